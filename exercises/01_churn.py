"""Exercise 1: add fresh noise in every step, and keep the right distribution.

At time t a flow has x_t = (1 - t) x_0 + t eps: 1 - t parts image x_0 and t parts noise eps. The
ratio of the two, t / (1 - t), is its noise level. FDFO compares images that differ slightly, so
each step from t to s adds fresh noise. The step first goes too far, to a time r < s, where there is
less noise than at s. Then it adds noise xi ~ N(0, I): x_s = a x_r + b xi.

Find the r at which (1 + churn) times the noise level is the noise level of s. Then find a and b
such that x_s has 1 - s parts image, and its old and fresh noise together have the standard
deviation s.

Teaches: why churn does not change the distribution of the images; independent noises add their
variances, not their standard deviations.
Belongs to: churned_step in fdflow.py. Check: pytest exercises/01_churn.py
"""

import math

import torch

import fdflow
from exercises.hints import assert_close

CASES = [(s, churn) for s in (0.1, 0.5, 0.9, 1.0) for churn in (0.0, 0.05, 1.0)]


def overshoot(s, churn):
    """Return the time r <= s with (1 + churn) r / (1 - r) = s / (1 - s).

    s may be 1, where both levels are infinite.
    """
    raise NotImplementedError


def add_noise(x_r, r, churn, xi):
    """Return x_s = a x_r + b xi, with a and b from r and churn alone."""
    raise NotImplementedError


# ---- the check


def right_overshoot(s, churn):
    """Find r by bisection, so that the formula is left to you."""
    low, high = 0.0, s
    for _ in range(100):
        r = (low + high) / 2
        if (1 + churn) * r * (1 - s) < s * (1 - r):
            low = r
        else:
            high = r
    return high


def test_overshoot_divides_the_noise_level():
    for s, churn in CASES:
        hint = "The level to divide is s / (1 - s), not s."
        if s == 1:
            hint = "At s = 1 all is noise: r = 1."

        what = f"r for s = {s}, churn = {churn}"
        assert_close(overshoot(s, churn), right_overshoot(s, churn), what, hint)


def test_the_signal_is_kept():
    for s, churn in CASES:
        r = right_overshoot(s, churn)
        a = add_noise(1.0, r, churn, 0.0)

        where = f"s = {s}, churn = {churn}"
        hint = "The step took the image to 1 - r parts, but 1 - s are wanted: scale x_r down."
        right = abs(a * (1 - r) - (1 - s)) < 1e-9
        assert right, f"{where}: {a * (1 - r):.4f} parts image. {hint}"
        assert a < 1 or churn == 0, f"{where}: a = {a:.4f}, but noise is added. {hint}"


def test_the_noise_is_kept():
    for s, churn in CASES:
        r = right_overshoot(s, churn)
        old = add_noise(1.0, r, churn, 0.0) * r
        new = add_noise(0.0, r, churn, 1.0)

        what = f"the standard deviation of the noise (s = {s}, churn = {churn})"
        hint = "Independent noises add their variances, not their standard deviations."
        assert_close(math.hypot(old, new), s, what, hint)


def test_it_is_the_step_of_fdflow():
    x, v, xi = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    for s, churn in CASES:
        expected = fdflow.churned_step(x, v, 1.0, s, churn, noise=lambda x_r: xi)
        r = overshoot(s, churn)
        found = add_noise(x + (r - 1.0) * v, r, churn, xi)

        what = f"x_s for s = {s}, churn = {churn}"
        assert_close(found, expected, what, "Is the sign of xi kept?")
