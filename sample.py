"""Sample images from a model, with or without a LoRA.

python sample.py --prompt "red apple" --n 8 [--lora runs/NAME] [--guidance 4] [--compare]
"""

from pathlib import Path

import torch

from models.flow import load_flow
from models.lora_files import load_lora
from models.table import find_model
from support.arguments import (
    Parser,
    add_lora_argument,
    add_model_arguments,
    find_model_of,
    number,
)
from support.errors import run_command
from support.pictures import check_writable, grid, save_picture
from support.prompts import read_prompts


def parse_args():
    """Read the command line. Returns the arguments, with all defaults, and the Model."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add("--n", type=number(int, 1), default=4, help="images of each prompt")
    add("--seed", type=number(int, 0), default=0, help="image i has noise seed + i")
    add_lora_argument(parser)
    add("--out", default="sample.png", help="the picture to write")
    add("--compare", action="store_true", help="base model | with LoRA, for the same noise")
    add_model_arguments(parser)
    args = parser.parse_args()

    if args.prompts:
        args.prompt += read_prompts(args.prompts)
    if not args.prompt:
        parser.error("give a --prompt or a file of --prompts")
    if args.compare and not args.lora:
        parser.error("--compare needs --lora")

    return args, find_model_of(args, find_model)


def main():
    args, model = parse_args()
    out = Path(args.out)
    check_writable(out)
    flow = load_flow(model, args, args.prompt)
    cond = torch.arange(len(args.prompt)).repeat_interleave(args.n)
    seeds = [args.seed + i for i in range(args.n)] * len(args.prompt)

    pictures = []
    if args.compare or not args.lora:
        pictures.append(flow.images(cond, seeds, args.batch, progress=True))
    if args.lora:
        load_lora(flow, args.lora)
        pictures.append(flow.images(cond, seeds, args.batch, progress=True))

    captions = [args.prompt[i] + (" | with LoRA" if args.compare else "") for i in cond.tolist()]
    columns = min(args.n, 8) if args.n > 1 else min(4, len(args.prompt))
    print(save_picture(grid(torch.cat(pictures, dim=3), captions, columns), out))


if __name__ == "__main__":
    run_command(main)
