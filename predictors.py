"""Rewards that are trained models: how well an image pleases people or fits its prompt."""

import functools
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from errors import UserError, why_unreachable
from pictures import to_pil


class Clip:
    """Image and text embeddings of a transformers CLIPModel, each of unit length."""

    def __init__(self, model, tokenizer, processor, scale=100):
        self.model, self.scale = model.eval().requires_grad_(False), scale
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
            features = self.model.get_image_features(pixels).pooler_output.float()
            self.last = (images, F.normalize(features, dim=-1))
        return self.last[1]

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def embed_text(self, prompt):
        """[D]."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)[0]

    def __call__(self, images, prompts):
        """The cosine of image and prompt, times the scale: at 100 the CLIP score of Hessel et al. 2021."""
        texts = torch.stack([self.embed_text(prompt) for prompt in prompts])
        return self.scale * (self.embed_images(images) * texts).sum(1)


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


def pretrained(kind, path, **options):
    """`kind.from_pretrained(path, **options)`, or a UserError of one line."""
    try:
        return kind.from_pretrained(path, **options)
    except OSError as error:
        raise UserError(why_unreachable(path, error)) from error


def small_dtype(device):
    """What models too large for float32 are loaded in."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def clip_from(path, processors, device, **options):
    """A Clip of a transformers model, and of the tokenizer and image processor of maybe another."""
    model = pretrained(transformers.CLIPModel, path, **options).to(device)
    parts = (transformers.CLIPTokenizer, transformers.CLIPImageProcessor)
    return Clip(model, *(pretrained(part, processors) for part in parts))


@functools.cache
def load_clip(tiny, device):
    """The CLIP of a folder of tiny models, or where `tiny` is None the published ViT-L/14."""
    path = tiny / "tiny-clip" if tiny else "openai/clip-vit-large-patch14"
    return clip_from(path, path, device)


def load_aesthetic(tiny, device):
    if tiny:
        return Aesthetic(load_clip(tiny, device), tiny_head(tiny))
    try:
        path = hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    except OSError as error:
        raise UserError(why_unreachable("trl-lib/ddpo-aesthetic-predictor", error)) from error
    return Aesthetic(load_clip(tiny, device), laion_head(path))


def load_pickscore(tiny, device):
    """PickScore v1 (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on half a million choices between images.

    Its unit is the model's own: the logarithm of the odds that one image is preferred to another is the
    difference of their scores. Typically 17 to 24.
    """
    processors = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    clip = clip_from("yuvalkirstain/PickScore_v1", processors, device, dtype=small_dtype(device))
    clip.scale = clip.model.logit_scale.exp().item()
    return clip


class Vlm:
    """Probability, in percent, that a vision-language model answers a question about the image with yes.

    sigmoid(logit of "Yes" - logit of "No") at the answer's first token (VQAScore, Lin et al. 2024). Where the
    question holds {prompt}, the image's prompt is put in. For models of the Qwen-VL families.
    """

    def __init__(self, model, tokenizer, image_processor, question):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.image_processor, self.question = image_processor, question
        self.image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        self.yes, self.no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))

    def __call__(self, images, prompts):
        vision = self.image_processor([to_pil(image) for image in images], return_tensors="pt")
        counts = (
            vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        )  # tokens of each image
        texts = []
        for prompt, count in zip(prompts, counts.tolist()):
            question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
            talk = [{"role": "user", "content": [{"type": "image"}, question]}]
            text = self.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            texts.append(text.replace(self.image_token, self.image_token * count, 1))
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        vision["pixel_values"] = vision["pixel_values"].to(self.model.dtype)
        inputs = {name: a.to(self.model.device) for name, a in {**tokens, **vision}.items()}
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return 100 * torch.sigmoid(logits[:, self.yes] - logits[:, self.no])


MATCH = 'Does this image match the caption "{prompt}"? Answer Yes or No.'


def load_vlm(tiny, device, *options):
    """Qwen2.5-VL (3b, or as an option 7b, 32b, 72b) or another of its kind from the hub or a folder."""
    names = [option for option in options if " " not in option]
    name = names[0] if names else "3b"
    path = name if "/" in name else f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct"
    question = next((option for option in options if " " in option), MATCH)
    model = pretrained(transformers.AutoModelForImageTextToText, path, dtype=small_dtype(device)).to(device)
    parts = (pretrained(kind, path) for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor))
    return Vlm(model, *parts, question)


class Ocr:
    """How well the words that stand in quotes in the prompt can be read: 1 to 0, without case and spaces.

    1 - edit distance / length of what is asked for, as in Flow-GRPO (Liu et al. 2025). NaN without quotes.
    engine: a callable from a BGR array to something with `txts`, as rapidocr's.
    """

    def __init__(self, engine):
        self.engine = engine

    def __call__(self, images, prompts):
        R = []
        for image, prompt in zip(images, prompts):
            wanted = "".join(re.findall(r'["“]([^"“”]+)["”]', prompt))
            read = " ".join(self.engine(np.asarray(to_pil(image))[:, :, ::-1]).txts or ())
            wanted, read = ("".join(text.lower().split()) for text in (wanted, read))
            R.append(1 - min(edit_distance(wanted, read) / len(wanted), 1) if wanted else math.nan)
        return torch.tensor(R)


def edit_distance(a, b):
    """Insertions, deletions and substitutions that turn text a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def load_ocr(tiny, device):
    """PP-OCR through the package rapidocr, which brings its models along."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError("reward ocr needs two more packages: pip install rapidocr onnxruntime") from error
    return Ocr(RapidOCR(params={"Global.log_level": "error"}))
