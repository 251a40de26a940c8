"""Exercise 4: SPSA, a gradient from random signs.

J(theta) is the mean reward of a small flow, always from the same noises, and theta has P = 54
numbers. A direction d [P] of random signs, -1 or +1, gives one slope,

    (J(theta + h d) - J(theta - h d)) / (2h).

This slope times d estimates the gradient. SPSA's estimate g is the mean of this over M directions.
Write it, with a loop over the directions.

Then predict its error, E|g - w|^2 / |w|^2, for M independent directions, where w is the exact
gradient. If h is small, the slope is w . d, so one direction gives (w . d) d. Use d_i^2 = 1, and
E[d_i d_j] = 0 for i != j.

Teaches: two values say something about all parameters at once; the price is an error that grows
with P.
Belongs to: spsa in fdflow.py. Check: pytest exercises/04_spsa.py
"""

import torch
from torch.nn.utils import parameters_to_vector

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import draw, exact_gradient, small_problem


def spsa(J, theta, h, signs):
    """Return the estimate [P] of the gradient of J at theta [P], from directions signs [M, P]."""
    raise NotImplementedError


def relative_squared_error(P, M):
    """Return E|g - w|^2 / |w|^2, for M directions and P parameters."""
    raise NotImplementedError


# ---- the check


def random_signs(*shape):
    return 2 * torch.randint(2, shape, generator=torch.Generator().manual_seed(0)).double() - 1


def flow():
    """Return J, theta and the exact gradient. J.calls counts the calls of J."""
    problem, (eps, cond) = small_problem(), draw(4)
    theta = parameters_to_vector(problem.lora.parameters).detach()

    @torch.no_grad()
    def J(vector):
        shape = list(vector.shape)
        assert vector.shape == theta.shape, f"J takes one theta [{len(theta)}], not {shape}"

        J.calls += 1
        with problem.lora.perturbed((vector - theta)[None]):
            return problem.reward(sample(problem.velocity, eps, cond, problem.times), cond).mean()

    J.calls = 0
    return J, theta, exact_gradient(problem, eps, cond)


def test_one_direction():
    J, theta, exact = flow()
    signs = random_signs(1, len(theta))
    before = theta.clone()
    found = spsa(J, theta, 1e-3, signs)
    assert J.calls == 2, f"one direction takes 2 values of J, not {J.calls}"
    assert torch.equal(theta, before), "theta must not change: theta + h * d, not +="

    d = signs[0]
    hint = "The slope is a difference over 2h, plus side first; the estimate is the slope times d."
    assert_close(found, (exact @ d) * d, "the estimate from one direction", hint, tolerance=1e-3)


def test_many_directions():
    J, theta, exact = flow()
    signs = random_signs(200, len(theta))
    found = spsa(J, theta, 1e-3, signs)

    expected = (signs @ exact) @ signs / 200
    hint = "It is the mean over the directions, each with its own slope."
    assert_close(found, expected, "the estimate from 200 directions", hint, tolerance=1e-3)


def test_the_error():
    for P, M in ((54, 1), (54, 16), (6, 4)):
        w = torch.linspace(-1, 2, P).double()
        signs = random_signs(4000, M, P)  # 4,000 estimates
        g = ((signs @ w)[:, :, None] * signs).mean(1)
        measured = (g - w).square().sum(1).mean() / w.square().sum()

        what = f"P = {P}, M = {M}: your error"
        hint = "For one direction the i-th element is w_i + sum over j != i of w_j d_j d_i."
        assert_close(relative_squared_error(P, M), measured, what, hint, tolerance=0.1)
