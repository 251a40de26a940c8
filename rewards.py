"""Rewards: what the images are trained to be, as an expression over models, programs, services and people.

A reward is any callable (images: float [B, 3, H, W] in [0, 1], prompts: list of B strings) -> [B] numbers,
higher is better, no gradient needed. `Reward("clip - 0.1*jpeg_size")` combines them. Some terms have options
after colons: vlm:7b, vlm:"Is there a cat in it? Answer Yes or No."
"""

import ast
import importlib.util
import re
from pathlib import Path

import torch

import programs
from errors import UserError, first_line
from models import TINY
from predictors import load_aesthetic, load_clip, load_ocr, load_pickscore, load_vlm
from services import Http

PROGRAMS = ("brightness", "sharpness", "colorfulness", "jpeg_size", "edge_density", "color_entropy")
MODELS = {
    "aesthetic": load_aesthetic,
    "clip": load_clip,
    "pickscore": load_pickscore,
    "vlm": load_vlm,
    "ocr": load_ocr,
}
KNOWN = ", ".join([*MODELS, *PROGRAMS, "human", "file.py:function", "http://..."])
# the terms that are not Python: a service, a function in a file, a name with options
TERM = re.compile(r'https?://[^\s*()]+|[\w./~-]+\.py:\w+|[A-Za-z]\w*(?::(?:"[^"]*"|[\w./-]+))+')


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
    """An expression over rewards: terms, numbers, + - * and parentheses, as "clip - 0.1*jpeg_size".

    `terms` maps the text of each to its callable; only what is named loads. tiny: a folder with tiny-clip and
    tiny-aesthetic to use instead of the published models, or None. human: the callable of the term `human`,
    where there is a person to ask. UserError if it does not parse.
    """

    def __init__(self, expression, tiny=TINY, device="cpu", human=None):
        self.expression, paths = expression, {}

        def as_name(match):  # a name of the same length, so that the columns stay
            name = f"term{len(paths)}".ljust(len(match[0]), "_")
            paths[name] = match[0]
            return name

        text = TERM.sub(as_name, expression)
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
            raise UserError(f"reward {expression!r} names no reward; known: {KNOWN}")
        self.terms = {name: load_term(name, tiny, device, human) for name in dict.fromkeys(names)}

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

    def measure(self, images, prompts):
        """The values of each term, {name: float32 [B]}, NaN where one is not finite."""
        return {name: checked(name, term, images, prompts) for name, term in self.terms.items()}

    def __call__(self, images, prompts):
        """[B]: the value of the expression for images [B, 3, H, W] in [0, 1] and their prompts."""
        return self.combine(self.measure(images, prompts))


def load_term(text, tiny, device, human):
    """The callable behind one term of an expression."""
    if text.startswith(("http://", "https://")):
        return Http(text)
    if ".py:" in text:
        return load_function(text)
    name, *options = (part.strip('"') for part in re.findall(r'"[^"]*"|[^:]+', text))
    if name == "human" and not options:
        if human is None:
            raise UserError("reward human: only train.py with --estimator fdfo can ask a person")
        return human
    if name in PROGRAMS and not options:
        return getattr(programs, name)
    if name in MODELS and (name == "vlm" or not options):
        return MODELS[name](tiny, device, *options)
    raise UserError(f"there is no reward {text!r}; known: {KNOWN}")


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
