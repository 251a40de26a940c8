"""Scores of images for the estimators, and the evaluation on held-out prompts."""

import math

import torch
import torch.distributed as dist

from support.errors import UserError


def processes():
    """(the number of this process among those of torchrun, how many there are): (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(parts):
    """[{name: [n, ...]}, ...] to {name: [N, ...]} on the CPU, from all processes in their order.

    The first process has parts; another may have none, if there was too little to share.
    """
    parts = [{name: values.cpu() for name, values in part.items()} for part in parts]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, parts)
        parts = sum(everyone, [])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mean_and_error(values, prompts):
    """Mean of values [N] and its standard error over prompts [N]; None where there are too few to tell.

    A prompt's images are not independent, so they are averaged first; what is not finite is left out.
    """
    values, prompts = values[values.isfinite()].double(), prompts[values.isfinite()]
    means = torch.tensor([values[prompts == prompt].mean() for prompt in prompts.unique()])
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return values.mean().item() if len(values) else None, error


def statistics(name, values, prompts):
    """The mean of values under a name, and its standard error under the name with _se."""
    return dict(zip((name, f"{name}_se"), mean_and_error(values, prompts)))


def plus_minus(mean, error, sign="+"):
    """A mean and its standard error as text, either of which may be None."""
    if mean is None:
        return "unknown"
    return f"{mean:{sign}.2f}" if error is None else f"{mean:{sign}.2f} ± {error:.2f}"


class Counted:
    """A velocity that counts its evaluations: one for an image forward, three for forward and backward."""

    def __init__(self, velocity):
        self.velocity, self.evaluations = velocity, 0

    def __call__(self, x, t, cond):
        self.evaluations += len(x) * (3 if torch.is_grad_enabled() else 1)
        return self.velocity(x, t, cond)

    def pop_count(self):
        """The evaluations since the last call, of all processes."""
        count, self.evaluations = torch.tensor([self.evaluations]), 0
        return int(gather_rows([{"": count}])[""].sum())


class Scorer:
    """The reward of latents, as the estimators ask for it; keeps what the terms gave until it is asked."""

    def __init__(self, flow, reward):
        self.flow, self.reward, self.seen = flow, reward, []

    def __call__(self, x, cond):
        values = self.reward.measure(
            self.flow.decode(x), [self.flow.prompts[i] for i in cond.tolist()]
        )
        self.seen.append({name: R.detach() for name, R in values.items()} | {"": cond})
        return self.reward.combine(values)

    def pop_record(self):
        """What is to be logged of the rewards since the last call, those of all processes."""
        if not self.seen:
            raise UserError("the estimator did not ask for the reward of a single image")
        values, self.seen = gather_rows(self.seen), []
        prompts = values.pop("")
        R = self.reward.combine(values)
        terms = {name: v[v.isfinite()] for name, v in values.items()}
        return statistics("reward", R, prompts) | {
            "terms": {name: v.mean().item() if len(v) else None for name, v in terms.items()},
            "terms_std": {
                name: v.std().item() if len(v) > 1 else None for name, v in terms.items()
            },
            "not_finite": int(R.isnan().sum()),
        }


class HeldOut:
    """Measures the model on prompts it is not trained on, two images each, always from the same noise.

    Up to 128 of the last `count` prompts of the flow; every process measures its share of them. `prompts` are
    up to 48 of these, from first to last, whose images are shown. A person is not asked here: with `human` in
    the reward only the watched rewards are measured. embed: images to embeddings of unit length, for
    diversity. seed: of the noise, an image its own from there on.
    """

    def __init__(self, flow, count, reward, watched, embed, batch, seed):
        self.flow, self.reward, self.watched, self.embed = flow, reward, watched, embed
        self.batch, self.base_images, self.base = batch, None, None
        total, (rank, world) = len(flow.prompts), processes()
        chosen = torch.linspace(total - count, total - 1, min(count, 128)).round().long()
        shown = torch.linspace(0, len(chosen) - 1, min(len(chosen), 48)).round().long()
        self.prompts = [flow.prompts[i] for i in chosen[shown].tolist()]
        if len(chosen) < world:
            raise UserError(
                f"{world} processes need at least as many held-out prompts, not {len(chosen)}"
            )
        mine = torch.arange(len(chosen)).tensor_split(world)[rank]
        self.cond = chosen[mine].repeat_interleave(2)
        self.seeds = (seed + 2 * mine[:, None] + torch.arange(2)).flatten().tolist()
        self.shown = (
            2 * torch.isin(mine, shown).nonzero()[:, 0]
        )  # the first of a prompt's two images

    @torch.no_grad()
    def __call__(self):
        """Returns the first image of each of `prompts` [P, 3, H, W], and a record of means and their errors.

        The first call measures the base model. Gain and change are mean differences to its images from the
        same noise, of the reward and of what is watched. Drift is the root mean square difference in pixels,
        diversity the mean cosine distance between the embeddings of a prompt's two images. A term that was
        learned from choices has a `choice_error` of the mean change of embeddings, which stands beside the
        standard errors over prompts.
        """
        images, parts = self.flow.images(self.cond, self.seeds, self.batch), []
        if self.base_images is None:
            self.base_images = images
        for i in range(0, len(images), self.batch):
            part, cond = images[i : i + self.batch], self.cond[i : i + self.batch]
            drift = (part - self.base_images[i : i + self.batch]).square().mean((1, 2, 3))
            prompts, part = [self.flow.prompts[c] for c in cond.tolist()], part.to(self.flow.device)
            terms = {} if "human" in self.reward.terms else self.reward.measure(part, prompts)
            terms |= {
                t.expression: t(part, prompts) for t in self.watched if t.expression not in terms
            }
            parts.append({"": cond, "embedding": self.embed(part), "drift": drift, **terms})
        values = gather_rows(parts)
        prompts, embeddings = values.pop(""), values.pop("embedding")
        record = {"drift": values.pop("drift").mean().sqrt().item()}
        R = None if "human" in self.reward.terms else self.reward.combine(values)
        first, second = embeddings.unflatten(0, (-1, 2)).unbind(1)
        values["diversity"] = (1 - (first * second).sum(1)).repeat_interleave(2)
        self.base = self.base or (R, values, embeddings)
        if R is not None:
            record |= statistics("held_out", R, prompts) | statistics(
                "gain", R - self.base[0], prompts
            )
        change = {name: v - self.base[1][name] for name, v in values.items()}
        for key, group in (("watched", values), ("change", change)):
            record[key] = {name: mean_and_error(v, prompts)[0] for name, v in group.items()}
            record[f"{key}_se"] = {name: mean_and_error(v, prompts)[1] for name, v in group.items()}
        terms = self.reward.terms | {
            name: term for t in self.watched for name, term in t.terms.items()
        }
        learned = {name: term for name, term in terms.items() if hasattr(term, "choice_error")}
        if learned:  # from choices, of whose number their errors tell
            de = (embeddings - self.base[2]).mean(0)
            record["change_se_choices"] = {
                name: term.choice_error(de) for name, term in learned.items()
            }
        pictures = gather_rows([{"": (255 * images[self.shown]).round().byte()}])[""]
        return pictures / 255, record


def signs_of_hacking(record):
    """The watched names, none of them trained, that fell while the reward rose; fewer than two are no sign.

    Rises and falls count beyond three standard errors: one fall can be a matter of taste.
    """

    def clear(value, error, sign):
        return None not in (value, error) and sign * value > 3 * error

    if not clear(record.get("gain"), record.get("gain_se"), 1):
        return []
    names = [name for name in record["change"] if name not in record["terms"]]
    fallen = [
        name for name in names if clear(record["change"][name], record["change_se"][name], -1)
    ]
    return fallen if len(fallen) > 1 else []
