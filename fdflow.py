"""Finite-difference post-training of flow models: sampler, LoRA and three estimators.

The method is that of McAllister et al., "Finite Difference Flow Optimization for RL
Post-Training of Text-to-Image Models" (arXiv:2603.12893). This file is plain PyTorch and imports
nothing else of this project: copy it into yours. `python -m studies.toy` shows all of it on a flow
in two dimensions.

    t, s   times, from 1 (noise) to 0 (image); a step goes from t to s < t
    x_t    the image at time t: x_t = (1 - t) x_0 + t eps
    eps    standard normal noise: in the arguments, the noise that an image is sampled from
    v      the velocity dx/dt = eps - x_0, which the model predicts from x_t, t and cond
    cond   what the image is to show, one row for each image (in train.py the index of its prompt)
    theta  the P numbers that are trained, those of a LoRA
    R      the reward of an image; training should raise J(theta), its mean over noise and prompts
    g      an estimate of a gradient: of J with respect to theta [P], or of R with respect to x_0
    G, K   groups and branches: a group is the K images sampled from one noise (K = 2: a pair)
    M      members of a population: models with different theta that are computed together
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

    The noise level at time t is noise over image, t / (1 - t). The step goes past s to r <= s,
    where the level is that of s divided by 1 + churn; then noise is added, back to exactly the
    level of s. Up to the error of the step, x_s has the same distribution for every churn;
    churn = 0 is the plain Euler step. The stochastic sampler of Karras et al. 2022 (algorithm 2)
    adds noise first, and then steps.

    x: [B, ...] at time t
    v: [B, ...], the velocity there
    churn: strength of the fresh noise, >= 0
    noise: a function from x to normal noise of its shape
    Returns x_s [B, ...].
    """
    r = s / (1 + churn * (1 - s))
    x_r = x + (r - t) * v
    if churn == 0 or s == 0:  # nothing to add
        return x_r

    # variances add: from r to (1 + churn) r; then image and noise together are scaled to time s
    return (x_r + r * math.sqrt((1 + churn) ** 2 - 1) * noise(x)) / (1 + churn * r)


def sample(velocity, eps, cond, times, churn=0.0, noise=torch.randn_like, trajectory=None):
    """Integrate the flow ODE from noise eps [B, ...] to image latents x_0 [B, ...].

    times: decreasing floats, from 1 at most down to 0, one more than there are steps
    churn: strength of the fresh noise in every step
    trajectory: a list that receives (x_t, v) of every step
    """
    # with churn the starting noise is stirred, too, so that branches start differently
    x = churned_step(eps, 0.0, 1.0, 1.0, churn, noise)
    x = times[0] * x  # some schedules start a little below 1, where x_t is about t eps

    for t, s in pairwise(times):
        v = velocity(x, t, cond)
        if trajectory is not None:
            trajectory.append((x, v))
        x = churned_step(x, v, t, s, churn, noise)
    return x


# ---- what is trained


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x (Hu et al. 2021); A starts gaussian, B zero.

    A [rank, in] and B [out, rank] are float32 (float64 if the layer is) and compute in the dtype of
    the input. A `population` is M other values of both, its members: (A [M, rank, in],
    B [M, out, rank]). With it, image i of a batch is computed by member i mod M, so that one pass
    through the network evaluates M values of theta; a batch is then a multiple of M images.
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

        A_T = self.population[0].to(x.dtype).mT  # [M, in, rank]
        B_T = self.population[1].to(x.dtype).mT  # [M, rank, out]
        tokens = x[0].numel() // x.shape[-1]
        images = x.reshape(-1, len(A_T), tokens, x.shape[-1])  # [images / M, M, tokens, in]
        return self.base(x) + (self.scale * (images @ A_T) @ B_T).view(*x.shape[:-1], -1)


class LoRA:
    """Wraps each nn.Linear of a model whose dotted name ends with a target, and freezes the rest.

    targets: ends of names, as "to_q" or "attn.to_out.0"
    alpha: scale of B A x, over the rank (default: the rank, so 1)
    layers: {name: LoRALinear}
    parameters: a list of A and B of each layer in turn, which are theta
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
        """Within the `with` block, image i is computed with theta + offsets[i mod M], [M, P]."""
        members = [p.detach() + o for p, o in zip(self.parameters, self.unflatten(offsets))]
        # A and B of each layer alternate
        for layer, A, B in zip(self.layers.values(), members[0::2], members[1::2]):
            layer.population = (A, B)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.population = None

    @contextmanager
    def switched_off(self):
        """Within the `with` block, the model is the one that training began with."""
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
    From rewards alone it estimates dJ/dtheta, leaves the negative in the parameters' .grad, which
    was empty, and returns how many images it sampled. `spsa` and `central_difference` estimate the
    gradient itself; `fdfo` something that points in about the same direction, plus its pull to
    where training began. An optimiser like Adam does not mind the scale. Under torchrun all
    processes call an estimator alike; each does its share and gets the whole gradient.
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
    """Split this process's share of the rows of tensors into even batches of at most `size` rows.

    Returns [(rows of each tensor, ...), ...].
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if len(tensors[0]) < world:
        raise ValueError(f"{world} processes cannot share {len(tensors[0])} parts of the work")

    shares = [tensor.tensor_split(world)[rank] for tensor in tensors]
    batches = math.ceil(len(shares[0]) / max(1, size))
    return list(zip(*(share.tensor_split(batches) for share in shares)))


def sum_over_processes(*tensors):
    """Sum tensors over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


# ---- estimators that perturb the parameters


@torch.no_grad()
def slopes(problem, directions, h, eps, cond):
    """Measure the slopes of the reward along directions d [D, P]: [D, n].

    (R_plus - R_minus) / 2h, where R_plus is the reward of the image made with theta + h d, and
    R_minus with theta - h d. Each direction is tried at n noises, eps and cond [D, n, ...]. Both
    sides see the same noise (common random numbers), and one pass of the sampler serves a
    population of all directions and sides, M = 2 D.
    """
    D = len(directions)
    members = torch.cat([h * directions, -h * directions])
    size = max(1, problem.batch // len(members))

    slopes_by_batch = []
    for e, c in zip(eps.split(size, dim=1), cond.split(size, dim=1)):
        # for each noise: D images with theta + h d, then D with theta - h d
        e = torch.cat([e, e]).transpose(0, 1).flatten(0, 1)
        c = torch.cat([c, c]).transpose(0, 1).flatten(0, 1)
        with problem.lora.perturbed(members):
            x = sample(problem.velocity, e, c, problem.times)

        plus, minus = problem.reward(x, c).to(directions).view(-1, 2, D).unbind(1)
        slopes_by_batch.append((plus - minus).T / (2 * h))
    found = torch.cat(slopes_by_batch, dim=1)
    return found.nan_to_num(0, 0, 0)  # a reward that is not finite counts as no slope


def central_difference(
    problem, eps, cond, generator=None, h: float = 0.1, coordinates: int | None = 32
):
    """Estimate dJ/dtheta by central differences, one coordinate i of theta after another.

    g_i = (J(theta + h e_i) - J(theta - h e_i)) / 2h, with the unit vectors e_i. Exact up to O(h^2);
    costs 2 G images for each coordinate. The other parameters get the gradient 0.

    h: step in each parameter
    coordinates: parameters tried, drawn at random; None: all
    """
    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    tried = torch.randperm(len(g), generator=generator, device=g.device)[:coordinates]

    for (i,) in micro_batches(problem.batch // (2 * len(eps)), tried):  # D at a time
        units = F.one_hot(i, len(g)).to(g)  # [D, P]
        each_eps = eps.expand(len(i), *eps.shape)
        each_cond = cond.expand(len(i), *cond.shape)
        g[i] = slopes(problem, units, h, each_eps, each_cond).mean(1)

    sum_over_processes(g)
    problem.lora.add_grad(-g)
    return 2 * len(tried) * len(eps)


def spsa(problem, eps, cond, generator=None, h: float = 0.02, directions: int = 16):
    """Estimate dJ/dtheta by SPSA: all parameters at once, along random signs d (Spall 1992).

    g is the mean over directions of (J(theta + h d) - J(theta - h d)) / (2h) times d, with J the
    mean over the groups of that direction. Unbiased up to O(h^2); costs 2 G images however many
    parameters there are.

    h: step in every parameter
    directions: random directions, each tried on its own part of the groups
    """
    if len(eps) % directions:
        raise ValueError(f"{len(eps)} groups cannot be dealt out evenly to {directions} directions")
    eps, cond = eps.unflatten(0, (directions, -1)), cond.unflatten(0, (directions, -1))

    g = torch.zeros_like(parameters_to_vector(problem.lora.parameters))
    bits = torch.randint(
        2, (directions, len(g)), generator=generator, device=g.device, dtype=torch.int8
    )
    for e, c, b in micro_batches(problem.batch // (2 * eps.shape[1]), eps, cond, bits):
        d = 2 * b.to(g) - 1  # random signs [D, P]
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

    From each noise K images are sampled with churn, its branches. They differ slightly, since churn
    stirs the starting noise and every step. How the rewards of two of them differ tells which way
    to move both (1 and 2 are branches, not times):

        g = (R_1 - R_2) (x_1 - x_2) / mean((x_1 - x_2)^2)

    An image moves along g if the velocity that makes it moves along -g. So the velocity is
    regressed onto its current value minus g. The exact direction would need the Jacobian of the
    sampler: how x_0 responds to a nudge of v_t. It is taken for -dt times the identity, as if all
    later steps passed the nudge on unchanged. This *identity approximation* makes the estimate
    biased; it is also biased toward the directions in which branches differ. It works because a
    nudge does move the image mostly along itself: on the toy of studies/toy.py the estimate has a
    cosine near 0.9 with the exact gradient.

    All branches of a group have the same g, so one of them is trained, which costs less. It is
    trained with fresh noise, at x_t = (1 - t) x_0 + t noise, although g was measured on another
    path. There flow matching would teach the velocity noise - x_0; if x_0 moves by g and the noise
    stays, that moves by -g. (That x_t then moves, too, by (1 - t) g, is neglected.) The paper
    trains at the steps that led to the image (fdfo_published in studies/baselines.py).

    branches: images sampled from each noise
    churn: strength of the fresh noise in every step, by which the branches differ
    train_steps: random times at which each group is trained
    kl: weight of the pull to the model that training began with, by the mean squared difference of
        the velocities
    """
    if branches < 2 or churn <= 0:
        raise ValueError(
            "fdfo compares at least 2 branches, and needs churn > 0 for them to differ"
        )

    # 1. branch, 2. score, 3. difference: roll_out samples the images and computes g
    rolls = roll_out(problem, eps, cond, branches, churn, generator)

    # rewards in units of their mean absolute deviation from that of their group, over all groups:
    # so one learning rate, and one kl, suits any reward
    total = sum(roll.spread.sum() for roll in rolls)
    sum_over_processes(total)
    unit = (total / len(eps)).clamp(min=1e-12)

    # 4. pull the velocity toward its current value minus g
    for roll in rolls:
        for t in draw_times(problem.times, train_steps, roll.generators):
            x_t = noised(roll.x_0, t, normal(roll.generators, roll.x_0))
            v = problem.velocity(x_t, t, roll.cond)
            # what counts of this loss is its gradient at v, which is 2 g / unit / v.numel()
            loss = F.mse_loss(v, v.detach() - roll.g / unit)

            if kl > 0:
                with torch.no_grad(), problem.lora.switched_off():
                    v_base = problem.velocity(x_t, t, roll.cond)
                loss = loss + kl * F.mse_loss(v, v_base)

            # so that the losses of all batches and processes add up to one mean
            weight = len(x_t) / (train_steps * len(eps))
            (weight * loss).backward()

    # .grad is None for layers that the image does not depend on, such as the last ones for text
    sum_over_processes(*(p.grad for p in problem.lora.parameters if p.grad is not None))
    return branches * len(eps)


class Rollout(NamedTuple):
    """What training needs of a batch of G groups that were sampled and scored."""

    x_0: torch.Tensor  # [G, ...], the first branch of each group
    cond: torch.Tensor  # [G, ...]
    g: torch.Tensor  # [G, ...], the direction in which the reward rises
    spread: torch.Tensor  # [G], mean absolute deviation of the rewards in a group
    generators: list  # of G, so that a group's noise is the same in whichever batch it comes


@torch.no_grad()
def roll_out(problem, eps, cond, branches, churn, generator=None):
    """Sample and score all branches of eps [G, ...]; return a Rollout for each micro-batch."""
    rolls = []
    all_seeds = torch.randint(2**31, (len(eps),), generator=generator, device=eps.device)
    for e, c, seeds in micro_batches(problem.batch // branches, eps, cond, all_seeds):
        generators = [torch.Generator(e.device).manual_seed(seed) for seed in seeds.tolist()]

        # sample the branches, side by side: [G K, ...]
        each_eps, each_cond = e.repeat_interleave(branches, 0), c.repeat_interleave(branches, 0)
        noise = partial(normal, generators)
        x = sample(problem.velocity, each_eps, each_cond, problem.times, churn, noise)

        # score them; where one reward is NaN all of the group become 0, so that its g is 0
        R = problem.reward(x, each_cond).to(x).view(-1, branches)  # [G, K]
        R = R.where(R.isfinite().all(1, keepdim=True), 0)
        spread = (R - R.mean(1, keepdim=True)).abs().mean(1)

        g = image_gradient(R, x.view(*R.shape, -1)).view(e.shape)
        rolls.append(Rollout(x[::branches], c, g, spread, generators))
    return rolls


def image_gradient(R, x):
    """Estimate dR/dx_0 as FDFO does: g [G, D], from rewards R [G, K] of images x [G, K, D].

    g = mean_k (R_k - mean R) (x_k - mean x) / mean square of (x_k - mean x), over K branches and,
    in the mean square, D latent pixels. For K = 2 it is the formula in `fdfo`. Divided by the sum
    of squares it would be the gradient's projection on the branches' difference. A random direction
    holds about 1/D of the gradient, and the mean in place of the sum makes up for that.
    """
    dR = R - R.mean(1, keepdim=True)
    dx = x - x.mean(1, keepdim=True)
    return (dR[:, :, None] * dx).mean(1) / (dx**2).mean((1, 2))[:, None].clamp(min=1e-12)


def noised(x_0, t, noise):
    """Return x_t = (1 - t) x_0 + t noise, for images x_0 [B, ...] and a time for each, t [B]."""
    t = t.view(-1, *[1] * (x_0.dim() - 1))
    return (1 - t) * x_0 + t * noise


def normal(generators, x):
    """Draw normal noise like x [B, ...], for an equal part of its images from each generator."""
    parts = []
    for part, generator in zip(x.chunk(len(generators)), generators):
        parts.append(torch.randn(part.shape, generator=generator, device=x.device, dtype=x.dtype))
    return torch.cat(parts)


def draw_times(times, n, generators):
    """Draw n random times for each of G groups, of those at which the sampler calls the network.

    A time is as likely as its step is long, because that is how far its velocity moves the image:
    n points are spread evenly over the way from noise to image, from a random start, and each takes
    the time at which the step it falls in begins.

        times    1.0 ---------- 0.7 ---------- 0.4 ----- 0.2 ------- 0
        points      ^                ^                ^                 n = 3
        drawn    1.0            0.7            0.4

    Returns [n, G].
    """
    device = generators[0].device
    start = [torch.rand(1, generator=generator, device=device) for generator in generators]
    times = torch.tensor(times, device=device)
    points = times[0] * (1 - (torch.arange(n, device=device)[:, None] + torch.cat(start)) / n)
    # how many of the inner times lie above each point; searchsorted wants rising numbers
    index = torch.searchsorted(-times[1:-1], -points)
    return times[index]
