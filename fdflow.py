"""Finite-difference post-training of flow models: sampler, LoRA and three estimators, in plain PyTorch.

The method is that of McAllister et al., "Finite Difference Flow Optimization for RL Post-Training of
Text-to-Image Models" (arXiv:2603.12893). Copy this file into your project: it imports nothing of ours.

Time t runs from 1 (noise) to 0 (image): x_t = (1 - t) x_0 + t eps. The model predicts the velocity
v(x_t, t, cond) = dx/dt = eps - x_0, so the image estimate at any time is x_0 = x_t - t v. `cond` is any
tensor with one row per image (in train.py the index of its prompt). `python toy.py` shows it all in 2-D.
"""

import math
from bisect import bisect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def churned_step(x, v, t, s, churn=0.0, generator=None):
    """One step of the flow ODE from time t to s <= t that arrives at the right noise level, with fresh noise.

    It overshoots to r < s and adds back the noise that was removed too much: the noise level r / (1 - r),
    multiplied by (1 + churn), is exactly s / (1 - s), so x_s is distributed as after a plain step.
    churn = 0 is Euler. x, v: [B, ...]. Returns x_s [B, ...]. After Karras et al. 2022, algorithm 2.
    """
    r = s / (1 + churn * (1 - s))
    x = x + (r - t) * v
    if churn == 0 or s == 0:
        return x
    xi = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + r * math.sqrt((1 + churn) ** 2 - 1) * xi) / (1 + churn * r)


def sample(velocity, eps, cond, times, churn=0.0, generator=None, trajectory=None):
    """Integrate the flow ODE from noise to image latents x_0 [B, ...].

    velocity: (x [B, ...], t float, cond [B, ...]) -> v [B, ...]. eps: standard normal noise [B, ...].
    times: decreasing floats, from 1 at most down to 0, one more than there are steps. churn: strength >= 0 at
    every step and on the starting noise. trajectory: a list that receives (t, x_t, v) of every step.
    """
    x = times[0] * churned_step(eps, 0.0, 1.0, 1.0, churn, generator)
    for t, s in pairwise(times):
        v = velocity(x, t, cond)
        if trajectory is not None:
            trajectory.append((t, x, v))
        x = churned_step(x, v, t, s, churn, generator)
    return x


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x (Hu et al. 2021); A starts gaussian, B zero.

    A [rank, in] and B [out, rank] are float32 (float64 over float64) and compute in the input's dtype.
    `population`, if set, is (A [K, rank, in], B [K, out, rank]): member k acts on the k-th part of the batch.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.randn(rank, base.in_features, generator=generator, dtype=dtype) / rank
        self.base, self.scale, self.population = base, alpha / rank, None
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(self.A.new_zeros(base.out_features, rank))

    def forward(self, x):
        y = self.base(x)
        A, B = self.population or (self.A[None], self.B[None])
        members = x.reshape(len(A), -1, x.shape[-1])
        hidden, base = members @ A.to(x.dtype).mT, y.view(len(A), -1, y.shape[-1])
        return torch.baddbmm(base, hidden, B.to(x.dtype).mT, alpha=self.scale).view_as(y)


class LoRA:
    """Wraps every nn.Linear of `model` whose dotted name ends with one of `targets`, and freezes the rest.

    `layers` maps names to LoRALinears, `parameters` lists all A and B. ValueError if no layer matches.
    """

    def __init__(self, model, targets, rank, alpha=None, generator=None):
        model.requires_grad_(False)
        self.layers = {}
        for name, base in list(model.named_modules()):
            if isinstance(base, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
                self.layers[name] = LoRALinear(base, rank, alpha or rank, generator)
                model.set_submodule(name, self.layers[name])
        if not self.layers:
            raise ValueError(f"the model has no linear layer named {' or '.join(targets)}")
        self.parameters = [p for layer in self.layers.values() for p in (layer.A, layer.B)]

    def unflatten(self, vectors):
        """Vectors [..., P] of all parameters to one tensor [..., *p.shape] for each parameter p."""
        parts = vectors.split([p.numel() for p in self.parameters], dim=-1)
        return [part.unflatten(-1, p.shape) for part, p in zip(parts, self.parameters)]

    @contextmanager
    def perturbed(self, offsets):
        """Inside, the k-th part of every batch sees the parameters plus offsets[k], of [K, P]."""
        members = [p.detach() + o for p, o in zip(self.parameters, self.unflatten(offsets))]
        for layer, A, B in zip(self.layers.values(), members[0::2], members[1::2]):
            layer.population = (A, B)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.population = None

    def switched_off(self):
        """Inside, the model is the base model again: all parameters are 0."""
        return self.perturbed(-parameters_to_vector(self.parameters).detach()[None])

    def add_grad(self, vector):
        """Add a vector [P] to the parameters' .grad."""
        for p, g in zip(self.parameters, self.unflatten(vector)):
            p.grad = g if p.grad is None else p.grad + g


def dealt_out(size, *tensors):
    """The micro-batches of this process: [(number, rows of each tensor)], at most `size` rows at a time."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size = max(1, min(size, len(tensors[0]) // world))
    return list(enumerate(zip(*(tensor.split(size) for tensor in tensors))))[rank::world]


def summed(x):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def random_seeds(n, generator=None):
    """n numbers below 2^31: seeds that all processes know, whichever of them comes to use one."""
    device = generator.device if generator else "cpu"
    return torch.randint(2**31, (n,), generator=generator, device=device).tolist()


@dataclass
class Problem:
    """What is trained, on what reward, and how it is sampled.

    velocity: (x [B, ...], t float, cond [B, ...]) -> v [B, ...], through the layers of `lora`.
    reward: (x_0 [B, ...], cond [B, ...]) -> R [B], higher is better, NaN where there is none.
    times: as in `sample`. batch: most images in one call of velocity or reward.

    An estimator takes a Problem and G groups (noise eps [G, ...], cond [G, ...]), leaves minus the gradient
    of the expected reward in every .grad, from reward values alone, and returns {"images": number}. Under
    torchrun all processes call it with the same arguments; each does its share and gets the whole gradient.
    """

    velocity: Callable
    reward: Callable
    lora: LoRA
    times: list
    batch: int = 64


@torch.no_grad()
def slopes(problem, directions, h, eps, cond):
    """(R(theta + h d) - R(theta - h d)) / 2h of K directions d [K, P] at eps [K, n, ...]; returns [K, n].

    Both sides see the same noise (common random numbers); one sampler pass serves all directions.
    """
    K, columns = len(directions), []
    size = max(1, problem.batch // (2 * K))
    for e, c in zip(eps.split(size, dim=1), cond.split(size, dim=1)):
        e, c = torch.cat([e, e]).flatten(0, 1), torch.cat([c, c]).flatten(0, 1)
        with problem.lora.perturbed(torch.cat([h * directions, -h * directions])):
            x = sample(problem.velocity, e, c, problem.times)
        plus, minus = problem.reward(x, c).to(directions).view(2, K, -1)
        columns.append((plus - minus) / (2 * h))
    return torch.cat(columns, dim=1)


def central_difference(problem, eps, cond, generator=None, h=0.02, coordinates=None):
    """g_i = (J(theta + h e_i) - J(theta - h e_i)) / 2h for a random block of coordinates i (default: all).

    Exact up to O(h^2), at 2 G images a coordinate; parameters outside the block get no gradient.
    """
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    block = torch.randperm(len(g), generator=generator, device=g.device)[:coordinates]
    for _, (i,) in dealt_out(problem.batch // (2 * len(eps)), block):
        same = eps.expand(len(i), *eps.shape), cond.expand(len(i), *cond.shape)
        slope = slopes(problem, F.one_hot(i, len(g)).to(g), h, *same)
        g[i] = slope.nanmean(dim=1).nan_to_num()
    g[block] = summed(g[block])
    problem.lora.add_grad(-g)
    return {"images": 2 * len(block) * len(eps)}


def spsa(problem, eps, cond, generator=None, h=0.02, directions=16):
    """g = mean_k (J_k(theta + h d_k) - J_k(theta - h d_k)) / 2h d_k with random signs d_k (Spall 1992).

    Unbiased up to O(h^2), at 2 G images whatever the number of parameters. The groups are dealt out evenly to
    the directions; J_k is the mean over those of d_k. A direction is remade from its seed, never stored.
    """
    if len(eps) % directions:
        raise ValueError(f"{len(eps)} pairs cannot be dealt out evenly to {directions} directions")
    eps, cond = (a.view(directions, -1, *a.shape[1:]) for a in (eps, cond))
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    slope, seeds = g.new_zeros(directions), random_seeds(directions, generator)
    for _, (k, e, c) in dealt_out(problem.batch // (2 * eps.shape[1]), torch.arange(directions), eps, cond):
        d = torch.stack([random_signs(g, seeds[i]) for i in k])
        slope[k] = slopes(problem, d, h, e, c).nanmean(dim=1).nan_to_num()
    for seed, weight in zip(seeds, summed(slope) / directions):
        g += weight * random_signs(g, seed)
    problem.lora.add_grad(-g)
    return {"images": 2 * eps.shape[0] * eps.shape[1]}


def random_signs(like, seed):
    """A vector of +1 and -1 shaped like `like`, always the same for one seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return 2 * torch.randint(2, like.shape, generator=generator, device=like.device).to(like) - 1


def fdfo(problem, eps, cond, generator=None, churn=0.05, branches=2, train_branches=1, train_steps=None,
         clip=0.03, kl=0.0, updates=1, step=None):  # fmt: skip
    """Finite Difference Flow Optimization: differences between sampled images instead of between parameters.

    Every noise is churned into K branches. How the rewards of their images differ tells which way to move
    them; steps are pulled that way, without the sampler's Jacobian. The unit of reward: its mean difference.

    train_branches: trained ones of each group, since all are pulled alike. train_steps: random steps trained
    (default: all). clip: width of the trust region. kl: pull to the base model. updates: gradients, between
    which `step` is called.
    """
    if not 1 <= train_branches <= branches or branches < 2 or churn <= 0:
        raise ValueError("fdfo compares branches: at least 2, of which it trains 1 or more, with churn > 0")
    settings = generator, churn, branches, train_branches, train_steps
    shares = [roll_out(problem, e, c, *settings) for e, c in zip(eps.chunk(updates), cond.chunk(updates))]
    dR = torch.cat([r["dR"] for share in shares for r in share])
    total, count = summed(torch.stack([dR.nansum(), dR.isfinite().to(dR).sum()]))
    unit = (total / count).clamp(min=1e-12)
    for i, (e, share) in enumerate(zip(eps.chunk(updates), shares)):
        if i > 0:
            step()
        for r in share:
            dR = (r["dR"] / unit).nan_to_num()
            for weight, t, x, v_ref in r["steps"]:
                v = problem.velocity(x, t, r["cond"])
                dv = v - v_ref
                # exp(mean(d^2) - mean((v - (v_ref - d))^2)), multiplied out because d is large and dv small
                rho = torch.exp(-(dv * (dv + 2 * r["d"])).flatten(1).mean(1))
                loss = -dR * rho + dR / (2 * clip) * (rho - 1) ** 2
                if kl > 0:
                    with torch.no_grad(), problem.lora.switched_off():
                        v_base = problem.velocity(x, t, r["cond"])
                    loss = loss + kl * ((v - v_base) ** 2).flatten(1).mean(1)
                (weight / (train_branches * len(e)) * loss.sum()).backward()
        if dist.is_initialized():
            grads = [p.grad for p in problem.lora.parameters]
            vector_to_parameters(summed(parameters_to_vector(grads)), grads)
    return {"images": branches * len(eps)}


@torch.no_grad()
def roll_out(problem, eps, cond, generator, churn, branches, train_branches, train_steps):
    """Sample K branches from every noise; a record for each micro-batch, of the B trajectories to train:

    cond [B, ...], the (weight, t, x_t, v) of their steps, the mean absolute difference dR [B] of the rewards
    in their group (NaN if one is), and the direction d [B, ...] to pull them: dR d is the mean over k of
    (R_k - mean R) (x_k - mean x), over the mean square of x_k - mean x.
    """
    records, seeds = [], random_seeds(len(eps), generator)
    for number, (e, c) in dealt_out(problem.batch // branches, eps, cond):
        e, c, steps = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0), []
        kept = torch.arange(len(e), device=e.device).view(-1, branches)[:, :train_branches].flatten()
        generator = torch.Generator(e.device).manual_seed(seeds[number])
        x = sample(problem.velocity, e, c, problem.times, churn, generator, steps)
        R = problem.reward(x, c).view(-1, branches)
        dx = x.view(*R.shape, -1) - x.view(*R.shape, -1).mean(1, keepdim=True)
        spread = R - R.mean(1, keepdim=True)
        dR = spread.abs().mean(1)
        g = (spread[..., None] * dx).mean(1) / (dx**2).mean((1, 2))[:, None]
        d = (g / dR.clamp(min=1e-12)[:, None]).nan_to_num().view_as(x[::branches])
        weights = step_weights(problem.times, train_steps, generator)
        steps = [(w, t, x[kept], v[kept]) for w, (t, x, v) in zip(weights, steps) if w > 0]
        records.append(dict(cond=c[kept], steps=steps, d=d[kept // branches], dR=dR[kept // branches]))
    return records


def step_weights(times, count=None, generator=None):
    """The share of the whole time that each step covers, for so much does its velocity move the image.

    With a count, that many points evenly spaced in time, from a random start, draw the steps that count; the
    others get 0. Either way the weights add up to 1, and on average are the shares.
    """
    shares = [(t - s) / times[0] for t, s in pairwise(times)]
    if count is None:
        return shares
    start = random_seeds(1, generator)[0] / 2**31
    ends = list(accumulate(shares))
    drawn = [min(bisect(ends, (i + start) / count), len(ends) - 1) for i in range(count)]
    return [drawn.count(i) / count for i in range(len(ends))]
