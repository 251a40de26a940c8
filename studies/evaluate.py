"""Measure a LoRA against its base model: one table of rewards, on prompts of your choice.

python -m studies.evaluate --lora runs/NAME --rewards "pickscore,hps,clip,aesthetic" \\
    --prompts hpdv2.txt --images 4 --guidance 1,4.5 --size 512,1024
torchrun --standalone --nproc-per-node 8 -m studies.evaluate ...      # many GPUs

Both models draw from the same noise. The table has means over all images, differences, and the
share of images in which the LoRA's has the higher reward; ± is the standard error over prompts. The
reward that the run was trained on stands first. It is written to the folder of the run as
evaluation.md and evaluation.json, for each guidance and size. The same command goes on after an
interruption.
"""

import hashlib
import json
from argparse import Namespace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from models.flow import load_flow
from models.lora_files import find_file, load_lora
from models.table import find_model
from rewards import Reward, load_clip, split_expressions
from support.arguments import (
    Parser,
    add_lora_argument,
    add_model_arguments,
    find_model_of,
    number,
    size,
)
from support.errors import UserError, run_command
from support.evaluation import asks_a_person, diversity, mean_and_error, plus_minus
from support.pictures import make_folder
from support.processes import processes, start_processes
from support.prompts import TINY, read_prompts
from support.run import read_config, write_whole
from zoo.jsonl import append_line, read_lines

MODELS = ("base", "LoRA")


def listed(kind):
    """Make an argparse type: values of a kind, with commas."""

    def parse(text):
        return [kind(part) for part in text.split(",")]

    parse.__name__ = kind.__name__
    return parse


def parse_args():
    """Read the command line. Returns the arguments, with all defaults, and the Model."""
    parser = Parser(__doc__, conflict_handler="resolve")
    add = parser.add_argument
    add_lora_argument(parser)
    add("--rewards", default="aesthetic,clip", help="besides the one that the run was trained on")
    add("--prompts", metavar="FILE", help="as for train.py, but all are used (default: bundled)")
    add("--images", type=number(int, 2), default=4, help="of each prompt, from each model")
    add("--seed", type=number(int, 0), default=0, help="of the noise")
    add("--out", help="folder of the table (default: that of the run)")
    add("--max-requests", type=number(int, 1), help="to judges; more than that stop it")
    add_model_arguments(parser)
    add("--guidance", dest="guidances", type=listed(number(float, 0, 100)), help="as 1,4.5")
    add("--size", dest="sizes", type=listed(size), help="as 512,768x512")
    args = parser.parse_args()
    if not args.lora:
        parser.error("give a --lora, the folder of a run or a file")

    args.guidance = args.size = None
    model = find_model_of(args, find_model)
    args.out = Path(args.out or (args.lora if Path(args.lora).is_dir() else "evaluation"))
    return args, model


def key_of(args, prompts, names):
    """Return by what the measurements of a setting are known again."""
    file = find_file(args.lora)
    if not file.exists():
        raise UserError(f"no LoRA at {file}")

    weights = hashlib.sha256(file.read_bytes()).hexdigest()
    config = [args.model, args.dtype, args.steps, args.guidance, args.size, args.negative]
    config += [args.seed, args.images, prompts, names, weights]
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]


@torch.no_grad()
def measure(flow, cond, args, rewards, embed):
    """Draw and score the images of some prompts cond [P]; return the values of each prompt."""
    n, batch = args.images, args.batch
    seeds = [args.seed + n * i + k for i in cond for k in range(n)]
    images = flow.images(torch.tensor(cond).repeat_interleave(n), seeds, batch).to(flow.device)
    prompts = [flow.prompts[i] for i in cond for _ in range(n)]

    parts = []
    for i in range(0, len(images), batch):
        some = images[i : i + batch]
        part = {reward.expression: reward(some, prompts[i : i + batch]) for reward in rewards}
        parts.append(part | {"embedding": embed(some)})
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scores = {name: values.unflatten(0, (-1, n)) for name, values in scores.items()}  # [P, n, ...]
    scores["diversity"] = diversity(scores.pop("embedding"))[:, None]

    records = []
    for row, i in enumerate(cond):
        R = {name: values[row].tolist() for name, values in scores.items()}
        records.append({"prompt": i, "size": args.size, "R": R})
    return records


def measure_setting(args, model, prompts, rewards, embed):
    """Measure both models on this process's prompts, and add a line for each to a file."""
    rank, world = processes()
    path = args.out / f"evaluation-{rank}.jsonl"
    key = key_of(args, prompts, [reward.expression for reward in rewards])
    done = {(line["model"], line["prompt"]) for line in read_records(args.out, key)}
    mine = range(rank, len(prompts), world)
    left = {name: [i for i in mine if (name, i) not in done] for name in MODELS}
    if not any(left.values()):
        return key

    # the base model first, then the same with the LoRA
    flow = load_flow(model, args, prompts, list(mine))
    at_once = max(1, args.batch // args.images)
    for name in MODELS:
        if name == "LoRA":
            load_lora(flow, args.lora)
        for start in range(0, len(left[name]), at_once):
            for record in measure(flow, left[name][start : start + at_once], args, rewards, embed):
                append_line(path, {"key": key, "model": name, **record})
    return key


def read_records(folder, key):
    """Return what all processes have measured in a setting."""
    records = []
    for path in sorted(folder.glob("evaluation-*.jsonl")):
        records += [line for line in read_lines(path) if line.get("key") == key]
    return records


def summary(records):
    """Return {name of a reward: its statistics}, from the records of one setting."""
    records = sorted(records, key=lambda record: record["prompt"])
    base, lora = ([record["R"] for record in records if record["model"] == m] for m in MODELS)

    rows = {}
    for name in base[0]:
        before = torch.tensor([R[name] for R in base])  # [P, n]
        after = torch.tensor([R[name] for R in lora])
        difference = after - before
        wins = 50 + 50 * difference.sign()  # half for a draw
        wins = wins.where(~difference.isnan(), torch.nan)
        columns = {"base": before, "lora": after, "difference": difference, "wins": wins}

        rows[name] = {}
        prompts = torch.arange(len(before)).repeat_interleave(before.shape[1])
        for column, R in columns.items():
            mean, error = mean_and_error(R.flatten(), prompts)
            rows[name] |= {column: mean, f"{column}_se": error}
    return rows


def table(rows, trained):
    """Write the statistics as a table; trained: names of what the LoRA was trained on."""
    lines = ["| | base | with LoRA | difference | LoRA is higher |", "|---|---|---|---|---|"]
    for name in [*trained, *(name for name in rows if name not in trained)]:
        row, digits = rows[name], 3 if name == "diversity" else 2

        cells = [f"`{name}`" + (", trained" if name in trained else "")]
        cells.append(plus_minus(row["base"], row["base_se"], "", digits))
        cells.append(plus_minus(row["lora"], row["lora_se"], "", digits))
        cells.append(plus_minus(row["difference"], row["difference_se"], "+", digits))
        cells.append(plus_minus(row["wins"], row["wins_se"], "", 0) + " %")

        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(args, prompts, results):
    """Write evaluation.json and evaluation.md, and print the newest table."""
    about = {"lora": args.lora, "model": args.model, "prompts": prompts, "images": args.images}
    text = json.dumps({**about, "seed": args.seed, "settings": results}, indent=2) + "\n"
    write_whole(args.out / "evaluation.json", text.encode())

    drawn = f"{prompts} prompts, {args.images} images each, ± standard error over prompts"
    parts = [f"{args.lora}: {drawn}"]
    for result in results:
        parts.append("{steps} steps, guidance {guidance}, size {size}".format(**result))
        parts.append(table(result["rewards"], result["trained"]))
    write_whole(args.out / "evaluation.md", ("\n\n".join(parts) + "\n").encode())
    print("\n\n".join(parts[-2:]))


class Evaluation:
    """What a judge wants to know of the run that it answers for."""

    def __init__(self, args):
        self.args, self.folder = args, args.out


def load_rewards(args, tiny):
    """Return the Rewards, first that of the run, if it has one that can be measured."""
    rewards = [Reward(text, tiny, args.device) for text in split_expressions(args.rewards)]
    if any(asks_a_person(reward) for reward in rewards):
        raise UserError("--rewards: a person can be asked in training only")

    trained = []
    if Path(args.lora, "config.json").exists():
        reward = Reward(read_config(args.lora)["reward"], tiny, args.device)
        if not asks_a_person(reward):
            trained = [reward]
            terms = [name for name in reward.terms if name != reward.expression]
            trained += [Reward(name, tiny, args.device) for name in terms]
    known = [reward.expression for reward in trained]
    return trained, [reward for reward in rewards if reward.expression not in known]


def main():
    args, model = parse_args()
    start_processes(args)
    make_folder(args.out)
    prompts = read_prompts(args.prompts or TINY / "prompts_test.txt")

    # the rewards, as train.py has them
    folder = Path(model.path).parent
    tiny = folder if (folder / "tiny-clip").is_dir() else None
    trained, others = load_rewards(args, tiny)
    rewards, evaluation = trained + others, Evaluation(args)
    for reward in rewards:
        for term in reward.terms.values():
            if hasattr(term, "open"):
                term.open(evaluation)
    embed = load_clip(tiny, args.device).embed_images

    # each setting, and the tables of all so far
    results = []
    for guidance, side in product(args.guidances or [args.guidance], args.sizes or [args.size]):
        setting = Namespace(**vars(args) | {"guidance": guidance, "size": side})
        key = measure_setting(setting, model, prompts, rewards, embed)
        if dist.is_initialized():
            dist.barrier()
        if processes()[0] > 0:
            continue

        records = read_records(args.out, key)
        result = {"steps": args.steps, "guidance": guidance, "size": records[0]["size"]}
        result["trained"] = [reward.expression for reward in trained]
        results.append(result | {"rewards": summary(records)})
        write_results(args, len(prompts), results)
    if results:
        print(f"see {args.out / 'evaluation.md'}")


if __name__ == "__main__":
    run_command(main)
