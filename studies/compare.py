"""How fast each method learns, on the bundled model: held-out reward against images, evaluations and seconds.

python compare.py                # the methods, tuned alike; runs that are there already are not repeated
python compare.py others         # where gradients of the reward, SPSA and central differences stand
python compare.py sensitivity    # fdfo with other learning rates and churn
"""

import math
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
from runs import read_metrics

# about 18,000 network evaluations each: 3,584 images of fdfo, 2,048 of most others
SHORT, LONG = "--iterations 32 --eval-every 8", "--iterations 56 --eval-every 8"
GRPO = f"--estimator flow-grpo --train-steps 2 {SHORT}"
PUBLISHED = f"--estimator fdfo {SHORT} --pairs 32 --branches 2 --train-branches 2 --train-steps 3 --kl 0"
METHODS = {  # name: flags, and the learning rates that are tried
    "fdfo": (f"--estimator fdfo {LONG}", 0.0005, 0.001, 0.002),
    "fdfo as published": (PUBLISHED, 0.0005, 0.001),
    "flow-grpo": (GRPO, 0.001, 0.002),
    "flow-grpo, same noise": (f"{GRPO} --shared-noise", 0.001, 0.002),
}
OTHERS = {
    "fdfo": (f"--estimator fdfo {LONG}", 0.001),
    "reward gradient": (f"--estimator reward-gradient --train-steps 2 {SHORT}", 0.0002),
    "backprop": (f"--estimator backprop --pairs 64 {SHORT}", 0.0002),
    "spsa": ("--estimator spsa --iterations 8 --eval-every 2", 0.003),
    "central": ("--estimator central --iterations 16 --eval-every 4", 0.02),
}
STUDIES = {"methods": (METHODS, list(METHODS)[1:]), "others": (OTHERS, ["fdfo"])}
SENSITIVITY = {
    "lr": {x: f"--estimator fdfo {SHORT} --lr {x}" for x in (0.00025, 0.0005, 0.001, 0.002, 0.004)},
    "churn": {x: f"--estimator fdfo {SHORT} --lr 0.001 --churn {x}" for x in (0.002, 0.01, 0.05, 0.3, 2.0)},
}
WEIGHT = {"aesthetic": 1, "clip": 0.2}  # the rewards that are trained, weighted as in the README
OTHER = {"aesthetic": "clip", "clip": "aesthetic"}  # what is watched when one is trained


def folder(args, flags, reward, seed):
    """The folder of a run."""
    return Path(args.out, re.sub(r"[^\w.]+", "-", f"{reward} {flags} seed {seed}".replace("--", "")))


def make(args, runs):
    """Make those of the runs [(flags, reward, seed)] that are not there, each on one core."""

    def one(task):
        path, (flags, reward, seed) = folder(args, *task), task
        if (path / "report.png").exists():
            return
        command = f"train.py {flags} --reward {reward} --seed {seed} --out {args.out} --name {path.name}"
        command += " --resume" * path.exists()
        print(f"python {command}", flush=True)
        command, one_core = [sys.executable, *command.split()], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=one_core, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{path}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, dict.fromkeys(runs)))


def curves(args, flags, reward, seeds):
    """What the runs of some seeds measured: {name: [seeds, evaluations on held-out prompts]}."""
    found = []
    for seed in seeds:
        records = read_metrics(folder(args, flags, reward, seed), math.inf)
        seconds = np.cumsum([record.get("seconds", 0) for record in records])
        found.append([{**r, **r["change"], "seconds": s} for r, s in zip(records, seconds) if "change" in r])
    names = ["images", "evaluations", "seconds", "gain", *found[0][0]["change"]]
    return {name: np.array([[record[name] for record in records] for records in found]) for name in names}


def tune(args, methods):
    """Sweep the learning rates of methods with seed 0; returns {method: its best flags} and a table.

    Best is the largest sum of what is gained on each reward when it is trained, times its WEIGHT.
    """
    trials = [f"{flags} --lr {rate}" for flags, *rates in methods.values() for rate in rates]
    make(args, [(trial, reward, 0) for reward in WEIGHT for trial in trials])
    best, lines = {}, ["| method | lr | aesthetic: gain | clip | clip: gain | aesthetic |", "|---" * 6 + "|"]
    for name, (flags, *rates) in methods.items():
        runs = {rate: {r: curves(args, f"{flags} --lr {rate}", r, [0]) for r in WEIGHT} for rate in rates}
        score = {rate: sum(w * c[r][r][0, -1] for r, w in WEIGHT.items()) for rate, c in runs.items()}
        best[name] = f"{flags} --lr {max(score, key=score.get)}"
        for rate, c in runs.items():
            mark = "**" * best[name].endswith(f" {rate}")
            cells = [f"{c[r][n][0, -1]:+.2f}" for r in WEIGHT for n in (r, OTHER[r])]
            lines.append(f"| {name} | {mark}{rate}{mark} | {' | '.join(cells)} |")
    return best, lines


def reach(c, goal):
    """What runs have spent and changed, {name: number}, when their mean gain is first `goal`; or None."""
    gain, points = np.maximum.accumulate(c["gain"].mean(0)), np.arange(c["gain"].shape[1])
    at = np.interp(goal, gain, points)
    return {name: np.interp(at, points, v.mean(0)) for name, v in c.items()} if gain[-1] >= goal else None


def table(measured, reward, goals):
    """A table of {method: its runs}: where they end, and what they need to get where the `goals` do."""
    other = OTHER[reward]
    cells = {"images": ",.0f", "evaluations": ",.0f", "seconds": ",.0f", other: "+.2f", "diversity": "+.3f"}
    lines = [f"| {reward} | gain | {other} |", "|---|---|---|"]
    for goal in goals:
        lines[0] += f" to the end of {goal}: {' | '.join(cells)} |"
        lines[1] += "---|" * len(cells)
    for name, c in measured.items():
        end = c["gain"][:, -1]
        lines.append(f"| {name} | {end.mean():+.2f} ± {end.std():.2f} | {c[other][:, -1].mean():+.2f} |")
        for goal in goals:
            at = reach(c, measured[goal]["gain"].mean(0)[-1])
            row = [f"{at[k]:{form}}" for k, form in cells.items()] if at else ["never", *[""] * 4]
            lines[-1] += f" {' | '.join(row)} |"
    return lines


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=(*STUDIES, "sensitivity"), default="methods")
    parser.add_argument("--out", default="runs/compare", help="folder of the runs (default runs/compare)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    args = parser.parse_args()
    picture = Path(args.out, f"{args.study}.png")
    if args.study == "sensitivity":
        make(args, [(flags, "aesthetic", 0) for trials in SENSITIVITY.values() for flags in trials.values()])
        return draw_sensitivity(picture, SENSITIVITY, lambda flags: curves(args, flags, "aesthetic", [0]))
    (methods, goals), seeds = STUDIES[args.study], range(args.seeds)
    best, lines = tune(args, methods)
    make(args, [(flags, reward, seed) for reward in WEIGHT for seed in seeds for flags in best.values()])
    measured = {r: {name: curves(args, flags, r, seeds) for name, flags in best.items()} for r in WEIGHT}
    for reward in WEIGHT:
        lines += ["", *table(measured[reward], reward, goals)]
    draw_costs(picture, measured, OTHER)
    picture.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(*lines, f"see {picture}", sep="\n")


if __name__ == "__main__":
    run(main)
