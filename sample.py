"""Sample images from a model, with or without a LoRA.

python sample.py --prompt "red apple" --n 8 [--lora runs/NAME] [--guidance 4] [--compare]
"""

from pathlib import Path

import torch

from models.flows import load_flow
from models.lora_files import load_lora
from models.table import add_model_arguments, fill_defaults
from support.commands import Parser, number
from support.errors import UserError, first_line, run_command
from support.pictures import grid
from support.prompts import read_prompts
from support.run import read_config


def parse_args():
    """The arguments with all defaults filled in, from the run where there is one; and the Model."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add("--n", type=number(int, 1, 10_000), default=4, help="images of each prompt (default 4)")
    add(
        "--seed",
        type=number(int, 0, 10**9),
        default=0,
        help="image i has noise seed + i (default 0)",
    )
    add(
        "--lora",
        help="a run folder, which also sets model, steps, guidance and size, or a LoRA file",
    )
    add("--out", default="sample.png", help="the picture to write (default sample.png)")
    add("--compare", action="store_true", help="base model | with LoRA, for the same noise")
    add_model_arguments(parser)
    args = parser.parse_args()
    args.prompt += read_prompts(args.prompts) if args.prompts else []
    if not args.prompt:
        parser.error("give a --prompt or a file of --prompts")
    if args.compare and not args.lora:
        parser.error("--compare needs --lora")
    if args.lora and any(
        Path(args.lora, name).exists() for name in ("config.json", "metrics.jsonl")
    ):
        keys = ("model", "steps", "guidance", "size")
        saved = parser.parse_args(read_config(args.lora, keys))
        for key in keys:
            setattr(args, key, getattr(args, key) or getattr(saved, key))
    return args, fill_defaults(args)


def main():
    args, model = parse_args()
    flow = load_flow(model, args, args.prompt)
    cond = torch.arange(len(args.prompt)).repeat_interleave(args.n)
    seeds = [args.seed + i for i in range(args.n)] * len(args.prompt)
    pictures = []
    if args.compare or not args.lora:
        pictures.append(flow.images(cond, seeds, args.batch, progress=True))
    if args.lora:
        load_lora(flow, args.lora)
        pictures.append(flow.images(cond, seeds, args.batch, progress=True))
    captions = [args.prompt[c] + (" | with LoRA" if args.compare else "") for c in cond.tolist()]
    columns = min(args.n, 8) if args.n > 1 else min(4, len(args.prompt))
    try:
        grid(torch.cat(pictures, dim=3), captions, columns).save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out}: {first_line(error)}") from error
    print(args.out)


if __name__ == "__main__":
    run_command(main)
