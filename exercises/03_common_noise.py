"""Exercise 3: the same noise on both sides of a difference.

R(offset, eps) gives the rewards [n] of the images that a small flow makes from noises eps [n, 3], after its
parameters were moved by `offset` along some direction. So (R(h, eps) - R(-h, eps')) / 2h are n slopes. Their
mean estimates the derivative of the mean reward, whether the two sides see the same noises, eps' = eps
(common random numbers), or different ones. Write both.

Then predict, for small h, the variance of a slope with different noises, from h and the rewards of the flow
as it is, R_0 [n] = R(0, eps).

Teaches: why every difference in fdflow.py uses the same noise on both sides. In this flow, at h = 0.02 (the
default of spsa), one such pair of images is worth about 470 with different noises (pytest -s prints it).
Belongs to: slopes in fdflow.py. Check: pytest exercises/03_common_noise.py
"""

import torch

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import exact_gradient, small_problem

N = 20_000  # so many that the variances of several runs agree to about 2 %


def slopes_common(R, h, draw):
    """Slopes [n], from the same noises on both sides; draw() gives fresh noises [n, 3]."""
    raise NotImplementedError


def slopes_independent(R, h, draw):
    """Slopes [n], from different noises on the two sides."""
    raise NotImplementedError


def predicted_variance(R_0, h):
    """The variance of a slope with different noises, from rewards R_0 [n] of the unmoved flow."""
    raise NotImplementedError


def flow():
    """R, draw, and the exact mean slope; R notes each call in R.calls."""
    problem, generator = small_problem(), torch.Generator().manual_seed(0)
    cond, eps = torch.full((N,), 0.5).double(), torch.randn(N, 3, generator=generator).double()
    exact = exact_gradient(problem, eps, cond)
    d = torch.randn(len(exact), generator=generator).double()

    @torch.no_grad()
    def R(offset, eps):
        R.calls.append((offset, eps))
        with problem.lora.perturbed((offset * d)[None]):
            return problem.reward(sample(problem.velocity, eps, cond, problem.times), cond)

    R.calls = []
    return R, lambda: torch.randn(N, 3, generator=generator).double(), (exact @ d).item()


def test_both_estimate_the_slope():
    R, draw, exact = flow()
    for slopes, same in ((slopes_common, True), (slopes_independent, False)):
        R.calls.clear()
        found, name = slopes(R, 0.1, draw), slopes.__name__
        assert len(R.calls) == 2, f"{name}: R is called {len(R.calls)} times, and two suffice"
        (plus, eps), (minus, other) = R.calls
        seen = "the same noises" if torch.equal(eps, other) else "different noises"
        assert torch.equal(eps, other) == same, (
            f"{name}: the two sides see {seen}: how often to call draw()?"
        )
        assert sorted([plus, minus]) == [-0.1, 0.1], f"{name}: the offsets are {plus} and {minus}"
        slack = (
            4 * found.std().item() / N**0.5
        )  # four standard errors, and 2 % for the truncation error
        hint = "Divide by the distance of the two sides, 2h, and subtract the minus side."
        assert_close(
            found.mean(), exact, f"{name}: the mean slope", hint, slack / abs(exact) + 0.02
        )


def test_the_variance():
    R, draw, _ = flow()
    R_0 = R(0.0, draw())
    for h in (0.1, 0.02):
        variance = slopes_independent(R, h, draw).var()
        hint = "Var(R - R') = 2 Var(R) for independent R and R'; then the 2h, squared."
        assert_close(
            predicted_variance(R_0, h), variance, f"the variance at h = {h}: yours", hint, 0.1
        )
    coarse, fine = (slopes_common(R, h, draw).var() for h in (0.1, 0.02))
    assert_close(
        fine, coarse, "with the same noise, the variance at h = 0.02", "h does not change it.", 0.1
    )
    print(
        f"at h = 0.02 one pair with the same noise is worth {variance / fine:.0f} with different ones"
    )
