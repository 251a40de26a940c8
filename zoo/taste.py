"""A taste, learned from choices between images of one prompt: a linear head on CLIP embeddings.

P(the first of two is preferred) = sigmoid(w . (e_1 - e_2)) (Bradley and Terry 1952), where e are
the embeddings of the images, and w has a normal prior. `python -m studies.taste --name mine` asks,
and writes the head that `--reward taste:mine` reads.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from support.errors import UserError, first_line
from support.run import warn

PRECISIONS = torch.logspace(3, -4, 15).tolist()  # of the prior, strong to weak


@dataclass
class Taste:
    """Gives the logit by which an image is preferred: a difference of one is a choice of 73 %.

    weight: w [D]
    covariance: [D, D], of the posterior of w, which is taken as normal (Laplace)
    mean: [D], of the embeddings of the images compared, where the taste is 0
    clip: what embeds the images of a reward
    """

    weight: torch.Tensor
    covariance: torch.Tensor
    mean: torch.Tensor
    clip: object = None

    def __call__(self, images, prompts):
        e = self.clip.embed_images(images)
        return (e - self.mean.to(e)) @ self.weight.to(e)

    def choice_error(self, de):
        """Return the standard error of the mean taste when the mean embedding changes by de [D].

        It is due to the limited number of choices.
        """
        de = de.to(self.covariance)
        return (de @ self.covariance @ de).clamp(min=0).sqrt().item()


def newton(z, y, precision, u):
    """Return the most probable u [r] and the Hessian there, by Newton's method from a first u.

    z: [n, r], differences between the images of each choice
    y: [n], answers
    precision: of the normal prior of u
    """
    for _ in range(30):
        p = torch.sigmoid(z @ u)
        H = (z.T * (p * (1 - p))) @ z + precision * torch.eye(len(u))
        step = torch.linalg.solve(H, z.T @ (y - p) - precision * u)
        u = u + step
        if step.abs().max() < 1e-6:
            break
    return u, H


def fit(d, y, fold):
    """Return w [D], its covariance [D, D], and the logits [n] of choices that w has not seen.

    A priori w varies as d does, since tastes are mostly of what images differ in: its covariance is
    that of d, plus a tenth of white noise, over a precision. All precisions count by their evidence
    (MacKay 1992). The logits are those of a cross-validation.

    d: [n, D], embedding of the first image minus that of the second
    y: [n], 1 if the first was preferred, 1/2 without preference
    fold: [n], number of the group of choices that are left out together
    """
    d, y = d.double(), y.double()
    D = d.shape[1]

    # prior: w = root u, and u is normal with variance 1 / precision in the directions V of d
    U, spread, V = torch.linalg.svd(d, full_matrices=False)
    variance = D * spread**2 / (spread**2).sum().clamp(min=1e-12) + 0.1
    std = variance.sqrt()
    root = V.T * std
    z = U * spread * std

    # the posterior of u for each precision, and the evidence of that precision
    u = torch.zeros_like(spread)
    modes, inverses, evidence = [], [], []
    for precision in PRECISIONS:
        u, H = newton(z, y, precision, u)
        likelihood = (y * (z @ u) - F.softplus(z @ u)).sum()
        prior = len(u) * math.log(precision) - precision * u @ u
        modes.append(u)
        inverses.append(H.inverse())
        evidence.append(likelihood + (prior - H.logdet()) / 2)
    modes, inverses = torch.stack(modes), torch.stack(inverses)

    # mean and covariance of their mixture; in directions without data the prior's 0.1 stays
    share = torch.stack(evidence).softmax(0)
    u = share @ modes
    within = (share[:, None, None] * inverses).sum(0)
    between = (share * (modes - u).T) @ (modes - u)
    inside = root @ (within + between) @ root.T
    outside = 0.1 * (share / share.new_tensor(PRECISIONS)).sum() * (torch.eye(D) - V.T @ V)

    # predict each fold from the others, at the likeliest precision
    unseen = torch.zeros_like(y)
    precision = PRECISIONS[share.argmax()]
    for k in fold.unique():
        rest = fold != k
        without, _ = newton(z[rest], y[rest], precision, torch.zeros_like(u))
        unseen[~rest] = z[~rest] @ without

    return root @ u, inside + outside, unseen


def load(clip, *options):
    """Return the Taste of a term `taste:NAME`, in tastes/NAME, or `taste:path/to/folder`.

    UserError if there is none, it is damaged, or was fitted on another CLIP.
    """
    if len(options) != 1:
        raise UserError("reward taste: say whose, as taste:NAME or taste:path/to/folder")
    name = options[0].strip('"')
    folder = Path(name).expanduser() if "/" in name else Path("tastes", name)
    D = clip.model.config.projection_dim
    file = folder / "head.safetensors"
    if not file.exists():
        make = f"make one with: python -m studies.taste --name {folder.name}"
        raise UserError(f"reward taste:{name}: there is no {file}; {make}")

    try:
        with safe_open(file, "pt") as head:
            about = json.loads(head.metadata()["taste"])
            weight, covariance, mean = map(head.get_tensor, ("weight", "covariance", "mean"))
        known = about["clip"]
        right = about["right"]
        error = math.sqrt(right * (1 - right) / about["choices"])
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise UserError(f"reward taste:{name}: {file} is damaged: {first_line(error)}") from error

    if known != clip_name(clip) or weight.shape != (D,):
        text = f"it was fitted on {known}, and this model has {clip_name(clip)}"
        raise UserError(f"reward taste:{name}: {text}")
    if right - 2 * error < 0.5:  # it would train all the same, in some direction
        text = f"predicts {100 * right:.0f} % of choices it has not seen: that may be guessing"
        warn(f"taste:{name} {text}")
    return Taste(weight, covariance, mean, clip)


def clip_name(clip):
    """Return the name by which a CLIP is known again."""
    return Path(clip.model.name_or_path).name
