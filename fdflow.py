"""Finite-difference post-training of flow models: sampler, LoRA, three gradient estimators, in plain PyTorch.

The method is that of McAllister et al., "Finite Difference Flow Optimization for RL Post-Training of
Text-to-Image Models" (arXiv:2603.12893). Copy this file into your project: it imports nothing of ours. In two
dimensions `python -m studies.toy` shows it all.

    t, s   times, from 1 (noise) to 0 (image); a step goes from t to s < t
    eps    standard normal noise; x_t = (1 - t) x_0 + t eps
    v      the velocity dx/dt = eps - x_0, which the model predicts from x_t, t and cond; x_0 = x_t - t v
    cond   what the image is to show, one row an image (in train.py the index of its prompt)
    theta  the P numbers that are trained, those of a LoRA
    R      the reward of an image; J(theta), its mean over noise and prompts, is to rise
    G, K   groups and branches: a group is the K branches, images sampled from one noise (K = 2: a pair)
    g      an estimate of a gradient: of J with respect to theta [P], or of R with respect to x_0 (FDFO)
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector


def churned_step(x, v, t, s, churn=0.0, noise=torch.randn_like):
    """One step of the flow ODE from time t to s <= t, with fresh noise (Karras et al. 2022, algorithm 2).

    It overshoots to r < s and adds back the noise that was removed too much: the noise level r / (1 - r),
    multiplied by (1 + churn), is exactly s / (1 - s), so x_s is distributed as after a plain step. churn = 0
    is Euler. x, v: [B, ...]; noise: x -> normal noise of its shape. Returns x_s [B, ...].
    """
    r = s / (1 + churn * (1 - s))
    x_r = x + (r - t) * v
    if churn == 0 or s == 0:  # no noise may be left in the image
        return x_r
    return (x_r + r * math.sqrt((1 + churn) ** 2 - 1) * noise(x)) / (1 + churn * r)


def sample(velocity, eps, cond, times, churn=0.0, noise=torch.randn_like, trajectory=None):
    """Integrate the flow ODE from noise eps [B, ...] to image latents x_0 [B, ...].

    times: decreasing floats, from 1 at most down to 0, one more than there are steps. churn: strength >= 0 at
    every step and on the starting noise. trajectory: a list that receives (x_t, v) of every step.
    """
    x = churned_step(
        eps, 0.0, 1.0, 1.0, churn, noise
    )  # a step of no length, which stirs the starting noise
    x = times[0] * x  # some schedules start a little below 1
    for t, s in pairwise(times):
        v = velocity(x, t, cond)
        if trajectory is not None:
            trajectory.append((x, v))
        x = churned_step(x, v, t, s, churn, noise)
    return x


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x (Hu et al. 2021); A starts gaussian, B zero.

    A [rank, in] and B [out, rank] are float32 (float64 over float64) and compute in the input's dtype.
    `population`, if set, is (A [K, rank, in], B [K, out, rank]): its k-th member acts on the k-th part of the
    batch, so that one pass through the network evaluates K values of theta.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.randn(rank, base.in_features, generator=generator, dtype=dtype) / rank
        self.base, self.scale, self.population = base, alpha / rank, None
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(self.A.new_zeros(base.out_features, rank))

    def forward(self, x):
        if self.population is None:
            return self.base(x) + self.scale * (x @ self.A.to(x.dtype).mT) @ self.B.to(x.dtype).mT
        A, B = (
            matrix.to(x.dtype).mT for matrix in self.population
        )  # [K, in, rank], [K, rank, out]
        members = x.reshape(len(A), -1, x.shape[-1])  # [K, rows of a member, in]
        return self.base(x) + (self.scale * (members @ A) @ B).view(*x.shape[:-1], -1)


class LoRA:
    """Wraps every nn.Linear of `model` whose dotted name ends with one of `targets`, and freezes the rest.

    `layers`: names to LoRALinears; `parameters`: all A and B. ValueError if no layer matches.
    """

    def __init__(self, model, targets, rank, alpha=None, generator=None):
        model.requires_grad_(False)
        self.layers = {}
        for name, base in list(model.named_modules()):
            if isinstance(base, nn.Linear) and any(
                f".{name}".endswith(f".{target}") for target in targets
            ):
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
        """Inside, the k-th part of every batch sees theta + offsets[k], of [K, P]."""
        members = [p.detach() + o for p, o in zip(self.parameters, self.unflatten(offsets))]
        for layer, A, B in zip(self.layers.values(), members[0::2], members[1::2]):
            layer.population = (A, B)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.population = None

    def switched_off(self):
        """Inside, the model is the base model again: theta is 0."""
        return self.perturbed(-parameters_to_vector(self.parameters).detach()[None])

    def add_grad(self, vector):
        """Add a vector [P] to the parameters' .grad."""
        for p, g in zip(self.parameters, self.unflatten(vector)):
            p.grad = g if p.grad is None else p.grad + g


@dataclass
class Problem:
    """What is trained, on what reward, and how it is sampled.

    An estimator is a function (problem, noise eps [G, ...], cond [G, ...], generator, options) that adds
    minus its estimate of dJ/dtheta to every .grad, from rewards alone, and returns how many images it
    sampled. Under torchrun all processes call it alike; each does its share and gets the whole gradient.
    """

    velocity: (
        Callable  # (x [B, ...], t a float or [B], cond [B, ...]) -> v [B, ...], through the LoRA
    )
    reward: Callable  # (x_0 [B, ...], cond [B, ...]) -> R [B], higher is better, NaN where there is none
    lora: LoRA
    times: list  # as in `sample`
    batch: int = 64  # most images in one call of velocity or reward
    step: Callable = lambda: None  # applies the gradients, for estimators with several updates
    memory: dict = field(
        default_factory=dict
    )  # what an estimator keeps; train.py's checkpoints save it


def micro_batches(size, *tensors):
    """This process's share of the rows of tensors, in even parts of at most `size`: [(part of each, ...)]."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(tensors[0]) < world:
        raise ValueError(f"{world} processes cannot share {len(tensors[0])} parts of the work")
    shares = [tensor.tensor_split(world)[rank] for tensor in tensors]
    parts = math.ceil(len(shares[0]) / max(1, size))
    return list(zip(*(share.tensor_split(parts) for share in shares)))


def sum_over_processes(*tensors):
    """Sum tensors over all processes, in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


@torch.no_grad()
def slopes(problem, directions, h, eps, cond):
    """(R(theta + h d) - R(theta - h d)) / 2h of K directions d [K, P], each at n noises [K, n, ...]: [K, n].

    Both sides see the same noise (common random numbers); one sampler pass serves all directions.
    """
    K, slopes_by_batch, size = len(directions), [], max(1, problem.batch // (2 * len(directions)))
    for e, c in zip(eps.split(size, dim=1), cond.split(size, dim=1)):
        e, c = (
            torch.cat([e, e]).flatten(0, 1),
            torch.cat([c, c]).flatten(0, 1),
        )  # first all +h, then all -h
        with problem.lora.perturbed(torch.cat([h * directions, -h * directions])):
            x = sample(problem.velocity, e, c, problem.times)
        plus, minus = problem.reward(x, c).to(directions).view(2, K, -1)
        slopes_by_batch.append((plus - minus) / (2 * h))
    return torch.cat(slopes_by_batch, dim=1).nan_to_num()  # a lost reward counts as no slope


def central_difference(
    problem, eps, cond, generator=None, h: float = 0.1, coordinates: int | None = 32
):
    """Central differences: g_i = (J(theta + h e_i) - J(theta - h e_i)) / 2h, one coordinate i after another.

    Exact up to O(h^2), at 2 G images a coordinate; the other parameters get no gradient.

    h: step in each parameter
    coordinates: parameters tried, drawn at random
    """
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    block = torch.randperm(len(g), generator=generator, device=g.device)[:coordinates]
    for (i,) in micro_batches(problem.batch // (2 * len(eps)), block):
        e_i = F.one_hot(i, len(g)).to(g)  # [K, P]
        e, c = eps.expand(len(i), *eps.shape), cond.expand(len(i), *cond.shape)
        g[i] = slopes(problem, e_i, h, e, c).mean(1)
    sum_over_processes(g)
    problem.lora.add_grad(-g)
    return 2 * len(block) * len(eps)


def spsa(problem, eps, cond, generator=None, h: float = 0.02, directions: int = 16):
    """SPSA: g = mean_k (J_k(theta + h d_k) - J_k(theta - h d_k)) / 2h d_k, d_k random signs (Spall 1992).

    Unbiased up to O(h^2), at 2 G images whatever P is. J_k is the mean over the groups dealt out to d_k.

    h: step in every parameter
    directions: random directions, which share the groups
    """
    if len(eps) % directions:
        raise ValueError(f"{len(eps)} groups cannot be dealt out evenly to {directions} directions")
    eps, cond = eps.unflatten(0, (directions, -1)), cond.unflatten(0, (directions, -1))
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    signs = torch.randint(
        2, (directions, len(g)), generator=generator, device=g.device, dtype=torch.int8
    )
    for e, c, part in micro_batches(problem.batch // (2 * eps.shape[1]), eps, cond, signs):
        d = 2 * part.to(g) - 1  # [K, P]
        g += slopes(problem, d, h, e, c).mean(1) @ d / directions
    sum_over_processes(g)
    problem.lora.add_grad(-g)
    return 2 * eps.shape[0] * eps.shape[1]


def fdfo(problem, eps, cond, generator=None, branches: int = 2, churn: float = 0.05, train_steps: int = 1,
         kl: float = 0.0):  # fmt: skip
    """Finite Difference Flow Optimization: differences between sampled images instead of between parameters.

    Every noise is churned into branches. How the rewards of two of them differ tells which way to move both:
    g = (R_1 - R_2) (x_1 - x_2) / mean((x_1 - x_2)^2). An image moves along g if its velocity moves along -g:
    the velocity is pulled toward what it is, less g, and the Jacobian of the sampler is not needed. Since
    that is one g for the whole group, one branch is trained. It is trained at its image with fresh noise; the
    paper does so at the steps that led to the image (studies/baselines.py: fdfo_published).

    branches: images sampled from each noise
    churn: how far the branches part: the fresh noise in every step
    train_steps: random times at which each group is trained
    kl: pull to the base model
    """
    if branches < 2 or churn <= 0:
        raise ValueError(
            "fdfo compares at least 2 branches, and needs churn > 0 for them to differ"
        )
    rolls = roll_out(problem, eps, cond, branches, churn, generator)
    # rewards count in units of their mean difference, so that one learning rate suits any reward
    unit = sum((spread.sum() for *_, spread, _ in rolls), eps.new_zeros(()))
    sum_over_processes(unit)
    unit = (unit / len(eps)).clamp(min=1e-12)
    for x_0, c, g, _, generators in rolls:
        for t in draw_times(problem.times, train_steps, generators):
            t_ = t.view(-1, *[1] * (x_0.dim() - 1))  # [G, 1, ...]
            x = (1 - t_) * x_0 + t_ * normal(generators, x_0)
            v = problem.velocity(x, t, c)
            loss = F.mse_loss(v, v.detach() - g / unit)
            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    v_base = problem.velocity(x, t, c)
                loss = loss + kl * F.mse_loss(v, v_base)
            (loss * len(x) / (train_steps * len(eps))).backward()
    sum_over_processes(*(p.grad for p in problem.lora.parameters))
    return branches * len(eps)


@torch.no_grad()
def roll_out(problem, eps, cond, branches, churn, generator=None):
    """Sample and score the branches of noises eps [G, ...]. Returns for each micro-batch, of its groups,

    the first image x_0 [G, ...], cond [G, ...], the direction g [G, ...] to move it, how much the rewards
    differ, spread [G], and a generator each, so that a group's noise is the same in whichever batch it comes.
    """
    rolls, seeds = [], torch.randint(2**31, (len(eps),), generator=generator, device=eps.device)
    for e, c, part in micro_batches(problem.batch // branches, eps, cond, seeds):
        generators = [torch.Generator(e.device).manual_seed(seed) for seed in part.tolist()]
        es, cs = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0)  # [G K, ...]
        x = sample(problem.velocity, es, cs, problem.times, churn, partial(normal, generators))
        R = problem.reward(x, cs).view(-1, branches)  # [G, K]
        R = R.where(
            R.isfinite().all(1, keepdim=True), 0
        )  # one lost reward, and its group says nothing
        g, spread = (
            image_gradient(R, x.view(*R.shape, -1)),
            (R - R.mean(1, keepdim=True)).abs().mean(1),
        )
        rolls.append((x[::branches], c, g.view(e.shape), spread, generators))
    return rolls


def image_gradient(R, x):
    """FDFO's estimate g [G, D] of dR/dx_0, from rewards R [G, K] of images x [G, K, D].

    g = mean_k (R_k - mean R) (x_k - mean x) / mean square of (x_k - mean x): for K = 2 what `fdfo` says.
    """
    dR, dx = R - R.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    return (dR[:, :, None] * dx).mean(1) / (dx**2).mean((1, 2))[:, None].clamp(min=1e-12)


def normal(generators, x):
    """Normal noise like x, its i-th part from the i-th generator."""
    parts = zip(x.chunk(len(generators)), generators)
    return torch.cat(
        [torch.randn(a.shape, generator=g, device=x.device, dtype=x.dtype) for a, g in parts]
    )


def draw_times(times, n, generators):
    """n random times for each of G groups, of those at which the sampler calls the network: [n, G].

    A time is as likely as its step's share of the way to 0, for so much does its velocity move the image.
    The n are spread evenly from a random start.
    """
    device = generators[0].device
    start = torch.cat([torch.rand(1, generator=g, device=device) for g in generators])
    times = torch.tensor(times, device=device)
    points = times[0] * (1 - (torch.arange(n, device=device)[:, None] + start) / n)
    return times[torch.searchsorted(-times[1:-1], -points)]
