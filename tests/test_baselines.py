"""Tests of the baselines: against torch.distributions, finite differences, autograd and closed forms.

pytest -q tests/test_baselines.py
"""

import json
import math
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

import train
from fdflow import LoRA, Problem, central_difference, normal, sample
from studies import baselines, toy
from studies.baselines import awm, backprop, fdfo_published, flow_grpo, reinforce, reward_gradient
from support.commands import Parser, add_estimator_arguments
from test_fdflow import constant_flow, draw, estimated, exact_gradient, small_problem

ALL = [awm, backprop, fdfo_published, flow_grpo, reinforce, reward_gradient]


def seed(number):
    return torch.Generator().manual_seed(number)


def test_log_probability_and_its_gradient_are_those_of_the_normal_distribution():
    (x, _), (mean, _), std = draw(5), draw(5, seed=2), 0.3
    mean.requires_grad_()
    ours = baselines.log_probability(x, mean, std)
    theirs = Normal(mean, std).log_prob(x).mean(1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), mean), torch.autograd.grad(theirs.sum(), mean)):
        torch.testing.assert_close(a, b)


def test_noisy_steps_keep_the_marginals():
    # data that is one point m: x_t = (1 - t) m + t eps, and the exact velocity (x - m) / t
    n, m, times = 20_000, 2.0, [1 - i / 400 for i in range(400)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    for t, s in pairwise(times):
        mean, std = baselines.noisy_step(x, (x - m) / t, t, s, 0.7, times[1])
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if s in (times[100], times[200], times[300]):
            # standard errors of 1 / sqrt(n) times 5, and the error of first-order steps, 1 % at 400 of them
            assert x.mean().item() == pytest.approx((1 - s) * m, abs=5 * s / math.sqrt(n) + 0.01)
            assert x.std().item() == pytest.approx(s, rel=5 / math.sqrt(2 * n) + 0.01)
    mean, std = baselines.noisy_step(x, (x - m) / s, 0.5, 0.4, 0.7, 0.9)
    assert std == pytest.approx(0.7 * math.sqrt(0.1))


def test_backprop_is_what_central_differences_tend_to():
    problem, groups = small_problem(), draw(6)
    exact = estimated(problem, backprop, *groups)
    differences = estimated(problem, central_difference, *groups, h=1e-4, coordinates=None)
    torch.testing.assert_close(exact, differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(exact, exact_gradient(problem, *groups))
    # the last step alone moves the image by its length times the velocity's gradient
    last = estimated(problem, backprop, *groups, last_steps=1)
    assert 0 < last.norm() < exact.norm() and not torch.allclose(last, exact)
    torch.testing.assert_close(estimated(problem, backprop, *groups, last_steps=5), exact)


@pytest.mark.parametrize("train_steps", [1, 3])
def test_the_copied_reward_gradient_is_exact_where_the_velocity_is_constant(train_steps):
    problem, layer, w, _ = constant_flow()
    groups = draw(8, len(w))
    copied = estimated(problem, reward_gradient, *groups, train_steps=train_steps)
    torch.testing.assert_close(copied, estimated(problem, backprop, *groups))


@pytest.fixture(scope="module")
def learned():
    """The toy flow with a LoRA away from zero, and the gradient of its reward from 4,096 images."""
    velocity = toy.train_base(steps=800)
    lora = LoRA(velocity, toy.LAYERS, rank=4, generator=seed(0))
    generator = seed(0)
    for p in lora.parameters:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    problem = Problem(velocity, toy.reward, lora, toy.TIMES, batch=4096)
    return problem, exact_gradient(
        problem, torch.randn(4096, 2, generator=generator), torch.zeros(4096)
    )


@pytest.mark.parametrize(
    "estimator, groups, options, least",
    [
        (flow_grpo, 1024, {}, 0.9),
        (flow_grpo, 1024, {"shared_noise": True}, 0.9),
        (reinforce, 8192, {}, 0.9),
        (awm, 1024, {}, 0.65),  # for the likelihood that it raises stands a bound
        (fdfo_published, 4096, {"churn": 0.05, "updates": 1}, 0.9),
        (reward_gradient, 8192, {}, 0.9),  # not a policy gradient
    ],
)
def test_estimates_point_the_way_of_autograd(estimator, groups, options, least, learned):
    problem, exact = learned
    eps = torch.randn(groups, 2, generator=seed(1))
    g = estimated(problem, estimator, eps, torch.zeros(groups), seed(2), **options)
    # from 8,192 images each; over five other seeds the cosines were 0.94 to 0.97, and 0.74 to 0.75 of awm
    assert torch.cosine_similarity(g, exact, dim=0) > least


def test_awm_is_its_closed_form_for_a_constant_velocity():
    problem, layer, w, seen = constant_flow()
    (eps, cond), images, calls = draw(5000, len(w)), [], []
    velocity, reward = problem.velocity, problem.reward
    problem.reward = lambda x, cond: images.append(x) or reward(x, cond)
    problem.velocity = lambda x, t, cond: calls.append((x, t)) or velocity(x, t, cond)
    assert awm(problem, eps, cond, seed(0)) == 8 * 5000
    # v has the gradient 2 / dim E[A (v - noise + x_0)]; A sums to 0 in a group and is independent of the
    # noise, and of x_0 but along w: E[A x_0] = w / |w|^2 E[A R]; 7 / 8 of a standard deviation is E[A R]
    R = seen[0].view(-1, 8)
    expected = 2 / len(w) * w / w.square().sum() * 7 / 8 * R.std(1).mean()
    # an element is a mean of 40,000 numbers with a spread of sqrt(2) 2 / dim; five standard errors
    error = layer.B.grad[:, 0] - expected
    assert error.abs().max() < 5 * 2 / len(w) * math.sqrt(2 / 40000)
    assert expected.norm() > 20 * 2 / len(w) * math.sqrt(2 / 40000)
    # each image at a time of its own, drawn by the time its step covers, with fresh noise
    (x_t, t), times = calls[-1], torch.tensor(problem.times)
    shares = torch.stack([(t == time).double().mean() for time in problem.times[:-1]])
    torch.testing.assert_close(
        shares, -times.diff().double(), rtol=0, atol=4 * 0.5 / math.sqrt(40000)
    )
    noise = (x_t - (1 - t[:, None]) * images[0]) / t[:, None]
    spread = torch.cov(torch.cat([noise, images[0]], 1).T)[: len(w)]
    # standard errors of 1 / 200, twice that of the variances; all 72 within five
    torch.testing.assert_close(
        spread, torch.eye(len(w), 2 * len(w)).double(), rtol=0, atol=5 * 1.5 / 200
    )


def pairs(problem, eps, cond, churn):
    """By hand, from seed 5: images [G, 2, ...], rewards [G, 2], cond and steps (t, x_t, v_ref) of pairs."""
    seeds = torch.randint(2**31, (len(eps),), generator=seed(5)).tolist()
    noise = partial(normal, [seed(number) for number in seeds])
    e, c, steps = eps.repeat_interleave(2, 0), cond.repeat_interleave(2, 0), []
    with torch.no_grad():
        x = sample(problem.velocity, e, c, problem.times, churn, noise, steps)
        R = problem.reward(x, c)
    steps = [(t, *step) for t, step in zip(problem.times, steps)]
    return x.view(-1, 2, *eps.shape[1:]), R.view(-1, 2), c, steps


def test_one_update_of_published_fdfo_is_the_plain_pull_at_all_steps_of_both_branches():
    problem, groups = small_problem(batch=1000), draw(16)
    g = estimated(problem, fdfo_published, *groups, seed(5), churn=0.1, updates=1)
    x, R, c, steps = pairs(problem, *groups, 0.1)
    for i in range(16):
        dx, dR = x[i, 0] - x[i, 1], R[i, 0] - R[i, 1]
        for t, x_t, v_ref in steps:
            both = slice(2 * i, 2 * i + 2)
            v = problem.velocity(x_t[both], t, c[both])
            (F.mse_loss(v, v_ref[both] - dR * dx / (dx**2).mean()) / 16 / len(steps)).backward()
    torch.testing.assert_close(g, toy.gradient(problem.lora), rtol=1e-9, atol=1e-12)


def test_the_second_update_of_published_fdfo_is_its_closed_form():
    problem, layer, w, _ = constant_flow()
    (eps, cond), dv, clip = draw(12, len(w)), 0.01 * torch.arange(1.0, 7).double(), 0.03

    def step():  # stands for the optimiser: from now on v = v_ref + dv
        layer.B.data = dv[:, None].clone()
        layer.B.grad = None

    problem.step = step
    fdfo_published(problem, eps, cond, seed(5), churn=0.05, clip=clip, updates=2)
    layer.B.data.zero_()
    again, parts = seed(5), list(zip(eps.chunk(2), cond.chunk(2)))
    rolls = [list(baselines.pair_roll_outs(problem, *part, again, 0.05)) for part in parts]
    _, _, dR, d = rolls[1][0]
    rho = torch.exp(d.square().mean(1) - (dv + d).square().mean(1))
    slope = dR.abs() / clip * (rho - 1) - dR  # of the loss with respect to rho
    expected = (slope * rho)[:, None] * -2 / len(w) * (dv + d)
    assert (rho - 1).abs().max() > clip
    torch.testing.assert_close(layer.B.grad[:, 0], expected.mean(0))


def test_advantages_are_normalised_in_groups():
    problem, (eps, cond) = small_problem(), draw(4)
    reward = problem.reward
    for estimator in (flow_grpo, awm):
        problem.reward = reward
        g = estimated(problem, estimator, eps, cond, seed(0))
        problem.reward = lambda x, c: (
            100 * reward(x, c) + 50 * c
        )  # neither scale nor prompt matters
        again = estimated(problem, estimator, eps, cond, seed(0))
        torch.testing.assert_close(again, g, rtol=1e-2, atol=1e-2 * g.abs().max().item())
    R = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 0.0, 9.0]])
    advantages = torch.tensor(
        [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    )  # a group with a lost reward says nothing
    torch.testing.assert_close(baselines.group_advantages(R), advantages, rtol=1e-3, atol=0)


@pytest.mark.parametrize("noise_level, kl", [(0.7, 0.3), (0.4, 1.0)])
def test_the_kl_of_flow_grpo_is_the_published_one(noise_level, kl):
    problem, layer, w, _ = constant_flow()
    problem.reward = lambda x, cond: torch.ones_like(cond)  # nothing to learn but the pull
    layer.B.data = 0.1 * torch.arange(1.0, len(w) + 1).double()[:, None]  # v - v_base
    flow_grpo(problem, *draw(4, len(w)), seed(0), noise_level=noise_level, kl=kl)
    # mean((mean - mean_base)^2) / (2 sigma^2), a mean over steps; the step's mean moves with v by
    # (s - t) (1 + sigma^2 (1 - t) / 2t)
    slopes = []
    for t, s in pairwise(problem.times):
        variance = noise_level**2 * t / (1 - min(t, 0.8))
        slopes.append(((s - t) * (1 + variance * (1 - t) / (2 * t))) ** 2 / (2 * variance))
    expected = kl * sum(slopes) / 4 * 2 * layer.B.data / len(w)
    torch.testing.assert_close(layer.B.grad, expected)


def test_awm_is_pulled_to_the_base_model_and_to_the_average_of_its_weights():
    problem, layer, w, _ = constant_flow()
    problem.reward = lambda x, cond: torch.ones_like(cond)  # nothing to learn but the pull
    first, second = (
        0.1 * torch.arange(1.0, len(w) + 1).double()[:, None],
        torch.ones(len(w), 1).double(),
    )
    for B, average in ((first, first), (second, 0.3 * first + 0.7 * second)):
        layer.B.data, layer.B.grad = B.clone(), None
        awm(problem, *draw(4, len(w)), seed(0), kl=0.5, average_kl=2.0)
        torch.testing.assert_close(layer.B.grad, 2 / len(w) * (0.5 * B + 2.0 * (B - average)))


def test_the_generalized_huber_loss_of_awm_weighs_errors_down():
    problem, layer, w, seen = constant_flow()
    images, calls, velocity, reward = [], [], problem.velocity, problem.reward
    problem.reward = lambda x, cond: images.append(x) or reward(x, cond)
    problem.velocity = lambda x, t, cond: calls.append((x, t)) or velocity(x, t, cond)
    awm(problem, *draw(20, len(w)), seed(0), generalized_huber=True)
    (x_t, t), A = calls[-1], baselines.group_advantages(seen[0].view(-1, 8))
    error = velocity(x_t, t, None).detach() - (x_t - images[0]) / t[:, None]  # v - (noise - x_0)
    # d/dv of 4 t mean(error^2)^(1/4) is t mean(error^2)^(-3/4) 2 error / dim
    expected = (A * t * error.square().mean(1) ** -0.75)[:, None] * 2 * error / len(w)
    torch.testing.assert_close(layer.B.grad[:, 0], expected.mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("estimator", [fdfo_published, flow_grpo])
def test_updates_step_in_between(estimator):
    problem, groups, steps = small_problem(), draw(6), []
    problem.step = lambda: steps.append(toy.gradient(problem.lora))
    last = estimated(problem, estimator, *groups, seed(0), updates=3)
    assert len(steps) == 2 and all(g.norm() > 0 for g in (*steps, last))


def test_running_means_are_kept_in_the_memory_and_a_lost_reward_does_not_spoil_them():
    problem, (eps, _) = small_problem(), draw(3)
    rewards = iter([[1.0, 2.0, torch.nan], [3.0, torch.nan, torch.nan]])
    problem.reward = lambda x, cond: torch.tensor(next(rewards)).double()
    for _ in range(2):
        reinforce(problem, eps, torch.arange(3), seed(0))
    every = 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3
    assert problem.memory == pytest.approx({0: 0.9 * 1 + 0.1 * 3, 1: 2.0, "all": every})
    assert all(p.grad.norm() > 0 and p.grad.isfinite().all() for p in problem.lora.parameters)


def test_a_lost_reward_adds_nothing_to_an_exact_gradient():
    problem, (eps, cond) = small_problem(), draw(6)
    reward = problem.reward
    for estimator in (backprop, reward_gradient):
        problem.reward = reward
        rest = estimated(problem, estimator, eps[:-1], cond[:-1], seed(0)) * 5 / 6
        problem.reward = lambda x, c: torch.where(c == cond[-1], torch.nan, reward(x, c))
        torch.testing.assert_close(estimated(problem, estimator, eps, cond, seed(0)), rest)


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("train_steps", [None, 2])
def test_groups_start_from_the_same_noise_or_not_and_train_as_many_steps(shared_noise, train_steps):
    problem, (eps, cond), starts, trained = small_problem(), draw(4), [], []
    velocity = problem.velocity

    def spy(x, t, c):
        (trained if torch.is_grad_enabled() else starts).append(x)
        return velocity(x, t, c)

    problem.velocity = spy
    flow_grpo(
        problem, eps, cond, seed(0), branches=3, shared_noise=shared_noise, train_steps=train_steps
    )
    assert len(starts) == 5 and len(trained) == (train_steps or 5)
    same = starts[0] == eps.repeat_interleave(3, 0)
    assert same.all() if shared_noise else not same.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_clipping_stops_what_went_far_enough(advantage, shift):
    problem, groups = small_problem(), draw(4)
    rolls = list(baselines.noisy_roll_outs(problem, *groups, seed(0), 2, False, 0.7, None))
    # now the ratio is exp(shift)
    rolls = [
        (
            c,
            torch.full((len(c),), advantage).double(),
            [(*step, before - shift) for *step, before in steps],
        )
        for c, _, steps in rolls
    ]
    baselines.policy_gradient(problem, rolls, 0.7, clip=0.1)
    still = any(p.grad.norm() > 0 for p in problem.lora.parameters)
    assert still == (advantage * shift < 0)


@pytest.mark.parametrize("estimator", [awm, backprop, fdfo_published, flow_grpo, reward_gradient])
def test_the_size_of_a_micro_batch_does_not_matter(estimator):
    results = [
        estimated(small_problem(batch=batch), estimator, *draw(6), seed(0)) for batch in (1000, 9)
    ]
    torch.testing.assert_close(*results)


def test_rewards_without_gradient_are_refused():
    problem, groups = small_problem(), draw(4)
    problem.reward = lambda x, cond: x.detach()[:, 0]
    for estimator in (backprop, reward_gradient):
        with pytest.raises(ValueError, match="no gradient"):
            estimator(problem, *groups)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for estimator in ALL:
        with pytest.raises(ValueError, match="one process"):
            estimator(small_problem(), *draw(4))


def test_every_option_is_a_flag_with_a_help_text():
    for estimator in ALL:
        parser = Parser()
        add_estimator_arguments(parser, estimator.__name__, estimator)
        texts = [action.help for action in parser._actions if action.dest != "help"]
        assert texts and not any(text.startswith("(default") for text in texts)


def test_help_texts_may_have_percent_signs():
    def estimator(problem, eps, cond, generator, h: float = 0.1):
        """h: 100 % of %(x)s"""

    parser = Parser()
    add_estimator_arguments(parser, "estimator", estimator)
    assert "100 % of %(x)s (default 0.1)" in parser.format_help()


def metrics(monkeypatch, flags):
    """The records of a small run of train.py in the current folder."""
    small = "--prompts prompts.txt --pairs 4 --steps 2 --name x --reward clip+brightness"
    monkeypatch.setattr(
        "support.run.signal.signal", lambda *args: None
    )  # Ctrl-C still stops pytest
    monkeypatch.setattr(sys, "argv", ["train.py", *small.split(), *flags.split()])
    train.main()
    with open("runs/x/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


FILE = baselines.__file__


@pytest.mark.parametrize(
    "flags",
    [
        "awm",
        "flow_grpo --shared-noise --branches 3",
        "backprop",
        "reward_gradient",
        "fdfo_published",
    ],
)
def test_baselines_train_from_the_command_line(flags, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    monkeypatch.chdir(tmp_path)
    last = metrics(monkeypatch, f"--estimator {FILE}:{flags} --iterations 2")[-1]
    images = {"awm": 8, "fdfo_published": 2, "backprop": 1, "reward_gradient": 1}.get(flags, 3)
    assert last["images"] == 2 * 4 * images and last["drift"] > 0 and last["grad_norm"] > 0


@pytest.mark.parametrize("flags", ["reinforce", "awm --branches 2 --average-kl 1"])
def test_what_an_estimator_remembers_is_resumed(flags, tmp_path, monkeypatch):
    runs = []
    for folder, parts in (("whole", ["3"]), ("parts", ["2", "3 --resume"])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text("sun\nrobot")
        monkeypatch.chdir(tmp_path / folder)
        for iterations in parts:
            records = metrics(monkeypatch, f"--estimator {FILE}:{flags} --iterations {iterations}")
        runs.append([(r["evaluations"], r["reward"], r["grad_norm"]) for r in records[1:]])
    assert runs[0] == runs[1] and len(runs[0]) == 3
