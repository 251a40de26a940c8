"""Tests: the sampler, the LoRA and the estimators against autograd and closed forms.

pytest -q test_fdflow.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fdflow
from fdflow import LoRA, Problem, central_difference, churned_step, fdfo, sample, spsa
from studies import toy

torch.set_num_threads(1)  # so small networks only lose by two


# ---- toy flows


def small_problem(seed=0, **options):
    """A random curved flow in 3 dimensions with 54 float64 LoRA parameters, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    for p in net.parameters():
        p.data = 0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    lora = LoRA(net, ["0", "2"], rank=2, generator=generator)
    for p in lora.parameters:
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)

    def velocity(x, t, cond):
        return net(torch.cat([x, torch.as_tensor(t).to(x).expand(len(x))[:, None]], 1))

    def reward(x, cond):
        return torch.sin(x[:, 0]) - (x[:, 1] - cond) ** 2 + x[:, 2] * x[:, 0]

    return Problem(velocity, reward, lora, torch.linspace(1, 0, 6).tolist(), **options)


def draw(n, dim=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator).double(), torch.rand(
        n, generator=generator
    ).double()


def exact_gradient(problem, eps, cond):
    toy.autograd(problem, eps, cond)
    return toy.gradient(problem.lora)


def estimated(problem, estimator, *args, **options):
    estimator(problem, *args, **options)
    return toy.gradient(problem.lora)


def relative_error(g, exact):
    return ((g - exact).norm() / exact.norm()).item()


def test_central_difference_is_the_autograd_gradient():
    problem, groups = small_problem(), draw(5)
    exact = exact_gradient(problem, *groups)
    assert exact.norm() > 0.1
    all_of_them = {"coordinates": None}
    assert (
        relative_error(
            estimated(problem, central_difference, *groups, h=1e-4, **all_of_them), exact
        )
        < 1e-6
    )
    # the error is h^2 times a constant: a third of h has a ninth of it
    coarse, fine = (
        relative_error(estimated(problem, central_difference, *groups, h=h, **all_of_them), exact)
        for h in (0.06, 0.02)
    )
    assert coarse / fine == pytest.approx(9, rel=0.05)


def test_central_difference_of_a_block_leaves_the_rest_alone():
    problem, groups = small_problem(), draw(5)
    g = estimated(problem, central_difference, *groups, h=1e-4, coordinates=7)
    exact = exact_gradient(problem, *groups)
    assert (g != 0).sum() == 7
    torch.testing.assert_close(g[g != 0], exact[g != 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("directions", [64, 1024])
def test_spsa_error_falls_as_one_over_root_directions(directions):
    # With random signs, E|g - exact|^2 = (P - 1) |exact|^2 / directions. In units of it, one estimate has the
    # mean 1 and about the spread sqrt(2 / P) = 0.18; over 20 estimates 0.04. Four of those are allowed.
    problem, (eps, cond) = small_problem(batch=4096), draw(4)
    exact = exact_gradient(problem, eps, cond)
    unit = (len(exact) - 1) * exact.norm() ** 2 / directions
    generator = torch.Generator().manual_seed(0)
    groups = eps.repeat(directions, 1), cond.repeat(directions)
    estimates = [
        estimated(problem, spsa, *groups, generator, h=1e-3, directions=directions)
        for _ in range(20)
    ]
    errors = torch.stack([(g - exact).square().sum() / unit for g in estimates])
    assert errors.mean() == pytest.approx(1, abs=0.16)
    # unbiased: the mean of all 20 has a twentieth of the squared error
    assert (torch.stack(estimates).mean(0) - exact).square().sum() / unit * 20 == pytest.approx(
        1, abs=0.75
    )


def test_both_sides_of_a_difference_see_the_same_noise():
    problem, groups = small_problem(), draw(8)
    starts, velocity = [], problem.velocity

    def spy(x, t, cond):
        if t == 1:
            starts.append((x, cond))
        return velocity(x, t, cond)

    problem.velocity = spy
    estimated(problem, spsa, *groups, directions=4)
    for x, cond in starts:
        plus, minus = x.chunk(2)
        assert torch.equal(plus, minus) and torch.equal(*cond.chunk(2))
    assert torch.equal(torch.cat([x.chunk(2)[0] for x, _ in starts]), groups[0])


def test_population_axis_equals_one_member_at_a_time():
    results, calls = [], []
    for batch in (1000, 1):  # all 32 directions in one pass, or one image at a time
        problem, groups = small_problem(batch=batch), draw(64)
        velocity = problem.velocity
        problem.velocity = lambda *args: calls.append(1) or velocity(*args)  # noqa: B023
        results.append(
            estimated(problem, spsa, *groups, torch.Generator().manual_seed(3), directions=32)
        )
        calls.append("next")
    assert calls.index("next") == 5 and len(calls) == 2 + 5 + 5 * 64
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    # and by hand: member k is the model with those parameters
    problem, (eps, cond) = small_problem(), draw(6)
    offsets = 0.1 * torch.randn(
        3, sum(p.numel() for p in problem.lora.parameters), dtype=torch.float64
    )
    with problem.lora.perturbed(offsets):
        together = problem.velocity(eps, 0.5, cond)
    for offset, x, v in zip(offsets, eps.chunk(3), together.chunk(3)):
        start = [p.data for p in problem.lora.parameters]
        for p, o in zip(problem.lora.parameters, problem.lora.unflatten(offset)):
            p.data = p.data + o.view_as(p)
        torch.testing.assert_close(problem.velocity(x, 0.5, None), v)
        for p, data in zip(problem.lora.parameters, start):
            p.data = data


def test_fdfo_agrees_with_autograd_on_a_learned_flow():
    velocity = toy.train_base(steps=800)
    lora = LoRA(velocity, toy.LAYERS, rank=4, generator=torch.Generator().manual_seed(0))
    problem = Problem(velocity, toy.reward, lora, toy.TIMES, batch=4096)
    optimizer = torch.optim.Adam(lora.parameters, 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):  # away from the start, where B = 0 hides half of the gradient
        fdfo(problem, torch.randn(256, 2, generator=generator), torch.zeros(256), generator)
        optimizer.step()
        optimizer.zero_grad()
    eps = torch.randn(4096, 2, generator=generator)
    exact = exact_gradient(problem, eps, torch.zeros(4096))
    for branches in (2, 4):
        g = estimated(problem, fdfo, eps, torch.zeros(4096), generator, branches=branches)
        assert torch.cosine_similarity(g, exact, dim=0) > 0.85


def constant_flow(dim=6):
    """v does not depend on x, so x_0 = eps - v; J = mean(w x_0) has the gradient -w with respect to v."""
    base = nn.Linear(1, dim).double()
    lora = LoRA(nn.Sequential(base), ["0"], rank=1, generator=torch.Generator().manual_seed(0))
    (layer,) = lora.layers.values()
    layer.A.data.fill_(1.0)
    w = torch.linspace(-1, 2, dim, dtype=torch.float64)
    seen = []

    def reward(x, cond):
        seen.append(x @ w)
        return x @ w

    times = [1.0, 0.8, 0.5, 0.4, 0.0]
    problem = Problem(
        lambda x, t, cond: layer(torch.ones_like(x[:, :1])), reward, lora, times, 40000
    )
    return problem, layer, w, seen


@pytest.mark.parametrize("train_steps", [1, 3])
def test_fdfo_is_the_closed_form_for_a_linear_flow(train_steps):
    problem, layer, w, seen = constant_flow()
    eps, _ = draw(20000, len(w))
    fdfo(
        problem, eps, torch.zeros(20000), torch.Generator().manual_seed(0), train_steps=train_steps
    )
    R = seen[0].view(-1, 2)
    unit = (R - R.mean(1, keepdim=True)).abs().mean()
    # dJ/dv = -w, and the gradient of a mean over elements has the factor 2 / dim; .grad holds minus that
    expected = 2 / len(w) * w / unit
    # each element is a mean of 20,000 numbers with a spread of about 2 |w|; five standard errors of it
    error = (layer.B.grad[:, 0] - expected) * unit * len(w) / 2
    assert error.abs().max() < 5 * 2 * w.norm() / math.sqrt(20000)


@pytest.mark.parametrize("branches, train_steps", [(2, 1), (2, 3), (4, 1)])
def test_fdfo_is_the_pull_that_it_says(branches, train_steps):
    problem, (eps, cond), scores, images, seen = small_problem(batch=1000), draw(16), [], [], []
    reward, velocity = problem.reward, problem.velocity
    problem.reward = lambda x, c: images.append(x) or scores.append(reward(x, c)) or scores[-1]
    problem.velocity = lambda x, t, c: (
        torch.is_grad_enabled() and seen.append((x, t)) or velocity(x, t, c)
    )
    options = dict(churn=0.1, branches=branches, train_steps=train_steps)
    g = estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(5), **options)
    assert len(seen) == train_steps
    unit = (
        (scores[0].view(16, branches) - scores[0].view(16, -1).mean(1, keepdim=True)).abs().mean()
    )
    for x, t in seen:
        assert set(t.tolist()) <= set(
            problem.times[:-1]
        )  # where the sampler, too, calls the network
        for k, (R, y) in enumerate(
            zip(scores[0].view(16, branches), images[0].view(16, branches, -1))
        ):
            dR, dy = R - R.mean(), y - y.mean(0)
            pull = sum(dR[i] * dy[i] for i in range(branches)) / branches / (dy**2).mean() / unit
            v = velocity(x[k : k + 1], t[k : k + 1], None)
            (F.mse_loss(v, v.detach() - pull) / 16 / train_steps).backward()
    torch.testing.assert_close(g, toy.gradient(problem.lora), rtol=1e-9, atol=1e-12)


def test_fdfo_trains_images_with_fresh_noise():
    problem, layer, w, _ = constant_flow()  # where from noise 0 all images are x_0 = -v
    n, seen, velocity = 20_000, [], problem.velocity
    problem.velocity = lambda x, t, c: (
        torch.is_grad_enabled() and seen.append((x, t)) or velocity(x, t, c)
    )
    eps = torch.zeros(n, len(w)).double()
    fdfo(problem, eps, torch.zeros(n), torch.Generator().manual_seed(0), churn=1e-9)
    ((x, t),) = seen
    x_0 = -velocity(eps[:1], 1.0, None).detach()
    for time in problem.times[:-1]:
        noise = (x[t == time] - (1 - time) * x_0) / time
        # five standard errors: at least 2,000 of the groups have each time
        assert noise.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * 2000 * len(w)))
        assert noise.mean().abs() < 5 / math.sqrt(2000 * len(w))


def test_the_difference_of_a_pair_is_the_formula_of_the_paper():
    (x, _), R = draw(6), torch.tensor([[1.0, -0.5], [2.0, 7.0], [0.0, 0.0]]).double()
    g = fdflow.image_gradient(R, x.view(3, 2, 3))
    for (R_1, R_2), (x_1, x_2), estimate in zip(R, x.view(3, 2, 3), g):
        torch.testing.assert_close(estimate, (R_1 - R_2) * (x_1 - x_2) / ((x_1 - x_2) ** 2).mean())


def test_kl_pulls_to_the_base_model():
    problem, (eps, cond), seen = small_problem(), draw(8), []
    velocity, problem.reward = (
        problem.velocity,
        lambda x, cond: torch.ones_like(cond),
    )  # only the pull
    problem.velocity = lambda x, t, c: (
        torch.is_grad_enabled() and seen.append((x, t)) or velocity(x, t, c)
    )
    g = estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0), kl=0.7)
    ((x, t),) = seen
    with problem.lora.switched_off():
        v_base = velocity(x, t, None).detach()
    assert (velocity(x, t, None) - v_base).abs().max() > 0.1
    (0.7 * F.mse_loss(velocity(x, t, None), v_base)).backward()
    torch.testing.assert_close(g, toy.gradient(problem.lora))


def test_fdfo_drops_a_group_with_a_nan():
    problem, (eps, cond) = small_problem(), draw(8)
    cond[3] = 7.0  # far away, so that this group would matter
    reward, results = problem.reward, []
    for lost in (torch.nan, 0.0):  # a group whose rewards are all the same says nothing either
        problem.reward = lambda x, c: torch.where(c == 7.0, lost, reward(x, c))  # noqa: B023
        results.append(estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*results)
    problem.reward = lambda x, c: torch.full_like(c, torch.nan)
    assert estimated(problem, fdfo, eps, cond).norm() == 0


@pytest.mark.parametrize("churn", [0.0025, 0.1, 1.0])
def test_churn_keeps_the_marginals(churn):
    n, generator = 100_000, torch.Generator().manual_seed(0)
    slack = 5 / math.sqrt(
        n
    )  # five standard errors of a mean; those of a standard deviation are smaller
    eps = torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    # a step along the exact flow of data N(m, sigma^2): mean (1 - t) m, variance (1 - t)^2 sigma^2 + t^2
    m, sigma = 2.0, 0.5

    def std(t):
        return math.sqrt((1 - t) ** 2 * sigma**2 + t**2)

    for t, s in ((1.0, 0.8), (0.8, 0.5), (0.5, 0.1)):
        x_t = (1 - t) * m + std(t) * eps
        level = s / (1 - s) / (1 + churn)  # noise over signal before the fresh noise
        r = level / (1 + level)
        x_r = (1 - r) * m + std(r) * eps
        x_s = churned_step(x_t, (x_r - x_t) / (r - t), t, s, churn, noise)
        assert x_s.mean().item() == pytest.approx((1 - s) * m, abs=slack * std(s))
        assert x_s.std().item() == pytest.approx(std(s), rel=slack)
        assert not torch.allclose(x_s, (1 - s) * m + std(s) * eps, atol=0.01 * std(s))
    # the whole sampler, on data that is one point, where Euler is exact
    trajectory = []
    times = torch.linspace(1, 0, 6).tolist()
    x_0 = sample(lambda x, t, cond: (x - m) / t, eps, None, times, churn, noise, trajectory)
    for t, (x, _) in zip(times, trajectory):
        assert x.mean().item() == pytest.approx((1 - t) * m, abs=slack * t)
        assert x.std().item() == pytest.approx(t, rel=slack)
    torch.testing.assert_close(x_0, torch.full_like(x_0, m))


def test_every_group_has_noise_of_its_own_in_whichever_batch():
    problem, (eps, cond), rolls, grads = small_problem(), draw(1), [], []
    eps, cond = eps.repeat(6, 1), cond.repeat(6)  # six times the same group
    for problem.batch in (1000, 4, 1):
        generator = torch.Generator().manual_seed(0)
        found = fdflow.roll_out(problem, eps, cond, 2, 0.05, generator)
        rolls.append([torch.cat(parts) for parts in list(zip(*found))[:4]])
        grads.append(estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0)))
    for roll, grad in zip(rolls[1:], grads[1:]):
        torch.testing.assert_close(roll, rolls[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-12)
    assert len(rolls[0][0][:, 0].unique()) == 6


def test_no_churn_is_euler():
    x, v = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(churned_step(x, v, 0.7, 0.4), x + (0.4 - 0.7) * v)
    assert torch.equal(churned_step(x, v, 0.7, 0.0, churn=0.5), x - 0.7 * v)


def test_times_are_drawn_by_the_share_of_their_step():
    times, shares = [0.9, 0.6, 0.5, 0.0], torch.tensor([3, 1, 5]) / 9
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    for n in (1, 2):
        drawn = fdflow.draw_times(times, n, generators)
        assert drawn.shape == (n, 2000)
        found = torch.stack([(drawn == t).float().mean() for t in torch.tensor(times[:-1])])
        # chances of 0 to 1 in 2,000 draws: a standard error of at most 0.011; four of them
        torch.testing.assert_close(found, shares, rtol=0, atol=0.045)


def test_lora_computes_in_the_dtype_of_the_model_and_learns_in_float32():
    base = nn.Linear(4, 3).bfloat16()
    lora = LoRA(nn.Sequential(base), ["0"], rank=2)
    (layer,) = lora.layers.values()
    layer.B.data.fill_(0.1)
    x = torch.randn(5, 4).bfloat16()
    y = layer(x)
    y.sum().backward()
    assert (
        y.dtype == torch.bfloat16
        and layer.A.grad.dtype == torch.float32
        and base.weight.grad is None
    )
    expected = base(x).float() + x.float() @ layer.A.T @ layer.B.T
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits
