"""Exercise 1: fresh noise in every step, and still the right distribution.

At time t a flow has x_t = (1 - t) x_0 + t eps: 1 - t parts image x_0 and t parts noise eps, so its noise
level is t / (1 - t). FDFO compares images that differ slightly, so each step from t to s gets fresh noise:
it first goes too far, to x_r with r < s; then it adds noise xi ~ N(0, I), x_s = a x_r + b xi.

Find r such that (1 + churn) times its noise level is the noise level of s. Then find a and b such that x_s
has 1 - s parts image, and its old and fresh noise together have the standard deviation s.

Teaches: why churn does not change the distribution of the images; variances add, standard deviations do not.
Belongs to: churned_step in fdflow.py. Check: pytest exercises/01_churn.py
"""

import math

import torch

import fdflow
from exercises.hints import assert_close

CASES = [(s, churn) for s in (0.1, 0.5, 0.9, 1.0) for churn in (0.0, 0.05, 1.0)]


def overshoot(s, churn):
    """The time r <= s with (1 + churn) r / (1 - r) = s / (1 - s); s may be 1, where the level is infinite."""
    raise NotImplementedError


def add_noise(x_r, r, churn, xi):
    """x_s = a x_r + b xi, with a and b from r and churn alone."""
    raise NotImplementedError


def right_overshoot(s, churn):
    """By bisection, so that the formula is left to you."""
    low, high = 0.0, s
    for _ in range(100):
        r = (low + high) / 2
        low, high = (r, high) if (1 + churn) * r * (1 - s) < s * (1 - r) else (low, r)
    return high


def test_overshoot_divides_the_noise_level():
    for s, churn in CASES:
        hint = (
            "The level to divide is s / (1 - s), not s."
            if s < 1
            else "At s = 1 all is noise: r = 1."
        )
        assert_close(
            overshoot(s, churn), right_overshoot(s, churn), f"r for s = {s}, churn = {churn}", hint
        )


def test_the_signal_is_kept():
    for s, churn in CASES:
        r = right_overshoot(s, churn)
        a = add_noise(1.0, r, churn, 0.0)
        hint = "The step took the image to 1 - r parts, and 1 - s are wanted: scale x_r down."
        assert abs(a * (1 - r) - (1 - s)) < 1e-9, (
            f"s = {s}, churn = {churn}: {a * (1 - r):.4f} parts. {hint}"
        )
        assert a < 1 or churn == 0, (
            f"s = {s}, churn = {churn}: a = {a:.4f}, but noise is added. {hint}"
        )


def test_the_noise_is_kept():
    for s, churn in CASES:
        r = right_overshoot(s, churn)
        old, new = add_noise(1.0, r, churn, 0.0) * r, add_noise(0.0, r, churn, 1.0)
        hint = "Independent noises add their variances, not their standard deviations."
        found, where = math.hypot(old, new), f"s = {s}, churn = {churn}"
        assert_close(found, s, f"the standard deviation of the noise ({where})", hint)


def test_it_is_the_step_of_fdflow():
    x, v, xi = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    for s, churn in CASES:
        expected = fdflow.churned_step(x, v, 1.0, s, churn, noise=lambda x_r: xi)
        r = overshoot(s, churn)
        found = add_noise(x + (r - 1.0) * v, r, churn, xi)
        assert_close(
            found, expected, f"x_s for s = {s}, churn = {churn}", "Is the sign of xi kept?"
        )
