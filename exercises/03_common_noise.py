"""Exercise 3: use the same noise on both sides of a difference.

R(offset, eps) returns the rewards [n] of the images that a small flow makes from noises eps [n, 3],
after its parameters were moved by `offset` along some direction. So there are n slopes,

    (R(h, eps) - R(-h, eps')) / (2h).

Their mean estimates the derivative of the mean reward, whether the two sides see the same noises,
eps' = eps (common random numbers), or different ones. Write both.

Then predict, for small h, the variance of a slope with different noises. It follows from h and from
the rewards of the flow as it is, R_0 [n] = R(0, eps).

Teaches: why every difference in fdflow.py uses the same noise on both sides. In this flow, with the
step h = 0.02 (the default of spsa), one pair of images from the same noise is worth about 480 pairs
from different noises (pytest -s prints it).
Belongs to: slopes in fdflow.py. Check: pytest exercises/03_common_noise.py
"""

import torch

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import exact_gradient, small_problem

N = 20_000  # so many that the variances of several runs agree to about 2 %


def slopes_common(R, h, draw):
    """Return slopes [n] from the same noises on both sides; draw() gives fresh noises [n, 3]."""
    raise NotImplementedError


def slopes_independent(R, h, draw):
    """Return slopes [n] from different noises on the two sides."""
    raise NotImplementedError


def predicted_variance(R_0, h):
    """Return the variance of a slope with different noises.

    R_0: rewards [n] of the flow whose parameters were not moved
    """
    raise NotImplementedError


# ---- the check


def flow():
    """Return R, draw and the exact mean slope. R.calls lists the arguments of each call of R."""
    problem, generator = small_problem(), torch.Generator().manual_seed(0)
    cond = torch.full((N,), 0.5).double()
    eps = torch.randn(N, 3, generator=generator).double()
    exact = exact_gradient(problem, eps, cond)
    d = torch.randn(len(exact), generator=generator).double()

    @torch.no_grad()
    def R(offset, eps):
        R.calls.append((offset, eps))
        with problem.lora.perturbed((offset * d)[None]):
            return problem.reward(sample(problem.velocity, eps, cond, problem.times), cond)

    def draw():
        return torch.randn(N, 3, generator=generator).double()

    R.calls = []
    return R, draw, (exact @ d).item()


def test_both_estimate_the_slope():
    R, draw, exact = flow()
    for slopes, same in ((slopes_common, True), (slopes_independent, False)):
        R.calls.clear()
        name = slopes.__name__
        found = slopes(R, 0.1, draw)
        assert len(R.calls) == 2, f"{name}: R is called {len(R.calls)} times, but two are enough"

        (plus, eps), (minus, other) = R.calls
        seen = "the same noises" if torch.equal(eps, other) else "different noises"
        hint = f"{name}: the two sides see {seen}: how often to call draw()?"
        assert torch.equal(eps, other) == same, hint
        assert sorted([plus, minus]) == [-0.1, 0.1], f"{name}: the offsets are {plus} and {minus}"

        # four standard errors, and 2 % for the truncation error
        tolerance = 4 * found.std().item() / N**0.5 / abs(exact) + 0.02
        hint = "Divide by the distance of the two sides, 2h, and subtract the minus side."
        assert_close(found.mean(), exact, f"{name}: the mean slope", hint, tolerance)


def test_the_variance():
    R, draw, _ = flow()
    R_0 = R(0.0, draw())
    for h in (0.1, 0.02):
        variance = slopes_independent(R, h, draw).var()
        hint = "Var(R - R') = 2 Var(R) for independent R and R'; then divide by (2h)^2."
        what = f"the variance at h = {h}: yours"
        assert_close(predicted_variance(R_0, h), variance, what, hint, 0.1)

    coarse = slopes_common(R, 0.1, draw).var()
    fine = slopes_common(R, 0.02, draw).var()
    what = "with the same noise, the variance at h = 0.02"
    assert_close(fine, coarse, what, "h does not change it.", 0.1)

    worth = f"{variance / fine:.0f} from different noises"
    print(f"at h = 0.02 one pair from the same noise is worth {worth}")
