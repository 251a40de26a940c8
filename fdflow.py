"""Finite-difference post-training of flow models: sampler, LoRA and three estimators.

The method is that of McAllister et al., "Finite Difference Flow Optimization for RL
Post-Training of Text-to-Image Models" (arXiv:2603.12893). This file is plain PyTorch and imports
nothing of ours: copy it into your project. `python -m studies.toy` shows all of it on a flow in two
dimensions.

    t, s   times, from 1 (noise) to 0 (image); a step goes from t to s < t
    eps    standard normal noise; x_t = (1 - t) x_0 + t eps
    v      the velocity dx/dt = eps - x_0, which the model predicts from x_t, t and cond
    cond   what the image is to show, one row for each image (in train.py the index of its prompt)
    theta  the P numbers that are trained, those of a LoRA
    R      the reward of an image; J(theta) is its mean over noise and prompts, and is to rise
    G, K   groups and branches: a group is the K images sampled from one noise (K = 2: a pair)
    g      an estimate of a gradient: of J with respect to theta [P], or of R with respect to x_0
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

# ---- the sampler


def churned_step(x, v, t, s, churn=0.0, noise=torch.randn_like):
    """Take a step of the flow ODE from time t to s <= t, with fresh noise.

    Like the stochastic sampler of Karras et al. 2022 (algorithm 2), which adds noise and then
    steps; here the step comes first. It overshoots to r <= s, then adds noise, back to exactly the
    level of s: the noise level r / (1 - r), times 1 + churn, is s / (1 - s). So x_s is distributed
    as after a plain step. churn = 0 is a plain Euler step.

    x, v: [B, ...]
    noise: a function from x to normal noise of its shape
    Returns x_s [B, ...].
    """
    r = s / (1 + churn * (1 - s))
    x_r = x + (r - t) * v

    if churn == 0 or s == 0:  # no noise may be left in the image
        return x_r
    return (x_r + r * math.sqrt((1 + churn) ** 2 - 1) * noise(x)) / (1 + churn * r)


def sample(velocity, eps, cond, times, churn=0.0, noise=torch.randn_like, trajectory=None):
    """Integrate the flow ODE from noise eps [B, ...] to image latents x_0 [B, ...].

    times: decreasing floats, from 1 at most down to 0, one more than there are steps
    churn: strength >= 0 of the fresh noise in every step
    trajectory: a list that receives (x_t, v) of every step
    """
    # the branches of a group get different starting noise, too
    x = churned_step(eps, 0.0, 1.0, 1.0, churn, noise)
    x = times[0] * x  # some schedules start a little below 1

    for t, s in pairwise(times):
        v = velocity(x, t, cond)
        if trajectory is not None:
            trajectory.append((x, v))
        x = churned_step(x, v, t, s, churn, noise)
    return x


# ---- what is trained


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x (Hu et al. 2021); A starts gaussian, B zero.

    A [rank, in] and B [out, rank] are float32 (float64 over float64) and compute in the input's
    dtype. With a `population` (A [M, rank, in], B [M, out, rank]) image i of the batch is computed
    by member i mod M, so that one pass through the network evaluates M values of theta.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.randn(rank, base.in_features, generator=generator, dtype=dtype) / rank

        self.base = base
        self.scale = alpha / rank
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(self.A.new_zeros(base.out_features, rank))
        self.population = None
        self.enabled = True

    def forward(self, x):
        if not self.enabled:
            return self.base(x)
        if self.population is None:
            return self.base(x) + self.scale * (x @ self.A.to(x.dtype).mT) @ self.B.to(x.dtype).mT

        A, B = (
            matrix.to(x.dtype).mT for matrix in self.population
        )  # [M, in, rank], [M, rank, out]
        rows = x[0].numel() // x.shape[-1]  # tokens of an image
        images = x.reshape(-1, len(A), rows, x.shape[-1])  # [B / M, M, rows, in]
        return self.base(x) + (self.scale * (images @ A) @ B).view(*x.shape[:-1], -1)


class LoRA:
    """Wraps each nn.Linear of a model whose dotted name ends with a target, and freezes the rest.

    layers: {name: LoRALinear}
    parameters: all A and B, which are theta
    ValueError if no layer matches.
    """

    def __init__(self, model, targets, rank, alpha=None, generator=None):
        model.requires_grad_(False)
        ends = tuple(f".{target}" for target in targets)

        self.layers = {}
        for name, base in list(model.named_modules()):
            if isinstance(base, nn.Linear) and f".{name}".endswith(ends):
                self.layers[name] = LoRALinear(base, rank, alpha or rank, generator)
                model.set_submodule(name, self.layers[name])
        if not self.layers:
            raise ValueError(f"the model has no linear layer named {' or '.join(targets)}")
        self.parameters = [p for layer in self.layers.values() for p in (layer.A, layer.B)]
        self.start = None  # theta [P] where training began, if not at the base model

    def unflatten(self, vectors):
        """Split vectors [..., P] of all parameters into one tensor [..., *p.shape] for each p."""
        parts = vectors.split([p.numel() for p in self.parameters], dim=-1)
        return [part.unflatten(-1, p.shape) for part, p in zip(parts, self.parameters)]

    @contextmanager
    def perturbed(self, offsets):
        """Inside, image i of every batch sees theta + offsets[i mod M], of offsets [M, P]."""
        members = [p.detach() + o for p, o in zip(self.parameters, self.unflatten(offsets))]
        for layer, A, B in zip(self.layers.values(), members[0::2], members[1::2]):
            layer.population = (A, B)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.population = None

    @contextmanager
    def switched_off(self):
        """Inside, the model is the one that training began with: the base model, or `start`."""
        if self.start is not None:
            theta = parameters_to_vector(self.parameters).detach()
            with self.perturbed((self.start - theta)[None]):
                yield
            return

        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def add_grad(self, vector):
        """Add a vector [P] to the parameters' .grad."""
        for p, part in zip(self.parameters, self.unflatten(vector)):
            p.grad = part if p.grad is None else p.grad + part


@dataclass
class Problem:
    """What is trained, on what reward, and how it is sampled.

    An estimator is a function (problem, noise eps [G, ...], cond [G, ...], generator, options).
    From rewards alone it estimates dJ/dtheta, accumulates the negative into every parameter's
    .grad, and returns how many images it sampled. `spsa` and `central_difference` estimate the
    gradient itself, `fdfo` something that points the same way, plus its pull to the base model;
    an optimiser like Adam does not mind the scale. Under torchrun all processes call an
    estimator alike; each does its share and gets the whole gradient.
    """

    velocity: Callable  # (x [B, ...], t a float or [B], cond [B, ...]) -> v [B, ...]
    reward: Callable  # (x_0 [B, ...], cond [B, ...]) -> R [B], higher is better, NaN if undefined
    lora: LoRA
    times: list  # as in `sample`
    batch: int = 64  # most images in one call of velocity or reward
    step: Callable = lambda: None  # applies the gradients, for estimators with several updates
    memory: dict = field(default_factory=dict)  # what an estimator keeps; checkpoints save it


# ---- work in parts, over one process or many


def micro_batches(size, *tensors):
    """This process's share of the rows of tensors, in even parts of at most `size` rows.

    Returns [(part of each tensor, ...), ...].
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if len(tensors[0]) < world:
        raise ValueError(f"{world} processes cannot share {len(tensors[0])} parts of the work")

    shares = [tensor.tensor_split(world)[rank] for tensor in tensors]
    parts = math.ceil(len(shares[0]) / max(1, size))
    return list(zip(*(share.tensor_split(parts) for share in shares)))


def sum_over_processes(*tensors):
    """Sum tensors over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


# ---- estimators that perturb the parameters


@torch.no_grad()
def slopes(problem, directions, h, eps, cond):
    """Slopes (R(theta + h d) - R(theta - h d)) / 2h along directions d [M, P]: [M, n].

    Each direction is tried at n noises, eps and cond [M, n, ...]. Both sides see the same noise
    (common random numbers), and one pass of the sampler serves all directions.
    """
    M = len(directions)
    size = max(1, problem.batch // (2 * M))

    slopes_by_batch = []
    for e, c in zip(eps.split(size, dim=1), cond.split(size, dim=1)):
        # [n, 2 M, ...]: the images of one n are those of theta + h d for all d, then theta - h d
        e = torch.cat([e, e]).transpose(0, 1).flatten(0, 1)
        c = torch.cat([c, c]).transpose(0, 1).flatten(0, 1)
        with problem.lora.perturbed(torch.cat([h * directions, -h * directions])):
            x = sample(problem.velocity, e, c, problem.times)

        plus, minus = problem.reward(x, c).to(directions).view(-1, 2, M).unbind(1)
        slopes_by_batch.append((plus - minus).T / (2 * h))
    return torch.cat(slopes_by_batch, dim=1).nan_to_num()  # a lost reward counts as no slope


def central_difference(
    problem, eps, cond, generator=None, h: float = 0.1, coordinates: int | None = 32
):
    """Estimate dJ/dtheta by central differences, one coordinate i of theta after another.

    g_i = (J(theta + h e_i) - J(theta - h e_i)) / 2h. Exact up to O(h^2), at 2 G images for each
    coordinate; the other parameters get no gradient.

    h: step in each parameter
    coordinates: parameters tried, drawn at random
    """
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    tried = torch.randperm(len(g), generator=generator, device=g.device)[:coordinates]

    for (i,) in micro_batches(problem.batch // (2 * len(eps)), tried):
        e_i = F.one_hot(i, len(g)).to(g)  # [M, P]
        e, c = eps.expand(len(i), *eps.shape), cond.expand(len(i), *cond.shape)
        g[i] = slopes(problem, e_i, h, e, c).mean(1)

    sum_over_processes(g)
    problem.lora.add_grad(-g)
    return 2 * len(tried) * len(eps)


def spsa(problem, eps, cond, generator=None, h: float = 0.02, directions: int = 16):
    """Estimate dJ/dtheta by SPSA: all parameters at once, along random signs d (Spall 1992).

    g = mean over d of (J(theta + h d) - J(theta - h d)) / 2h d. Unbiased up to O(h^2), at 2 G
    images however many parameters there are.

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
        d = 2 * part.to(g) - 1  # [M, P]
        g += slopes(problem, d, h, e, c).mean(1) @ d / directions

    sum_over_processes(g)
    problem.lora.add_grad(-g)
    return 2 * eps.shape[0] * eps.shape[1]


# ---- the estimator that perturbs the images


def fdfo(
    problem,
    eps,
    cond,
    generator=None,
    branches: int = 2,
    churn: float = 0.05,
    train_steps: int = 1,
    kl: float = 0.0,
):
    """Finite Difference Flow Optimization: compare images sampled from the same noise.

    Every noise is churned into branches, which differ slightly. How the rewards of two of them
    differ tells which way to move both:

        g = (R_1 - R_2) (x_1 - x_2) / mean((x_1 - x_2)^2)

    An image moves along g if the velocity that makes it moves along -g. So the velocity is
    regressed onto its current value minus g. The exact direction would need the Jacobian of the
    sampler: how x_0 answers to a nudge of v_t. It is taken for -dt times the identity, as if all
    later steps passed the nudge on unchanged. This *identity approximation* makes the estimate
    biased; it works because a nudge does move the image mostly along itself (on the toy of
    studies/toy.py the estimate has a cosine near 0.9 with the exact gradient).

    Since g holds for the whole group, one of its branches is trained. It is trained with fresh
    noise, at x_t = (1 - t) x_0 + t eps, although g was measured on another path: a flow model's
    velocity at x_t is the mean over all images that x_t may become, so moving x_0 along g moves its
    share of that mean. The paper trains at the steps that led to the image (fdfo_published in
    studies/baselines.py).

    branches: images sampled from each noise
    churn: strength of the fresh noise in every step, by which the branches differ
    train_steps: random times at which each group is trained
    kl: weight of the pull to the base model, the mean squared difference of the velocities
    """
    if branches < 2 or churn <= 0:
        raise ValueError(
            "fdfo compares at least 2 branches, and needs churn > 0 for them to differ"
        )

    # 1. branch and 2. score
    rolls = roll_out(problem, eps, cond, branches, churn, generator)

    # 3. difference: in units of the mean absolute deviation, so one learning rate suits any reward
    unit = sum(roll.spread.sum() for roll in rolls)
    sum_over_processes(unit)
    unit = (unit / len(eps)).clamp(min=1e-12)

    # 4. pull the velocity toward what it is, minus g
    for roll in rolls:
        for t in draw_times(problem.times, train_steps, roll.generators):
            x_t = noised(roll.x_0, t, normal(roll.generators, roll.x_0))
            v = problem.velocity(x_t, t, roll.cond)
            loss = F.mse_loss(v, v.detach() - roll.g / unit)

            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    v_base = problem.velocity(x_t, t, roll.cond)
                loss = loss + kl * F.mse_loss(v, v_base)

            share = len(x_t) / (train_steps * len(eps))
            (share * loss).backward()

    # the image may not depend on a layer at all, as the last of a stream of text
    sum_over_processes(*(p.grad for p in problem.lora.parameters if p.grad is not None))
    return branches * len(eps)


class Rollout(NamedTuple):
    """What is left to train on of a micro-batch of G groups that were sampled and scored."""

    x_0: torch.Tensor  # [G, ...], the first branch of each group
    cond: torch.Tensor  # [G, ...]
    g: torch.Tensor  # [G, ...], the direction in which the reward rises
    spread: torch.Tensor  # [G], mean absolute deviation of the rewards in a group
    generators: (
        list  # one for each group, so that its noise is the same in whichever batch it comes
    )


@torch.no_grad()
def roll_out(problem, eps, cond, branches, churn, generator=None):
    """Sample and score all branches of eps [G, ...]; return a Rollout for each micro-batch."""
    rolls = []
    seeds = torch.randint(2**31, (len(eps),), generator=generator, device=eps.device)
    for e, c, part in micro_batches(problem.batch // branches, eps, cond, seeds):
        generators = [torch.Generator(e.device).manual_seed(seed) for seed in part.tolist()]

        # sample the branches, side by side: [G K, ...]
        each_eps, each_cond = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0)
        noise = partial(normal, generators)
        x = sample(problem.velocity, each_eps, each_cond, problem.times, churn, noise)

        # score them; a group that has lost a reward says nothing
        R = problem.reward(x, each_cond).view(-1, branches)  # [G, K]
        R = R.where(R.isfinite().all(1, keepdim=True), 0)
        spread = (R - R.mean(1, keepdim=True)).abs().mean(1)

        g = image_gradient(R, x.view(*R.shape, -1)).view(e.shape)
        rolls.append(Rollout(x[::branches], c, g, spread, generators))
    return rolls


def image_gradient(R, x):
    """FDFO's estimate g [G, D] of dR/dx_0, from rewards R [G, K] of images x [G, K, D].

    g = mean_k (R_k - mean R) (x_k - mean x) / mean square of (x_k - mean x), as in `fdfo` at K = 2.
    """
    dR = R - R.mean(1, keepdim=True)
    dx = x - x.mean(1, keepdim=True)
    return (dR[:, :, None] * dx).mean(1) / (dx**2).mean((1, 2))[:, None].clamp(min=1e-12)


def noised(x_0, t, noise):
    """x_t = (1 - t) x_0 + t noise, for images x_0 [B, ...] and a time for each, t [B]."""
    t = t.view(-1, *[1] * (x_0.dim() - 1))
    return (1 - t) * x_0 + t * noise


def normal(generators, x):
    """Draw normal noise like x [B, ...], an equal part of its images from each generator."""
    parts = []
    for part, generator in zip(x.chunk(len(generators)), generators):
        parts.append(torch.randn(part.shape, generator=generator, device=x.device, dtype=x.dtype))
    return torch.cat(parts)


def draw_times(times, n, generators):
    """Draw n random times for each of G groups, of those at which the sampler calls the network.

    A time is as likely as its step is long, because that is how far its velocity moves the image.
    The n are spread evenly over the way from noise to image, from a random start:

        times    1.0 ------------- 0.7 -------- 0.4 ---- 0.2 -- 0
        points       ^                  ^                  ^         n = 3
        drawn    1.0               0.7          0.4

    Returns [n, G].
    """
    device = generators[0].device
    start = torch.cat([torch.rand(1, generator=g, device=device) for g in generators])
    times = torch.tensor(times, device=device)
    points = times[0] * (1 - (torch.arange(n, device=device)[:, None] + start) / n)
    return times[torch.searchsorted(-times[1:-1], -points)]
