"""Sample images from a model, with or without a LoRA; and what the command lines have in common.

python sample.py --prompt "red apple" --n 8 [--lora runs/NAME] [--guidance 4] [--compare]
"""

import argparse
import json
import re
from pathlib import Path

import torch

from adapters import load_lora
from errors import UserError, first_line, run
from flows import load_flow
from models import MODELS, find_model
from pictures import grid


def read_prompts(path):
    """The non-empty lines of a text file. UserError if there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no prompt file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a text file of prompts: {first_line(error)}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; it needs one prompt a line")
    return prompts


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        if "expected one argument" in message:
            message += "; where it begins with a minus, put an equals sign before: --reward=-jpeg_size"
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or float within [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text):
    """An argparse type: the size of an image in pixels, a side or width x height."""
    if not re.fullmatch(r"[1-9]\d{1,3}(x[1-9]\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a size as 512 or 768x512")
    return text


def folder_or_name(text):
    """An argparse type: a folder by its whole path, so that it is found from elsewhere, or any other name."""
    return str(Path(text).resolve()) if text not in MODELS and Path(text).is_dir() else text


def add_model_arguments(parser):
    """The flags that sample.py and train.py share; None leaves the choice to the model or the run."""
    add = parser.add_argument
    add("--model", type=folder_or_name, help=f"{', '.join(MODELS)}, a hub id or a folder (default tiny)")
    add("--steps", type=number(int, 1, 1000), help="sampling steps (default: the model's)")
    add("--guidance", type=number(float, 1, 100), help="guidance scale, 1 is none (default: the model's)")
    add("--size", type=size, help="in pixels: 512, or 768x512 (width first; default: the model's)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the model (default: bfloat16 on cuda, else float32)",
    )
    add("--batch", type=number(int, 1), help="images in one network call (default: tiny 64, SD3.5 12)")
    add("--compile", action="store_true", help="compile the network's blocks: a slow start, then faster")
    add("--checkpointing", action="store_true", help="compute twice what training would store: less memory")


def fill_defaults(args):
    """Fill in the arguments of `add_model_arguments` that were not given; returns the Model."""
    args.model = args.model or "tiny"
    model = find_model(args.model)
    args.steps, args.size = args.steps or model.steps, args.size or model.size
    args.guidance, args.batch = args.guidance or model.guidance, args.batch or model.batch
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return model


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to draw; may be given several times"
    )
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--n", type=number(int, 1), default=4, help="images of each prompt (default 4)")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="image i has noise seed + i (default 0)"
    )
    parser.add_argument("--lora", help="a run folder, which also sets model and steps, or a LoRA file")
    parser.add_argument("--out", default="sample.png", help="the picture to write (default sample.png)")
    parser.add_argument("--compare", action="store_true", help="base model | with LoRA, for the same noise")
    add_model_arguments(parser)
    args = parser.parse_args()
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        parser.error("give a --prompt or a file of --prompts")
    if args.compare and not args.lora:
        parser.error("--compare needs --lora")
    if args.lora and Path(args.lora, "config.json").is_file():
        config = json.loads(Path(args.lora, "config.json").read_text())
        for key in ("model", "steps", "guidance", "size"):
            setattr(args, key, getattr(args, key) or config[key])
    model = fill_defaults(args)
    flow = load_flow(model, args, prompts)
    cond = torch.arange(len(prompts)).repeat_interleave(args.n)
    seeds = [args.seed + i for i in range(args.n)] * len(prompts)
    columns = []
    if args.compare or not args.lora:
        columns.append(flow.images(cond, seeds, args.batch, progress=True))
    if args.lora:
        load_lora(flow, args.lora)
        columns.append(flow.images(cond, seeds, args.batch, progress=True))
    captions = [prompts[c] + (" | with LoRA" if args.compare else "") for c in cond]
    picture = grid(
        torch.cat(columns, dim=3), captions, columns=min(args.n, 8) if args.n > 1 else min(4, len(prompts))
    )
    try:
        picture.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out}: {first_line(error)}") from error
    print(args.out)


if __name__ == "__main__":
    run(main)
