"""Tests: the sampler, the LoRA and the estimators against autograd and closed forms.

pytest -q test_fdflow.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fdflow
from fdflow import LoRA, Problem, central_difference, churned_step, fdfo, noised, sample, spsa
from studies import toy

torch.set_num_threads(1)  # networks this small only lose by more


# ---- toy flows and exact gradients


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
    """Noise [n, dim] and cond [n] of n groups."""
    generator = torch.Generator().manual_seed(seed)
    eps, cond = torch.randn(n, dim, generator=generator), torch.rand(n, generator=generator)
    return eps.double(), cond.double()


def pop_gradient(lora):
    """The estimate of the gradient, minus what is in .grad, as a vector; clears .grad."""
    g = -torch.cat([p.grad.flatten() for p in lora.parameters])
    for p in lora.parameters:
        p.grad = None
    return g


def exact_gradient(problem, eps, cond):
    """The gradient that autograd finds through the whole sampler."""
    x = sample(problem.velocity, eps, cond, problem.times)
    (-problem.reward(x, cond).mean()).backward()
    return pop_gradient(problem.lora)


def estimated(problem, estimator, *args, **options):
    estimator(problem, *args, **options)
    return pop_gradient(problem.lora)


def relative_error(g, exact):
    return ((g - exact).norm() / exact.norm()).item()


def spy_on_training(problem):
    """A list that receives (x, t) of every velocity that is computed with its gradient."""
    seen, velocity = [], problem.velocity

    def spy(x, t, cond):
        if torch.is_grad_enabled():
            seen.append((x, t))
        return velocity(x, t, cond)

    problem.velocity = spy
    return seen


# ---- parameters perturbed


def test_central_difference_is_the_autograd_gradient():
    problem, groups = small_problem(), draw(5)
    exact = exact_gradient(problem, *groups)
    assert exact.norm() > 0.1

    def error(h):
        g = estimated(problem, central_difference, *groups, h=h, coordinates=None)
        return relative_error(g, exact)

    assert error(1e-4) < 1e-6
    # the error is h^2 times a constant: a third of h has a ninth of it
    assert error(0.06) / error(0.02) == pytest.approx(9, rel=0.05)


def test_central_difference_of_a_block_leaves_the_rest_alone():
    problem, groups = small_problem(), draw(5)
    g = estimated(problem, central_difference, *groups, h=1e-4, coordinates=7)
    exact = exact_gradient(problem, *groups)
    assert (g != 0).sum() == 7
    torch.testing.assert_close(g[g != 0], exact[g != 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("directions", [64, 1024])
def test_spsa_error_falls_as_one_over_root_directions(directions):
    # With random signs E|g - exact|^2 = (P - 1) |exact|^2 / directions. In units of it, one
    # estimate has the mean 1 and about the spread sqrt(2 / P) = 0.18; over 20 estimates 0.04. Four
    # of those are allowed.
    problem, (eps, cond) = small_problem(batch=4096), draw(4)
    exact = exact_gradient(problem, eps, cond)
    unit = (len(exact) - 1) * exact.norm() ** 2 / directions

    generator = torch.Generator().manual_seed(0)
    groups = eps.repeat(directions, 1), cond.repeat(directions)
    estimates = []
    for _ in range(20):
        g = estimated(problem, spsa, *groups, generator, h=1e-3, directions=directions)
        estimates.append(g)
    estimates = torch.stack(estimates)
    assert ((estimates - exact).square().sum(1) / unit).mean() == pytest.approx(1, abs=0.16)
    # unbiased: the mean of all 20 has a twentieth of the squared error
    error = (estimates.mean(0) - exact).square().sum() / unit
    assert 20 * error == pytest.approx(1, abs=0.75)


def test_both_sides_of_a_difference_see_the_same_noise():
    problem, groups = small_problem(), draw(8)
    starts, velocity = [], problem.velocity

    def spy(x, t, cond):
        if t == 1:
            starts.append((x, cond))
        return velocity(x, t, cond)

    problem.velocity = spy
    estimated(problem, spsa, *groups, directions=4)
    tried = []
    for x, cond in starts:
        plus, minus = x.view(-1, 2, 4, 3).unbind(1)  # [n, +-, directions, dimensions]
        plus_cond, minus_cond = cond.view(-1, 2, 4).unbind(1)
        assert torch.equal(plus, minus) and torch.equal(plus_cond, minus_cond)
        tried.append(plus)
    tried = torch.cat(tried).transpose(0, 1).flatten(0, 1)
    assert torch.equal(tried, groups[0])  # each group is tried in one direction


def test_population_equals_one_member_at_a_time():
    results, calls = [], []
    for batch in (1000, 1):  # all 32 directions in one pass, or one image at a time
        problem, groups = small_problem(batch=batch), draw(64)
        velocity = problem.velocity

        def count(*args, velocity=velocity):
            calls.append(batch)
            return velocity(*args)

        problem.velocity = count
        generator = torch.Generator().manual_seed(3)
        results.append(estimated(problem, spsa, *groups, generator, directions=32))
    assert calls.count(1000) == 5 and calls.count(1) == 5 * 64
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_image_i_of_a_batch_sees_member_i_mod_m():
    problem, (eps, cond) = small_problem(), draw(6)
    lora = problem.lora
    start = [p.data.clone() for p in lora.parameters]
    P = sum(p.numel() for p in lora.parameters)
    offsets = 0.1 * torch.randn(3, P, dtype=torch.float64)
    with lora.perturbed(offsets):
        together = problem.velocity(eps, 0.5, cond)

    for i in range(6):
        for p, data, offset in zip(lora.parameters, start, lora.unflatten(offsets[i % 3])):
            p.data = data + offset
        torch.testing.assert_close(problem.velocity(eps[i : i + 1], 0.5, None)[0], together[i])


def test_population_takes_tokens_too():
    """[B, d], as of a time embedding, and [B, tokens, d]."""
    lora = LoRA(nn.Sequential(nn.Linear(4, 3)).double(), ["0"], rank=2)
    (layer,) = lora.layers.values()
    offsets = torch.randn(2, 2 * 4 + 3 * 2, dtype=torch.float64)
    for shape in ((6, 4), (6, 5, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        with lora.perturbed(offsets):
            together = layer(x)
        for i in range(6):
            with lora.perturbed(offsets[i % 2][None]):
                torch.testing.assert_close(layer(x[i : i + 1])[0], together[i])


# ---- images perturbed


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
    """A flow whose v does not depend on x, so that x_0 = eps - v; the reward is w x_0.

    J has the gradient -w with respect to v. Returns the problem, its LoRA layer, w, and a list that
    receives the rewards.
    """
    base = nn.Linear(1, dim).double()
    lora = LoRA(nn.Sequential(base), ["0"], rank=1, generator=torch.Generator().manual_seed(0))
    (layer,) = lora.layers.values()
    layer.A.data.fill_(1.0)
    w = torch.linspace(-1, 2, dim, dtype=torch.float64)
    seen = []

    def velocity(x, t, cond):
        return layer(torch.ones_like(x[:, :1]))

    def reward(x, cond):
        seen.append(x @ w)
        return seen[-1]

    times = [1.0, 0.8, 0.5, 0.4, 0.0]
    return Problem(velocity, reward, lora, times, batch=40_000), layer, w, seen


@pytest.mark.parametrize("train_steps", [1, 3])
def test_fdfo_is_the_closed_form_for_a_linear_flow(train_steps):
    problem, layer, w, seen = constant_flow()
    n, generator = 20_000, torch.Generator().manual_seed(0)
    eps, _ = draw(n, len(w))
    fdfo(problem, eps, torch.zeros(n), generator, train_steps=train_steps)

    R = seen[0].view(-1, 2)
    unit = (R - R.mean(1, keepdim=True)).abs().mean()
    # dJ/dv = -w, and the gradient of a mean over elements has the factor 2 / dim; .grad holds minus
    # that
    expected = 2 / len(w) * w / unit
    # each element is a mean of 20,000 numbers with a spread of about 2 |w|; five standard errors
    error = (layer.B.grad[:, 0] - expected) * unit * len(w) / 2
    assert error.abs().max() < 5 * 2 * w.norm() / math.sqrt(n)


@pytest.mark.parametrize("branches, train_steps", [(2, 1), (2, 3), (4, 1)])
def test_fdfo_is_the_pull_that_it_says(branches, train_steps):
    problem, (eps, cond) = small_problem(batch=1000), draw(16)
    scores, images = [], []
    reward, velocity = problem.reward, problem.velocity

    def keep(x, c):
        images.append(x.view(16, branches, -1))
        scores.append(reward(x, c))
        return scores[-1]

    problem.reward = keep
    seen = spy_on_training(problem)
    options = dict(churn=0.1, branches=branches, train_steps=train_steps)
    g = estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(5), **options)
    assert len(seen) == train_steps

    R = scores[0].view(16, branches)
    unit = (R - R.mean(1, keepdim=True)).abs().mean()
    for x, t in seen:
        # where the sampler, too, calls the network
        assert set(t.tolist()) <= set(problem.times[:-1])
        for k in range(16):
            dR, dy = R[k] - R[k].mean(), images[0][k] - images[0][k].mean(0)
            pull = sum(dR[i] * dy[i] for i in range(branches)) / branches / (dy**2).mean() / unit
            v = velocity(x[k : k + 1], t[k : k + 1], None)
            (F.mse_loss(v, v.detach() - pull) / 16 / train_steps).backward()
    torch.testing.assert_close(g, pop_gradient(problem.lora), rtol=1e-9, atol=1e-12)


def test_fdfo_trains_images_with_fresh_noise():
    problem, layer, w, _ = constant_flow()  # where from noise 0 all images are x_0 = -v
    n, velocity = 20_000, problem.velocity
    seen = spy_on_training(problem)
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
    x = x.view(3, 2, 3)
    g = fdflow.image_gradient(R, x)
    for k in range(3):
        dR, dx = R[k, 0] - R[k, 1], x[k, 0] - x[k, 1]
        torch.testing.assert_close(g[k], dR * dx / (dx**2).mean())


def test_kl_pulls_to_the_base_model():
    problem, (eps, cond) = small_problem(), draw(8)
    velocity = problem.velocity
    problem.reward = lambda x, cond: torch.ones_like(cond)  # so there is only the pull
    seen = spy_on_training(problem)
    g = estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0), kl=0.7)

    ((x, t),) = seen
    with problem.lora.switched_off():
        v_base = velocity(x, t, None).detach()
    assert (velocity(x, t, None) - v_base).abs().max() > 0.1
    (0.7 * F.mse_loss(velocity(x, t, None), v_base)).backward()
    torch.testing.assert_close(g, pop_gradient(problem.lora))


def test_fdfo_drops_a_group_with_a_nan():
    problem, (eps, cond) = small_problem(), draw(8)
    cond[3] = 7.0  # far away, so that this group would matter
    reward, results = problem.reward, []
    for lost in (torch.nan, 0.0):  # a group whose rewards are all the same says nothing either
        problem.reward = lambda x, c, lost=lost: torch.where(c == 7.0, lost, reward(x, c))
        results.append(estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*results)

    problem.reward = lambda x, c: torch.full_like(c, torch.nan)
    assert estimated(problem, fdfo, eps, cond).norm() == 0


@pytest.mark.parametrize("estimator", [spsa, central_difference])
@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
def test_a_reward_that_is_not_finite_counts_as_no_slope(estimator, lost):
    problem, (eps, cond) = small_problem(), draw(16)
    # lost for every third image, so for one side of many pairs
    problem.reward = lambda x, c: torch.where(torch.arange(len(x)) % 3 == 0, lost, x[:, 1])
    assert estimated(problem, estimator, eps, cond).norm() < 1e6
    problem.reward = lambda x, c: torch.full_like(c, lost)
    assert estimated(problem, estimator, eps, cond).norm() == 0


def test_every_group_has_noise_of_its_own_in_whichever_batch():
    problem, (eps, cond) = small_problem(), draw(1)
    eps, cond = eps.repeat(6, 1), cond.repeat(6)  # six times the same group
    rolls, grads = [], []
    for problem.batch in (1000, 4, 1):
        found = fdflow.roll_out(problem, eps, cond, 2, 0.05, torch.Generator().manual_seed(0))
        rolls.append([torch.cat(parts) for parts in list(zip(*found))[:4]])
        grads.append(estimated(problem, fdfo, eps, cond, torch.Generator().manual_seed(0)))
    for roll, grad in zip(rolls[1:], grads[1:]):
        torch.testing.assert_close(roll, rolls[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-12)
    assert len(rolls[0][0][:, 0].unique()) == 6


def test_times_are_drawn_by_the_share_of_their_step():
    times, shares = [0.9, 0.6, 0.5, 0.0], torch.tensor([3, 1, 5]) / 9
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    for n in (1, 2):
        drawn = fdflow.draw_times(times, n, generators)
        assert drawn.shape == (n, 2000)
        found = torch.stack([(drawn == t).float().mean() for t in torch.tensor(times[:-1])])
        # chances of 0 to 1 in 2,000 draws: a standard error of at most 0.011; four of them
        torch.testing.assert_close(found, shares, rtol=0, atol=0.045)


# ---- the sampler


@pytest.mark.parametrize("churn", [0.0025, 0.1, 1.0])
def test_churn_keeps_the_marginals(churn):
    n, generator = 100_000, torch.Generator().manual_seed(0)
    slack = 5 / math.sqrt(n)  # five standard errors of a mean; those of a deviation are smaller
    eps = torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    # a step along the exact flow of data N(m, sigma^2), with mean (1 - t) m and this deviation
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
    def velocity(x, t, cond):
        return (x - m) / t

    trajectory, times = [], torch.linspace(1, 0, 6).tolist()
    x_0 = sample(velocity, eps, None, times, churn, noise, trajectory)
    for t, (x, _) in zip(times, trajectory):
        assert x.mean().item() == pytest.approx((1 - t) * m, abs=slack * t)
        assert x.std().item() == pytest.approx(t, rel=slack)
    torch.testing.assert_close(x_0, torch.full_like(x_0, m))


def test_no_churn_is_euler():
    x, v = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(churned_step(x, v, 0.7, 0.4), x + (0.4 - 0.7) * v)
    assert torch.equal(churned_step(x, v, 0.7, 0.0, churn=0.5), x - 0.7 * v)


def test_noised_lies_between_image_and_noise():
    x_0, noise = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    x_t = noised(x_0, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert torch.equal(x_t[:, 0, 0], torch.tensor([0.0, 0.25, 1.0]))


# ---- the LoRA


def test_lora_computes_in_the_dtype_of_the_model_and_learns_in_float32():
    base = nn.Linear(4, 3).bfloat16()
    lora = LoRA(nn.Sequential(base), ["0"], rank=2)
    (layer,) = lora.layers.values()
    layer.B.data.fill_(0.1)
    x = torch.randn(5, 4).bfloat16()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32
    assert base.weight.grad is None
    expected = base(x).float() + x.float() @ layer.A.T @ layer.B.T
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits

    with lora.switched_off():
        assert torch.equal(layer(x), base(x))


def test_lora_wraps_the_layers_that_are_named_and_freezes_the_rest():
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2), "not_to_q": nn.Linear(2, 2)})
    lora = LoRA(model, ["to_q"], rank=1)
    assert [*lora.layers] == ["to_q"] and isinstance(model["not_to_q"], nn.Linear)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"to_q.A", "to_q.B"}
    with pytest.raises(ValueError, match="no linear layer named to_x"):
        LoRA(model, ["to_x"], rank=1)
