"""Exercise 9: train one random time instead of all steps, without bias.

The sampler calls the network at times t_0 > t_1 > ..., and steps from the last of them to t_S = 0:
    x_0 = t_0 eps - sum_i (t_i - t_{i+1}) v_i.
Step i moves the image by its share of the time, w_i = (t_i - t_{i+1}) / t_0, so the gradient is a weighted
sum over the S steps, sum_i w_i f_i. One random step is cheaper than all, and has the same mean, in two ways:
(a) draw the time t_i with the chance w_i, and use f_i;
(b) draw i with the chance 1 / S, and use weight_i f_i.
Write the draw of (a) from a number u, uniform in [0, 1), and the weight of (b). Then make n numbers for (a)
out of a single u: each is uniform in [0, 1), and together they are evenly spaced.

Teaches: unbiased estimates, importance weights, and less variance at no cost.
Belongs to: draw_times in fdflow.py. Check: pytest exercises/09_random_times.py
"""

import torch

import fdflow
from exercises.hints import assert_close

TIMES = [0.9, 0.6, 0.5, 0.0]
SHARES = [3 / 9, 1 / 9, 5 / 9]
U = ((torch.arange(900) + 0.5) / 900).tolist()  # stands for all numbers in [0, 1)


def draw_time(times, u):
    """One of the times t_0 ... t_{S-1}, as floats, where the network is called: t_i with the chance w_i."""
    raise NotImplementedError


def weight(times, i):
    """weight_i, for a step i that was drawn with the chance 1 / S."""
    raise NotImplementedError


def spread(u, n):
    """n numbers in [0, 1), evenly spaced, and shifted by the random u."""
    raise NotImplementedError


def shares(drawn):
    assert set(drawn) <= set(TIMES[:-1]), (
        f"times {set(drawn)} drawn: the network is called at {TIMES[:-1]}"
    )
    return [drawn.count(t) / len(drawn) for t in TIMES[:-1]]


def test_a_time_is_as_likely_as_its_share():
    hint = (
        "The chance is the length of the step that starts there, over t_0 (which may be below 1)."
    )
    assert_close(
        shares([draw_time(TIMES, u) for u in U]), SHARES, "the chances of 0.9, 0.6, 0.5", hint
    )


def test_uniform_steps_with_weights():
    f = [2.0, -1.0, 5.0]
    found = sum(weight(TIMES, i) * f[i] for i in range(3)) / 3
    hint = "A weight is the wanted share over the chance of the draw, 1 / S."
    assert_close(found, sum(w * f_i for w, f_i in zip(SHARES, f)), "the mean of weight f", hint)


def test_spread_draws_are_uniform_and_even():
    for n in (1, 2, 4):
        found = [spread(u, n) for u in U]
        assert all(len(set(numbers)) == n for numbers in found), (
            f"spread(u, {n}) must be {n} different numbers"
        )
        flat = sorted(u for numbers in found for u in numbers)
        assert 0 <= flat[0] and flat[-1] < 1, (
            f"spread(u, {n}) leaves [0, 1): {flat[0]:.3f} to {flat[-1]:.3f}"
        )
        even = [(i + 0.5) / len(flat) for i in range(len(flat))]
        assert_close(
            flat,
            even,
            "all numbers, sorted,",
            "u is uniform in [0, 1): shift by u / n.",
            tolerance=1e-6,
        )
        counts = [sum(number < 1 / 2 for number in numbers) for numbers in found]
        assert max(counts) - min(counts) <= n % 2, (
            f"{min(counts)} to {max(counts)} of {n} numbers are below 1/2"
        )


def test_it_is_what_fdflow_draws():
    for seed in range(50):
        u = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        expected = fdflow.draw_times(TIMES, 4, [torch.Generator().manual_seed(seed)])[:, 0]
        assert_close(
            [draw_time(TIMES, u) for u in spread(u, 4)], expected, "four times", "From t_0 down."
        )
