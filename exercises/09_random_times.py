"""Exercise 9: train at one random time in place of all steps, without bias.

The sampler calls the network at times t_0 > t_1 > ... and takes S steps down to t_S = 0:

    x_0 = t_0 eps - sum_i (t_i - t_{i+1}) v_i.

Step i moves the image in proportion to its share of the time, w_i = (t_i - t_{i+1}) / t_0. So the
gradient is a weighted sum over the S steps, sum_i w_i f_i. One random step is cheaper than all, and
two ways to draw it have the same mean:

(a) draw the time t_i with the chance w_i, and use f_i;
(b) draw i with the chance 1 / S, and use weight_i f_i.

Write the draw of (a) from a number u, uniform in [0, 1), and the weight of (b). Then make n numbers
for (a) out of a single u. Each is uniform in [0, 1), and together they are evenly spaced.

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
    """Return one of the times t_0 ... t_{S-1} at which the network is called, t_i with chance w_i.

    times: floats t_0 ... t_S
    """
    raise NotImplementedError


def weight(times, i):
    """Return weight_i, for a step i that was drawn with the chance 1 / S."""
    raise NotImplementedError


def spread(u, n):
    """Return n numbers in [0, 1), evenly spaced, and shifted by the random u."""
    raise NotImplementedError


# ---- the check


def shares(drawn):
    called = TIMES[:-1]
    allowed = set(drawn) <= set(called)
    assert allowed, f"times {set(drawn)} drawn: the network is called at {called}"
    return [drawn.count(t) / len(drawn) for t in called]


def test_a_time_is_as_likely_as_its_share():
    found = shares([draw_time(TIMES, u) for u in U])
    hint = "The chance is the length of the step that starts there, over t_0 (here below 1)."
    assert_close(found, SHARES, "the chances of 0.9, 0.6, 0.5", hint)


def test_uniform_steps_with_weights():
    f = [2.0, -1.0, 5.0]
    found = sum(weight(TIMES, i) * f[i] for i in range(3)) / 3
    expected = sum(w * f_i for w, f_i in zip(SHARES, f))
    hint = "A weight is the wanted share over the chance of the draw, 1 / S."
    assert_close(found, expected, "the mean of weight f", hint)


def test_spread_draws_are_uniform_and_even():
    for n in (1, 2, 4):
        found = [spread(u, n) for u in U]
        different = all(len(set(numbers)) == n for numbers in found)
        assert different, f"spread(u, {n}) must be {n} different numbers"

        flat = sorted(u for numbers in found for u in numbers)
        inside = 0 <= flat[0] and flat[-1] < 1
        assert inside, f"spread(u, {n}) leaves [0, 1): {flat[0]:.3f} to {flat[-1]:.3f}"

        even = [(i + 0.5) / len(flat) for i in range(len(flat))]
        hint = "u is uniform in [0, 1): shift by u / n."
        assert_close(flat, even, "all numbers, sorted,", hint)

        counts = [sum(number < 1 / 2 for number in numbers) for numbers in found]
        fewest, most = min(counts), max(counts)
        assert most - fewest <= n % 2, f"{fewest} to {most} of {n} numbers are below 1/2"


def test_it_is_what_fdflow_draws():
    for seed in range(50):
        u = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        found = [draw_time(TIMES, number) for number in spread(u, 4)]
        expected = fdflow.draw_times(TIMES, 4, [torch.Generator().manual_seed(seed)])[:, 0]
        assert_close(found, expected, "four times", "From t_0 down.")
