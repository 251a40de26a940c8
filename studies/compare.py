"""How fast each method learns, on the bundled model: held-out gain against images, evaluations and seconds.

python -m studies.compare                # methods tuned alike; runs that are there already are not repeated
python -m studies.compare others         # where gradients of the reward, SPSA and central differences stand
python -m studies.compare steps          # what a gain costs each method, with few and many sampling steps
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from support.commands import Parser, number
from support.errors import UserError, run_command
from support.run import read_metrics

BASELINE, SHORT = "--estimator studies/baselines.py:", "--iterations 32 --eval-every 8"
FDFO, GRPO = "--estimator fdfo --train-steps 1", f"{BASELINE}flow_grpo --pairs 8 --train-steps 2"
AWM, AWM_LENGTH = f"{BASELINE}awm --pairs 8", "--iterations 36 --eval-every 9"
METHODS = {  # as OTHERS each for about 18,000 evaluations of the network, but with the best of RATES
    "fdfo": f"{FDFO} --kl 1 --iterations 56 --eval-every 14",
    "fdfo, no pull": f"{FDFO} --kl 0 --iterations 64 --eval-every 16",
    "fdfo, stored steps": f"{BASELINE}fdfo_published --churn 0.05 --updates 1 --iterations 24 --eval-every 6",
    "flow-grpo": f"{GRPO} {SHORT}",
    "flow-grpo, same noise": f"{GRPO} --shared-noise {SHORT}",
    "flow-grpo, kl and updates": f"{GRPO} --kl 0.04 --updates 2 --iterations 24 --eval-every 6",
    "awm": f"{AWM} --iterations 48 --eval-every 12",
    "awm, huber and pulls": f"{AWM} --generalized-huber --kl 0.003 --average-kl 1 {AWM_LENGTH}",
}
RATES = (0.0005, 0.001, 0.002)
OTHERS = {
    "fdfo": f"{FDFO} --kl 1 --iterations 56 --eval-every 14 --lr 0.001",
    "reward gradient": f"{BASELINE}reward_gradient --pairs 64 --train-steps 2 {SHORT} --lr 0.0002",
    "backprop": f"{BASELINE}backprop --pairs 64 {SHORT} --lr 0.0002",
    "spsa": "--estimator spsa --iterations 24 --eval-every 6 --lr 0.003",
    "central": "--estimator central --iterations 48 --eval-every 12",
}
STEPS = {  # the methods without a pull, by the number of steps, in training and in drawing
    steps: {
        method: f"{METHODS[method].split(' --iterations')[0]} --steps {steps} --rollout-steps {steps}"
        f" --iterations 40 --eval-every {every}"
        for method in ("fdfo, no pull", "flow-grpo", "flow-grpo, same noise", "awm")
    }
    for steps, every in {3: 2, 6: 2, 10: 5, 20: 8}.items()
}
OTHER = {"aesthetic": "clip", "clip": "aesthetic"}  # what is watched when one is trained
GOAL = 1.0  # a gain that most reach
STEP_RATES = RATES[1:]  # at 0.004 some collapse
TUNED_ON = "aesthetic", 100  # a reward, and a seed that is not among those reported


def folder(args, flags, reward, seed):
    """The folder of a run, after those of its flags that differ."""
    words = re.sub(r"--estimator |studies/baselines.py:|--eval-every \d+", "", f"{reward} {flags}")
    return Path(args.out, re.sub(r"[^\w.]+", "-", f"{words} seed {seed}"))


def run_missing(args, runs):
    """Make those of the runs [(flags, reward, seed)] that are not there, each on one core."""

    def run_one(task):
        path, (flags, reward, seed) = folder(args, *task), task
        if (path / "report.png").exists():
            return
        command = ["train.py", *flags.split(), "--reward", reward, "--seed", str(seed)]
        command += ["--out", args.out, "--name", path.name, *["--resume"] * path.exists()]
        print(" ".join(["python", *command]), flush=True)
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], env=one_core, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{path}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_one, dict.fromkeys(runs)))


def curves(args, flags, reward, seeds):
    """What the runs of some seeds measured on the way: {name: [seeds, points]}."""
    found = []
    for seed in seeds:
        records = read_metrics(folder(args, flags, reward, seed))
        seconds = np.cumsum([record.get("seconds", 0) for record in records])
        found.append(
            [{**r, **r["change"], "seconds": s} for r, s in zip(records, seconds) if "change" in r]
        )
    names = ["images", "evaluations", "seconds", "gain", *found[0][0]["change"]]
    return {
        name: np.array([[record[name] for record in records] for records in found])
        for name in names
    }


def tune(args, methods, rates, score):
    """Try all rates on {method: flags}. Returns {method: the flags with the largest score} and a table."""
    trials = {
        method: {rate: f"{flags} --lr {rate}" for rate in rates}
        for method, flags in methods.items()
    }
    run_missing(args, [(flags, *TUNED_ON) for swept in trials.values() for flags in swept.values()])
    best, lines = {}, [f"| --lr | {' | '.join(map(str, rates))} |", "|---" * (1 + len(rates)) + "|"]
    for method, swept in trials.items():
        scores = [score(curves(args, flags, TUNED_ON[0], TUNED_ON[1:])) for flags in swept.values()]
        best[method] = swept[rates[np.argmax(scores)]]
        lines.append(f"| {method} | {' | '.join(f'{score:+,.2f}' for score in scores)} |")
    return best, lines


def gain_without_harm(c, reward):
    """[seeds]: the largest gain that each run had while the other reward was no lower than at its start."""
    return np.where(c[OTHER[reward]] < 0, 0, c["gain"]).max(1)


def cost_to_reach(c, goal, cost="evaluations"):
    """The evaluations, or what `cost` names, when the mean gain over seeds is first `goal`; NaN if never."""
    gain, costs = np.maximum.accumulate(c["gain"].mean(0)), c[cost].mean(0)
    end = np.argmax(gain >= goal) + 1  # of the first point that is there
    return np.interp(goal, gain[:end], costs[:end]) if gain[-1] >= goal else np.nan


def table(measured, reward):
    """A table of {method: its runs}: how far it gets without harm, where it ends, how soon it is at GOAL."""
    heads = [reward, "gain without harm", "gain at the end", OTHER[reward], "diversity"]
    lines = [f"| {' | '.join(heads)} | evaluations to +{GOAL:g} |", "|---" * 6 + "|"]
    for method, c in measured.items():
        gain, other, diversity = (c[name][:, -1] for name in ("gain", OTHER[reward], "diversity"))
        spreads = (
            f"{x.mean():+.2f} ± {x.std(ddof=1):.2f}"
            for x in (gain_without_harm(c, reward), gain, other)
        )
        cost = cost_to_reach(c, GOAL)
        cells = [
            method,
            *spreads,
            f"{diversity.mean():+.3f}",
            "never" if np.isnan(cost) else f"{cost:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_costs(path, measured):
    """Draw mean gains, and bands of a standard deviation, against costs; and against harm, as a frontier."""
    costs = {
        "images": "images",
        "evaluations": "evaluations of the network",
        "seconds": "seconds, one core",
    }
    figure, axes = plt.subplots(
        len(measured), 5, figsize=(22, 9), sharey="row", layout="constrained"
    )
    for row, (reward, methods) in zip(axes, measured.items()):
        row[0].set_ylabel(f"gain in held-out {reward}")
        watched = {name: f"change in {name}, watched" for name in (OTHER[reward], "diversity")}
        for axis, (name, label) in zip(row, (costs | watched).items()):
            axis.set(
                xlabel=label, title="cost" if name in costs else "frontier: right and up is better"
            )
            for method, c in methods.items():
                x, gain, band = c[name].mean(0), c["gain"].mean(0), c["gain"].std(0, ddof=1)
                (line,) = axis.plot(x, gain, ".-", label=method)
                if name in costs:  # a change may turn back
                    axis.fill_between(
                        x, gain - band, gain + band, color=line.get_color(), alpha=0.15, lw=0
                    )
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=70)


def cheapness(c):
    """Minus the evaluations to GOAL; infinitely dear if it never comes, or clip has fallen by 2 by then."""
    return -cost_to_reach(c, GOAL) if cost_to_reach(c, GOAL, "clip") >= -2 else -np.inf


def middle_and_ends(values, form):
    """The median of values [seeds], of which NaN is never, and the first and last, as "5 (3 to never)"."""
    values = np.sort(values)  # NaN to the end
    chosen = values[[len(values) // 2, 0, -1]]
    middle, first, last = ("never" if np.isnan(x) else form.format(x) for x in chosen)
    return middle if first == last else f"{middle} ({first} to {last})"


def study_steps(args, path, seeds):
    """Draw what it costs to reach GOAL against the number of steps, by method. Returns a table of it.

    Each at the learning rate that was cheapest on another seed. Lines and table: the medians of the seeds,
    where one that never gets there counts as dearest. Points: each seed.
    """
    methods = {f"{method}, {n}": flags for n, row in STEPS.items() for method, flags in row.items()}
    best, lines = tune(args, methods, STEP_RATES, cheapness)
    run_missing(args, [(flags, "aesthetic", seed) for flags in best.values() for seed in seeds])
    costs = {
        "images": "images",
        "evaluations": "evaluations of the network",
        "clip": "change in clip",
    }
    lines += ["", f"| to +{GOAL:g}: method, steps | {' | '.join(costs)} |", "|---" * 4 + "|"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    rows = dict.fromkeys(best, "")
    for axis, (cost, label) in zip(axes, costs.items()):
        axis.set(xscale="log", xlabel="sampling steps", ylabel=f"{label} to +{GOAL:g}")
        axis.set(
            yscale="linear" if cost == "clip" else "log", xticks=list(STEPS), xticklabels=STEPS
        )
        axis.minorticks_off()
        for method in STEPS[min(STEPS)]:
            keys = [f"{method}, {n}" for n in STEPS]
            runs = [
                [curves(args, best[key], "aesthetic", [seed]) for seed in seeds] for key in keys
            ]
            spent = np.array([[cost_to_reach(c, GOAL, cost) for c in row] for row in runs])
            (line,) = axis.plot(list(STEPS), np.sort(spent)[:, len(seeds) // 2], label=method)
            axis.plot(list(STEPS), spent, "o", color=line.get_color(), ms=4)
            for key, values in zip(keys, spent):
                rows[key] += (
                    middle_and_ends(values, "{:+.1f}" if cost == "clip" else "{:,.0f}") + " | "
                )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=80)
    return lines + [f"| {key} | {row.strip()}" for key, row in rows.items()]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "study", nargs="?", choices=["methods", "others", "steps"], default="methods"
    )
    parser.add_argument(
        "--out", default="runs/compare", help="folder of the runs (default runs/compare)"
    )
    parser.add_argument(
        "--seeds", type=number(int, 2, 100), default=3, help="runs of each (default 3)"
    )
    args = parser.parse_args()
    picture, seeds = Path(args.out, f"{args.study}.png"), range(args.seeds)
    if args.study == "steps":
        lines = study_steps(args, picture, seeds)
    else:
        best, lines = OTHERS, []
        if args.study == "methods":
            best, lines = tune(args, METHODS, RATES, lambda c: gain_without_harm(c, TUNED_ON[0])[0])
        run_missing(
            args, [(flags, r, seed) for r in OTHER for seed in seeds for flags in best.values()]
        )
        measured = {
            r: {m: curves(args, flags, r, seeds) for m, flags in best.items()} for r in OTHER
        }
        for reward in OTHER:
            lines += ["", *table(measured[reward], reward)]
        draw_costs(picture, measured)
    picture.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(*lines, f"see {picture}", sep="\n")


if __name__ == "__main__":
    run_command(main)
