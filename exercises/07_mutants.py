"""Exercise 7: a wrong sign, and the tests that notice it.

Each of the MUTANTS below is fdflow's image_gradient (g of exercise 6) with one mistake. Write `notices`, a
test for such a function: it returns True if the function is wrong. It must notice every mutant, and accuse
neither the original nor the variant in HARMLESS, which is other code for the same result.

Then predict which mutants still raise the reward when FDFO trains a small flow for 20 iterations with Adam.
(FDFO divides g by the mean difference of the rewards; Adam divides a gradient by its usual size.)

Teaches: a test must be able to fail; a reward that rises does not show that the code is right.
Belongs to: image_gradient in fdflow.py, and test_fdflow.py. Check: pytest exercises/07_mutants.py
"""

from unittest.mock import patch

import torch

import fdflow
from fdflow import image_gradient
from test_fdflow import draw, small_problem


def notices(image_gradient):
    """True if this function is wrong; it takes R [G, K] and x [G, K, D] (float64), and returns g [G, D]."""
    raise NotImplementedError


def still_rises(mutant):
    """Your prediction: does training with this mutant, one of the keys of MUTANTS, raise the reward?"""
    raise NotImplementedError


def centred(x):
    return x - x.mean(1, keepdim=True)


def mean_square(x):
    return (x**2).mean((1, 2))[:, None]


MUTANTS = {
    "wrong sign": lambda R, x: -image_gradient(R, x),
    "three times as long": lambda R, x: 3 * image_gradient(R, x),
    "not divided": lambda R, x: image_gradient(R, x) * mean_square(centred(x)),
    "images not centred": lambda R, x: (centred(R)[:, :, None] * x).mean(1) / mean_square(x),
    "rewards of the next group": lambda R, x: image_gradient(R.roll(1, 0), x),
    "elements in reverse order": lambda R, x: image_gradient(R, x).flip(1),
}
HARMLESS = {
    "the original": image_gradient,
    "rewards not centred": lambda R, x: (
        (R[:, :, None] * centred(x)).mean(1) / mean_square(centred(x))
    ),
}


def gain(mutant):
    """What 20 iterations of FDFO gain in mean reward, with a mutant in place of image_gradient."""
    problem, (eps, cond) = small_problem(batch=1000), draw(512, seed=7)
    optimizer, generator = (
        torch.optim.Adam(problem.lora.parameters, 0.02),
        torch.Generator().manual_seed(0),
    )

    @torch.no_grad()
    def J():
        return (
            problem.reward(fdflow.sample(problem.velocity, eps, cond, problem.times), cond)
            .mean()
            .item()
        )

    before = J()
    with patch.object(fdflow, "image_gradient", mutant):
        for iteration in range(20):
            fdflow.fdfo(problem, *draw(64, seed=100 + iteration), generator, churn=0.1)
            optimizer.step()
            optimizer.zero_grad()
    return J() - before


def not_the_judge(R, x):
    raise AssertionError("write down what g should be: the code under test cannot be its own judge")


def test_the_right_function_is_not_accused():
    for name, function in HARMLESS.items():
        with patch.object(fdflow, "image_gradient", not_the_judge):
            why = "Compare its results with the formula, with a tolerance for rounding."
            assert not notices(function), f"{name}: your test calls it wrong. {why}"


def test_every_mutant_is_noticed():
    missed = [name for name, mutant in MUTANTS.items() if not notices(mutant)]
    why = (
        "Compare every element of g with the formula, for several groups of more than two branches."
    )
    assert not missed, f"your test does not notice: {', '.join(missed)}. {why}"


def test_what_training_shows():
    for name, mutant in MUTANTS.items():
        found = gain(mutant)  # far from 0.5 for every one of them
        why = "Adam takes out constant factors; the direction is left, and a rough one will do."
        assert still_rises(name) == (found > 0.5), (
            f"{name}: the reward changed by {found:+.2f}. {why}"
        )
