"""Exercise 2: how large a step h? A finite difference has two errors, and the best h balances them.

J(h) is the mean reward of a small flow whose parameters were moved by h along some direction. We
want its slope at h = 0 from values of J alone, by one of two differences:

    one-sided: (J(h) - J(0)) / h
    central:   (J(h) - J(-h)) / (2h)

The truncation error is the rest of the Taylor series of J; it grows with h. The rounding error
grows as h shrinks: the computer knows J only to a relative precision `unit` (2e-16 in float64, 1e-7
in float32), and that error is divided by h.

Write both differences. Then predict for each: which fraction of the truncation error is left at a
third of h, and which power of `unit` is about the best h? Assume that J and its derivatives are
about 1.

Teaches: order of accuracy; why we look at both sides; why float32 needs a much larger h than
float64.
Belongs to: slopes and central_difference in fdflow.py. Check: pytest exercises/02_step_size.py
"""

import torch

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import draw, exact_gradient, small_problem


def one_sided(J, h):
    """Return the one-sided difference, from a function J and a step h."""
    raise NotImplementedError


def central(J, h):
    """Return the central difference, from a function J and a step h."""
    raise NotImplementedError


def error_left(method):
    """Return the fraction of the truncation error that is left at a third of h.

    method: "one-sided" or "central"
    """
    raise NotImplementedError


def best_h(method, unit):
    """Return about the best h, where the relative precision of J is `unit`."""
    raise NotImplementedError


# ---- the check


def curves(dtype):
    """Return eight functions J of h, each along its own direction, with their exact slopes."""
    problem, (eps, cond) = small_problem(), draw(4)
    exact = exact_gradient(problem, eps, cond)
    directions = torch.randn(8, len(exact), generator=torch.Generator().manual_seed(0)).double()
    directions /= directions.norm(dim=1, keepdim=True)

    for layer in problem.lora.layers.values():
        layer.to(dtype)

    def J(h, d):
        with torch.no_grad(), problem.lora.perturbed((h * d)[None].to(dtype)):
            x = sample(problem.velocity, eps.to(dtype), cond.to(dtype), problem.times)
            return problem.reward(x, cond.to(dtype)).mean().item()

    return [(lambda h, d=d: J(h, d), (exact @ d).item()) for d in directions]


def mean_error(difference, dtype, h):
    """Return the mean error of a difference over the eight directions."""
    return sum(abs(difference(J, h) - slope) for J, slope in curves(dtype)) / 8


def test_they_are_the_differences():
    def J(h):
        return h + h**2 + h**3

    for h in (0.5, 1e-3):
        hint = "A central difference spans 2h." if h == 0.5 else ""
        assert_close(one_sided(J, h), 1 + h + h**2, "one-sided slope of h + h^2 + h^3")
        assert_close(central(J, h), 1 + h**2, "central slope of h + h^2 + h^3", hint)


def test_the_error_left_at_a_third_of_h():
    for method, difference in (("one-sided", one_sided), ("central", central)):
        coarse = mean_error(difference, torch.float64, 0.03)
        fine = mean_error(difference, torch.float64, 0.01)

        hint = "Which is the first term of the Taylor series that does not cancel?"
        what = f"{method}: your prediction"
        assert_close(error_left(method), fine / coarse, what, hint, tolerance=0.05)


def test_the_best_h():
    for method, difference in (("one-sided", one_sided), ("central", central)):
        for dtype in (torch.float64, torch.float32):
            h = best_h(method, torch.finfo(dtype).eps)
            error = mean_error(difference, dtype, h)

            steps = [10.0**exponent for exponent in range(-10, 1)]
            errors = {step: mean_error(difference, dtype, step) for step in steps}
            best = min(errors, key=errors.get)

            dominates = "rounding" if h < best else "truncation"
            assert error < 10 * errors[best], (
                f"{method}, {dtype}: the error is {error:.1e} at your h = {h:.1e}, "
                f"{errors[best]:.1e} at {best:.0e}: {dominates} dominates. "
                "Where is the truncation error about as large as unit / h?"
            )
