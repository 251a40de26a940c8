"""How well the text that a prompt asks for can be read in the image."""

import math
import re

import torch

from support.errors import UserError
from support.pictures import to_pil


class Ocr:
    """How well the words that stand in quotes in the prompt can be read: 1 to 0, without case and spaces.

    1 - edit distance / length of what is asked for, as in Flow-GRPO (Liu et al. 2025). NaN without quotes.
    engine: a callable from a PIL image to something with `txts`, as rapidocr's.
    """

    def __init__(self, engine):
        self.engine = engine

    def __call__(self, images, prompts):
        R = []
        for image, prompt in zip(images, prompts):
            wanted = "".join(re.findall(r'["“]([^"“”]+)["”]', prompt))
            read = " ".join(self.engine(to_pil(image)).txts or ())
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


def load(device, *options):
    """PP-OCR through the package rapidocr, which brings its models along. UserError if it is missing."""
    if options:
        raise UserError(f"reward ocr takes no options, as {options[0]}")
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            "reward ocr needs two more packages: pip install rapidocr onnxruntime"
        ) from error
    return Ocr(RapidOCR(params={"Global.log_level": "error"}))
