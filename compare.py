"""How fast each method learns, on the bundled model: held-out reward against images, evaluations and seconds.

python compare.py                # the methods, tuned alike
python compare.py sensitivity    # fdfo with other learning rates and churn

Every run is one of train.py, on one thread. Runs that are there already are not repeated, and one that was
interrupted goes on, so that tables and figures can be made again at any time.
"""

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from errors import UserError, run
from pictures import draw_costs, draw_sensitivity

# every run makes 2,048 images, 64 an iteration where nothing else is said
SHORT = "--iterations 32 --eval-every 8"
FDFO = f"--estimator fdfo {SHORT}"
GRPO = f"--estimator flow-grpo {SHORT}"
PUBLISHED = f"{FDFO} --pairs 32 --branches 2 --train-branches 2 --train-steps 3 --kl 0"
# name: flags, the learning rates that are tried, and what else is tried
METHODS = {
    "fdfo": (FDFO, (0.0005, 0.001, 0.002), "--lr 0.001 --kl 0"),
    "fdfo as published": (PUBLISHED, (0.0005, 0.001, 0.002), ""),
    "flow-grpo": (GRPO, (0.0005, 0.001, 0.002), "--lr 0.001 --train-steps 3"),
    "flow-grpo, same noise": (f"{GRPO} --shared-noise", (0.001, 0.002, 0.003), "--lr 0.001 --train-steps 3"),
    "reward gradient": (f"--estimator reward-gradient {SHORT}", (0.0001, 0.0002, 0.0005), ""),
    "backprop": (f"--estimator backprop --pairs 64 {SHORT}", (0.0001, 0.0002, 0.0005), ""),
    "spsa": ("--estimator spsa --iterations 8 --eval-every 2", (0.003, 0.01, 0.03), ""),
    "central": ("--estimator central --iterations 16 --eval-every 4", (0.01, 0.02, 0.05), ""),
}
SENSITIVITY = {
    "learning rate": {rate: f"{FDFO} --lr {rate}" for rate in (0.0001, 0.0003, 0.001, 0.003, 0.01)},
    "churn": {churn: f"{FDFO} --lr 0.001 --churn {churn}" for churn in (0.002, 0.01, 0.05, 0.3, 2.0)},
}
GOALS = ("flow-grpo", "flow-grpo, same noise")
LOSS = 1.5  # points of clip, three standard errors of such a change
OTHER = {"aesthetic": "clip", "clip": "aesthetic"}  # what is watched when one is trained


def folder(args, flags, reward, seed):
    """The folder of a run."""
    return Path(args.out, re.sub(r"[^\w.]+", "-", f"{reward} {flags} seed {seed}".replace("--", "")))


def make(args, runs):
    """Make those of the runs [(flags, reward, seed)] that are not there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def one(task):
        path, (flags, reward, seed) = folder(args, *task), task
        if (path / "report.png").exists():
            return
        command = f"train.py {flags} --reward {reward} --seed {seed} --out {args.out} --name {path.name}"
        command += " --resume" * path.exists()
        print(f"python {command}", flush=True)
        command = [sys.executable, *command.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{path}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, runs))


def curves(args, flags, reward, seeds):
    """What the runs of some seeds measured: {name: [seeds, evaluations on held-out prompts]}."""
    found = []
    for seed in seeds:
        lines = (folder(args, flags, reward, seed) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        seconds = np.cumsum([record.get("seconds", 0) for record in records])
        found.append([{**r, **r["change"], "seconds": s} for r, s in zip(records, seconds) if "change" in r])
    names = ["images", "evaluations", "seconds", "gain", *found[0][0]["change"]]
    return {name: np.array([[record[name] for record in records] for records in found]) for name in names}


def tune(args):
    """Sweep every method on `aesthetic` with seed 0; returns {method: its best flags} and a table.

    Best is the largest gain of the trials that lost less than LOSS of clip, or else the smallest loss.
    """
    trials = {}
    for name, (flags, rates, other) in METHODS.items():
        trials[name] = [f"{flags} --lr {rate}" for rate in rates] + [f"{flags} {other}"] * bool(other)
    make(args, [(trial, "aesthetic", 0) for trial in sum(trials.values(), [])])
    best, lines = {}, ["| method | trial | aesthetic | clip |", "|---|---|---|---|"]
    for name in METHODS:
        ends = {}
        for trial in trials[name]:
            c = curves(args, trial, "aesthetic", [0])
            ends[trial] = min(c["clip"][0, -1] + LOSS, 0), c["gain"][0, -1], c["clip"][0, -1]
        best[name] = max(ends, key=ends.get)
        for trial, (_, gain, clip) in ends.items():
            chosen = "**" * (trial == best[name])
            flags = trial.removeprefix(METHODS[name][0])
            lines.append(f"| {name} | {chosen}{flags.strip()}{chosen} | {gain:+.2f} | {clip:+.2f} |")
    return best, lines


def reach(c, goal):
    """What runs have spent and changed, {name: number}, when their mean gain is first `goal`; or None."""
    gain = c["gain"].mean(0)
    if gain.max() < goal:
        return None
    i = max(1, np.argmax(gain >= goal))
    share = (goal - gain[i - 1]) / (gain[i] - gain[i - 1])
    return {name: (1 - share) * v.mean(0)[i - 1] + share * v.mean(0)[i] for name, v in c.items()}


def table(measured, reward):
    """A table of {method: its runs}: where they end, and what they need to get where GOALS do."""
    other, costs = OTHER[reward], ("images", "evaluations", "seconds")
    lines = [f"| {reward} | gain | {other} |", "|---|---|---|"]
    for goal in GOALS:
        lines[0] += f" to the end of {goal}: images | evaluations | seconds | {other} | diversity |"
        lines[1] += "---|" * 5
    for name, c in measured.items():
        end = c["gain"][:, -1]
        cells = [name, f"{end.mean():+.2f} ± {end.std():.2f}", f"{c[other][:, -1].mean():+.2f}"]
        for goal in GOALS:
            at = reach(c, measured[goal]["gain"].mean(0)[-1])
            cells += [f"{at[k]:,.0f}" for k in costs] if at else ["never", "", ""]
            cells += [f"{at[other]:+.2f}", f"{at['diversity']:+.3f}"] if at else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", nargs="?", choices=("methods", "sensitivity"), default="methods")
    add("--out", default="runs/compare", help="folder of the runs (default runs/compare)")
    add("--jobs", type=int, default=2, help="runs at a time (default 2)")
    add("--seeds", type=int, default=3, help="runs of each method, the sweep's among them (default 3)")
    args = parser.parse_args()
    picture = Path(args.out, f"{args.study}.png")
    if args.study == "sensitivity":
        make(args, [(flags, "aesthetic", 0) for trials in SENSITIVITY.values() for flags in trials.values()])
        draw_sensitivity(picture, {
            knob: {value: curves(args, flags, "aesthetic", [0]) for value, flags in trials.items()}
            for knob, trials in SENSITIVITY.items()
        })  # fmt: skip
        return
    best, lines = tune(args)
    seeds = range(args.seeds)
    make(args, [(flags, reward, seed) for reward in OTHER for seed in seeds for flags in best.values()])
    measured = {r: {name: curves(args, flags, r, seeds) for name, flags in best.items()} for r in OTHER}
    for reward in OTHER:
        lines += ["", *table(measured[reward], reward)]
    draw_costs(picture, measured, OTHER)
    picture.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(*lines, f"see {picture}", sep="\n")


if __name__ == "__main__":
    run(main)
