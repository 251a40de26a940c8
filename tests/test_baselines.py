"""Tests of the baselines: against torch.distributions, finite differences, and autograd on toy flows.

pytest -q test_baselines.py
"""

import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

import baselines
import toy
import train
from baselines import backprop, flow_grpo, reinforce, reward_gradient
from errors import UserError
from fdflow import LoRA, Problem, central_difference
from test_fdflow import constant_flow, draw, estimated, exact_gradient, small_problem


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
    torch.testing.assert_close(
        exact, estimated(problem, central_difference, *groups, h=1e-4), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(exact, exact_gradient(problem, *groups))
    problem.batch = 2  # of micro-batches, the same
    torch.testing.assert_close(estimated(problem, backprop, *groups), exact)
    # the last step alone moves the image by its length times the velocity's gradient
    last = estimated(problem, backprop, *groups, last_steps=1)
    assert 0 < last.norm() < exact.norm() and not torch.allclose(last, exact)
    torch.testing.assert_close(estimated(problem, backprop, *groups, last_steps=5), exact)


def test_the_copied_reward_gradient_is_exact_where_the_velocity_is_constant():
    problem, layer, w, _ = constant_flow()
    groups = draw(8, len(w))
    copied = estimated(problem, reward_gradient, *groups)
    torch.testing.assert_close(copied, estimated(problem, backprop, *groups))
    # on a curved flow it only points the same way
    problem, groups = small_problem(), draw(64)
    copied, exact = estimated(problem, reward_gradient, *groups), exact_gradient(problem, *groups)
    assert 0.3 < torch.cosine_similarity(copied, exact, dim=0) < 0.999


@pytest.mark.parametrize("name", ["flow-grpo", "shared noise", "reinforce"])
def test_policy_gradients_point_the_way_of_autograd(name):
    torch.set_num_threads(1)  # so small a network only loses by two
    velocity = toy.train_base(steps=800)
    lora = LoRA(velocity, toy.LAYERS, rank=4, generator=torch.Generator().manual_seed(0))
    problem = Problem(velocity, toy.reward, lora, toy.TIMES, batch=4096)
    generator = torch.Generator().manual_seed(0)
    for p in lora.parameters:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    estimator, groups = {
        "flow-grpo": (lambda *args: flow_grpo(*args, branches=8), 1024),
        "shared noise": (lambda *args: flow_grpo(*args, branches=8, shared_noise=True), 1024),
        "reinforce": (reinforce, 8192),
    }[name]
    exact = exact_gradient(problem, torch.randn(4096, 2, generator=generator), torch.zeros(4096))
    eps = torch.randn(groups, 2, generator=generator)
    g = estimated(problem, estimator, eps, torch.zeros(groups), generator)
    # 8,192 images; another random batch gives a cosine that differs by about 0.1
    assert torch.cosine_similarity(g, exact, dim=0) > 0.4


def test_advantages_of_flow_grpo_are_normalised_in_groups():
    problem, (eps, cond) = small_problem(), draw(4)
    g = estimated(problem, flow_grpo, eps, cond, torch.Generator().manual_seed(0))
    reward = problem.reward
    problem.reward = lambda x, c: 100 * reward(x, c) + 50 * c  # neither scale nor prompt matters
    again = estimated(problem, flow_grpo, eps, cond, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, g, rtol=1e-2, atol=1e-2 * g.abs().max().item())
    problem.reward = lambda x, c: torch.where(c == cond[0], torch.nan, reward(x, c))
    assert estimated(problem, flow_grpo, eps, cond, torch.Generator().manual_seed(0)).isfinite().all()


def test_a_lost_reward_does_not_spoil_the_running_means():
    problem, (eps, cond), means = small_problem(), draw(6), {}
    reward = problem.reward
    problem.reward = lambda x, c: torch.where(c == cond[0], torch.nan, reward(x, c))
    for _ in range(2):
        reinforce(problem, eps, cond, torch.Generator().manual_seed(0), baselines=means)
    assert len(means) == 5 + 1 and all(math.isfinite(mean) for mean in means.values())
    assert all(p.grad.norm() > 0 and p.grad.isfinite().all() for p in problem.lora.parameters)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_clipping_stops_what_went_far_enough(advantage, shift):
    problem, groups = small_problem(), draw(4)
    records = baselines.noisy_roll_out(problem, *groups, None, 2, False, 0.7, None)
    for r in records:
        r["A"] = torch.full((len(r["cond"]),), advantage).double()
        r["steps"] = [(*step, before - shift) for *step, before in r["steps"]]  # now the ratio is exp(shift)
    baselines.climb(problem, records, 0.7, clip=0.1, kl=0.0)
    still = any(p.grad.norm() > 0 for p in problem.lora.parameters)
    assert still == (advantage * shift < 0)


def test_rewards_without_gradient_are_refused():
    problem, groups = small_problem(), draw(4)
    problem.reward = lambda x, cond: x.detach()[:, 0]
    for estimator in (backprop, reward_gradient):
        with pytest.raises(UserError, match="no gradient"):
            estimator(problem, *groups)


@pytest.mark.parametrize(
    "name", ["flow-grpo", "flow-grpo --shared-noise", "reinforce", "backprop", "reward-gradient"]
)
def test_baselines_train_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--prompts prompts.txt --pairs 4 --steps 2 --iterations 2 --name x --reward clip+brightness"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "catch_interrupt", list)  # or Ctrl-C would no longer stop pytest
    monkeypatch.setattr(sys, "argv", ["train.py", "--estimator", *name.split(), *small.split()])
    train.main()
    last = json.loads((tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 2 * (32 if "grpo" in name else 4) and last["drift"] > 0 and last["grad_norm"] > 0
