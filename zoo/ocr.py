"""How well the text that a prompt asks for can be read in the image."""

import math
import re

import torch

from support.errors import UserError
from support.pictures import to_pil


class Ocr:
    """Says how well the words in quotes in a prompt can be read in its image, 0 to 1.

    1 - edit distance / length of what is asked for, as in Flow-GRPO (Liu et al. 2025), without
    case and spaces; NaN if nothing is in quotes.

    engine: a callable from a PIL image to something with `txts`, as rapidocr's
    """

    def __init__(self, engine):
        self.engine = engine

    def __call__(self, images, prompts):
        R = []
        for image, prompt in zip(images, prompts):
            wanted = without_spaces(re.findall(r'["“]([^"“”]+)["”]', prompt))
            read = without_spaces(self.engine(to_pil(image)).txts or ())
            if wanted:
                R.append(1 - min(edit_distance(wanted, read) / len(wanted), 1))
            else:
                R.append(math.nan)
        return torch.tensor(R)


def without_spaces(texts):
    """Return texts as one, in lower case and without spaces."""
    return "".join("".join(texts).lower().split())


def edit_distance(a, b):
    """Count the insertions, deletions and substitutions that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
            diagonal = row[j]
            row[j] = best
    return row[-1]


def load(device, *options):
    """Return PP-OCR through the package rapidocr, which brings its models. UserError if missing."""
    if options:
        raise UserError(f"reward ocr takes no options, such as {options[0]}")
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        text = "reward ocr needs two more packages: pip install rapidocr onnxruntime"
        raise UserError(text) from error
    return Ocr(RapidOCR(params={"Global.log_level": "error"}))
