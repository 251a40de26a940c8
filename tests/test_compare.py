"""The comparison: what it runs, chooses and says, for runs that are written by hand.

pytest -q tests/test_compare.py
"""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import train
from models.table import find_model
from studies import compare
from support.arguments import parse_training_args
from support.errors import UserError
from tests.commands import exit_code


def records(slope, reward):
    """The metrics of a run that gains `slope` at each of four points."""
    for i in range(5):
        change = {"aesthetic": -0.5, "clip": -0.5, "clip_h": -0.7, "diversity": -0.01}
        change[reward] = slope
        if reward == "aesthetic" and i < 3:  # harm begins after the second point
            change["clip"] = 0.1
        change = {name: i * value for name, value in change.items()}
        spent = {"images": 100 * i, "evaluations": 700 * i, "seconds": 3 * (i > 0)}
        yield {"iteration": i, "gain": slope * i, "change": change} | spent


@pytest.fixture
def commands(monkeypatch):
    """The commands of the runs that are made, of which some gain more than others."""
    made = []

    def run_train(command, env, **options):
        assert env["OMP_NUM_THREADS"] == "1" and command[:2] == [sys.executable, "train.py"]
        made.append(command[1:])
        flags = dict(zip(command, command[1:]))
        folder = compare.Path(flags["--out"], flags["--name"])
        folder.mkdir(parents=True, exist_ok=True)

        # a seed counts except in tuning
        slope = 2 if flags["--estimator"] == "fast" else 1
        slope *= float(flags.get("--lr", 1)) * float(flags.get("--noise-level", 1))
        slope += 0.1 * (int(flags["--seed"]) % 100)
        if flags["--reward"] == "aesthetic" and flags.get("--lr") == "2.0":
            slope = -10  # too large a learning rate
        lines = [json.dumps(record) for record in records(slope, flags["--reward"])]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        (folder / "report.png").touch()
        return SimpleNamespace(returncode=int(flags.get("--lr") == "9"), stderr="a\ntrain.py: why")

    monkeypatch.setattr(compare.subprocess, "run", run_train)
    return made


@pytest.fixture
def study(commands, tmp_path, monkeypatch):
    """A function that runs a study of two methods, whose gains are known, and returns its table."""
    ours = {"ours": "--estimator fast"}
    settings = {
        "METHODS": ours | {"theirs": "--estimator flow_grpo"},
        "BY_STEPS": ours,
        "STEPS": {3: 2, 20: 8},
        "RATES": {"methods": (1.0, 2.0), "steps": (0.5, 1.0, 2.0)},
        "NOISE_LEVELS": (0.5, 1.0),
    }
    for name, value in settings.items():
        monkeypatch.setattr(compare, name, value)

    def run(name="methods"):
        monkeypatch.setattr(sys, "argv", f"compare.py {name} --seeds 2 --out {tmp_path}".split())
        compare.main()
        return (tmp_path / f"{name}.md").read_text().splitlines()

    return run


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    kept = []
    monkeypatch.setattr(compare.plt.Figure, "savefig", lambda self, *a, **b: kept.append(self))
    return kept


def test_the_table_says_what_the_runs_say(study, commands, tmp_path):
    lines = study()
    assert lines[0] == "| --lr | 1.0 | 2.0 |"
    assert lines[2:5] == [
        "| ours | +4.00 | +0.00 |",
        "| theirs --noise-level 0.5 | +1.00 | +0.00 |",
        "| theirs --noise-level 1.0 | +2.00 | +0.00 |",
    ]
    # 6 trials with a seed of their own, and two rewards and seeds of the two that are chosen
    texts = [f"{' '.join(command)} " for command in commands]
    trials = [text for text in texts if "--seed 100 " in text]
    chosen = [text for text in texts if text not in trials]
    assert len(trials) == 6 and len(set(chosen)) == 8
    assert all("--lr 1.0" in text and "--noise-level 0.5" not in text for text in chosen)
    assert all("--seed 0 " in text or "--seed 1 " in text for text in chosen)

    # ours gains 2 and 2.1 a point; clip falls after the second
    heads = "gain without harm | gain at the end | clip | clip_h | diversity | evaluations to +1"
    assert f"| aesthetic | {heads} | clip then |" in lines
    spread = 0.4 / np.sqrt(2)  # of 8 and 8.4, the seeds less one
    gains = f"+4.10 ± {spread / 2:.2f} | +8.20 ± {spread:.2f} | -2.00 ± 0.00"
    gains += " | -2.80 ± 0.00 | -0.040"
    costs = f"350 ({700 / 2.1:.0f} to 350) | +0.1 (+0.0 to +0.1)"
    assert f"| ours | {gains} | {costs} |" in lines
    assert sum(line.startswith("| theirs | +2.10 ") for line in lines) == 1
    assert (tmp_path / "methods.png").stat().st_size > 10_000


def test_finished_runs_are_not_repeated_and_an_interrupted_one_goes_on(study, commands, figures):
    study()
    first = list(commands)
    study()
    assert commands == first
    flags = dict(zip(first[0], first[0][1:]))
    compare.Path(flags["--out"], flags["--name"], "report.png").unlink()
    study()
    assert commands == [*first, [*first[0], "--resume"]]


def test_what_a_gain_costs_by_steps(study, commands, monkeypatch, tmp_path):
    lines = study("steps")
    # the last rate, too large, does not get there; at 1 it is twice as quick as at 0.5
    assert lines[2:4] == [f"| ours, {n} | -700.00 | -350.00 | -inf |" for n in (3, 20)]
    assert len(commands) == 3 * 2 + 2 * 2
    assert sum(line.startswith("| ours, 20 | +4.10") for line in lines) == 1
    assert (tmp_path / "steps.png").stat().st_size > 5_000


def test_the_picture_shows_gains_against_costs_and_harm(study, figures):
    study()
    axes = np.array(figures[0].axes).reshape(2, 5)
    harm = ["change in aesthetic, watched", "change in clip_h, watched"]
    costs = ["images", "evaluations of the network", "seconds, one core"]
    assert [axis.get_xlabel() for axis in axes[1]] == costs + harm
    ours, theirs = axes[0, 3].get_lines()
    np.testing.assert_allclose(ours.get_xdata(), [0, 0.1, 0.2, -1.5, -2])
    np.testing.assert_allclose(ours.get_ydata(), 2.05 * np.arange(5))
    np.testing.assert_allclose(axes[0, 2].get_lines()[1].get_xdata(), [0, 3, 6, 9, 12])


def test_the_cost_is_that_of_the_first_time(monkeypatch):
    c = {"gain": np.array([[0, 1, 1, 0.5, 2]]), "evaluations": np.array([[0, 10, 20, 30, 40]])}
    costs = {-1: 0, 0: 0, 0.5: 5, 1: 10, 1.5: 35, 2: 40, 2.5: np.nan}
    for goal, cost in costs.items():
        monkeypatch.setattr(compare, "GOAL", goal)
        np.testing.assert_equal(compare.costs_at_goal(c), [cost])


def test_a_gain_that_costs_too_much_clip_is_not_cheap():
    # the gain is +1 half-way, and by then clip has fallen by half as much
    for clip, gain, cheapness in ((-3.9, 2, -10), (-4.1, 2, -np.inf), (1, 2, -10), (1, 0, -np.inf)):
        c = {"gain": [[0, gain]], "evaluations": [[0, 20]], "clip": [[0, clip]]}
        assert compare.cheapness({name: np.array(v) for name, v in c.items()}) == [cheapness]


def test_never_is_later_than_all():
    for costs, text in (
        ([3.0, 2.0, 9.0], "3 (2 to 9)"),
        ([np.nan, 3.0, 2.0], "3 (2 to never)"),
        ([np.nan, 5.0, np.nan], "never (5 to never)"),
        ([np.nan], "never"),
    ):
        assert compare.median_and_range(costs, "{:.0f}") == text


def test_a_run_that_fails_says_why(study, monkeypatch):
    monkeypatch.setattr(compare, "RATES", {"methods": (9,)})
    with pytest.raises(UserError, match="train.py: why"):
        study()


def test_one_seed_has_no_spread(commands, tmp_path, monkeypatch):
    command = ["compare.py", "--seeds", 1, "--out", tmp_path]
    assert exit_code(compare.main, monkeypatch, *command) == 2 and commands == []


@pytest.mark.parametrize("name, runs", [("methods", 54 + 40), ("others", 20), ("steps", 64 + 32)])
def test_train_takes_the_flags_of_every_run(name, runs, commands, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"compare.py {name} --seeds 2 --out {tmp_path}".split())
    compare.main()
    assert len(commands) == runs
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        args, *_ = parse_training_args(None, train.find_estimator, find_model, train.SUITS)
        assert re.fullmatch(r"\w[\w.-]{0,99}", args.name)  # as train.py wants names
        # at least five points of every curve, the last at its end
        assert args.iterations % args.eval_every == 0 and args.iterations // args.eval_every >= 4
