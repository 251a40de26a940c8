"""Your taste in a hundred clicks: which of two images do you like better? A head on CLIP learns it.

python -m studies.taste --name mine --choices 100     # a page asks; stop and go on at any time
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

from models.flow import load_flow
from models.table import find_model
from rewards import load_clip
from support.arguments import Parser, add_model_arguments, fill_defaults, number
from support.draws import seeded
from support.errors import UserError, first_line, run_command
from support.pictures import grid, make_folder, save_picture
from support.prompts import split_prompts
from support.run import read_config, warn, write_whole
from zoo.human import Human, read_answers
from zoo.jsonl import append_line
from zoo.taste import Taste, clip_name, fit

KEYS = ("model", "steps", "guidance", "size", "prompts")  # the same for all choices of a taste
LEAST = 10  # choices that a head needs
AHEAD = 64  # pairs that are drawn ahead, for the next to be chosen among


def parse_args():
    """Return the arguments, some of them those of the taste or the run, and the Model."""
    parser = Parser(__doc__)
    add = parser.add_argument
    whole = number(int, 1, 10**5)
    add("--name", default="mine", help="of the taste, a folder in tastes (default mine)")
    add("--choices", type=whole, default=100, help="to have in the end (default 100)")
    add("--prompts", metavar="FILE", help="a prompt a line (default: emoji names)")
    add("--from", dest="source", metavar="RUN", help="learn from the answers in a run, ask nothing")
    add("--out", default="tastes", help="folder of the tastes (default tastes)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of the images (default 0)")
    add_model_arguments(parser)

    args = parser.parse_args()
    if not re.fullmatch(r"\w[\w.-]{0,99}", args.name, re.ASCII):
        raise UserError(f"--name {args.name[:100]}: at most 100 letters, digits, - . and _")
    args.folder = Path(args.out, args.name)

    known = (args.folder / "config.json").exists()
    if known:
        take_over(args, args.folder, KEYS)
    if args.source:
        take_over(args, args.source, ("model", "size") if known else KEYS)

    model = find_model(args.model or "tiny")
    fill_defaults(args, vars(model))
    return args, model


def take_over(args, folder, keys):
    """Set arguments to what a taste or a run was made with. UserError if others were given."""
    config = read_config(folder)
    for key in keys:
        given, saved = getattr(args, key), config[key]
        moved = Path(str(given)).name == Path(str(saved)).name  # a file or folder
        if given is None:
            setattr(args, key, saved)
        elif given != saved and not moved:
            raise UserError(f"{folder} was made with --{key} {saved}: choose another --name")


def import_answers(source, folder):
    """Add the answers of a run, with their pictures, to those of a taste."""
    answers = read_answers(source)
    if not answers:
        raise UserError(f"{source} has no choices: name a run of --reward human with some answers")

    known = read_answers(folder)
    for key, choice in answers.items():
        if key not in known:
            picture = Path("preferences", f"{key}.png")
            write_whole(folder / picture, Path(source, picture).read_bytes())
            append_line(folder / "preferences.jsonl", {"key": key, "choice": choice})


class Choices:
    """The choices in a folder, and the Taste that is fitted to them.

    No preference counts as half a choice for each image.

    clip: what embeds images
    width: of each of the images that lie side by side in a picture, in pixels
    """

    def __init__(self, folder, clip, width):
        self.folder = folder
        self.clip = clip
        self.images = []  # uint8 [K, 3, H, W] for each choice
        self.embeddings = []  # [K, D] for each choice
        self.rows = []  # for each pair of images: difference of embeddings, answer, fold
        self.clear = 0  # how many choices were no "no preference"
        self.taste = None

        for key, choice in read_answers(folder).items():
            try:
                picture = np.array(Image.open(folder / "preferences" / f"{key}.png").convert("RGB"))
                images = torch.from_numpy(picture).unflatten(1, (-1, width)).permute(1, 3, 0, 2)
                self.add(images, choice)
            except Exception as error:  # whatever damage does
                text = f"its picture {key}.png is damaged ({first_line(error)})"
                warn(f"a choice is left out: {text}")

    @torch.no_grad()
    def embed(self, images):
        """Return the embeddings [B, D], on the CPU, of uint8 images [B, 3, H, W]."""
        return self.clip.embed_images(images / 255).cpu()

    def add(self, images, choice):
        """Add that one of the uint8 images [K, 3, H, W] was chosen, or with None that none was."""
        others = [k for k in range(len(images)) if k != choice]
        if choice is None:
            pairs = itertools.combinations(others, 2)
        else:
            pairs = [(choice, other) for other in others]

        e = self.embed(images)
        y = 0.5 if choice is None else 1.0
        fold = len(self.images) % 10
        self.rows += [(e[i] - e[j], y, fold) for i, j in pairs]

        self.images.append(images)
        self.embeddings.append(e)
        self.clear += choice is not None

    def fit(self):
        """Fit the Taste and write it, if there are enough choices."""
        if self.clear < LEAST:
            return
        d = torch.stack([d for d, _, _ in self.rows])
        y = torch.tensor([y for _, y, _ in self.rows])
        fold = torch.tensor([fold for _, _, fold in self.rows])
        weight, covariance, unseen = fit(d, y, fold)
        mean = torch.cat(self.embeddings).mean(0)
        self.taste = Taste(weight.float(), covariance.float(), mean)

        # the share of choices it predicts; smoothed for its error, so that no error is 0
        self.right = (unseen[y == 1] > 0).double().mean().item()
        smooth = (self.right * self.clear + 1) / (self.clear + 2)
        self.error = math.sqrt(smooth * (1 - smooth) / self.clear)

        about = {"clip": clip_name(self.clip), "choices": self.clear, "right": self.right}
        tensors = {name: getattr(self.taste, name) for name in ("weight", "covariance", "mean")}
        write_whole(self.folder / "head.safetensors", save(tensors, {"taste": json.dumps(about)}))

    def logits(self, d):
        """Return mean and variance [n] of the logits of choices, by their differences d [n, D]."""
        variance = ((d @ self.taste.covariance) * d).sum(1).clamp(min=0)
        return d @ self.taste.weight, variance

    def still_to_learn(self, d):
        """Return how many more of the choices d [n, D], as a share, an exact w would predict."""
        mean, variance = self.logits(d)
        now = torch.sigmoid(mean.abs() / (1 + torch.pi / 8 * variance).sqrt())  # MacKay 1992

        quantiles = torch.special.ndtri((torch.arange(99) + 0.5) / 99)
        logits = mean[:, None] + variance.sqrt()[:, None] * quantiles
        known = torch.sigmoid(logits.abs()).mean(1)
        return (known - now).mean().item()

    def pick(self, d, generator):
        """Return which of the choices d [n, D] to ask for.

        Every fourth is the first, whatever it is; the others tell most about w. The information, in
        the logarithm of the volume of its posterior, is log(1 + p (1 - p) variance) / 2.
        """
        if self.taste is None or torch.rand(1, generator=generator) < 0.25:
            return 0
        mean, variance = self.logits(d)
        p = torch.sigmoid(mean)
        return int((p * (1 - p) * variance).argmax())

    def words(self, d=None):
        """Say in a sentence how well the taste predicts choices that it has not seen.

        The choices are mostly those it was least sure of: of others it predicts a few percent more.

        d: [n, D], differences of pairs that were not asked yet
        """
        if self.taste is None:
            return f"After {LEAST} choices a bar here shows how well they predict each other."

        right, error = round(100 * self.right), round(100 * self.error)
        more = 0 if d is None else round(100 * self.still_to_learn(d))
        if right - 2 * error < 50:
            hint = ": that may be guessing"
            if self.clear >= 100:
                hint += ", or not what CLIP sees"
        elif d is None:
            hint = ""
        elif more > 1:
            hint = f"; more may add up to {more} %"
        else:
            hint = "; more would hardly help: you can stop"
        return f"What it has learned predicts {right} ± {error} % of other choices{hint}."

    def draw_extremes(self):
        """Draw the twelve images that the taste likes best, and the twelve that it likes least."""
        R = (torch.cat(self.embeddings) - self.taste.mean) @ self.taste.weight
        order = R.argsort(descending=True).tolist()
        shown = list(dict.fromkeys(order[:12] + order[-12:]))

        images = torch.cat(self.images)[shown] / 255
        captions = [f"{R[i]:+.1f}" for i in shown]
        save_picture(grid(images, captions, 6), self.folder / "best-and-worst.png")


def ask(args, flow, prompts, choices):
    """Ask on the page until there are enough choices; another thread draws pairs ahead."""
    human = Human()
    human.serve(args.folder, branches=2, groups=args.choices)
    start = len(human.answers)
    pairs = max(1, args.batch // 2)

    def draw(batch):
        """Return [(uint8 images [2, 3, H, W], prompt)], others in every session."""
        draws = seeded(args.seed, f"taste {start} {batch}")
        cond = torch.randint(len(prompts), (pairs,), generator=draws).repeat_interleave(2)
        seeds = torch.randint(2**31, (2 * pairs,), generator=draws).tolist()
        images = (255 * flow.images(cond, seeds, args.batch)).round().byte()
        return list(zip(images.split(2), (prompts[c] for c in cond[::2].tolist())))

    batches = itertools.count()
    pool = []  # what can be asked: images, prompt, difference of embeddings
    drawing = None
    with ThreadPoolExecutor(1) as drawer:
        while len(choices.images) < args.choices:
            # have the pool filled, and wait for that only if it is empty
            if drawing is None and len(pool) < AHEAD:
                drawing = drawer.submit(draw, next(batches))
            if drawing is not None and (drawing.done() or not pool):
                for images, prompt in drawing.result():
                    first, second = choices.embed(images)
                    pool.append((images, prompt, first - second))
                drawing = None
                continue

            # choose a pair, and say beside it how far the taste is known
            number = len(choices.images)
            d = torch.stack([d for _, _, d in pool])
            images, prompt, _ = pool.pop(choices.pick(d, seeded(args.seed, f"next {number}")))
            count = f"choice {number + 1} of {args.choices}"
            human.more = {"what": "study", "count": count, "note": choices.words(d)}
            if choices.taste:
                human.more |= {"right": 100 * choices.right, "error": 100 * choices.error}

            # ask and learn
            R = human(images / 255, [prompt] * 2)
            choices.add(images, None if R[0] == R[1] else R.argmax().item())
            choices.fit()


def main():
    args, model = parse_args()
    # before the model is loaded, so that a folder that cannot be written is noticed
    make_folder(args.folder / "preferences")

    model_folder = Path(model.path).parent
    tiny = model_folder if (model_folder / "tiny-clip").is_dir() else None
    clip = load_clip(tiny, args.device)
    prompts, _ = split_prompts(args.prompts)
    flow = None if args.source else load_flow(model, args, prompts)

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
            print(f"see {args.folder / 'best-and-worst.png'}")
            print(f"to train: python train.py --reward {reward}")


if __name__ == "__main__":
    run_command(main)
