"""Scores of images for the estimators, and the evaluation on held-out prompts."""

import math

import torch

from support.errors import UserError
from support.processes import count_over_processes, gather_rows, processes

CLEAR = 3  # standard errors beyond which a change is no chance
MATTERS = 0.1  # standard deviations between prompts from which on a change matters


def mean_and_error(values, prompts):
    """Return the mean of values [N], and its error over prompts [N]; None if there are too few.

    A prompt's images are not independent, so they are averaged first. What is not finite is left
    out.
    """
    finite = values.isfinite()
    values, prompts = values[finite].double(), prompts[finite]
    if len(values) == 0:
        return None, None

    means = torch.stack([values[prompts == prompt].mean() for prompt in prompts.unique()])
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return values.mean().item(), error


def plus_minus(mean, error, sign="+", digits=2):
    """Write a mean and its standard error as text; either may be None."""
    if mean is None:
        return "unknown"
    text = f"{mean:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


class Counted:
    """A velocity that counts its evaluations: one for an image forward, three with its gradient."""

    def __init__(self, velocity):
        self.velocity, self.evaluations = velocity, 0

    def __call__(self, x, t, cond):
        self.evaluations += len(x) * (3 if torch.is_grad_enabled() else 1)
        return self.velocity(x, t, cond)

    def pop_count(self):
        """Return the evaluations of all processes since the last call."""
        count, self.evaluations = self.evaluations, 0
        return count_over_processes(count)


class Scorer:
    """The reward of latents, as the estimators ask for it; it remembers all values for the log."""

    def __init__(self, flow, reward):
        self.flow, self.reward, self.seen = flow, reward, []

    def __call__(self, x, cond):
        prompts = [self.flow.prompts[i] for i in cond.tolist()]
        values = self.reward.measure(self.flow.decode(x), prompts)
        self.seen.append({name: R.detach() for name, R in values.items()} | {"prompt": cond})
        return self.reward.combine(values)

    def pop_record(self):
        """Return what is to be logged of all processes' rewards since the last call."""
        if not self.seen:
            raise UserError("the estimator did not ask for the reward of a single image")
        values, self.seen = gather_rows(self.seen), []
        prompts = values.pop("prompt")

        R = self.reward.combine(values)
        mean, error = mean_and_error(R, prompts)
        finite = {name: v[v.isfinite()] for name, v in values.items()}
        return {
            "reward": mean,
            "reward_se": error,
            "terms": {name: v.mean().item() if len(v) else None for name, v in finite.items()},
            "terms_std": {
                name: v.std().item() if len(v) > 1 else None for name, v in finite.items()
            },
            "not_finite": int(R.isnan().sum()),
        }


def held_out_share(count, most=128):
    """Choose which of `count` held-out prompts are measured, and which of those here.

    Indices [P] and [p]. UserError if there are fewer than processes.
    """
    rank, world = processes()
    if count < world:
        raise UserError(f"{world} processes need at least as many held-out prompts, not {count}")
    chosen = torch.linspace(0, count - 1, min(count, most)).round().long()
    return chosen, chosen.tensor_split(world)[rank]


class HeldOut:
    """Measures the model on prompts it is not trained on, each with images from the same noise.

    cond: indices in `flow.prompts` of the prompts that all processes measure together
    mine: those of this process
    reward, watched: a Reward, and a list of them
    embed: a function from images to embeddings of unit length, for diversity
    seed: of the noise, an image its own from there on

    `prompts` are up to 48 of them, whose first images are shown.
    """

    def __init__(self, flow, cond, mine, reward, watched, embed, batch, seed):
        self.flow, self.reward, self.watched, self.embed = flow, reward, watched, embed
        self.batch, self.base, self.base_images = batch, None, None

        # two images of each prompt, whose noise depends on the place of the prompt alone
        places = torch.isin(cond, mine).nonzero()[:, 0]
        self.cond = mine.repeat_interleave(2)
        self.seeds = (seed + 2 * places[:, None] + torch.arange(2)).flatten().tolist()

        shown = torch.linspace(0, len(cond) - 1, min(len(cond), 48)).round().long()
        self.prompts = [flow.prompts[i] for i in cond[shown].tolist()]
        self.shown = 2 * torch.isin(places, shown).nonzero()[:, 0]

        # a person is asked in training only
        self.scored = not asks_a_person(reward)
        if any(asks_a_person(reward) for reward in watched):
            raise UserError("--watch: a person can be asked in training only")

    @torch.no_grad()
    def __call__(self):
        """Measure the model; the first call measures the base model.

        Returns the first image of each of `prompts` [P, 3, H, W], and a record of means and their
        errors over prompts. Gain and change are mean differences to the base model's images from
        the same noise, of the reward and of what is watched. Drift is the root mean square
        difference in pixels. Diversity is the mean cosine distance of a prompt's two images. A term
        that was learned from choices has a `choice_error` of the change of embeddings, too.
        """
        images = self.flow.images(self.cond, self.seeds, self.batch)
        if self.base_images is None:
            self.base_images = images
            if images.isnan().any():
                raise UserError("the model's images are not finite numbers: try --dtype bfloat16")

        # score batch by batch, then bring the scores of all processes together
        parts = []
        for i in range(0, len(images), self.batch):
            parts.append(self.measure(images, slice(i, i + self.batch)))
        values = gather_rows(parts)
        prompts, embeddings = values.pop("prompt"), values.pop("embedding")
        record = {"drift": values.pop("drift").mean().sqrt().item()}
        values["diversity"] = diversity(embeddings.unflatten(0, (-1, 2))).repeat_interleave(2)

        # the trained reward, and all else, against the base model
        R = self.reward.combine(values) if self.scored else None
        self.base = self.base or (R, values, embeddings)
        if self.scored:
            record["held_out"], record["held_out_se"] = mean_and_error(R, prompts)
            record["gain"], record["gain_se"] = mean_and_error(R - self.base[0], prompts)

        change = {name: v - self.base[1][name] for name, v in values.items()}
        for key, group in (("watched", values), ("change", change)):
            statistics = {name: mean_and_error(v, prompts) for name, v in group.items()}
            record[key] = {name: mean for name, (mean, _) in statistics.items()}
            record[f"{key}_se"] = {name: error for name, (_, error) in statistics.items()}
        record["prompts"] = len(prompts.unique())

        # the limited number of choices that a taste was fitted to is an error of its own
        difference = (embeddings - self.base[2]).mean(0)
        for name, term in self.terms().items():
            if hasattr(term, "choice_error"):
                errors = record.setdefault("change_se_choices", {})
                errors[name] = term.choice_error(difference)

        shown = (255 * images[self.shown]).round().byte()
        return gather_rows([{"image": shown}])["image"] / 255, record

    def measure(self, images, part):
        """Score a part of the images of this process."""
        prompts = [self.flow.prompts[i] for i in self.cond[part].tolist()]
        drift = (images[part] - self.base_images[part]).square().mean((1, 2, 3))
        images = images[part].to(self.flow.device)

        scores = self.reward.measure(images, prompts) if self.scored else {}
        for reward in self.watched:
            if reward.expression not in scores:
                scores[reward.expression] = reward(images, prompts)
        return {"prompt": self.cond[part], "embedding": self.embed(images), "drift": drift} | scores

    def terms(self):
        """Return all terms of the rewards, {name: callable}."""
        rewards = [self.reward, *self.watched]
        return {name: term for reward in rewards for name, term in reward.terms.items()}

    def counts(self):
        """Return what terms have counted so far, such as requests to judges."""
        counts = {}
        for term in self.terms().values():
            if hasattr(term, "record"):
                counts |= term.record()
        return counts


def open_terms(rewards, run, prompts):
    """Show the run, and its prompts, to the terms of rewards that want to see them.

    Judges and people keep something in its folder; others need more of a prompt than its text.
    """
    for reward in rewards:
        for term in reward.terms.values():
            if hasattr(term, "open"):
                term.open(run)
            if hasattr(term, "check"):
                term.check(prompts)


def diversity(embeddings):
    """Return the mean cosine distance [P] between the images of each prompt, from [P, n, D]."""
    n = embeddings.shape[1]
    cosines = embeddings @ embeddings.mT
    return (n * n - cosines.sum((1, 2))) / (n * (n - 1))


def asks_a_person(reward):
    """Say whether a Reward has a term for which a person must be asked."""
    return any(getattr(term, "only_in_training", False) for term in reward.terms.values())


def signs_of_hacking(record, base):
    """Return the watched names, none of them trained, that fell while the reward rose.

    record, base: of a later evaluation, and of the base model. Fewer than two are no sign: one fall
    can be a matter of taste. A change counts if it is clear and matters.
    """

    def counts(change, error, base_error, sign):
        if None in (change, error, base_error):
            return False
        spread = base_error * math.sqrt(base["prompts"])
        return sign * change > max(CLEAR * error, MATTERS * spread)

    if not counts(record.get("gain"), record.get("gain_se"), base.get("held_out_se"), 1):
        return []
    fallen = []
    for name, change in record["change"].items():
        error, base_error = record["change_se"][name], base["watched_se"][name]
        if name not in record["terms"] and counts(change, error, base_error, -1):
            fallen.append(name)
    return fallen if len(fallen) > 1 else []
