"""Exercise 7: which mistakes does a test notice, and which does training show?

Each of the MUTANTS below is fdflow's image_gradient (g of exercise 6) with one mistake. Write
`notices`, a test for such a function: it returns True if the function is wrong. It must notice
every mutant. It must accuse neither the original nor the variant in HARMLESS, which is different
code with the same result.

Then predict which mutants still raise the reward when FDFO trains a small flow for 20 iterations
with Adam. (FDFO divides g by the mean absolute deviation of the rewards within a group; Adam
divides a gradient by its usual size.)

Teaches: a test must be able to fail; a reward that rises does not show that the code is right.
Belongs to: image_gradient in fdflow.py, and test_fdflow.py. Check: pytest exercises/07_mutants.py
"""

from unittest.mock import patch

import torch

import fdflow
from fdflow import image_gradient
from test_fdflow import draw, small_problem


def notices(image_gradient):
    """Return True if this function is wrong.

    It takes R [G, K] and x [G, K, D] (float64), and returns g [G, D].
    """
    raise NotImplementedError


def still_rises(mutant):
    """Return your prediction: does training with this mutant raise the reward?

    mutant: a key of MUTANTS
    """
    raise NotImplementedError


# ---- the mutants


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


def rewards_not_centred(R, x):
    return (R[:, :, None] * centred(x)).mean(1) / mean_square(centred(x))


HARMLESS = {"the original": image_gradient, "rewards not centred": rewards_not_centred}


# ---- the check


def gain(mutant):
    """Return how much 20 iterations of FDFO with this mutant raise the mean reward."""
    problem, (eps, cond) = small_problem(batch=1000), draw(512, seed=7)
    optimizer = torch.optim.Adam(problem.lora.parameters, 0.02)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def J():
        x = fdflow.sample(problem.velocity, eps, cond, problem.times)
        return problem.reward(x, cond).mean().item()

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
            accused = notices(function)

        hint = "Compare its results with the formula, with a tolerance for rounding."
        assert not accused, f"{name}: your test calls it wrong. {hint}"


def test_every_mutant_is_noticed():
    missed = [name for name, mutant in MUTANTS.items() if not notices(mutant)]

    hint = "Compare every element of g with the formula, for several groups of over two branches."
    assert not missed, f"your test does not notice: {', '.join(missed)}. {hint}"


def test_what_training_shows():
    for name, mutant in MUTANTS.items():
        predicted = still_rises(name)
        found = gain(mutant)  # far from 0.5 for every one of them

        hint = "Adam takes out constant factors; the direction is left, and a rough one will do."
        assert predicted == (found > 0.5), f"{name}: the reward changed by {found:+.2f}. {hint}"
