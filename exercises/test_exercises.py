"""Check the exercises: solutions pass, skeletons fail, and a typical mistake gets its message.

pytest -q -n 0 exercises/test_exercises.py
"""

import subprocess
import sys
from unittest.mock import patch

import pytest

import fdflow
import test_fdflow
from exercises.conftest import EXERCISES, SOLUTIONS, functions_in, load

NAMES = [path.name for path in sorted(EXERCISES.glob("[0-9][0-9]_*.py"))]
MUTANTS = load(EXERCISES / "07_mutants.py").MUTANTS
HARMLESS = load(EXERCISES / "07_mutants.py").HARMLESS

# exercise, what stands in its solution, what a student wrote, words of the message
MISTAKES = [
    ("01", "s / (1 + churn * (1 - s))", "s / (1 + churn)", "not s"),
    ("01", " / (1 + churn * r)\n", "\n", "scale x_r down"),
    ("01", "math.sqrt((1 + churn) ** 2 - 1)", "churn", "add their variances"),
    ("01", "+ r * math", "- r * math", "sign of xi"),
    ("02", "J(-h)) / (2 * h)", "J(-h)) / h", "spans 2h"),
    ("02", "1 / 9", "1 / 3", "does not cancel"),
    ("02", "unit ** (1 / 3)", "unit ** (1 / 2)", "rounding dominates"),
    ("03", "R(-h, eps)", "R(-h, draw())", "see different noises"),
    ("03", "R(h, eps) - R(-h, eps)", "R(-h, eps) - R(h, eps)", "wrong sign"),
    ("03", "2 * R_0.var()", "R_0.var()", "2 Var(R)"),
    ("04", "/ (2 * h)", "/ h", "is 2 times what it should be"),
    ("04", "slope * d /", "slope /", "the slope times d"),
    ("04", "(J(theta + h * d) - J(theta - h * d))", "(J(theta - h * d) - J(theta + h * d))",
     "wrong sign"),
    ("04", " / len(signs)", "", "mean over the directions"),
    ("05", "x.view(-1, len(A), 1, x.shape[-1])", "x.view(len(A), -1, x.shape[-1])",
     "block of rows"),
    ("05", "scale * ", "", "Is the scale there"),
    ("05", "eps.repeat_interleave(members, 0)", "eps.repeat(members, 1)", "not eps.repeat"),
    ("05", "R.view(-1, 2, len(directions))", "R.view(-1, len(directions), 2).mT", "order"),
    ("06", "dx = x_1 - x_2", "dx = x_2 - x_1", "wrong sign"),
    ("06", "* dx / (dx**2).mean()", "* dx / (dx**2).sum()", "not their sum"),
    ("06", "(R_1 - R_2)", "abs(R_1 - R_2)", "no absolute values"),
    ("06", ".mean(0) / (dx**2).mean()", ".sum(0) / (dx**2).mean()", "is 2 times"),
    ("06", ".mean(0) / (dx**2).mean()", ".mean(0) / (x**2).mean()", "also in the divisor"),
    ("06", "(R_1 - R_2) * dx / (dx**2).mean().clamp(min=1e-12)",
     "(R_1 - R_2) * dx / (dx**2).mean()", "divided by zero"),
    ("07", "not torch.allclose(g, mean_product / mean_square)", "g @ mean_product < 0",
     "three times as long"),
    ("07", "G, K, D = 3, 4, 5", "G, K, D = 1, 4, 5", "rewards of the next group"),
    ("07", 'not in ("wrong sign", "rewards of the next group")', '== "three times as long"',
     "a rough one"),
    ("08", "v_ref - g)", "v_ref + g)", "the target is v_ref - g"),
    ("08", "g / dR\n", "g\n", "so that dR cancels"),
    ("08", "abs(dR)", "dR", "|dR|, not dR"),
    ("08", "1 + clip if dR > 0 else 1 - clip\n", "1.0\n", "derivative of the loss"),
    ("09", "(1 - u)", "u", "From t_0 down"),
    ("09", "times[:-1] if t >= point", "times[1:] if t >= point - times[2]", "is called at"),
    ("09", "(len(times) - 1) * ", "", "over the chance of the draw"),
    ("09", "(j + u) / n", "(j / n + u) % 1", "shift by u / n"),
    ("10", "gains = (after - before).mean(1)", "gains = (after - before).flatten()", "together"),
    ("10", ' + load_clip(TINY, "cpu")(images, prompts)', "", "gets hacked"),
]  # fmt: skip


def checks(name, answers=None):
    """Return the checks of an exercise, with the functions of a file of answers filled in."""
    module = load(EXERCISES / name)
    vars(module).update(functions_in(load(answers)) if answers else {})
    return [check for name, check in functions_in(module).items() if name.startswith("test_")]


def test_all_ten_are_there():
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(1, 11)]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    for check in checks(name, SOLUTIONS / name):
        check()


@pytest.mark.parametrize("name", NAMES)
def test_the_skeleton_fails(name):
    for check in checks(name):
        with pytest.raises((NotImplementedError, AssertionError), match="^$|NotImplementedError"):
            check()


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_holds_what_is_to_be_filled_in(name):
    module, solution = load(EXERCISES / name), functions_in(load(SOLUTIONS / name))
    blank = set()
    for function in functions_in(module).values():
        if "NotImplementedError" in function.__code__.co_names:
            blank.add(function.__name__)
    assert blank == solution.keys()


@pytest.mark.parametrize("number, right, wrong, words", MISTAKES)
def test_a_mistake_gets_its_message(number, right, wrong, words, tmp_path):
    (name,) = (name for name in NAMES if name.startswith(number))
    source = (SOLUTIONS / name).read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / name).write_text(source.replace(right, wrong), encoding="utf-8")

    messages = []
    for check in checks(name, tmp_path / name):
        try:
            check()
        except AssertionError as error:
            messages.append(str(error))
            if words in messages[-1]:
                return
    pytest.fail(f"{words!r} is in none of {messages}")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_tests_of_fdflow_notice_every_mutant(name):
    with patch.object(fdflow, "image_gradient", MUTANTS[name]):
        with pytest.raises(AssertionError):
            test_fdflow.test_fdfo_is_the_pull_that_it_says(branches=4, train_steps=1)


@pytest.mark.parametrize("name", HARMLESS)
def test_the_tests_of_fdflow_accept_other_code_with_the_same_result(name):
    with patch.object(fdflow, "image_gradient", HARMLESS[name]):
        test_fdflow.test_fdfo_is_the_pull_that_it_says(branches=4, train_steps=1)


@pytest.mark.parametrize(
    "answers, result", [([], "5 failed"), (["--answers", str(SOLUTIONS)], "5 passed")]
)
def test_the_command(answers, result):
    command = [sys.executable, "-m", "pytest", "-q", EXERCISES / "06_branches.py", *answers]
    done = subprocess.run(command, cwd=EXERCISES.parent, capture_output=True, text=True)
    assert result in done.stdout and done.returncode == (0 if "passed" in result else 1)
