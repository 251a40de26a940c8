"""What fdfo is compared with, each an estimator with the contract of those in fdflow.py.

python train.py --estimator studies/baselines.py:flow_grpo --branches 8 --shared-noise

    fdfo_published    FDFO at the very steps that led to the images, with a trust region
    flow_grpo         the policy gradient of a sampler with noisy steps
    awm, v_grpo       policy gradients with a flow-matching loss in place of the likelihood
    backprop          the exact gradient, through the reward and the sampler
    reward_gradient   FDFO with the exact gradient of the reward with respect to the image

They run in one process. The last two need a reward that can be differentiated.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from fdflow import churned_step, draw_times, micro_batches, noised, normal, sample
from support.errors import UserError

# ---- what they share


def seeded_batches(problem, branches, eps, cond, generator):
    """Yield micro-batches of groups: eps [G, ...], cond [G, ...] and a generator for each group.

    A group draws the same noise in whichever micro-batch it comes.
    """
    if dist.is_initialized():
        raise UserError("this estimator runs in one process: start it without torchrun")

    all_seeds = torch.randint(2**31, (len(eps),), generator=generator, device=eps.device)
    for e, c, seeds in micro_batches(problem.batch // branches, eps, cond, all_seeds):
        generators = [torch.Generator(e.device).manual_seed(seed) for seed in seeds.tolist()]
        yield e, c, generators


def one_part_each_update(problem, roll_outs, eps, cond, updates):
    """Sample all groups with the same model, then yield a part of the roll-outs for each update.

    The optimiser steps between two parts.
    """
    parts = []
    for e, c in zip(eps.chunk(updates), cond.chunk(updates)):
        parts.append(list(roll_outs(e, c)))

    for number, rolls in enumerate(parts):
        if number > 0:
            problem.step()
        yield rolls


def group_advantages(R):
    """Return how much better each image is than its group [G K], from rewards R [G, K].

    The reward less the group's mean, over its standard deviation; 0 if the group has lost a reward.
    """
    if R.shape[1] < 2:
        raise UserError("--branches 1: advantages compare the images of a group, at least 2")
    A = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)
    return A.flatten().nan_to_num()


# ---- FDFO as published


class PairRollout(NamedTuple):
    """What is left to train on of a micro-batch of pairs, B images side by side."""

    cond: torch.Tensor  # [B, ...]
    steps: list  # (x_t, v) of every step
    dR: torch.Tensor  # [B], the difference of the pair's rewards
    d: torch.Tensor  # [B, D], the difference of its images, over the mean square of that


@torch.no_grad()
def pair_roll_outs(problem, eps, cond, generator, churn):
    """Sample and score pairs; yield a PairRollout for each micro-batch."""
    for e, c, generators in seeded_batches(problem, 2, eps, cond, generator):
        e = e.repeat_interleave(2, 0)
        c = c.repeat_interleave(2, 0)
        steps = []
        x = sample(problem.velocity, e, c, problem.times, churn, partial(normal, generators), steps)

        R = problem.reward(x, c)
        dR = (R[::2] - R[1::2]).nan_to_num()  # a pair that has lost a reward says nothing
        dx = (x[::2] - x[1::2]).flatten(1)
        d = dx / (dx**2).mean(1, keepdim=True).clamp(min=1e-12)
        yield PairRollout(c, steps, dR.repeat_interleave(2), d.repeat_interleave(2, 0))


def spo_loss(dR, d, dv, clip):
    """Return SPO's surrogate [B] (Xie et al. 2024): a policy gradient with a soft trust region.

    -dR rho + |dR| / (2 clip) (rho - 1)^2, where rho = exp(mean(d^2) - mean((dv + d)^2)) stands for
    the ratio of policies: dv [B, D] is how far the velocity has moved from v_ref, and toward -d it
    makes the image more likely. At dv = 0, where rho is 1, the gradient is that of the plain pull
    toward v_ref - dR d, whatever `clip` is.
    """
    rho = torch.exp(-(dv * (dv + 2 * d)).mean(1))  # multiplied out, since d is large and dv small
    return -dR * rho + dR.abs() / (2 * clip) * (rho - 1) ** 2


def fdfo_published(
    problem, eps, cond, generator=None, churn: float = 0.0025, clip: float = 0.03, updates: int = 4
):
    """FDFO as published: train both branches of a pair, at the very steps that led to their images.

    With dR = R_1 - R_2 and d = (x_1 - x_2) / mean((x_1 - x_2)^2) every velocity is pulled toward
    v_ref - dR d, in the trust region of `spo_loss`.

    churn: strength of the fresh noise in every step, by which the branches differ
    clip: width of the trust region, for several updates
    updates: optimiser steps for one roll-out, each on its part of the groups
    """
    roll_outs = partial(pair_roll_outs, problem, generator=generator, churn=churn)

    for rolls in one_part_each_update(problem, roll_outs, eps, cond, updates):
        images = sum(len(roll.dR) for roll in rolls)
        for roll in rolls:
            for t, (x, v_ref) in zip(problem.times, roll.steps):
                dv = (problem.velocity(x, t, roll.cond) - v_ref).flatten(1)
                loss = spo_loss(roll.dR, roll.d, dv, clip).sum()
                (loss / images / len(roll.steps)).backward()
    return 2 * len(eps)


# ---- a policy gradient over noisy steps


def sde_step(x, v, t, s, noise_level, t_max):
    """Return mean [B, ...] and standard deviation of x_s after an Euler step of Flow-GRPO's SDE.

    Its diffusion coefficient is sigma = noise_level sqrt(t / (1 - t)), infinite at t = 1, where
    t_max stands for t: the second time of the schedule. The SDE keeps the marginals, its steps do
    so only if they are short: after few steps the image is still noisy, as the table in
    tests/test_baselines.py shows. Liu et al. 2025, arXiv:2505.05470.
    """
    sigma = noise_level * math.sqrt(t / (1 - min(t, t_max)))
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return mean, sigma * math.sqrt(t - s)


def cps_step(x, v, t, s, noise_level):
    """Return mean [B, ...] and standard deviation of x_s after a coefficients-preserving step.

    x_s = (1 - s) x_0 + s (cos(a) x_1 + sin(a) xi), with the predicted image x_0 and noise x_1, new
    noise xi, and the angle a = noise_level pi / 2. The noise adds up to level s however long the
    step is, and the last step leaves none. But x_0 is a mean over the images that x_t may become,
    so every step loses some of the spread between images, and shorter steps lose no less: at level
    0.7 gaussian data keep 85 % of their standard deviation. Flow-CPS, arXiv:2509.05952.
    """
    angle = noise_level * math.pi / 2
    x_0 = x - t * v
    x_1 = x + (1 - t) * v
    return (1 - s) * x_0 + s * math.cos(angle) * x_1, s * math.sin(angle)


def log_probability(x, mean, std):
    """Return the log of the normal density of x [B, ...], a mean over its elements: [B]."""
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


class NoisyRollout(NamedTuple):
    """What is left to train on of a micro-batch of B images that were sampled with noisy steps."""

    cond: torch.Tensor  # [B, ...]
    A: torch.Tensor  # [B], the advantages
    steps: list  # those trained: (t, s, x_t, x_s, log p(x_s | x_t) [B])


@torch.no_grad()
def noisy_roll_outs(problem, eps, cond, generator, branches, shared_noise, step, train_steps):
    """Sample and score groups with noisy steps; yield a NoisyRollout for each micro-batch.

    step: a function (x_t, v, t, s) -> mean and standard deviation of x_s
    """
    for e, c, generators in seeded_batches(problem, branches, eps, cond, generator):
        x = e.repeat_interleave(branches, 0)
        c = c.repeat_interleave(branches, 0)
        if not shared_noise:
            x = normal(generators, x)
        x = problem.times[0] * x

        steps = []
        for t, s in pairwise(problem.times):
            mean, std = step(x, problem.velocity(x, t, c), t, s)
            x_s = mean + std * normal(generators, x)
            if std > 0:  # else no chance was involved, so there is nothing to make more likely
                steps.append((t, s, x, x_s, log_probability(x_s, mean, std)))
            x = x_s
        A = group_advantages(problem.reward(x, c).view(-1, branches))

        # train at some steps, drawn at random
        order = torch.randperm(len(steps), generator=generators[0], device=x.device)
        yield NoisyRollout(c, A, [steps[i] for i in order[:train_steps].tolist()])


def policy_gradient(problem, rolls, step, clip, kl=0.0):
    """Accumulate the gradient of PPO's clipped surrogate (Schulman et al. 2017) at noisy steps."""
    images = sum(len(roll.A) for roll in rolls)
    for roll in rolls:
        for t, s, x, x_s, log_p in roll.steps:
            mean, std = step(x, problem.velocity(x, t, roll.cond), t, s)
            rho = (log_probability(x_s, mean, std) - log_p).exp()
            loss = -torch.minimum(rho * roll.A, rho.clamp(1 - clip, 1 + clip) * roll.A)

            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    base, _ = step(x, problem.velocity(x, t, roll.cond), t, s)
                divergence = ((mean - base) ** 2 / (2 * std**2)).flatten(1).mean(1)
                # as published, whose 2 sigma^2 is 2 std^2 over the length of the step
                loss = loss + kl * (t - s) * divergence

            (loss.sum() / images / len(roll.steps)).backward()


def flow_grpo(
    problem,
    eps,
    cond,
    generator=None,
    branches: int = 8,
    shared_noise: bool = False,
    dynamics: str = "sde",
    noise_level: float = 0.7,
    train_steps: int | None = None,
    clip: float = 1e-4,
    kl: float = 0.0,
    updates: int = 1,
):
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): a policy gradient over noisy steps.

    Each prompt has `branches` images, and the steps that led to the better ones become more likely.
    The noisy steps are those of `sde_step`, as published, or of `cps_step`. Flow-CPS publishes
    -(x_s - mean)^2 in place of the log-probability, which weights the steps otherwise. Here both
    have the normal density, and with it the policy gradient: on the toy of studies/toy.py its
    cosine with the exact gradient is 0.95, and 0.64 in the other form.

    branches: images of a group
    shared_noise: start the images of a group from the same noise instead of each from its own
    dynamics: the noisy steps, sde or cps
    noise_level: how noisy the steps are; for cps 1 at most
    train_steps: random steps trained of each trajectory (default all)
    clip: width of the trust region
    kl: weight of the pull to the base model
    updates: optimiser steps for one roll-out, each on its part of the groups
    """
    if dynamics not in ("sde", "cps"):
        raise UserError(f"--dynamics {dynamics}: it is sde or cps")
    if noise_level == 0 or (dynamics == "cps" and noise_level > 1):
        raise UserError(f"--noise-level {noise_level}: more than 0, and for cps 1 at most")
    if dynamics == "cps" and len(problem.times) < 3:
        raise UserError("--dynamics cps: the last step has no noise, so it takes at least 2 steps")

    step = partial(sde_step, noise_level=noise_level, t_max=problem.times[1])
    if dynamics == "cps":
        step = partial(cps_step, noise_level=noise_level)

    def roll_outs(e, c):
        return noisy_roll_outs(problem, e, c, generator, branches, shared_noise, step, train_steps)

    for rolls in one_part_each_update(problem, roll_outs, eps, cond, updates):
        policy_gradient(problem, rolls, step, clip, kl)
    return branches * len(eps)


# ---- policy gradients with a flow-matching loss in place of the likelihood


@torch.no_grad()
def clean_roll_outs(problem, eps, cond, generator, branches):
    """Sample groups without noise in the steps, each image from noise of its own, and score them.

    Yield for each micro-batch of B images x_0 [B, ...], cond [B, ...], advantages [B], and a
    generator for each group.
    """
    for e, c, generators in seeded_batches(problem, branches, eps, cond, generator):
        e = normal(generators, e.repeat_interleave(branches, 0))
        c = c.repeat_interleave(branches, 0)
        x_0 = sample(problem.velocity, e, c, problem.times)
        yield x_0, c, group_advantages(problem.reward(x_0, c).view(-1, branches)), generators


def awm(
    problem,
    eps,
    cond,
    generator=None,
    branches: int = 8,
    times_per_image: int = 1,
    generalized_huber: bool = False,
    kl: float = 0.0,
    average_kl: float = 0.0,
):
    """Advantage Weighted Matching (Xue et al. 2025, arXiv:2509.25050), on-policy.

    Flow matching on the model's own images x_0, weighted by their advantages: the loss is
    A |v(x_t, t) - (noise - x_0)|^2 with fresh noise, x_t = (1 - t) x_0 + t noise. Images better
    than their group become more likely, and the sampler needs no noise. DiffusionNFT
    (arXiv:2509.16117) is a close relative. As published
    (github.com/scxue/advantage_weighted_matching): --generalized-huber --kl 0.003 --average-kl 1.

    branches: images of a group, each from its own noise
    times_per_image: random times at which each image is matched
    generalized_huber: match by 4 t |v - (noise - x_0)|^(1/2), which large errors move less
    kl: weight of the pull to the base model
    average_kl: weight of the pull to the running average of the weights, whose decay is 0.3
    """
    # other models that it is pulled to, with the weights of the pulls
    pulls = []
    if kl > 0:
        pulls.append((kl, problem.lora.switched_off))
    if average_kl > 0:
        theta = parameters_to_vector(problem.lora.parameters).detach()
        average = 0.3 * problem.memory.get("average", theta).to(theta) + 0.7 * theta
        problem.memory["average"] = average
        pulls.append((average_kl, partial(problem.lora.perturbed, (average - theta)[None])))

    for x_0, c, A, generators in clean_roll_outs(problem, eps, cond, generator, branches):
        of_images = [generators[i // branches] for i in range(len(x_0))]
        for t in draw_times(problem.times, times_per_image, of_images):
            noise = normal(of_images, x_0)
            x_t = noised(x_0, t, noise)
            v = problem.velocity(x_t, t, c)
            error = ((v - (noise - x_0)) ** 2).flatten(1).mean(1)
            loss = A * (4 * t * (error + 1e-6) ** 0.25 if generalized_huber else error)

            for weight, other_model in pulls:
                with torch.no_grad(), other_model():
                    v_other = problem.velocity(x_t, t, c)
                loss = loss + weight * ((v - v_other) ** 2).flatten(1).mean(1)

            (loss.sum() / (times_per_image * branches * len(eps))).backward()
    return branches * len(eps)


def v_grpo(problem, eps, cond, generator=None, branches: int = 8, times_per_image: int = 4):
    """V-GRPO (Tang et al. 2026, arXiv:2604.23380), on-policy; written from the published formulas.

    The logarithm of the likelihood is replaced by minus a flow-matching loss: the squared error of
    the image that is predicted from x_t, over its own mean absolute error. The images of a group
    share times and noise, so that their losses can be compared. Advantages are clipped softly. With
    one update for a roll-out the ratio exp(L_old - L) is 1, so there is nothing else to clip, and
    the gradient is that of A L. The defaults are those of the first stage on SD3.5.

    branches: images of a group, each from its own noise
    times_per_image: random times, spread evenly, at which each image is matched
    """
    for x_0, c, A, generators in clean_roll_outs(problem, eps, cond, generator, branches):
        A = 3 * torch.tanh(A / 3)
        for t in draw_times(problem.times, times_per_image, generators):
            t = t.repeat_interleave(branches)
            noise = normal(generators, x_0[::branches]).repeat_interleave(branches, 0)
            v = problem.velocity(noised(x_0, t, noise), t, c)

            # of the image predicted, x_t - t v, against the real one
            error = t[:, None] * (noise - x_0 - v).flatten(1)
            scale = error.detach().abs().mean(1).clamp(min=1e-5)
            loss = A * (error**2).mean(1) / scale
            (loss.sum() / (times_per_image * branches * len(eps))).backward()
    return branches * len(eps)


# ---- exact gradients


def total_reward(problem, x, cond):
    """Return the sum of the rewards that are not lost, to be differentiated."""
    R = problem.reward(x, cond)
    if not R.requires_grad:
        raise UserError("this reward has no gradient, which the estimator needs: take fdfo or spsa")
    return R.nansum()


def backprop(problem, eps, cond, generator=None, last_steps: int | None = None):
    """Back-propagate the reward through the sampler, or its last steps (DRaFT, Clark et al. 2023).

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
    """FDFO with the exact gradient of the reward in place of the difference: the paper's ablation.

    train_steps: random times at which each image is trained
    """
    for e, c, generators in seeded_batches(problem, 1, eps, cond, generator):
        with torch.no_grad():
            x_0 = sample(problem.velocity, e, c, problem.times)
        (g,) = torch.autograd.grad(total_reward(problem, x_0.requires_grad_(), c), x_0)
        x_0 = x_0.detach()

        for t in draw_times(problem.times, train_steps, generators):
            v = problem.velocity(noised(x_0, t, normal(generators, x_0)), t, c)
            # the image moves along g when its velocity moves along -g
            ((v * g).sum() / (train_steps * len(eps))).backward()
    return len(eps)
