"""How fast, in how much memory: FDFO on real architectures with random weights, and a CLIP ViT-H as reward.

python -m studies.bench --model sd3.5 --compile         # on the GPU
python -m studies.bench --model sd-turbo --estimate     # no GPU and no memory: counted from the shapes alone
python -m studies.bench --smoke                         # toy sizes, to see that it runs

Counted are operations (2 to a multiply-add) and live tensor storage.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch

import fdflow
from fdflow import LoRA, Problem, fdfo
from models.flows import FAMILIES
from models.lora_files import layers_named
from models.table import add_model_arguments, check_device, fill_defaults
from studies.architectures import ARCHITECTURES, VARIANTS, build
from studies.profiler import Profiler, shapes_only
from support.commands import Parser, add_estimator_arguments, number, options_of
from support.errors import UserError, run_command
from train import call_estimator


def measure(args, model, device):
    """One iteration of FDFO, where it is real after one to warm up: {phase: [seconds, operations, bytes]}."""
    profiler, dtype, meta = Profiler(device), getattr(torch, args.dtype), device == "meta"
    settings = argparse.Namespace(
        **vars(args) | {"device": device, "compile": args.compile and not meta}
    )
    options = {
        key: getattr(args, key) for key in options_of(fdfo) if getattr(args, key) is not None
    }
    with profiler if meta else nullcontext(), shapes_only() if meta else nullcontext():
        torch.set_default_dtype(dtype)
        pipe, shapes, clip = build(args.model, model.tokens, args.smoke, torch.device(device))
        torch.set_default_dtype(torch.float32)
        flow = FAMILIES[type(pipe).__name__](pipe, settings, model.tokens)
        lora = LoRA(flow.network, layers_named(flow.network, model.layers), args.rank)
        text = partial(torch.randn, dtype=dtype, device=device)
        flow.conditioning = lambda cond: [
            text(len(cond) * (1 + flow.guided), *shape) for shape in shapes
        ]
        decode = profiler.profiled("decoding", flow.decode)
        reward = profiler.profiled("reward", lambda images: clip.embed_images(images)[:, 0])
        estimate = partial(call_estimator, "fdfo", partial(fdfo, **options))
        times, train = flow.train_times, profiler.profiled("training", estimate)
        problem = Problem(flow.velocity, lambda x, cond: reward(decode(x)), lora, times, args.batch)
        eps = torch.randn(args.pairs, *flow.shape, device=device)
        with mock.patch("fdflow.roll_out", profiler.profiled("sampling", fdflow.roll_out)):
            for _ in range(1 if meta else 2):
                profiler.table = {phase: [0, 0, 0] for phase in profiler.table}
                train(problem, eps, torch.arange(args.pairs, device=device))
    return profiler.table


def main():
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_estimator_arguments(parser, "fdfo", fdfo)
    parser.add_argument(
        "--rollout-steps", type=number(int, 1), help="sampling steps (default: the model's)"
    )
    parser.add_argument(
        "--pairs", type=number(int, 1), help="noises (default: what fills one batch)"
    )
    parser.add_argument("--rank", type=number(int, 1), default=32, help="of the LoRA (default 32)")
    parser.add_argument("--estimate", action="store_true", help="count from the shapes alone")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.set_defaults(model="sd3.5", branches=2)
    args = parser.parse_args()
    known = [*ARCHITECTURES, *VARIANTS]
    if args.model not in known:
        raise UserError(f"--model {args.model}: known here are {', '.join(known)}")
    model = fill_defaults(args)
    if not args.estimate:
        check_device(args.device)
    args.pairs = args.pairs or max(1, args.batch // args.branches)
    print(
        f"{args.model}, {args.size} px, {args.rollout_steps} steps, {args.pairs} noises, {args.dtype}"
    )
    counted = measure(args, model, "meta")
    timed = counted if args.estimate else measure(args, model, args.device)
    print("per 2 images  TFLOP  peak GiB" + "   seconds   TFLOP/s" * (not args.estimate))
    pairs, total = args.pairs * args.branches / 2, 0
    for phase in ("sampling", "decoding", "reward", "training"):
        operations, seconds = counted[phase][1] / pairs / 1e12, timed[phase][0] / pairs
        line = f"{phase:9}{operations:10.4g}{(timed[phase][2] or counted[phase][2]) / 2**30:10.4g}"
        print(line if args.estimate else f"{line}{seconds:10.4g}{operations / seconds:10.4g}")
        total += seconds
    if not args.estimate:
        print(f"{total:.4g} seconds per 2 images, {2 / total:.4g} images a second on {args.device}")


if __name__ == "__main__":
    run_command(main)
