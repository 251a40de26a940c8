"""How fast each method learns, on the bundled model: gain against images, evaluations, seconds.

python -m studies.compare           # the methods, tuned alike
python -m studies.compare others    # gradients of the reward, SPSA and central differences
python -m studies.compare steps     # what a gain costs each method with few and many steps

Runs that are finished are not repeated, and one that was interrupted goes on.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from support.arguments import Parser, number
from support.errors import UserError, run_command
from support.pictures import check_writable, make_folder
from support.run import read_metrics

# ---- what is compared

BASELINE = "--estimator studies/baselines.py:"
FDFO = "--estimator fdfo --train-steps 1"
GRPO = f"{BASELINE}flow_grpo --groups 8 --train-steps 2"
CPS = f"{GRPO} --dynamics cps"
AWM = f"{BASELINE}awm --groups 8"
GRADIENT = f"{BASELINE}reward_gradient --groups 64"


def length(iterations):
    """Return flags for so many iterations, with an evaluation after each quarter of them."""
    return f"--iterations {iterations} --eval-every {iterations // 4}"


METHODS = {  # each for about 18,000 evaluations of the network, with the best of RATES
    "fdfo": f"{FDFO} --kl 1 {length(56)}",
    "fdfo, no pull": f"{FDFO} --kl 0 {length(64)}",
    "fdfo, stored steps": f"{BASELINE}fdfo_published --churn 0.05 --updates 1 {length(24)}",
    "flow-grpo": f"{GRPO} {length(32)}",
    "flow-grpo, same noise": f"{GRPO} --shared-noise {length(32)}",
    "flow-grpo, kl and updates": f"{GRPO} --kl 0.04 --updates 2 {length(24)}",
    "flow-grpo, cps": f"{CPS} {length(32)}",
    "awm": f"{AWM} {length(48)}",
    "awm, huber and pulls": f"{AWM} --generalized-huber --kl 0.003 --average-kl 1 {length(36)}",
    "v-grpo": f"{BASELINE}v_grpo --groups 8 {length(20)}",
}
OTHERS = {  # as many evaluations; two need the gradient of the reward, two work for any reward
    "fdfo": f"{FDFO} --kl 1 {length(56)} --lr 0.001",
    "reward gradient": f"{GRADIENT} --train-steps 2 {length(32)} --lr 0.0002",
    "backprop": f"{BASELINE}backprop --groups 64 {length(32)} --lr 0.0002",
    "spsa": f"--estimator spsa {length(24)} --lr 0.003",
    "central": f"--estimator central {length(48)}",
}
STEPS = {3: 2, 6: 2, 10: 5, 20: 8}  # numbers of sampling steps, and iterations between evaluations
BY_STEPS = {"fdfo, no pull": f"{FDFO} --kl 0", "flow-grpo": GRPO, "flow-grpo, cps": CPS, "awm": AWM}
RATES = {"methods": (0.0005, 0.001, 0.002), "steps": (0.001, 0.002)}  # at 0.004 some collapse
NOISE_LEVELS = (0.3, 0.5, 0.7)  # tried with each rate where steps are noisy
TUNED_ON = ("aesthetic", 100)  # a reward, and a seed that is not among those reported
OTHER = {"aesthetic": "clip", "clip": "aesthetic"}  # what is watched when one is trained
# clip_h is watched in all: the opinion of a CLIP that nothing was trained on
GOAL = 1.0  # a gain that most reach

# ---- runs


def folder(out, flags, reward, seed):
    """Return the folder of a run, named after those of its flags that differ."""
    words = re.sub(
        r"--estimator |studies/baselines.py:|--(eval-every|rollout-steps) \d+", "", flags
    )
    return Path(out, f"{reward}-seed-{seed}", re.sub(r"[^\w.]+", "-", words))


def run_missing(out, runs):
    """Make those of the runs [(flags, reward, seed)] that are not finished, each on one core."""

    def run_one(run):
        flags, reward, seed = run
        path = folder(out, *run)
        if (path / "report.png").exists():
            return

        command = ["train.py", *flags.split(), "--reward", reward, "--seed", str(seed)]
        command += ["--out", str(path.parent), "--name", path.name]
        if path.exists():
            command.append("--resume")
        print("python", *command, flush=True)

        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *command]
        done = subprocess.run(command, env=one_core, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{path}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_one, dict.fromkeys(runs)))


def curves(out, flags, reward, seeds):
    """Read what the runs of some seeds measured on the way: {name: [seeds, points]}."""
    found = {}
    for seed in seeds:
        records = read_metrics(folder(out, flags, reward, seed))
        seconds = np.cumsum([record.get("seconds", 0) for record in records])
        points = []
        for record, so_far in zip(records, seconds):
            if "change" in record:
                points.append(record | record["change"] | {"seconds": so_far})

        for name in ("images", "evaluations", "seconds", "gain", *points[0]["change"]):
            found.setdefault(name, []).append([point[name] for point in points])
    return {name: np.array(rows) for name, rows in found.items()}


def tune(out, methods, rates, score):
    """Try all rates, and noise levels, with {method: flags}, on a seed that is not reported.

    Returns {method: the flags with the largest score}, and the lines of a table.
    """
    trials = {}
    for method, flags in methods.items():
        levels = [""]
        if "flow_grpo" in flags:
            levels = [f" --noise-level {level}" for level in NOISE_LEVELS]
        for level in levels:
            trials[method, level] = [f"{flags}{level} --lr {rate}" for rate in rates]
    run_missing(out, [(flags, *TUNED_ON) for flags in chain(*trials.values())])

    reward, seed = TUNED_ON
    best = {}
    lines = [row("--lr", *rates), "|---" * (1 + len(rates)) + "|"]
    for (method, level), tried in trials.items():
        scores = [score(curves(out, flags, reward, [seed]))[0] for flags in tried]
        lines.append(row(method + level, *(f"{value:+,.2f}" for value in scores)))
        for flags, value in zip(tried, scores):
            if method not in best or value > best[method][0]:
                best[method] = (value, flags)
    return {method: flags for method, (_, flags) in best.items()}, lines


# ---- what they gained, and what that cost


def gain_without_harm(c, reward="aesthetic"):
    """Return the largest gain of each run while the other reward was not below its start."""
    return np.where(c[OTHER[reward]] < 0, 0, c["gain"]).max(1)


def costs_at_goal(c, cost="evaluations"):
    """Return what each run had spent when its gain was first GOAL: [seeds], NaN if it never was.

    cost: evaluations, images, or the change of a reward
    """
    spent = []
    for gain, costs in zip(np.maximum.accumulate(c["gain"], axis=1), c[cost]):
        points = np.argmax(gain >= GOAL) + 1  # up to the first that is there
        reached = gain[-1] >= GOAL
        spent.append(np.interp(GOAL, gain[:points], costs[:points]) if reached else np.nan)
    return np.array(spent)


def cheapness(c):
    """Return minus the evaluations to GOAL of each run; minus infinity if clip has fallen by 2."""
    return np.where(costs_at_goal(c, "clip") >= -2, -costs_at_goal(c), -np.inf)


def median_and_range(costs, form):
    """Return the median of some costs, and the least and largest, as "5 (3 to never)"."""
    costs = np.sort(costs)  # NaN, which is never, to the end
    chosen = [costs[i] for i in (0, len(costs) // 2, -1)]
    first, median, last = ("never" if np.isnan(cost) else form.format(cost) for cost in chosen)
    return median if first == last else f"{median} ({first} to {last})"


def row(*cells):
    """Return a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(measured, reward):
    """Return the lines of a table of {method: its curves}."""
    other = OTHER[reward]
    heads = ("gain without harm", "gain at the end", other, "clip_h", "diversity")
    lines = [row(reward, *heads, f"evaluations to +{GOAL:g}", f"{other} then"), "|---" * 8 + "|"]

    for method, c in measured.items():
        cells = [method]
        ends = (c[name][:, -1] for name in ("gain", other, "clip_h"))
        for gain in (gain_without_harm(c, reward), *ends):
            cells.append(f"{gain.mean():+.2f} ± {gain.std(ddof=1):.2f}")
        cells.append(f"{c['diversity'][:, -1].mean():+.3f}")
        cells.append(median_and_range(costs_at_goal(c), "{:,.0f}"))
        cells.append(median_and_range(costs_at_goal(c, other), "{:+.1f}"))
        lines.append(row(*cells))
    return lines


def draw_gains(path, measured):
    """Draw {reward: {method: its curves}}: the mean gain against costs, and against harm."""
    costs = {"images": "", "evaluations": " of the network", "seconds": ", one core"}
    figure, axes = plt.subplots(2, 5, figsize=(22, 9), sharey="row", layout="constrained")

    for axes_of_reward, (reward, methods) in zip(axes, measured.items()):
        axes_of_reward[0].set_ylabel(f"gain in held-out {reward}")
        for axis, name in zip(axes_of_reward, [*costs, OTHER[reward], "clip_h"]):
            axis.set(xlabel=f"change in {name}, watched", title="frontier: right and up is better")
            if name in costs:
                axis.set(xlabel=name + costs[name], title="cost")

            for method, c in methods.items():
                x = c[name].mean(0)
                gain = c["gain"].mean(0)
                (line,) = axis.plot(x, gain, ".-", label=method)
                if name in costs:  # a change may turn back, and no band can be drawn along it
                    band = c["gain"].std(0, ddof=1)
                    color = line.get_color()
                    axis.fill_between(x, gain - band, gain + band, color=color, alpha=0.15, lw=0)

    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=70)


def draw_steps(path, measured):
    """Draw the costs of GOAL by the number of steps: a line of medians, and a point a seed."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, cost in zip(axes, ("images", "evaluations", "clip")):
        axis.set(xscale="log", yscale="linear" if cost == "clip" else "log")
        axis.set(xlabel="sampling steps", xticks=list(STEPS), xticklabels=STEPS)
        axis.set(ylabel=f"{cost} at +{GOAL:g}")
        axis.minorticks_off()

        for method in BY_STEPS:
            spent = [costs_at_goal(measured["aesthetic"][f"{method}, {n}"], cost) for n in STEPS]
            spent = np.sort(spent)  # [steps, seeds], NaN to the end
            (line,) = axis.plot(list(STEPS), spent[:, spent.shape[1] // 2], label=method)
            axis.plot(list(STEPS), spent, "o", color=line.get_color(), ms=4)

    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=80)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("study", nargs="?", choices=["methods", "others", "steps"], default="methods")
    add("--out", default="runs/compare", help="folder of the runs (default %(default)s)")
    add("--seeds", type=number(int, 2, 100), default=3, help="runs of each (default %(default)s)")
    args = parser.parse_args()

    picture = Path(args.out, f"{args.study}.png")
    make_folder(args.out)
    check_writable(picture)

    # what is run, tuned on another seed
    rewards = list(OTHER)
    if args.study == "methods":
        best, lines = tune(args.out, METHODS, RATES["methods"], score=gain_without_harm)
    elif args.study == "others":
        best, lines = OTHERS, []
    else:
        rewards = ["aesthetic"]
        methods = {}
        for n, every in STEPS.items():
            flags = f"--steps {n} --rollout-steps {n} --iterations 40 --eval-every {every}"
            methods |= {f"{method}, {n}": f"{BY_STEPS[method]} {flags}" for method in BY_STEPS}
        best, lines = tune(args.out, methods, RATES["steps"], score=cheapness)
    run_missing(args.out, product(best.values(), rewards, range(args.seeds)))

    # what it gained
    measured = {}
    for reward in rewards:
        measured[reward] = {}
        for method, flags in best.items():
            measured[reward][method] = curves(args.out, flags, reward, range(args.seeds))
        lines += ["", *table(measured[reward], reward)]

    draw = draw_steps if args.study == "steps" else draw_gains
    draw(picture, measured)
    picture.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(*lines, f"see {picture}", sep="\n")


if __name__ == "__main__":
    run_command(main)
