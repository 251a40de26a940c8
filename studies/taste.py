"""Your taste in a hundred clicks: which of two images do you like better? A head on CLIP learns it.

python -m studies.taste --name mine --choices 100     # a page asks; stopped at any moment, it goes on later
python -m studies.taste --name mine --from runs/NAME  # from the answers in a run of --reward human
python train.py --reward taste:mine                   # train towards it
"""

import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from models.flows import load_flow
from models.table import add_model_arguments, check_device, fill_defaults
from rewards import load_clip
from support.commands import Parser, number
from support.draws import seeded
from support.errors import UserError, first_line, run_command
from support.pictures import grid, save_picture
from support.prompts import split_prompts
from support.run import read_config, warn, write_whole
from zoo.human import Human, append_line
from zoo.taste import Taste, clip_name, fit

KEYS = ("model", "steps", "guidance", "size", "prompts")  # the same for all choices of a taste
LEAST = 10  # choices that a head needs
AHEAD = 64  # pairs that are drawn ahead, for the next to be chosen among


def parse_args():
    """The arguments with all defaults filled in, from the taste or the run where there is one; the Model."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--name", default="mine", help="of the taste, a folder in tastes (default mine)")
    add(
        "--choices",
        type=number(int, 1, 10**5),
        default=100,
        help="to have in the end (default 100)",
    )
    add("--prompts", metavar="FILE", help="a prompt a line (default: emoji names)")
    add(
        "--from",
        dest="source",
        metavar="RUN",
        help="learn from what was answered in this run, ask nothing",
    )
    add("--out", default="tastes", help="folder of the tastes (default tastes)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of the images (default 0)")
    add_model_arguments(parser)
    args = parser.parse_args()
    if not re.fullmatch(r"\w[\w.-]{0,99}", args.name, re.ASCII):
        raise UserError(f"--name {args.name[:100]}: at most 100 letters, digits, - . and _")
    args.folder = Path(args.out, args.name)
    known = [(args.folder, KEYS)] if (args.folder / "config.json").exists() else []
    known += [(args.source, ("model", "size") if known else KEYS)] if args.source else []
    for folder, keys in known:
        saved = parser.parse_args(read_config(folder, keys))
        for key in keys:
            had = getattr(saved, key)
            if getattr(args, key) not in (None, had):
                raise UserError(f"{folder} was made with --{key} {had}: choose another --name")
            setattr(args, key, had)
    return args, fill_defaults(args)


def answers(folder):
    """The choices in the folder of a taste or a run: {key of their picture: number of an image, or None}."""
    human = Human(branches=99, groups=1)
    human.folder = Path(folder)
    return dict(human.read_answers())


def import_answers(source, folder):
    """Add the choices of a run with their pictures to those of a taste."""
    new, had = answers(source), answers(folder)
    if not new:
        raise UserError(
            f"{source} has no choices: name a run of --reward human in which some were made"
        )
    (folder / "preferences").mkdir(exist_ok=True)
    for key in [key for key in new if key not in had]:
        picture = Path("preferences", f"{key}.png")
        write_whole(folder / picture, Path(source, picture).read_bytes())
        append_line(folder / "preferences.jsonl", json.dumps({"key": key, "choice": new[key]}))


class Choices:
    """The choices of a folder, and the Taste that fits them; space, no preference, is half a choice for each.

    clip: what embeds images; width: of one of the images that lie side by side in a picture, in pixels.
    """

    def __init__(self, folder, clip, width):
        self.folder, self.clip, self.width = folder, clip, width
        self.images, self.embeddings, self.rows, self.clear, self.taste = [], [], [], 0, None
        for key, choice in answers(folder).items():
            try:
                picture = np.array(Image.open(folder / "preferences" / f"{key}.png").convert("RGB"))
                images = torch.from_numpy(picture).unflatten(1, (-1, width)).permute(1, 3, 0, 2)
                self.add(images, choice)
            except Exception as error:  # whatever damage does
                warn(
                    f"a choice is left out: its picture {key}.png is damaged ({first_line(error)})"
                )

    @torch.no_grad()
    def embed(self, images):
        """[B, D], on the CPU, of uint8 images [B, 3, H, W]."""
        return self.clip.embed_images(images / 255).cpu()

    def add(self, images, choice):
        """Note that one of the uint8 images [K, 3, H, W] was chosen, or with None that none was."""
        others = [k for k in range(len(images)) if k != choice]
        pairs = (
            itertools.combinations(others, 2) if choice is None else [(choice, k) for k in others]
        )
        e, fold, y = self.embed(images), len(self.images) % 10, 0.5 if choice is None else 1.0
        self.rows += [(e[i] - e[j], y, fold) for i, j in pairs]
        self.images, self.embeddings = [*self.images, images], [*self.embeddings, e]
        self.clear += choice is not None

    def fit(self):
        """Fit the Taste and write it, if there are enough choices."""
        if self.clear < LEAST:
            return
        d, y, fold = (
            torch.stack([torch.as_tensor(v) for v in column]) for column in zip(*self.rows)
        )
        weight, covariance, unseen = fit(d, y, fold)
        self.taste = Taste(weight.float(), covariance.float(), torch.cat(self.embeddings).mean(0))
        self.right = (unseen[y == 1] > 0).double().mean().item()
        smooth = (self.right * self.clear + 1) / (self.clear + 2)  # so that no error is 0
        self.error = math.sqrt(smooth * (1 - smooth) / self.clear)
        about = {"clip": clip_name(self.clip), "choices": self.clear, "right": self.right}
        tensors = {key: getattr(self.taste, key) for key in ("weight", "covariance", "mean")}
        write_whole(self.folder / "head.safetensors", save(tensors, {"taste": json.dumps(about)}))

    def logits(self, d):
        """Mean and variance [n] of the logits of choices, by the difference of their embeddings d [n, D]."""
        return d @ self.taste.weight, ((d @ self.taste.covariance) * d).sum(1).clamp(min=0)

    def still_to_learn(self, d):
        """How many more of the choices d [n, D] it would predict, as a share, if it were known exactly."""
        mean, variance = self.logits(d)
        now = torch.sigmoid(mean.abs() / (1 + torch.pi / 8 * variance).sqrt())  # MacKay 1992
        quantiles = torch.special.ndtri((torch.arange(99) + 0.5) / 99)
        known = torch.sigmoid((mean[:, None] + variance.sqrt()[:, None] * quantiles).abs()).mean(1)
        return (known - now).mean().item()

    def pick(self, d, generator):
        """Which of the choices d [n, D] to ask for: every fourth is any, the others tell most about the head.

        The information, in the logarithm of its posterior's volume, is log(1 + p (1 - p) variance) / 2.
        """
        if self.taste is None or torch.rand(1, generator=generator) < 0.25:
            return 0
        mean, variance = self.logits(d)
        p = torch.sigmoid(mean)
        return int((p * (1 - p) * variance).argmax())

    def words(self, d=None):
        """How well the head predicts choices it has not seen, in a sentence; d [n, D]: pairs not yet asked.

        The choices are mostly those it was least sure of: of any others it predicts a few percent more.
        """
        if self.taste is None:
            return f"After {LEAST} choices a bar here shows how well they predict each other."
        right, error = round(100 * self.right), round(100 * self.error)
        hint, more = "", 0 if d is None else round(100 * self.still_to_learn(d))
        if right - 2 * error < 50:
            hint = f": that may be guessing{', or not what CLIP sees' if self.clear >= 100 else ''}"
        elif d is not None:
            hint = (
                f"; more may add up to {more} %"
                if more > 1
                else "; more would hardly help: you can stop"
            )
        return f"What it has learned predicts {right} ± {error} % of other choices{hint}."

    def draw_extremes(self):
        """Draw the twelve images that the taste likes best, and the twelve that it likes least."""
        R = (torch.cat(self.embeddings) - self.taste.mean) @ self.taste.weight
        order = R.argsort(descending=True).tolist()
        rows = list(dict.fromkeys(order[:12] + order[-12:]))
        picture = grid(torch.cat(self.images)[rows] / 255, [f"{R[i]:+.1f}" for i in rows], 6)
        save_picture(picture, self.folder / "best-and-worst.png")


def ask(args, flow, prompts, choices):
    """Ask on the page until there are enough choices; meanwhile another thread draws pairs ahead."""
    human, pairs = Human(branches=2, groups=args.choices), max(1, args.batch // 2)
    print(f"compare the images at {human.open(args.folder)}", flush=True)
    start, batches, pool, drawing = len(human.answers), itertools.count(), [], None

    def draw(batch):
        """[(uint8 images [2, 3, H, W], prompt)], others in every session."""
        draws = seeded(args.seed, f"taste {start} {batch}")
        cond = torch.randint(len(prompts), (pairs,), generator=draws).repeat_interleave(2)
        seeds = torch.randint(2**31, (2 * pairs,), generator=draws).tolist()
        images = (255 * flow.images(cond, seeds, args.batch)).round().byte()
        return list(zip(images.split(2), (prompts[c] for c in cond[::2].tolist())))

    with ThreadPoolExecutor(1) as drawer:
        while len(choices.images) < args.choices:
            if drawing is None and len(pool) < AHEAD:
                drawing = drawer.submit(draw, next(batches))
            if drawing is not None and (drawing.done() or not pool):
                for images, prompt in drawing.result():
                    first, second = choices.embed(images)
                    pool.append((images, prompt, first - second))
                drawing = None
                continue
            n, d = len(choices.images), torch.stack([d for *_, d in pool])
            images, prompt, _ = pool.pop(choices.pick(d, seeded(args.seed, f"next {n}")))
            count = f"choice {n + 1} of {args.choices}"
            human.more = {"what": "study", "count": count, "note": choices.words(d)}
            if choices.taste:
                human.more |= {"right": 100 * choices.right, "error": 100 * choices.error}
            R = human(images / 255, [prompt] * 2)
            choices.add(images, None if R[0] == R[1] else R.argmax().item())
            choices.fit()


def main():
    args, model = parse_args()
    check_device(args.device)
    beside = Path(model.path).parent
    clip = load_clip(beside if (beside / "tiny-clip").is_dir() else None, args.device)
    prompts = split_prompts(args.prompts)[0]
    flow = None if args.source else load_flow(model, args, prompts)
    args.folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps({key: getattr(args, key) for key in KEYS}, indent=2)
    write_whole(args.folder / "config.json", f"{config}\n".encode())
    if args.source:
        import_answers(args.source, args.folder)
    choices = Choices(args.folder, clip, int(args.size.split("x")[0]))
    choices.fit()
    try:
        if flow:
            ask(args, flow, prompts, choices)
    finally:  # after Ctrl-C as well
        print(f"{len(choices.images)} choices in {args.folder}. {choices.words()}")
        if choices.taste:
            choices.draw_extremes()
            reward = f"taste:{args.name if args.out == 'tastes' else args.folder}"
            print(
                f"see {args.folder / 'best-and-worst.png'}; to train: python train.py --reward {reward}"
            )


if __name__ == "__main__":
    run_command(main)
