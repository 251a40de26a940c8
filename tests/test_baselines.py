"""The baselines against autograd, torch.distributions and closed forms.

pytest -q tests/test_baselines.py
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from fdflow import LoRA, Problem, central_difference, normal, sample
from studies import baselines, toy
from studies.baselines import awm, backprop, cps_step, fdfo_published, flow_grpo, sde_step, v_grpo
from support.arguments import Parser, add_estimator_arguments
from support.errors import UserError
from test_fdflow import (
    constant_flow,
    draw,
    estimated,
    exact_gradient,
    pop_gradient,
    small_problem,
    spy_on_training,
)
from tests.models import folder, make_flow, shared_flow

ALL = [awm, backprop, fdfo_published, flow_grpo, baselines.reward_gradient, v_grpo]
CPS = {"dynamics": "cps", "noise_level": 0.5}


def seed(number):
    return torch.Generator().manual_seed(number)


# ---- noisy steps


def spreads(step, times, velocity, start):
    """Standard deviations of x at all times but the first, exactly, where steps are linear in x."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found, variance = [], start**2
    for t, s in pairwise(times):
        mean, std = step(x, velocity(x, t), t, s)
        slope = (mean[1] - mean[0]).item()
        variance = slope**2 * variance + std**2
        found.append(math.sqrt(variance))
    return found


def point_velocity(x, t, m=2.0):
    """The exact velocity for data that is one point m, where x_t = (1 - t) m + t eps."""
    return (x - m) / t


def gaussian_velocity(x, t, m=2.0, sigma=0.5):
    """The exact velocity for data N(m, sigma^2)."""
    variance = (1 - t) ** 2 * sigma**2 + t**2
    return (t - (1 - t) * sigma**2) / variance * (x - (1 - t) * m) - m


# steps: standard deviation of the noise that is left in the image, with the published dynamics at
# noise level 0.7, on the schedule of the bundled model. In closed form, where the data are one
# point: a step multiplies the noise by s / t - sigma^2 (t - s) / (2 t^2), then adds to it.
NOISE_LEFT = {2: 0.742, 3: 0.616, 4: 0.358, 6: 0.182, 10: 0.094, 20: 0.043, 40: 0.021}


def test_few_sde_steps_leave_noise_in_the_image():
    for steps, left in NOISE_LEFT.items():
        times = [t for t in shared_flow("tiny").schedule(steps) if t == 0 or t > 0.01]
        sde = partial(sde_step, noise_level=0.7, t_max=times[1])
        found = spreads(sde, times, point_velocity, times[0])
        assert found[-1] == pytest.approx(left, abs=6e-4)


def test_many_sde_steps_keep_the_marginals_and_cps_steps_lose_spread():
    times = torch.linspace(1, 0, 401, dtype=torch.float64).tolist()
    sde = partial(sde_step, noise_level=0.7, t_max=times[1])
    found = spreads(sde, times, gaussian_velocity, 1.0)[200:]
    expected = [math.sqrt(((1 - s) * 0.5) ** 2 + s**2) for s in times[201:]]
    # steps are of first order: at most 5 % off in the first half, where there is the most noise
    assert found == pytest.approx(expected, rel=0.01)
    cps = partial(cps_step, noise_level=0.7)
    assert spreads(cps, times, gaussian_velocity, 1.0)[-1] == pytest.approx(0.85 * 0.5, rel=0.01)


@pytest.mark.parametrize("steps", [1, 3])
def test_cps_steps_of_any_length_have_the_noise_of_their_time(steps):
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    cps = partial(cps_step, noise_level=0.7)
    assert spreads(cps, times, point_velocity, 1.0) == pytest.approx(times[1:], abs=1e-12)

    for t, s in pairwise(times):
        x = torch.tensor([[(1 - t) * 2.0]], dtype=torch.float64)  # the mean of x_t
        mean, std = cps(x, point_velocity(x, t), t, s)
        assert mean.item() == pytest.approx((1 - s) * 2)
        assert std == pytest.approx(s * math.sin(0.7 * math.pi / 2))


# ---- all estimators


@pytest.fixture(scope="module")
def learned():
    """The toy flow with a LoRA away from zero, and the gradient of its reward from 4,096 images."""
    velocity = toy.train_base(steps=300)
    lora = LoRA(velocity, toy.LAYERS, rank=4, generator=seed(0))
    generator = seed(0)
    for p in lora.parameters:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    problem = Problem(velocity, toy.reward, lora, toy.TIMES, batch=4096)
    eps = torch.randn(4096, 2, generator=generator)
    return problem, exact_gradient(problem, eps, torch.zeros(4096))


@pytest.mark.parametrize(
    "estimator, groups, options, least",
    [
        (flow_grpo, 1024, {}, 0.9),
        (flow_grpo, 1024, {"shared_noise": True}, 0.9),
        (flow_grpo, 1024, CPS, 0.93),
        (awm, 1024, {}, 0.78),  # of two that raise a bound of the likelihood
        (v_grpo, 1024, {}, 0.7),
        (fdfo_published, 2048, {"churn": 0.05, "updates": 1}, 0.9),
        (baselines.reward_gradient, 4096, {}, 0.9),
    ],
)
def test_estimates_point_the_way_of_autograd(estimator, groups, options, least, learned):
    problem, exact = learned
    eps = torch.randn(groups, 2, generator=seed(1))
    g = estimated(problem, estimator, eps, torch.zeros(groups), seed(2), **options)
    # from 4,096 to 8,192 images; over five other seeds the cosines were 0.92 to 0.99, those of awm
    # 0.82 to 0.84 and of v_grpo 0.74 to 0.76
    assert torch.cosine_similarity(g, exact, dim=0) > least


@pytest.mark.parametrize("estimator, options", [*((e, {}) for e in ALL), (flow_grpo, CPS)])
def test_the_size_of_a_micro_batch_does_not_matter(estimator, options):
    results = []
    for batch in (1000, 9):
        problem = small_problem(batch=batch)
        results.append(estimated(problem, estimator, *draw(6), seed(0), **options))
    torch.testing.assert_close(*results)
    assert results[0].norm() > 0


def test_advantages_have_no_scale_and_are_zero_where_a_reward_is_lost():
    R = torch.tensor([[1.0, 2.0, 3.0], [150.0, 250.0, 350.0], [torch.nan, 0.0, 9.0]])
    expected = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(baselines.group_advantages(R), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("estimator", [fdfo_published, flow_grpo])
def test_updates_step_in_between(estimator):
    problem, groups, steps = small_problem(), draw(6), []
    problem.step = lambda: steps.append(pop_gradient(problem.lora))
    last = estimated(problem, estimator, *groups, seed(0), updates=3)
    assert len(steps) == 2 and all(g.norm() > 0 for g in (*steps, last))


# ---- exact gradients


def test_backprop_is_what_central_differences_tend_to():
    problem, groups = small_problem(), draw(6)
    exact = estimated(problem, backprop, *groups)
    differences = estimated(problem, central_difference, *groups, h=1e-4, coordinates=None)
    torch.testing.assert_close(exact, differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(estimated(problem, backprop, *groups, last_steps=5), exact)

    # with the last step alone, everything before it counts as noise
    last = estimated(problem, backprop, *groups, last_steps=1)
    *_, t, s = problem.times
    with torch.no_grad():
        x = sample(problem.velocity, *groups, [*problem.times[:-1], t])
    (-problem.reward(x + (s - t) * problem.velocity(x, t, None), groups[1]).mean()).backward()
    torch.testing.assert_close(last, pop_gradient(problem.lora))


def test_the_reward_gradient_is_exact_where_the_velocity_is_constant():
    problem, _, w, _ = constant_flow()
    groups = draw(8, len(w))
    copied = estimated(problem, baselines.reward_gradient, *groups, train_steps=3)
    torch.testing.assert_close(copied, estimated(problem, backprop, *groups))


@pytest.mark.parametrize(
    "estimator", [backprop, baselines.reward_gradient, partial(fdfo_published, updates=1)]
)
def test_a_lost_reward_adds_nothing_to_a_gradient(estimator):
    problem, (eps, cond) = small_problem(), draw(6)
    rest = estimated(problem, estimator, eps[:-1], cond[:-1], seed(0)) * 5 / 6
    reward = problem.reward
    problem.reward = lambda x, c: reward(x, c) + torch.where(c == cond[-1], torch.nan, 0.0)
    torch.testing.assert_close(estimated(problem, estimator, eps, cond, seed(0)), rest)


# ---- FDFO as published


def test_one_update_of_published_fdfo_is_the_plain_pull_at_all_steps_of_both_branches():
    problem, (eps, cond) = small_problem(batch=1000), draw(16)
    g = estimated(problem, fdfo_published, eps, cond, seed(5), churn=0.1, updates=1)

    # the same pairs by hand
    seeds = torch.randint(2**31, (16,), generator=seed(5)).tolist()
    noise = partial(normal, [seed(number) for number in seeds])
    e, c, steps = eps.repeat_interleave(2, 0), cond.repeat_interleave(2, 0), []
    with torch.no_grad():
        x = sample(problem.velocity, e, c, problem.times, 0.1, noise, steps)
        R = problem.reward(x, c)

    for i in range(0, 32, 2):
        dx, dR = x[i] - x[i + 1], R[i] - R[i + 1]
        for t, (x_t, v_ref) in zip(problem.times, steps):
            v = problem.velocity(x_t[i : i + 2], t, c)
            target = v_ref[i : i + 2] - dR * dx / (dx**2).mean()
            (F.mse_loss(v, target) / 16 / len(steps)).backward()
    torch.testing.assert_close(g, pop_gradient(problem.lora), rtol=1e-9, atol=1e-12)


def test_the_second_update_of_published_fdfo_is_its_closed_form():
    problem, layer, w, _ = constant_flow()
    (eps, cond), dv, clip = draw(12, len(w)), 0.01 * torch.arange(1.0, 7).double(), 0.03

    def step():  # stands for the optimiser: from now on v = v_ref + dv
        layer.B.data = dv[:, None].clone()
        layer.B.grad = None

    problem.step = step
    fdfo_published(problem, eps, cond, seed(5), churn=0.05, clip=clip, updates=2)
    layer.B.data.zero_()
    generator = seed(5)
    parts = zip(eps.chunk(2), cond.chunk(2))
    rolls = [list(baselines.pair_roll_outs(problem, *part, generator, 0.05)) for part in parts]
    _, _, dR, d = rolls[1][0]

    rho = torch.exp(d.square().mean(1) - (dv + d).square().mean(1))
    slope = dR.abs() / clip * (rho - 1) - dR  # of the loss with respect to rho
    expected = (slope * rho)[:, None] * -2 / len(w) * (dv + d)
    assert (rho - 1).abs().max() > clip
    torch.testing.assert_close(layer.B.grad[:, 0], expected.mean(0))


# ---- flow-grpo


def noisy_rolls(problem, step, train_steps=None):
    roll_outs = baselines.noisy_roll_outs
    return list(roll_outs(problem, *draw(4), seed(0), 3, False, step, train_steps))


def test_the_policy_gradient_is_that_of_torch_distributions():
    problem = small_problem()
    sde = partial(sde_step, noise_level=0.7, t_max=problem.times[1])
    for step, trained in ((sde, 5), (partial(cps_step, noise_level=0.7), 4)):
        rolls = noisy_rolls(problem, step)
        baselines.policy_gradient(problem, rolls, step, clip=0.1)
        g = pop_gradient(problem.lora)

        ((cond, A, steps),) = rolls
        assert len(steps) == trained  # the last of cps is not random
        for t, s, x, x_s, log_p in steps:
            density = Normal(*step(x, problem.velocity(x, t, cond), t, s)).log_prob(x_s).mean(1)
            torch.testing.assert_close(log_p, density)
            (-(A * density).mean() / trained).backward()
        torch.testing.assert_close(g, pop_gradient(problem.lora))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_clipping_stops_what_went_far_enough(advantage, shift):
    problem = small_problem()
    step = partial(cps_step, noise_level=0.7)
    ((cond, A, steps),) = noisy_rolls(problem, step)
    steps = [(*others, log_p - shift) for *others, log_p in steps]  # the ratio is exp(shift)
    roll = baselines.NoisyRollout(cond, torch.full_like(A, advantage), steps)
    baselines.policy_gradient(problem, [roll], step, clip=0.1)
    assert (pop_gradient(problem.lora).norm() > 0) == (advantage * shift < 0)


def test_the_kl_of_flow_grpo_is_the_published_one():
    problem, layer, w, _ = constant_flow()
    problem.reward = lambda x, cond: torch.ones_like(cond)  # nothing to learn but the pull
    layer.B.data = 0.1 * torch.arange(1.0, len(w) + 1).double()[:, None]  # v - v_base
    flow_grpo(problem, *draw(4, len(w)), seed(0), noise_level=0.7, kl=0.3)
    # mean((mean - mean_base)^2) / (2 sigma^2), a mean over steps; the step's mean moves with v by
    # (s - t) (1 + sigma^2 (1 - t) / 2t)
    slopes = []
    for t, s in pairwise(problem.times):
        variance = 0.7**2 * t / (1 - min(t, 0.8))
        slopes.append(((s - t) * (1 + variance * (1 - t) / (2 * t))) ** 2 / (2 * variance))
    expected = 0.3 * sum(slopes) / 4 * 2 * layer.B.data / len(w)
    torch.testing.assert_close(layer.B.grad, expected)


@pytest.mark.parametrize("shared_noise, train_steps", [(True, 2), (False, None)])
def test_groups_start_from_the_same_noise_or_not_and_train_as_many_steps(shared_noise, train_steps):
    problem, (eps, cond) = small_problem(), draw(4)
    trained, calls, velocity = spy_on_training(problem), [], problem.velocity
    problem.velocity = lambda x, t, c: calls.append(x) or velocity(x, t, c)
    options = {"shared_noise": shared_noise, "train_steps": train_steps}
    flow_grpo(problem, eps, cond, seed(0), branches=3, **options)
    assert len(trained) == (train_steps or 5)
    same = calls[0] == eps.repeat_interleave(3, 0)
    assert same.all() if shared_noise else not same.any()


# ---- flow-matching losses in place of the likelihood


@pytest.mark.parametrize("generalized_huber", [False, True])
def test_awm_matches_the_images_weighted_by_their_advantages(generalized_huber):
    problem, layer, w, seen = constant_flow()
    calls, images, reward = spy_on_training(problem), [], problem.reward
    problem.reward = lambda x, cond: images.append(x) or reward(x, cond)
    images_made = awm(problem, *draw(20, len(w)), seed(0), generalized_huber=generalized_huber)
    assert images_made == 160

    ((x_t, t),), (x_0,) = calls, images
    A = baselines.group_advantages(seen[0].view(-1, 8))
    noise = (x_t - (1 - t[:, None]) * x_0) / t[:, None]
    error = problem.velocity(x_t, t, None).detach() - (noise - x_0)
    if generalized_huber:  # d/dv of 4 t mean(error^2)^(1/4) is t mean(error^2)^(-3/4) 2 error / dim
        A = A * t * error.square().mean(1) ** -0.75
    expected = (A[:, None] * 2 * error / len(w)).mean(0)
    torch.testing.assert_close(layer.B.grad[:, 0], expected, rtol=1e-4, atol=1e-7)

    # the noise is fresh: five standard errors
    found = torch.corrcoef(torch.stack([noise.flatten(), x_0.flatten()]))[0, 1]
    assert found.abs() < 5 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, rel=5 / (2 * noise.numel()) ** 0.5)


def test_awm_is_pulled_to_the_base_model_and_to_the_average_of_its_weights(tmp_path):
    problem, layer, w, _ = constant_flow()
    problem.reward = lambda x, cond: torch.ones_like(cond)  # nothing to learn but the pull
    first = 0.1 * torch.arange(1.0, len(w) + 1).double()[:, None]
    second = torch.ones_like(first)
    for B, average in ((first, first), (second, 0.3 * first + 0.7 * second)):
        layer.B.data, layer.B.grad = B.clone(), None
        awm(problem, *draw(4, len(w)), seed(0), kl=0.5, average_kl=2.0)
        torch.save(problem.memory, tmp_path / "state.pt")  # as in a checkpoint
        problem.memory = torch.load(tmp_path / "state.pt", weights_only=True)
        torch.testing.assert_close(layer.B.grad, 2 / len(w) * (0.5 * B + 2.0 * (B - average)))


def test_v_grpo_is_the_formula_of_the_paper():
    problem = small_problem(batch=1000)
    velocity, reward, images = problem.velocity, problem.reward, []
    calls = spy_on_training(problem)
    problem.reward = lambda x, cond: images.append(x) or reward(x, cond)
    assert v_grpo(problem, *draw(5), seed(0), branches=6, times_per_image=3) == 30
    g = pop_gradient(problem.lora)

    x_0 = images[0]
    R = reward(x_0, draw(5)[1].repeat_interleave(6)).view(5, 6)
    A = ((R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True)).flatten()
    loss = 0
    for x_t, t in calls:
        # a group shares its time and noise, others have their own
        noise = ((x_t - (1 - t[:, None]) * x_0) / t[:, None]).view(5, 6, 3)
        torch.testing.assert_close(noise, noise[:, :1].expand(5, 6, 3))
        assert (t.view(5, 6) == t.view(5, 6)[:, :1]).all() and len(noise[:, 0, 0].unique()) == 5
        error = x_t - t[:, None] * velocity(x_t, t, None) - x_0
        loss = loss + error.square().mean(1) / error.abs().mean(1).detach()
    assert len(calls) == 3 and (calls[0][1] > calls[2][1]).all()  # spread from noise to image
    rho = (loss.detach() / 3 - loss / 3).exp()
    (-(rho * 3 * torch.tanh(A / 3)).mean()).backward()
    torch.testing.assert_close(g, pop_gradient(problem.lora), rtol=1e-3, atol=1e-6)


# ---- mistakes and the command line


@pytest.mark.parametrize(
    "estimator, options, complaint",
    [
        (flow_grpo, {"dynamics": "ode"}, "--dynamics ode: it is sde or cps"),
        (flow_grpo, {"noise_level": 0.0}, "--noise-level 0.0: more than 0"),
        (flow_grpo, {"dynamics": "cps", "noise_level": 1.5}, "--noise-level 1.5.*1 at most"),
        (flow_grpo, CPS, "at least 2 steps"),
        (flow_grpo, {"branches": 1}, "--branches 1"),
        (backprop, {}, "no gradient"),
    ],
)
def test_mistakes_are_one_line(estimator, options, complaint):
    problem = small_problem()
    problem.times = [1.0, 0.0]
    problem.reward = lambda x, cond: x.detach()[:, 0]
    with pytest.raises(UserError, match=complaint):
        estimator(problem, *draw(4), **options)


@pytest.mark.parametrize("estimator", ALL)
def test_several_processes_are_refused(estimator, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="one process"):
        estimator(small_problem(), *draw(4))


@pytest.mark.parametrize("estimator", ALL)
def test_every_option_is_a_flag_with_a_help_text(estimator):
    parser = Parser(None)
    add_estimator_arguments(parser, estimator.__name__, estimator)
    texts = [action.help for action in parser._actions if action.dest != "help"]
    assert texts and not any(text.startswith(" (default") for text in texts)


@pytest.mark.parametrize("estimator, options", [*((e, {}) for e in ALL), (flow_grpo, CPS)])
def test_estimators_take_the_images_of_a_real_model(estimator, options):
    flow = make_flow(folder("tiny"), steps=3)
    lora = LoRA(flow.network, ["to_q"], 2)
    problem = Problem(flow.velocity, lambda x, c: x.mean((1, 2, 3)), lora, flow.train_times)
    images = estimator(problem, flow.noise([0]), torch.tensor([1]), seed(0), **options)
    assert images == {backprop: 1, baselines.reward_gradient: 1, fdfo_published: 2}.get(
        estimator, 8
    )
    assert 0 < pop_gradient(problem.lora).norm() < math.inf
