"""Rewards: what the images are trained to be, as an expression over predictors, programs and your own code.

A reward is any callable (images: float [B, 3, H, W] in [0, 1], prompts: list of B strings) -> [B] numbers,
higher is better, no gradient needed. `Reward("clip - 0.1*jpeg_size")` combines them.
"""

import ast
import functools
import importlib.util
import io
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from errors import UserError, first_line

TINY = Path(__file__).resolve().parent / "tiny"


# ---- programs


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
    """M3 of Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images": 0 (grey) to above 100."""
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


# ---- predictors


class Clip:
    """Image and text embeddings of a transformers CLIPModel, each of unit length."""

    def __init__(self, model, tokenizer, processor):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.processor, self.last = tokenizer, processor, (None, None)

    def pixels(self, images):
        """What the model's own image processor makes of images [B, 3, H, W] in [0, 1], on their device."""
        config = self.processor
        if "shortest_edge" in config.size:
            scale = config.size["shortest_edge"] / min(images.shape[2:])
            size = [round(scale * side) for side in images.shape[2:]]
        else:
            size = [config.size["height"], config.size["width"]]
        if size != list(images.shape[2:]):
            for shape in ((images.shape[2], size[1]), size):  # PIL, too, clips after each of its two passes
                images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        if config.do_center_crop:
            height, width = config.crop_size["height"], config.crop_size["width"]
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        mean, std = (images.new_tensor(a).view(3, 1, 1) for a in (config.image_mean, config.image_std))
        return (images - mean) / std

    def embed_images(self, images):
        """[B, D]. The last result is kept, since `clip` and `aesthetic` ask for the same one."""
        if self.last[0] is not images:
            pixels = self.pixels(images.to(self.model.device)).to(self.model.dtype)
            self.last = (images, F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1))
        return self.last[1]

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def embed_text(self, prompt):
        """[D]."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)[0]

    def __call__(self, images, prompts):
        """CLIP score: 100 times the cosine of image and prompt (Hessel et al. 2021)."""
        texts = torch.stack([self.embed_text(prompt) for prompt in prompts])
        return 100 * (self.embed_images(images) * texts).sum(1)


class Aesthetic:
    """How much people like a picture, 0 to 10, from its CLIP embedding (LAION aesthetic predictor v2)."""

    def __init__(self, clip, head):
        self.clip = clip
        self.head = head.to(clip.model.device).requires_grad_(False)

    def __call__(self, images, prompts):
        return self.head(self.clip.embed_images(images))[:, 0]


def tiny_head(folder):
    head = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1))
    head.load_state_dict(load_file(folder / "tiny-aesthetic" / "model.safetensors"))
    return head


def laion_head(path):
    """The published head, linear throughout; its dropouts, without effect here, hold places 1, 3 and 5."""
    widths = [(768, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1)]
    head = nn.Sequential(*(nn.Linear(*width) if width else nn.Identity() for width in widths))
    weights = torch.load(path, map_location="cpu", weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): w for key, w in weights.items()})
    return head


def pretrained(kind, path):
    """`kind.from_pretrained(path)`, or a UserError of one line."""
    try:
        return kind.from_pretrained(path)
    except OSError as error:
        raise UserError(f"cannot reach {path}: check the network, or train --model tiny") from error


@functools.cache
def load_clip(tiny, device):
    """The CLIP of a folder of tiny models, or where `tiny` is None the published ViT-L/14."""
    path = tiny / "tiny-clip" if tiny else "openai/clip-vit-large-patch14"
    parts = (transformers.CLIPModel, transformers.CLIPTokenizer, transformers.CLIPImageProcessor)
    model, tokenizer, processor = (pretrained(part, path) for part in parts)
    return Clip(model.to(device), tokenizer, processor)


def load_aesthetic(tiny, device):
    if tiny:
        return Aesthetic(load_clip(tiny, device), tiny_head(tiny))
    try:
        path = hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    except OSError as error:
        raise UserError("cannot reach the aesthetic predictor: check the network") from error
    return Aesthetic(load_clip(tiny, device), laion_head(path))


# ---- your own code, and expressions

PROGRAMS = {f.__name__: f for f in (brightness, sharpness, colorfulness, jpeg_size)}
PREDICTORS = {"aesthetic": load_aesthetic, "clip": load_clip}
KNOWN = [*PREDICTORS, *PROGRAMS]


def load_function(term):
    """The function of "path/to/file.py:function"."""
    path, name = term.rsplit(":", 1)
    if not Path(path).is_file():
        raise UserError(f"reward {term}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file of a user raises
        raise UserError(
            f"reward {term}: {path} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"reward {term}: {path} has no function {name}")
    return getattr(module, name)


class Reward:
    """An expression over rewards: names, numbers, + - * and parentheses, as "clip - 0.1*jpeg_size".

    `terms` maps each name to its callable; only what is named loads. tiny: a folder with tiny-clip and
    tiny-aesthetic to use instead of the published models, or None. UserError if it does not parse.
    """

    def __init__(self, expression, tiny=TINY, device="cpu"):
        self.expression, paths = expression, {}

        def as_name(match):  # "file.py:function" is not Python; a name of the same length keeps the columns
            name = f"term{len(paths)}".ljust(len(match[0]), "_")
            paths[name] = match[0]
            return name

        text = re.sub(r"[\w./~-]+\.py:\w+", as_name, expression)
        try:
            self.tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise UserError(f"reward {expression!r} does not parse at column {error.offset}") from error
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                node.id = paths.get(node.id, node.id)
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Name)]
        names = [node.id for node in sorted(nodes, key=lambda node: node.col_offset)]
        self.combine(dict.fromkeys(names, 0.0))  # finds what an expression may not have
        if not names:
            raise UserError(f"reward {expression!r} names no reward; known: {', '.join(KNOWN)}")
        self.terms = {name: load_term(name, tiny, device) for name in dict.fromkeys(names)}

    def combine(self, values):
        """The value of the expression for the values of its terms."""
        return self.value(self.tree, values)

    def value(self, node, values):
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return self.value(left, values) + self.value(right, values)
            case ast.BinOp(left, ast.Sub(), right):
                return self.value(left, values) - self.value(right, values)
            case ast.BinOp(left, ast.Mult(), right):
                return self.value(left, values) * self.value(right, values)
            case ast.UnaryOp(ast.USub(), operand):
                return -self.value(operand, values)
            case ast.Name(name):
                return values[name]
            case ast.Constant(number) if type(number) in (int, float):
                return number
        place = f"column {node.col_offset + 1} of reward {self.expression!r}"
        raise UserError(f"{place}: only names, numbers, + - * and parentheses may stand here")

    @torch.no_grad()
    def measure(self, images, prompts):
        """The values of each term, {name: float32 [B]}, NaN where one is not finite."""
        return {name: checked(name, term, images, prompts) for name, term in self.terms.items()}

    def __call__(self, images, prompts):
        """[B]: the value of the expression for images [B, 3, H, W] in [0, 1] and their prompts."""
        return self.combine(self.measure(images, prompts))


def load_term(name, tiny, device):
    """The callable behind one name of an expression."""
    if ".py:" in name:
        return load_function(name)
    if name in PROGRAMS:
        return PROGRAMS[name]
    if name in PREDICTORS:
        return PREDICTORS[name](tiny, device)
    raise UserError(f"there is no reward {name!r}; known: {', '.join(KNOWN)}, file.py:function")


def checked(name, term, images, prompts):
    """Call a reward and see that it returns what a reward must: one number for each image."""
    try:
        R = term(images, prompts)
    except Exception as error:  # whatever the code of a user raises
        if ".py:" not in name:
            raise
        raise UserError(f"reward {name} raised {type(error).__name__}: {first_line(error)}") from error
    try:
        R = torch.as_tensor(R, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"reward {name} must return numbers, not {type(R).__name__}") from error
    if R.shape != (len(images),):
        raise UserError(f"reward {name} must return [{len(images)}] numbers, not {list(R.shape)}")
    return R.where(R.isfinite(), torch.nan)
