"""A taste, learned from choices between images of one prompt: a linear head on CLIP embeddings.

P(the first of two is preferred) = sigmoid(w . (e_1 - e_2)) (Bradley and Terry 1952); w has a normal prior.
`python -m studies.taste --name mine` asks, and writes the head that `--reward taste:mine` reads.
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
    """The logit by which an image is preferred: a difference of one is a choice of 73 %.

    weight: w [D]; covariance [D, D]: of its posterior, which is taken as normal (Laplace); mean [D]: that of
    the embeddings of the images compared, where the taste is 0. With a clip it is a reward.
    """

    weight: torch.Tensor
    covariance: torch.Tensor
    mean: torch.Tensor
    clip: object = None

    def __call__(self, images, prompts):
        e = self.clip.embed_images(images)
        return (e - self.mean.to(e)) @ self.weight.to(e)

    def choice_error(self, de):
        """The standard error that the mean change has for want of choices, if embeddings change by de [D]."""
        de = de.to(self.covariance)
        return (de @ self.covariance @ de).clamp(min=0).sqrt().item()


def newton(z, y, precision, u):
    """The most probable u [r] for differences z [n, r] and answers y [n], and the Hessian there; from a u."""
    for _ in range(30):
        p = torch.sigmoid(z @ u)
        H = (z.T * (p * (1 - p))) @ z + precision * torch.eye(len(u))
        step = torch.linalg.solve(H, z.T @ (y - p) - precision * u)
        u = u + step
        if step.abs().max() < 1e-6:
            break
    return u, H


def fit(d, y, fold):
    """w [D], its covariance [D, D], and the logits [n] of choices that w has not seen, by cross-validation.

    d [n, D]: embedding of the first image minus that of the second; y [n]: 1 if the first was preferred, 1/2
    without preference; fold [n]: what is left out together. A priori w varies as d does, since tastes are
    mostly of what images differ in: its prior covariance is that of d, a tenth of white noise added, over a
    precision, and all precisions count by their evidence (MacKay 1992).
    """
    d, y = d.double(), y.double()
    U, spread, V = torch.linalg.svd(d, full_matrices=False)
    variance = d.shape[1] * spread**2 / (spread**2).sum().clamp(min=1e-12) + 0.1
    std = variance.sqrt()  # of w a priori, in the directions V; in all others the variance is 0.1
    root = V.T * std  # w = root u, and u has the prior N(0, 1 / precision)
    z, u, evidence, modes, inverses = U * spread * std, torch.zeros_like(spread), [], [], []
    for precision in PRECISIONS:
        u, H = newton(z, y, precision, u)
        likelihood = (y * (z @ u) - F.softplus(z @ u)).sum()
        evidence.append(
            likelihood + (len(u) * math.log(precision) - precision * u @ u - H.logdet()) / 2
        )
        modes.append(u)
        inverses.append(H.inverse())
    share, modes = torch.stack(evidence).softmax(0), torch.stack(modes)
    u = share @ modes
    S = (share[:, None, None] * torch.stack(inverses)).sum(0) + (share * (modes - u).T) @ (
        modes - u
    )
    outside = 0.1 * (share / share.new_tensor(PRECISIONS)).sum() * (torch.eye(d.shape[1]) - V.T @ V)
    unseen, precision = torch.zeros_like(y), PRECISIONS[share.argmax()]
    for k in fold.unique():
        rest = fold != k
        unseen[~rest] = z[~rest] @ newton(z[rest], y[rest], precision, torch.zeros_like(u))[0]
    return root @ u, root @ S @ root.T + outside, unseen


def load(clip, *options):
    """The Taste of a term `taste:NAME`, in tastes/NAME or another folder. UserError if none for this CLIP."""
    if len(options) != 1:
        raise UserError("reward taste: say whose, as taste:NAME or taste:path/to/folder")
    name = options[0].strip('"')
    folder = Path(name).expanduser() if "/" in name else Path("tastes", name)
    try:
        with safe_open(folder / "head.safetensors", "pt") as file:
            tensors = [file.get_tensor(key) for key in ("weight", "covariance", "mean")]
            about = json.loads(file.metadata()["taste"])
        known, right = about["clip"], float(about["right"])
        error = math.sqrt(right * (1 - right) / max(int(about["choices"]), 1))
    except FileNotFoundError as error:
        make = f"make one with: python -m studies.taste --name {folder.name}"
        raise UserError(
            f"reward taste:{name}: there is no {folder / 'head.safetensors'}; {make}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"reward taste:{name}: {folder} is damaged: {first_line(error)}") from error
    if known != (here := clip_name(clip)):
        raise UserError(f"reward taste:{name}: it was fitted on {known}, and this model has {here}")
    D = clip.model.config.projection_dim
    if [list(t.shape) for t in tensors] != [[D], [D, D], [D]] or not all(
        t.isfinite().all() for t in tensors
    ):
        raise UserError(f"reward taste:{name}: {folder} is damaged, or from another {here}")
    if right - 2 * error < 0.5:  # it would train all the same, in some direction
        warn(
            f"taste:{name} predicts {100 * right:.0f} % of choices it has not seen: that may be guessing"
        )
    return Taste(*tensors, clip)


def clip_name(clip):
    """By which a CLIP is known again."""
    return Path(clip.model.name_or_path).name
