"""Rewards: what the images are trained to be, as an expression over programs, models, services and people.

A reward is any callable (images: float [B, 3, H, W] in [0, 1], prompts: list of B strings) -> [B] numbers,
higher is better, no gradient needed. Here are programs, CLIP and the aesthetic predictor, functions in files,
and `Reward("clip - 0.1*jpeg_size")`, which combines them. Those with needs of their own are in zoo/.
"""

import ast
import functools
import importlib.util
import io
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from support.errors import UserError, first_line
from zoo.loading import downloaded, errors_of, pretrained

TINY = Path(__file__).resolve().parent / "tiny"


def luma(images):
    """Rec. 601 luma of [B, 3, H, W]: [B, H, W] in [0, 1]."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def brightness(images, prompts):
    """Mean luma in percent, 0 (black) to 100 (white)."""
    return 100 * luma(images).mean((1, 2))


def sharpness(images, prompts):
    """Variance of the Laplacian of the luma, in levels of 255 squared (Pech-Pacheco et al. 2000)."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(255 * luma(images)[:, None], kernel[None, None]).var((1, 2, 3), correction=0)


def colorfulness(images, prompts):
    """M3 of Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images": 0 (grey) to over 100."""
    red, green, blue = (255 * images).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = torch.sqrt(rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0))
    return spread + 0.3 * torch.sqrt(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2)


def jpeg_size(images, prompts):
    """Size as a JPEG file of quality 95, in kB of 1,000 bytes (DDPO, Black et al. 2023)."""
    sizes = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def edge_density(images, prompts):
    """Percentage of pixels at which the luma changes by over a tenth of its range a pixel (Sobel)."""
    kernel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    gradient = F.conv2d(luma(images)[:, None], torch.stack([kernel, kernel.T])[:, None])
    return 100 * (gradient.norm(dim=1) > 0.1).float().mean((1, 2))


def color_entropy(images, prompts):
    """Shannon entropy of the colours in bits, 0 (one colour) to 9, with each channel in 8 levels."""
    levels = (8 * images).long().clamp(max=7)
    bins = levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]
    p = torch.stack([torch.bincount(b, minlength=512) / b.numel() for b in bins.flatten(1)])
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)


PROGRAMS = (brightness, sharpness, colorfulness, jpeg_size, edge_density, color_entropy)
PROGRAMS = {program.__name__: program for program in PROGRAMS}


class Clip:
    """Image and text embeddings of a transformers CLIPModel, each of unit length."""

    def __init__(self, model, tokenizer, processor, scale=100):
        self.model, self.scale = model.eval().requires_grad_(False), scale
        self.tokenizer, self.processor, self.last = tokenizer, processor, (None, None, None)

    def pixels(self, images):
        """What the model's own image processor makes of images [B, 3, H, W] in [0, 1], on their device."""
        config = self.processor
        shape, size = images.shape[2:], config.size
        if "shortest_edge" in size:
            size = [round(size["shortest_edge"] / min(shape) * side) for side in shape]
        else:
            size = [size["height"], size["width"]]
        if size != list(shape):
            for shape in (
                (shape[0], size[1]),
                size,
            ):  # PIL, too, clips after each of its two passes
                images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        if config.do_center_crop:
            height, width = config.crop_size["height"], config.crop_size["width"]
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        mean, std = (
            images.new_tensor(a).view(3, 1, 1) for a in (config.image_mean, config.image_std)
        )
        return (images - mean) / std

    def embed_images(self, images):
        """[B, D]. The last result is kept, since `clip` and `aesthetic` ask for the same one."""
        # kept until the images are changed in place, which counts their version up, or a graph is wanted
        version = 0 if images.is_inference() else images._version
        state = (version, images.requires_grad and torch.is_grad_enabled())
        if self.last[0] is not images or self.last[1] != state:
            pixels = self.pixels(images.to(self.model.device)).to(self.model.dtype)
            features = self.model.get_image_features(pixels).pooler_output.float()
            self.last = (images, state, F.normalize(features, dim=-1))
        return self.last[2]

    @functools.lru_cache(maxsize=4096)
    def embed_text(self, prompt):
        """[D]."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(
            self.model.device
        )
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)[0]

    def __call__(self, images, prompts):
        """The cosine of image and prompt, times the scale: at 100 the CLIP score of Hessel et al. 2021."""
        texts = torch.stack([self.embed_text(prompt) for prompt in prompts])
        return self.scale * (self.embed_images(images) * texts).sum(1)


def clip_from(path, processors, device, **options):
    """A Clip of a transformers model, and of the tokenizer and image processor of maybe another."""
    model = pretrained(transformers.CLIPModel, path, **options).to(device)
    parts = (transformers.CLIPTokenizer, transformers.CLIPImageProcessor)
    return Clip(model, *(pretrained(part, processors) for part in parts))


@functools.cache
def load_clip(tiny, device):
    """The CLIP of a folder of tiny models, or where `tiny` is None the published ViT-L/14."""
    path = Path(tiny, "tiny-clip") if tiny else "openai/clip-vit-large-patch14"
    return clip_from(path, path, device)


class Aesthetic:
    """How much people like a picture, 0 to 10, from its CLIP embedding (LAION's predictor v2, or tiny's)."""

    def __init__(self, tiny, device):
        if tiny:
            weights = load_file(Path(tiny, "tiny-aesthetic", "model.safetensors"))
            layers = [nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1)]
        else:
            path = downloaded("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
            weights = torch.load(path, map_location="cpu", weights_only=True)
            # linear throughout; dropouts, without effect here, hold places 1, 3 and 5
            widths = [(768, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1)]
            layers = [nn.Linear(*width) if width else nn.Identity() for width in widths]
        self.clip, head = load_clip(tiny, device), nn.Sequential(*layers)
        head.load_state_dict({key.removeprefix("layers."): w for key, w in weights.items()})
        self.head = head.to(device).requires_grad_(False)

    def __call__(self, images, prompts):
        return self.head(self.clip.embed_images(images))[:, 0]


FILE = re.compile(r'(?:"[^"]+\.py"|[\w./~][\w./~-]*\.py):\w+')  # quotes where the path has spaces


def load_function(what, term):
    """The function of "path/to/file.py:function", which may import what is in the folder of its file.

    what: "reward" or "estimator", as which messages name it. UserError if there is none, or its file fails.
    """
    path, name = term.rsplit(":", 1)
    path = os.path.expanduser(path.strip('"'))
    if not os.path.isfile(path):
        raise UserError(f"{what} {term}: there is no file {path}")
    sys.path.append(
        os.path.dirname(os.path.abspath(path))
    )  # last: nothing of ours or of Python is replaced
    # dataclasses and pickle look their module up, under a name that no other has
    spec = importlib.util.spec_from_file_location(f"{what}_file_{len(sys.modules)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with errors_of(f"{what} {term}: {path}"):
        spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{what} {term}: {path} has no function {name}")
    return getattr(module, name)


KNOWN = f"aesthetic, clip, pickscore, vlm, judge, taste, ocr, human, URL, file.py:name, {', '.join(PROGRAMS)}"
# the terms that are not Python: a service, a function in a file, a name with options
TERM = re.compile(rf'https?://[^\s*()]+|{FILE.pattern}|[A-Za-z]\w*(?::(?:"[^"]*"|[\w./-]+))+')


def parse(expression):
    """The syntax tree of an expression, whose names are its terms. UserError if it does not parse."""
    if len(expression) > 2000:
        raise UserError(f"reward {expression[:40]!r}... is too long: 2,000 characters are the most")
    terms = {match.start(): match[0] for match in TERM.finditer(expression)}
    text = re.sub(r"\s", " ", TERM.sub(lambda match: "x" * len(match[0]), expression))
    if len(re.findall(r"[-+*(]", text)) > 100:  # each may be a level of recursion
        raise UserError(f"reward {expression[:40]!r}... is too long: 100 of + - * ( are the most")
    try:
        tree = ast.parse(
            text.encode("ascii"), mode="eval"
        ).body  # of bytes, so that columns count characters
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", 0) or getattr(error, "start", len(text)) + 1
        raise UserError(f"reward {expression!r} does not parse at column {column}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = terms.get(node.col_offset, node.id)
    return tree


class Reward:
    """An expression over rewards: terms, numbers, + - * and parentheses, as "clip - 0.1*jpeg_size".

    Some have options: vlm:7b, vlm:"Is there a cat in it? Answer Yes or No." A path with spaces is quoted:
    "my files/mine.py":purple. `terms` maps the text of each term to its callable; only what is named loads.
    tiny: a folder with tiny-clip and tiny-aesthetic to use instead of the published models, or None.
    human: the callable of the term `human`, where there is a person to ask. UserError if it does not parse.
    """

    def __init__(self, expression, tiny=TINY, device="cpu", human=None):
        self.expression = expression.strip()
        self.tree, values = parse(self.expression), defaultdict(float)
        self.combine(values)  # finds what an expression may not have, and puts in the names
        if not values:
            raise UserError(f"reward {self.expression!r} names no reward; known: {KNOWN}")
        self.terms = {name: load_term(name, tiny, device, human) for name in values}

    def combine(self, values, node=None):
        """The value of the expression, or of a node of its tree, for the values of its terms {name: [B]}."""
        node = self.tree if node is None else node
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return self.combine(values, left) + self.combine(values, right)
            case ast.BinOp(left, ast.Sub(), right):
                return self.combine(values, left) - self.combine(values, right)
            case ast.BinOp(left, ast.Mult(), right):
                return self.combine(values, left) * self.combine(values, right)
            case ast.UnaryOp(ast.USub(), operand):
                return -self.combine(values, operand)
            case ast.Name(name):
                return values[name]
            case ast.Constant(number) if type(number) in (int, float) and number <= 1e30:
                return float(number)
        place = f"column {node.col_offset + 1} of reward {self.expression!r}"
        raise UserError(
            f"{place}: only names, numbers to 1e30, + - * and parentheses may stand here"
        )

    def measure(self, images, prompts):
        """The values of each term, {name: float32 [B]}, NaN where one is not finite."""
        return {name: call_reward(name, term, images, prompts) for name, term in self.terms.items()}

    def __call__(self, images, prompts):
        """[B]: the value of the expression for images [B, 3, H, W] in [0, 1] and their prompts."""
        return self.combine(self.measure(images, prompts))


def load_term(text, tiny, device, human):
    """The callable behind one term of an expression; what is in zoo/ is imported when it is named."""
    if FILE.fullmatch(text):
        return load_function("reward", text)
    match re.findall(r'"[^"]*"|[^:]+', text):
        case [name] if name in PROGRAMS:
            return PROGRAMS[name]
        case ["aesthetic"]:
            return Aesthetic(tiny, device)
        case ["clip"]:
            return load_clip(tiny, device)
        case ["pickscore"]:
            return importlib.import_module("zoo.pickscore").load(clip_from, device)
        case ["taste", *options]:
            return importlib.import_module("zoo.taste").load(load_clip(tiny, device), *options)
        case [("vlm" | "ocr" | "judge") as name, *options]:
            return importlib.import_module(f"zoo.{name}").load(device, *options)
        case ["http" | "https", *_]:
            return importlib.import_module("zoo.http").Http(text)
        case ["human"]:
            if human is None:
                raise UserError(
                    "reward human: only train.py with --estimator fdfo can ask a person"
                )
            return human
    raise UserError(f"there is no reward {text!r}; known: {KNOWN}")


def call_reward(name, term, images, prompts):
    """[B]: what a reward returns, if that is what it must: one number for each image. UserError if not."""
    if FILE.fullmatch(
        name
    ):  # a stranger's code: it gets copies, since it may change what it is given
        with errors_of(f"reward {name}"):
            R = term(images.clone(), list(prompts))
    else:
        R = term(images, prompts)
    try:
        R = torch.as_tensor(R, dtype=torch.float32, device=images.device).to_dense()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(R).__name__
        raise UserError(
            f"reward {name} must return numbers, not {kind}: {first_line(error)}"
        ) from error
    if R.shape != (len(images),):
        raise UserError(f"reward {name} must return [{len(images)}] numbers, not {list(R.shape)}")
    return R.where(R.isfinite(), torch.nan)
