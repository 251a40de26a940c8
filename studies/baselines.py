"""What fdfo is compared with: itself as published, policy gradients, back-propagation, the reward's gradient.

python train.py --estimator studies/baselines.py:flow_grpo --branches 8 --shared-noise

They keep the contract of the estimators in fdflow.py, in one process. The last two differentiate the reward.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from fdflow import churned_step, draw_times, micro_batches, normal, sample


def seeded_batches(problem, branches, eps, cond, generator):
    """Micro-batches (eps [G, ...], cond [G, ...], G generators): every group draws from one of its own."""
    if dist.is_initialized():
        raise ValueError("this estimator runs in one process only")
    seeds = torch.randint(2**31, (len(eps),), generator=generator, device=eps.device)
    for e, c, part in micro_batches(problem.batch // branches, eps, cond, seeds):
        yield e, c, [torch.Generator(e.device).manual_seed(seed) for seed in part.tolist()]


def noised(problem, x_0, n, generators):
    """Images x_0 [B, ...] with fresh noise, at n random times each: n times (t [B], noise, x_t [B, ...])."""
    for t in draw_times(problem.times, n, generators):
        noise = normal(generators, x_0)
        yield t, noise, x_0 + t.view(-1, *[1] * (x_0.dim() - 1)) * (noise - x_0)


@torch.no_grad()
def pair_roll_outs(problem, eps, cond, generator, churn):
    """Sample pairs, and yield for each micro-batch of B images: cond [B, ...], the steps (x_t, v),

    dR [B], how the rewards of an image's pair differ, and d [B, D], how its images do, over its mean square.
    """
    for e, c, generators in seeded_batches(problem, 2, eps, cond, generator):
        e, c, steps = e.repeat_interleave(2, 0), c.repeat_interleave(2, 0), []
        x = sample(problem.velocity, e, c, problem.times, churn, partial(normal, generators), steps)
        R, x = problem.reward(x, c), x.flatten(1)
        dR, dx = (R[::2] - R[1::2]).nan_to_num(), x[::2] - x[1::2]
        d = dx / dx.square().mean(1, keepdim=True).clamp(min=1e-12)
        yield c, steps, dR.repeat_interleave(2), d.repeat_interleave(2, 0)


def spo_loss(dR, d, dv, clip):
    """SPO's surrogate [B] (Xie et al. 2024), a soft trust region: -dR rho + |dR| / (2 clip) (rho - 1)^2.

    rho = exp(mean(d^2) - mean((dv + d)^2)) stands for the ratio of policies: dv [B, D] is how far the
    velocity has moved from v_ref, and toward -d it makes the image more likely. At dv = 0, where rho is 1,
    the gradient is that of the plain pull toward v_ref - dR d, whatever `clip` is.
    """
    rho = torch.exp(-(dv * (dv + 2 * d)).mean(1))  # multiplied out, since d is large and dv small
    return -dR * rho + dR.abs() / (2 * clip) * (rho - 1) ** 2


def fdfo_published(problem, eps, cond, generator=None, churn: float = 0.0025, clip: float = 0.03,
                   updates: int = 4):  # fmt: skip
    """FDFO as published: both branches of a pair are trained, at the very steps that led to their images.

    With dR = R_1 - R_2 and d = (x_1 - x_2) / mean((x_1 - x_2)^2) every velocity is pulled toward
    v_ref - dR d, in the trust region of `spo_loss`.

    churn: how far the branches part: the fresh noise in every step
    clip: with several updates, the width of the trust region
    updates: optimiser steps for one roll-out, each on its part of the groups
    """
    parts = zip(eps.chunk(updates), cond.chunk(updates))
    for number, rolls in enumerate(
        [list(pair_roll_outs(problem, e, c, generator, churn)) for e, c in parts]
    ):
        if number > 0:
            problem.step()
        images = sum(len(dR) for *_, dR, _ in rolls)
        for c, steps, dR, d in rolls:
            for t, (x, v_ref) in zip(problem.times, steps):
                dv = (problem.velocity(x, t, c) - v_ref).flatten(1)
                (spo_loss(dR, d, dv, clip).sum() / images / len(steps)).backward()
    return 2 * len(eps)


def group_advantages(R):
    """Rewards [G, K] less the group's mean, over its standard deviation: [G K]; 0 where a reward is lost."""
    return ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)).flatten().nan_to_num()


def noisy_step(x, v, t, s, noise_level, t_max):
    """Mean [B, ...] and standard deviation of x_s after a noisy step from t to s that keeps the marginals.

    Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), whose diffusion coefficient is sigma = noise_level
    sqrt(t / (1 - t)); t_max, the second time of the schedule, stands for t = 1, where sigma is infinite.
    """
    sigma = noise_level * math.sqrt(t / (1 - min(t, t_max)))
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return mean, sigma * math.sqrt(t - s)


def log_probability(x, mean, std):
    """The logarithm of the normal density of x [B, ...], mean over its elements as in Flow-GRPO: [B]."""
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


@torch.no_grad()
def noisy_roll_outs(
    problem, eps, cond, generator, branches, shared_noise, noise_level, train_steps
):
    """Sample with noisy steps: cond [B, ...], R [G, K], all or random steps (t, s, x_t, x_s, log p [B])."""
    for e, c, generators in seeded_batches(problem, branches, eps, cond, generator):
        x, c, steps = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0), []
        x = problem.times[0] * (x if shared_noise else normal(generators, x))
        for t, s in pairwise(problem.times):
            mean, std = noisy_step(
                x, problem.velocity(x, t, c), t, s, noise_level, problem.times[1]
            )
            x_s = mean + std * normal(generators, x)
            steps.append((t, s, x, x_s, log_probability(x_s, mean, std)))
            x = x_s
        order = torch.randperm(len(steps), generator=generators[0], device=x.device).tolist()
        yield c, problem.reward(x, c).view(-1, branches), [steps[i] for i in order[:train_steps]]


def policy_gradient(problem, rolls, noise_level, clip, kl=0.0):
    """Add the gradient of PPO's clipped surrogate (Schulman et al. 2017); rolls: cond, advantages, steps."""
    images = sum(len(A) for _, A, _ in rolls)
    for c, A, steps in rolls:
        for t, s, x, x_s, before in steps:
            mean, std = noisy_step(
                x, problem.velocity(x, t, c), t, s, noise_level, problem.times[1]
            )
            ratio = (log_probability(x_s, mean, std) - before).exp()
            loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))
            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    base, _ = noisy_step(
                        x, problem.velocity(x, t, c), t, s, noise_level, problem.times[1]
                    )
                # over 2 sigma^2 as published, where the divergence of the two steps has 2 std^2
                loss = loss + kl * (t - s) * ((mean - base) ** 2 / (2 * std**2)).flatten(1).mean(1)
            (loss.sum() / images / len(steps)).backward()


def flow_grpo(problem, eps, cond, generator=None, branches: int = 8, shared_noise: bool = False,
              noise_level: float = 0.7, train_steps: int | None = None, clip: float = 1e-4, kl: float = 0.0,
              updates: int = 1):  # fmt: skip
    """Flow-GRPO (Liu et al. 2025): a policy gradient over noisy steps, with `branches` images of each prompt.

    The advantage of an image is its reward less the group's mean, over the group's standard deviation.

    branches: images of a group
    shared_noise: start the images of a group from the same noise instead of each from its own
    noise_level: of the sampler's noisy steps
    train_steps: random steps trained of each trajectory (default all)
    clip: width of the trust region
    kl: pull to the base model
    updates: optimiser steps for one roll-out, each on its part of the groups
    """
    options = generator, branches, shared_noise, noise_level, train_steps
    parts = zip(eps.chunk(updates), cond.chunk(updates))
    for number, rolls in enumerate(
        [list(noisy_roll_outs(problem, e, c, *options)) for e, c in parts]
    ):
        if number > 0:
            problem.step()
        rolls = [(c, group_advantages(R), steps) for c, R, steps in rolls]
        policy_gradient(problem, rolls, noise_level, clip, kl)
    return branches * len(eps)


def reinforce(
    problem, eps, cond, generator=None, noise_level: float = 0.7, train_steps: int | None = None
):
    """REINFORCE (Williams 1992) over noisy steps, one image to a noise, without groups or clipping.

    The advantage of an image is its reward less the running mean of its prompt, or at first of all prompts.

    noise_level: of the sampler's noisy steps
    train_steps: random steps trained of each trajectory (default all)
    """
    means, rolls = problem.memory, []
    for cond, R, steps in noisy_roll_outs(
        problem, eps, cond, generator, 1, True, noise_level, train_steps
    ):
        rows = list(zip(cond.tolist(), R.flatten().tolist()))
        usual = means.get("all", R.nanmean().item())
        A = R.new_tensor([r - means.get(c, usual) for c, r in rows]).nan_to_num()
        rolls.append((cond, A, steps))
        for c, r in rows:
            for key in (c, "all") if math.isfinite(r) else ():
                means[key] = 0.9 * means.get(key, r) + 0.1 * r
    policy_gradient(problem, rolls, noise_level, clip=math.inf)
    return len(eps)


def awm(problem, eps, cond, generator=None, branches: int = 8, times_per_image: int = 1,
        generalized_huber: bool = False, kl: float = 0.0, average_kl: float = 0.0):  # fmt: skip
    """Advantage Weighted Matching (Xue et al. 2025, arXiv:2509.25050), on-policy.

    Flow matching on the model's own images x_0: the loss is A |v(x_t, t) - (noise - x_0)|^2 with fresh noise,
    x_t = (1 - t) x_0 + t noise, and the advantage A of Flow-GRPO: images better than their group become more
    likely. The sampler needs no noise. DiffusionNFT (arXiv:2509.16117) is a close relative. As published
    (github.com/scxue/advantage_weighted_matching): --generalized-huber --kl 0.003 --average-kl 1.

    branches: images of a group, each from its own noise
    times_per_image: random times at which each image is matched
    generalized_huber: match by 4 t |v - (noise - x_0)|^(1/2), which large errors move less
    kl: pull to the base model
    average_kl: pull to the running average of the weights, whose decay is 0.3
    """
    pulls = [(kl, problem.lora.switched_off)]
    if average_kl > 0:
        theta = parameters_to_vector(problem.lora.parameters).detach()
        average = 0.3 * problem.memory.get("average", theta).to(theta) + 0.7 * theta
        problem.memory["average"] = average
        pulls.append((average_kl, partial(problem.lora.perturbed, (average - theta)[None])))
    for e, c, generators in seeded_batches(problem, branches, eps, cond, generator):
        e, c = (
            normal(generators, e.repeat_interleave(branches, 0)),
            c.repeat_interleave(branches, 0),
        )
        with torch.no_grad():
            x_0 = sample(problem.velocity, e, c, problem.times)
            A = group_advantages(problem.reward(x_0, c).view(-1, branches))
        each = [g for g in generators for _ in range(branches)]
        for t, noise, x_t in noised(problem, x_0, times_per_image, each):
            v = problem.velocity(x_t, t, c)
            error = ((v - (noise - x_0)) ** 2).flatten(1).mean(1)
            loss = A * (4 * t * (error + 1e-6) ** 0.25 if generalized_huber else error)
            for weight, other in pulls:
                if weight > 0:
                    with torch.no_grad(), other():
                        v_other = problem.velocity(x_t, t, c)
                    loss = loss + weight * ((v - v_other) ** 2).flatten(1).mean(1)
            (loss.sum() / (times_per_image * branches * len(eps))).backward()
    return branches * len(eps)


def backprop(problem, eps, cond, generator=None, last_steps: int | None = None):
    """The gradient of the reward through the sampler, or its last steps only (DRaFT, Clark et al. 2023).

    last_steps: steps differentiated (default all)
    """
    steps = list(pairwise(problem.times))
    first = len(steps) - (last_steps or len(steps))
    for e, c, _ in seeded_batches(problem, 1, eps, cond, generator):
        x = problem.times[0] * e
        for i, (t, s) in enumerate(steps):
            with torch.set_grad_enabled(i >= first):
                x = churned_step(x, problem.velocity(x, t, c), t, s)
        (-total_reward(problem, x, c) / len(eps)).backward()
    return len(eps)


def reward_gradient(problem, eps, cond, generator=None, train_steps: int = 1):
    """FDFO with the exact reward gradient in image space in place of the difference: the paper's ablation.

    train_steps: random times at which each image is trained
    """
    for e, c, generators in seeded_batches(problem, 1, eps, cond, generator):
        with torch.no_grad():
            x_0 = sample(problem.velocity, e, c, problem.times)
        (g,) = torch.autograd.grad(total_reward(problem, x_0.requires_grad_(), c), x_0)
        for t, _, x_t in noised(problem, x_0.detach(), train_steps, generators):
            # the image moves along g when its velocity moves along -g
            ((problem.velocity(x_t, t, c) * g).sum() / (train_steps * len(eps))).backward()
    return len(eps)


def total_reward(problem, x, cond):
    """The sum of the rewards that are not lost, to be differentiated. ValueError if they have no gradient."""
    R = problem.reward(x, cond)
    if not R.requires_grad:
        raise ValueError(
            "this reward has no gradient, which the estimator needs: take fdfo or spsa"
        )
    return R.nansum()
