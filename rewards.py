"""Rewards: what the images are trained for.

A reward is any callable `reward(images, prompts) -> R` with

images: float tensor [B, 3, H, W] in [0, 1]
prompts: list of B strings
R: [B] numbers, higher is better, no gradient needed

Here are programs (computed without a model), CLIP, the aesthetic predictor, and
`Reward("clip - 0.1*jpeg_size")`, which combines rewards. Those with needs of their own are in zoo/
and imported when they are named.
"""

import functools
import importlib
import io
import math
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from support.errors import UserError, first_line
from support.run import warn
from zoo.grammar import FILE, OPTION, Formula, split_expressions  # noqa: F401
from zoo.loading import CLIP_H, downloaded, large_model_dtype, load_function, pretrained

TINY = Path(__file__).resolve().parent / "tiny"
PATIENCE = 60  # seconds until a line says which reward is being waited for


# ---- programs


def luma(images):
    """Return the Rec. 601 luma of images [B, 3, H, W]: [B, H, W] in [0, 1]."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def brightness(images, prompts):
    """Return the mean luma in percent, 0 (black) to 100 (white)."""
    return 100 * luma(images).mean((1, 2))


def sharpness(images, prompts):
    """Return the variance of the Laplacian of the luma, in squared grey levels (0 to 255).

    Pech-Pacheco et al. 2000.
    """
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(255 * luma(images)[:, None], kernel[None, None]).var((1, 2, 3), correction=0)


def colorfulness(images, prompts):
    """Return the M3 of Hasler and Süsstrunk 2003, 0 (grey) to over 100."""
    red, green, blue = (255 * images).unbind(1)
    rg = red - green
    yb = (red + green) / 2 - blue

    spread = torch.sqrt(rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0))
    return spread + 0.3 * torch.sqrt(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2)


def jpeg_size(images, prompts):
    """Return the size as a JPEG file of quality 95, in kB of 1,000 bytes.

    DDPO, Black et al. 2023.
    """
    sizes = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def edge_density(images, prompts):
    """Return the percentage of pixels at which the luma changes by over 0.1 per pixel (Sobel)."""
    kernel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    gradient = F.conv2d(luma(images)[:, None], torch.stack([kernel, kernel.T])[:, None])
    return 100 * (gradient.norm(dim=1) > 0.1).float().mean((1, 2))


def color_entropy(images, prompts):
    """Return the Shannon entropy of the colours in bits, 0 to 9, with each channel in 8 levels."""
    levels = (8 * images).long().clamp(max=7)
    bins = levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]
    p = torch.stack([torch.bincount(b, minlength=512) / b.numel() for b in bins.flatten(1)])
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)


PROGRAMS = (brightness, sharpness, colorfulness, jpeg_size, edge_density, color_entropy)
PROGRAMS = {program.__name__: program for program in PROGRAMS}


# ---- models


class Clip:
    """Embeds images and prompts with a transformers CLIPModel, to vectors of unit length.

    As a reward it is the cosine of image and prompt, times `scale`. 100 is the convention of the
    CLIP score in torchmetrics; Hessel et al. 2021 define 2.5 max(cosine, 0).
    """

    def __init__(self, model, tokenizer, processor, scale=100):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.scale = scale
        self.last = (None, None, None)  # images, their state, their embedding

    def pixels(self, images):
        """Preprocess images [B, 3, H, W] in [0, 1] as the model's image processor does.

        They stay on their device, and gradients pass.
        """
        config = self.processor
        height, width = images.shape[2:]

        size = config.size
        if "shortest_edge" in size:
            shortest = min(height, width)
            new_height = size["shortest_edge"] * height // shortest
            new_width = size["shortest_edge"] * width // shortest
        elif "longest_edge" in size:
            scale = size["longest_edge"] / max(height, width)
            new_height, new_width = round(scale * height), round(scale * width)
        else:
            new_height, new_width = size["height"], size["width"]

        if (new_height, new_width) != (height, width):
            # in two passes, since PIL clips after each of them
            for shape in ((height, new_width), (new_height, new_width)):
                images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)

        if config.do_center_crop:
            height, width = config.crop_size["height"], config.crop_size["width"]
            top, left = (new_height - height) // 2, (new_width - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        if "longest_edge" in size:  # make it square, with black on both sides
            across, down = size["longest_edge"] - new_width, size["longest_edge"] - new_height
            sides = (across // 2, across - across // 2, down // 2, down - down // 2)
            images = F.pad(images, sides)

        mean = images.new_tensor(config.image_mean).view(3, 1, 1)
        std = images.new_tensor(config.image_std).view(3, 1, 1)
        return (images - mean) / std

    def embed_images(self, images):
        """Return embeddings [B, D]; the last are kept, since `clip` and `aesthetic` share them."""
        # what is kept is no longer valid once the images are changed in place, or a graph is wanted
        version = 0 if images.is_inference() else images._version
        state = (version, images.requires_grad and torch.is_grad_enabled())

        if self.last[0] is not images or self.last[1] != state:
            pixels = self.pixels(images.to(self.model.device)).to(self.model.dtype)
            features = self.model.get_image_features(pixels).pooler_output.float()
            self.last = (images, state, F.normalize(features, dim=-1))
        return self.last[2]

    @functools.lru_cache(maxsize=4096)
    def embed_text(self, prompt):
        """Return the embedding [D] of a prompt."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return F.normalize(features.float(), dim=-1)[0]

    def __call__(self, images, prompts):
        texts = torch.stack([self.embed_text(prompt) for prompt in prompts])
        return self.scale * (self.embed_images(images) * texts).sum(1)


def clip_from(path, processors, device, **options):
    """Return the Clip of a model at `path`; `processors` has its tokenizer and image processor."""
    model = pretrained(transformers.CLIPModel, path, **options).to(device)
    tokenizer = pretrained(transformers.CLIPTokenizer, processors)
    processor = pretrained(transformers.CLIPImageProcessor, processors)
    return Clip(model, tokenizer, processor)


@functools.cache
def load_clip(tiny, device):
    """Return the CLIP of a folder of tiny models, or the published ViT-L/14 if `tiny` is None."""
    path = Path(tiny, "tiny-clip") if tiny else "openai/clip-vit-large-patch14"
    return clip_from(path, path, device)


class Aesthetic:
    """Says how much people like a picture, 0 to 10, from its CLIP embedding.

    The predictor is LAION's v2, or the one in a folder of tiny models.
    """

    def __init__(self, tiny, device):
        if tiny:
            weights = load_file(Path(tiny, "tiny-aesthetic", "model.safetensors"))
            layers = [nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1)]
        else:
            path = downloaded("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
            weights = torch.load(path, map_location="cpu", weights_only=True)
            # linear throughout; None holds the place of a dropout, so that the weights' names match
            widths = [(768, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1)]
            layers = [nn.Linear(*width) if width else nn.Identity() for width in widths]

        head = nn.Sequential(*layers)
        head.load_state_dict({key.removeprefix("layers."): w for key, w in weights.items()})
        self.head = head.to(device).requires_grad_(False)
        self.clip = load_clip(tiny, device)

    def __call__(self, images, prompts):
        return self.head(self.clip.embed_images(images))[:, 0]


# ---- expressions

KNOWN = ", ".join(
    [
        "aesthetic, clip, clip_h, pickscore, hps, vlm, judge, taste, ocr, human, URL, file.py:name",
        *PROGRAMS,
    ]
)


def load_term(text, tiny, device):
    """Return the callable of one term. UserError if there is none, or it cannot be loaded."""
    if FILE.fullmatch(text):
        return load_function("reward", text)

    match OPTION.findall(text):
        case [name] if name in PROGRAMS:
            return PROGRAMS[name]
        case ["aesthetic"]:
            return Aesthetic(tiny, device)
        case ["clip"]:
            return load_clip(tiny, device)
        case ["clip", path]:
            path = path.strip('"')
            return clip_from(path, path, device)
        case ["clip_h"]:  # to watch: another CLIP, which nothing here is trained on
            path = Path(tiny, "tiny-clip-h") if tiny else CLIP_H
            return clip_from(path, path, device, dtype=large_model_dtype(device))
        case ["pickscore"]:
            return importlib.import_module("zoo.pickscore").load(clip_from, device)
        case ["hps"]:
            return importlib.import_module("zoo.hps").load(Clip, device)
        case ["taste", *options]:
            return importlib.import_module("zoo.taste").load(load_clip(tiny, device), *options)
        case [("vlm" | "ocr" | "judge") as name, *options]:
            return importlib.import_module(f"zoo.{name}").load(device, *options)
        case ["http" | "https", *_]:
            return importlib.import_module("zoo.http").Http(text)
        case ["human"]:
            return importlib.import_module("zoo.human").Human()
    raise UserError(f"there is no reward {text!r}; known: {KNOWN}")


class Reward:
    """Combines rewards by an expression of terms, numbers, + - * and parentheses.

    Some terms have options: vlm:7b, vlm:"Is there a cat in it? Answer Yes or No." A path with
    spaces is quoted: "my files/mine.py":purple. Only what is named is loaded.

    expression: its text, as "clip - 0.1*jpeg_size"; UserError if it does not parse
    tiny: a folder with tiny-clip and tiny-aesthetic (default: the bundled ones), or None for the
        published models
    device: where models are loaded

    `terms` maps the text of each term to its callable. A term may have three more methods:
    open(run), called once the run's folder exists, check(prompts), which may refuse them, and
    record(), a dict for every log entry; and an attribute only_in_training, true if a person
    answers.
    """

    def __init__(self, expression, tiny=TINY, device="cpu"):
        self.expression = expression.strip()
        self.combine = Formula(self.expression)  # {name: [B]} -> [B]
        if not self.combine.names:
            raise UserError(f"reward {self.expression!r} names no reward; known: {KNOWN}")
        self.terms = {name: load_term(name, tiny, device) for name in self.combine.names}

    def measure(self, images, prompts):
        """Return the values of each term, {name: float32 [B]}, NaN where one is not finite."""
        values = {}
        for name, term in self.terms.items():
            with patience(name, term):
                if FILE.fullmatch(name):  # may change what it is given, so it gets copies
                    R = term(images.clone(), list(prompts))
                else:
                    R = term(images, prompts)
            values[name] = as_values(name, R, images)
        return values

    def __call__(self, images, prompts):
        """Return the value [B] of the expression for images [B, 3, H, W] and their prompts."""
        return self.combine(self.measure(images, prompts))


@contextmanager
def patience(name, term):
    """Inside, a line says which reward is being waited for once it takes over PATIENCE seconds."""
    text = f"reward {name} has not answered for {PATIENCE} s; still waiting"
    timer = threading.Timer(PATIENCE, warn, [text])
    timer.daemon = True
    if not getattr(term, "only_in_training", False):  # a person may take any time
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def as_values(name, R, images):
    """Return what a reward returned as float32 [B]. UserError if it is not a number per image."""
    try:
        R = torch.as_tensor(R, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"reward {name} must return numbers, not {type(R).__name__}: {first_line(error)}"
        raise UserError(text) from error

    if R.shape != (len(images),):
        raise UserError(f"reward {name} must return [{len(images)}] numbers, not {list(R.shape)}")
    return R.where(R.isfinite(), torch.nan)
