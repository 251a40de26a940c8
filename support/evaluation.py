"""Scores of images for the estimators, and the evaluation on held-out prompts."""

import math

import torch
import torch.distributed as dist

from errors import UserError


def rank():
    """The number of this process among those of torchrun; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def joined(parts):
    """[{name: [n, ...]}, ...] to {name: [N, ...]} on the CPU, from all processes in their order.

    The first process has parts; another may have none, if there was too little to share.
    """
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [{name: v.cpu() for name, v in part.items()} for part in parts])
        parts = sum(everyone, [])
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def mean_and_error(values):
    """Mean and standard error of the finite numbers among values [N]."""
    values = values[values.isfinite()]
    return values.mean().item(), (values.std() / math.sqrt(max(1, len(values)))).item()


class Counted:
    """A velocity that counts its evaluations: one for an image forward, three for forward and backward."""

    def __init__(self, velocity):
        self.velocity, self.evaluations = velocity, 0

    def __call__(self, x, t, cond):
        self.evaluations += len(x) * (3 if torch.is_grad_enabled() else 1)
        return self.velocity(x, t, cond)

    def take(self):
        """The evaluations since the last call, in this process."""
        evaluations, self.evaluations = self.evaluations, 0
        return evaluations


class Scorer:
    """The reward of latents, as the estimators ask for it; keeps what the terms gave until `take`."""

    def __init__(self, flow, reward):
        self.flow, self.reward, self.seen = flow, reward, []

    def __call__(self, x, cond):
        values = self.reward.measure(self.flow.decode(x), [self.flow.prompts[i] for i in cond])
        self.seen.append({name: R.detach() for name, R in values.items()})
        return self.reward.combine(values)

    def take(self):
        """The values of each term since the last call, from all processes: {name: [N]}."""
        values, self.seen = joined(self.seen), []
        return values


class HeldOut:
    """Measures the model on prompts it is not trained on, two images each, always from the same noise.

    Up to 128 of the last `count` prompts of the flow; every process measures its share of them. A person is
    not asked here: with `human` in the reward only the watched rewards are measured.
    """

    def __init__(self, flow, count, reward, watched, embed, args):
        self.flow, self.reward, self.watched, self.embed = flow, reward, watched, embed
        self.batch, self.base_images, self.base = args.batch, None, None
        total = len(flow.prompts)
        chosen = torch.linspace(total - count, total - 1, min(count, 128)).round().long()
        self.prompts = [flow.prompts[i] for i in chosen]
        seeds = args.seed * 1_000_000 + torch.arange(2 * len(chosen))
        world = dist.get_world_size() if dist.is_initialized() else 1
        if len(chosen) < world:
            raise UserError(f"{world} processes need at least as many held-out prompts, not {len(chosen)}")
        self.cond = chosen.tensor_split(world)[rank()].repeat_interleave(2)
        self.seeds = seeds.unflatten(0, (-1, 2)).tensor_split(world)[rank()].flatten().tolist()

    @torch.no_grad()
    def __call__(self):
        """Returns the first image of up to 48 prompts [P, 3, H, W] and a record of means and standard errors.

        The first call measures the base model. Gain and change are mean differences to its images from the
        same noise, of the reward and of what is watched. Drift is the root mean square difference in pixels,
        diversity the mean cosine distance between the CLIP embeddings of a prompt's two images.
        """
        images, parts = self.flow.images(self.cond, self.seeds, self.batch), []
        if self.base_images is None:
            self.base_images = images
        for i in range(0, len(images), self.batch):
            part = images[i : i + self.batch]
            drift = (part - self.base_images[i : i + self.batch]).square().mean((1, 2, 3))
            prompts = [self.flow.prompts[c] for c in self.cond[i : i + self.batch]]
            part = part.to(self.flow.device)
            terms = {} if "human" in self.reward.terms else self.reward.measure(part, prompts)
            terms |= {t.expression: t(part, prompts) for t in self.watched if t.expression not in terms}
            parts.append({"embedding": self.embed(part), "drift": drift, **terms})
        values = joined(parts)
        first, second = values.pop("embedding").unflatten(0, (-1, 2)).unbind(1)
        record = {"drift": values.pop("drift").mean().sqrt().item()}
        R = None if "human" in self.reward.terms else self.reward.combine(values)
        values["diversity"] = 1 - (first * second).sum(1)
        self.base = self.base or (R, values)
        if R is not None:
            record |= statistics("held_out", R) | statistics("gain", R - self.base[0])
        for name, part in (
            ("watched", values),
            ("change", {k: v - self.base[1][k] for k, v in values.items()}),
        ):
            record[name] = {k: mean_and_error(v)[0] for k, v in part.items()}
            record[f"{name}_se"] = {k: mean_and_error(v)[1] for k, v in part.items()}
        pictures = joined([{"": (255 * images[::2][:48]).round().byte()}])[""]
        return pictures[:48] / 255, record


def statistics(name, values):
    """The mean of values under a name, and its standard error under the name with _se."""
    return dict(zip((name, f"{name}_se"), mean_and_error(values)))


def paid_with(record, trained):
    """What a reward that rises is paid with: the watched names, none of them `trained`, that fell meanwhile.

    Rises and falls count beyond three standard errors. One fall can be a matter of taste; two are a sign that
    the reward is hacked, so fewer than two give an empty list.
    """
    if record.get("gain", 0) <= 3 * record.get("gain_se", 0):
        return []
    fallen = [k for k, v in record["change"].items() if k not in trained and v < -3 * record["change_se"][k]]
    return fallen if len(fallen) > 1 else []
