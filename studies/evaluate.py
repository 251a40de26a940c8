"""Measure a LoRA against its base model: one table of rewards, on prompts of your choice.

python -m studies.evaluate --lora runs/NAME                             # its held-out prompts
python -m studies.evaluate --lora runs/NAME --rewards "pickscore,hps,clip,aesthetic" \\
    --prompts hpdv2.txt --images 1 --guidance 1,4.5 --size 512,1024
torchrun --standalone --nproc-per-node 8 -m studies.evaluate ...        # many GPUs

Both models draw from the same noise. A table has the means over all images, their difference, and
the share of images for which the LoRA scores higher; ± is the standard error over prompts. What the
LoRA was trained on stands first. Tables, one for each guidance and size, are written to the run's
folder as evaluation.md and evaluation.json, beside those of earlier evaluations. After an
interruption the same command goes on.
"""

import gc
import hashlib
import json
from argparse import Namespace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from models.flow import load_flow
from models.lora_files import find_file, load_lora, switch_lora
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
from support.draws import seeded
from support.errors import UserError, run_command
from support.evaluation import (
    asks_a_person,
    diversity,
    mean_and_error,
    open_terms,
    plus_minus,
)
from support.pictures import make_folder
from support.processes import processes, start_processes
from support.prompts import read_prompts, split_prompts
from support.run import read_config, run_of, write_whole
from zoo.jsonl import append_line, read_lines


def comma_separated(kind):
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
    add("--rewards", default="aesthetic,clip", help="besides what the run was trained on")
    add("--prompts", metavar="FILE", help="all of them count (default: those the run held out)")
    add("--images", type=number(int, 1), default=4, help="of each prompt, from each model")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of the noise")
    add("--out", help="folder of the tables (default: that of the run)")
    add("--max-requests", type=number(int, 1), help="most requests to judges")

    # several of both
    add_model_arguments(parser)
    guidance, sizes = comma_separated(number(float, 0, 100)), comma_separated(size)
    add("--guidance", dest="guidances", type=guidance, help="one or more, as 1,4.5")
    add("--size", dest="sizes", type=sizes, help="one or more, as 512,768x512")
    args = parser.parse_args()
    args.guidance = args.size = None

    if not args.lora:
        parser.error("give a --lora, the folder of a run or a file")
    if not find_file(args.lora).exists():
        parser.error(f"no LoRA at {find_file(args.lora)}")
    args.out = Path(args.out or run_of(args.lora) or "evaluation")
    return args, find_model_of(args, find_model)


# ---- what is measured


class Evaluation:
    """Stands in for a Run, for terms that keep something in its folder.

    That is where the lines of an interrupted evaluation are, too.
    """

    def __init__(self, args):
        self.args = args
        self.folder = args.out / "evaluation"
        make_folder(self.folder)


def load_rewards(args, run, tiny):
    """Return the Rewards: that of the run, if it can be measured, and the others."""
    rewards = []
    if run.get("reward"):
        reward = Reward(run["reward"], tiny, args.device)
        rewards = [] if asks_a_person(reward) else [reward]

    known = {name for reward in rewards for name in (reward.expression, *reward.terms)}
    for text in split_expressions(args.rewards):
        if text.strip() not in known:
            rewards.append(Reward(text, tiny, args.device))
    if any(asks_a_person(reward) for reward in rewards):
        raise UserError("--rewards: a person can be asked in training only")
    return rewards


@torch.no_grad()
def score(images, prompts, batch, rewards, embed):
    """Score images [B, 3, H, W], at most `batch` at a time; return {name: [B, ...]}."""
    parts = []
    for i in range(0, len(images), batch):
        some = images[i : i + batch]
        part = {"embedding": embed(some)}
        for reward in rewards:
            values = reward.measure(some, prompts[i : i + batch])
            part |= values | {reward.expression: reward.combine(values)}
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure(flow, cond, args, rewards, embed):
    """Measure both models on some prompts cond [P]; return the record of each prompt."""
    n, noise = args.images, seeded(args.seed, "held-out").initial_seed()
    seeds = [noise + n * i + k for i in cond for k in range(n)]
    prompts = [flow.prompts[i] for i in cond for _ in range(n)]
    records = [{"prompt": i, "size": args.size} for i in cond]

    for model, on in (("base", False), ("lora", True)):
        switch_lora(flow.network, on)
        images = flow.images(torch.tensor(cond).repeat_interleave(n), seeds, args.batch)
        if images.isnan().any():
            raise UserError(f"{model}: images are not finite numbers: try --dtype bfloat16")

        scores = score(images.to(flow.device), prompts, args.batch, rewards, embed)
        scores = {name: R.unflatten(0, (-1, n)) for name, R in scores.items()}  # [P, n, ...]
        embeddings = scores.pop("embedding")
        if n > 1:
            scores["diversity"] = diversity(embeddings)[:, None]
        for row, record in enumerate(records):
            record[model] = {name: R[row].tolist() for name, R in scores.items()}
    return records


def measure_setting(args, folder, model, prompts, rewards, embed):
    """Measure both models on all prompts, each process on its share; return all records.

    folder: where each process adds its records to a file
    The first process of several returns all of them, the others an empty list.
    """
    # a key by which an interrupted evaluation finds its own records
    weights = hashlib.sha256(find_file(args.lora).read_bytes()).hexdigest()
    texts = [[prompt, *getattr(prompt, "questions", ())] for prompt in prompts]
    names = [reward.expression for reward in rewards]
    setting = [weights, args.model, args.dtype, args.steps, args.guidance, args.size]
    setting += [args.negative, args.seed, args.images, names, texts]
    key = [hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]]
    if dist.is_initialized():
        dist.broadcast_object_list(key)

    rank, world = processes()
    done = read_records(folder, key[0])
    mine = range(rank, len(prompts), world)
    remaining = [i for i in mine if i not in done]
    if remaining:
        gc.collect()  # the model of the setting before
        flow = load_flow(model, args, prompts, list(mine))
        load_lora(flow, args.lora)

    at_once = max(1, args.batch // args.images)
    quiet = rank > 0 or not remaining
    for i in tqdm(range(0, len(remaining), at_once), "evaluating", disable=quiet):
        for record in measure(flow, remaining[i : i + at_once], args, rewards, embed):
            append_line(folder / f"records-{rank}.jsonl", {"key": key[0], **record})

    if dist.is_initialized():
        dist.barrier()
    if rank > 0:
        return []
    done = read_records(folder, key[0])
    return [done[i] for i in range(len(prompts))]


def read_records(folder, key):
    """Return what all processes have measured in a setting, {number of the prompt: record}."""
    records = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in read_lines(path):
            if line.get("key") == key:
                records[line["prompt"]] = line
    return records


# ---- tables


def statistics(records):
    """Return {name of a reward: means and errors over prompts}, from the records of prompts."""
    rows = {}
    for name in records[0]["base"]:
        base = torch.tensor([record["base"][name] for record in records])  # [P, n]
        lora = torch.tensor([record["lora"][name] for record in records])
        difference = lora - base
        wins = 50 + 50 * difference.sign()  # half for a draw
        wins = wins.where(~difference.isnan(), torch.nan)

        rows[name] = {}
        prompts = torch.arange(len(base)).repeat_interleave(base.shape[1])
        columns = {"base": base, "lora": lora, "difference": difference, "wins": wins}
        for column, R in columns.items():
            mean, error = mean_and_error(R.flatten(), prompts)
            rows[name] |= {column: mean, f"{column}_se": error}
    return rows


def table(result):
    """Write a result as a caption and a table, the trained rewards first."""
    caption = "`{lora}`: {prompts} prompts of {file}, {images} images each, seed {seed}; "
    caption += "{model}, {steps} steps, guidance {guidance}, size {size}, {dtype}"
    lines = [caption.format(**result), ""]
    lines += ["| | base | with LoRA | difference | LoRA is higher, % |", "|---|---|---|---|---|"]

    rows, trained = result["rewards"], result["trained"]
    for name in [*trained, *(name for name in rows if name not in trained)]:
        row, digits = rows[name], 3 if name == "diversity" else 2

        cells = [f"`{name}`" + (", trained" if name in trained else "")]
        cells.append(plus_minus(row["base"], row["base_se"], "", digits))
        cells.append(plus_minus(row["lora"], row["lora_se"], "", digits))
        cells.append(plus_minus(row["difference"], row["difference_se"], "+", digits))
        cells.append(plus_minus(row["wins"], row["wins_se"], "", 0))

        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def add_result(folder, result):
    """Add a result to evaluation.json and .md, in place of one of the same setting."""
    path = folder / "evaluation.json"
    results = json.loads(path.read_text()) if path.exists() else []
    measured = ("rewards", "trained")
    setting = {name: value for name, value in result.items() if name not in measured}
    results = [old for old in results if not setting.items() <= old.items()]

    results.append(result)
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())
    text = "\n\n".join(table(result) for result in results) + "\n"
    write_whole(folder / "evaluation.md", text.encode())


def main():
    args, model = parse_args()
    start_processes(args)
    run = read_config(run_of(args.lora)) if run_of(args.lora) else {}
    prompts = split_prompts(run.get("prompts"))[1]
    if args.prompts:
        prompts = read_prompts(args.prompts)

    # the rewards, as train.py has them
    folder = Path(model.path).parent
    tiny = folder if (folder / "tiny-clip").is_dir() else None
    rewards = load_rewards(args, run, tiny)
    evaluation = Evaluation(args)
    open_terms(rewards, evaluation, prompts)
    embed = load_clip(tiny, args.device).embed_images
    trained = []
    if rewards and rewards[0].expression == run.get("reward"):
        trained = list(dict.fromkeys([rewards[0].expression, *rewards[0].terms]))

    # one table for each setting
    for guidance, side in product(args.guidances or [args.guidance], args.sizes or [args.size]):
        setting = Namespace(**vars(args) | {"guidance": guidance, "size": side})
        records = measure_setting(setting, evaluation.folder, model, prompts, rewards, embed)
        if records:
            names = ("lora", "images", "seed", "model", "steps", "guidance", "dtype", "negative")
            result = {name: getattr(setting, name) for name in names}
            file = args.prompts or run.get("prompts") or "the bundled file"
            result |= {"prompts": len(prompts), "file": file, "size": records[0]["size"]}
            result |= {"trained": trained, "rewards": statistics(records)}
            add_result(args.out, result)
            print(table(result), end="\n\n")

    # all is done, so nothing needs to go on from the records
    if processes()[0] == 0:
        for path in evaluation.folder.glob("records-*.jsonl"):
            path.unlink()
        if not any(evaluation.folder.iterdir()):  # else it has the answers of judges
            evaluation.folder.rmdir()
        print(f"see {args.out / 'evaluation.md'}")


if __name__ == "__main__":
    run_command(main)
