"""What finite differences are compared with: policy gradients, back-propagation, the copied reward gradient.

They keep the contract of the estimators in fdflow.py, for one process. The last two differentiate the reward.
"""

import math
from itertools import pairwise

import torch

from errors import UserError
from fdflow import churned_step, random_seeds, sample, step_weights


def noisy_step(x, v, t, s, level, t_max):
    """Mean [B, ...] and standard deviation of x_s after a noisy step from t to s that keeps the marginals.

    Flow-GRPO (Liu et al. 2025, arXiv:2505.05470) with sigma_t = level sqrt(t / (1 - t)), where t_max, the
    second time of the schedule, stands for t = 1, since sigma would be infinite.
    """
    sigma = level * math.sqrt(t / (1 - min(t, t_max)))
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return mean, sigma * math.sqrt(t - s)


def log_probability(x, mean, std):
    """The logarithm of the normal density of x [B, ...], mean over its elements as in Flow-GRPO: [B]."""
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


@torch.no_grad()
def noisy_roll_out(problem, eps, cond, generator, branches, shared_noise, level, train_steps):
    """Sample with noisy steps; a record for each micro-batch: cond [B], R [B / branches, branches] and steps

    (t, s, x_t, x_s, log probability): all, or train_steps of them at random.
    """
    records, size = [], max(1, problem.batch // branches)
    for e, c, seed in zip(eps.split(size), cond.split(size), random_seeds(len(eps), generator)):
        x, c, steps = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0), []
        draws = torch.Generator(x.device).manual_seed(seed)

        def noise():
            return torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)  # noqa: B023

        x = problem.times[0] * (x if shared_noise else noise())
        for t, s in pairwise(problem.times):
            mean, std = noisy_step(x, problem.velocity(x, t, c), t, s, level, problem.times[1])
            x_s = mean + std * noise()
            steps.append((t, s, x, x_s, log_probability(x_s, mean, std)))
            x = x_s
        order = torch.randperm(len(steps), generator=draws, device=x.device)[:train_steps].tolist()
        R = problem.reward(x, c).view(-1, branches)
        records.append({"cond": c, "R": R, "steps": [steps[i] for i in order]})
    return records


def climb(problem, records, level, clip, kl):
    """Add the gradient of PPO's clipped surrogate (Schulman et al. 2017), of advantages r["A"], to .grad."""
    images = sum(len(r["A"]) for r in records)
    for r in records:
        for t, s, x, x_s, before in r["steps"]:
            mean, std = noisy_step(x, problem.velocity(x, t, r["cond"]), t, s, level, problem.times[1])
            ratio = (log_probability(x_s, mean, std) - before).exp()
            loss = torch.maximum(-r["A"] * ratio, -r["A"] * ratio.clamp(1 - clip, 1 + clip))
            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    v = problem.velocity(x, t, r["cond"])
                base, _ = noisy_step(x, v, t, s, level, problem.times[1])
                loss = loss + kl * ((mean - base) ** 2 / (2 * std**2)).flatten(1).mean(1)
            (loss.sum() / images / len(r["steps"])).backward()


def flow_grpo(problem, eps, cond, generator=None, branches=8, shared_noise=False, level=0.7, clip=1e-4,
              kl=0.0, updates=1, step=None, train_steps=None):  # fmt: skip
    """Flow-GRPO (Liu et al. 2025): a policy gradient over noisy steps, with `branches` images of each prompt.

    The advantage of an image is its reward less the group's mean, over the group's standard deviation.
    shared_noise: the images of a group start from the same noise instead of each from its own.
    """
    settings = generator, branches, shared_noise, level, train_steps
    shares = zip(eps.chunk(updates), cond.chunk(updates))
    shares = [noisy_roll_out(problem, e, c, *settings) for e, c in shares]
    for i, share in enumerate(shares):
        if i > 0:
            step()
        for r in share:
            spread = r["R"] - r["R"].mean(1, keepdim=True)
            r["A"] = (spread / (r["R"].std(1, keepdim=True) + 1e-4)).flatten().nan_to_num()
        climb(problem, share, level, clip, kl)
    return {"images": branches * len(eps)}


def reinforce(problem, eps, cond, generator=None, level=0.7, train_steps=None, baselines=None):
    """REINFORCE (Williams 1992) over noisy steps, one image to a noise, without groups or clipping.

    The advantage of an image is its reward less the running mean of its prompt, or of all while that has
    none; `baselines` is the dict that keeps these from call to call.
    """
    records = noisy_roll_out(problem, eps, cond, generator, 1, True, level, train_steps)
    baselines = {} if baselines is None else baselines
    for r in records:
        rows = list(zip(r["cond"].tolist(), r["R"].flatten().tolist()))
        usual = baselines.get("all", r["R"].nanmean().item())
        r["A"] = torch.tensor([R - baselines.get(c, usual) for c, R in rows]).to(r["R"]).nan_to_num()
        for c, R in rows:
            for key in (c, "all") if math.isfinite(R) else ():
                baselines[key] = 0.9 * baselines.get(key, R) + 0.1 * R
    climb(problem, records, level, math.inf, 0.0)
    return {"images": len(eps)}


def backprop(problem, eps, cond, generator=None, last_steps=None):
    """The gradient of the reward through the sampler, or its last steps only (DRaFT, Clark et al. 2023)."""
    steps = list(pairwise(problem.times))
    first = len(steps) - (last_steps or len(steps))
    for e, c in zip(eps.split(problem.batch), cond.split(problem.batch)):
        x = problem.times[0] * e
        for i, (t, s) in enumerate(steps):
            with torch.set_grad_enabled(i >= first):
                x = churned_step(x, problem.velocity(x, t, c), t, s)
        (-differentiable(problem.reward(x, c)).sum() / len(eps)).backward()
    return {"images": len(eps)}


def reward_gradient(problem, eps, cond, generator=None, train_steps=None):
    """FDFO with the exact reward gradient in image space in place of the difference: the paper's ablation."""
    for e, c in zip(eps.split(problem.batch), cond.split(problem.batch)):
        steps = []
        with torch.no_grad():
            x = sample(problem.velocity, e, c, problem.times, trajectory=steps)
        x.requires_grad_()
        (g,) = torch.autograd.grad(differentiable(problem.reward(x, c)).sum(), x)
        for weight, (t, x_t, _) in zip(step_weights(problem.times, train_steps, generator), steps):
            if weight > 0:
                # the image moves along g when its velocity moves along -g
                v = problem.velocity(x_t, t, c)
                (weight * (v * g).sum() / len(eps)).backward()
    return {"images": len(eps)}


def differentiable(R):
    """R, if it has a gradient; or a UserError."""
    if not R.requires_grad:
        raise UserError("this reward has no gradient, which the estimator needs: take fdfo, spsa or central")
    return R
