"""How fast, in how much memory: FDFO on real architectures with random weights, and a CLIP ViT-H as reward.

python bench.py --model sd3.5 --compile         # on the GPU
python bench.py --model sd-turbo --estimate     # no GPU and no memory: counted from the shapes alone
python bench.py --smoke                         # toy sizes, to see that it runs

Counted are operations (2 to a multiply-add) and live tensor storage. The limit is the time the operations
would take at the speed of one large matrix product.
"""

import argparse
import math
from contextlib import ExitStack
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer

import fdflow
from adapters import attention_layers
from architectures import ARCHITECTURES, build
from errors import UserError, run
from fdflow import LoRA, Problem, fdfo
from flows import FAMILIES
from phases import Phases
from sample import Parser, add_model_arguments, fill_defaults, number


def measure(args, device, fake):
    """One iteration of FDFO, where it is real after one to warm up: {phase: [seconds, operations, bytes]}."""
    phases, dtype = Phases(device), getattr(torch, args.dtype)
    options = argparse.Namespace(**vars(args) | {"device": device, "compile": args.compile and not fake})
    with ExitStack() as stack:
        make = FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device(device)
        if fake:
            stack.enter_context(phases)
        torch.set_default_dtype(dtype)
        pipe, shapes, clip = build(args.model, args.tokens, args.smoke, make)
        torch.set_default_dtype(torch.float32)
        flow = FAMILIES[type(pipe).__name__](pipe, options, args.tokens)
        if fake:  # here the seeds, the only numbers that the estimator reads from tensors, have no value
            stack.enter_context(make)
            stack.enter_context(mock.patch("fdflow.random_seeds", lambda n, generator=None: list(range(n))))
        lora = LoRA(flow.network, attention_layers(flow.network), args.rank)
        flow.embeddings = [torch.randn(args.pairs, *shape, dtype=dtype) for shape in shapes]
        text = torch.randn(1024, device=device)

        decode = phases.booked("decoding", flow.decode)
        reward = phases.booked("reward", lambda images: clip.embed_images(images) @ text)
        problem = Problem(
            flow.velocity, lambda x, cond: reward(decode(x)), lora, flow.train_times, args.batch
        )
        train = phases.booked("training", fdfo)
        with mock.patch("fdflow.roll_out", phases.booked("sampling", fdflow.roll_out)):
            for _ in range(1 if fake else 2):
                phases.table = {phase: [0, 0, 0] for phase in phases.table}
                eps, cond = torch.randn(args.pairs, *flow.shape, device=device), torch.arange(args.pairs)
                train(problem, eps, cond, None, args.churn, args.branches, train_steps=args.train_steps)
    return phases.table


def matrix_rate(device, dtype):
    """Operations a second of a large matrix product."""
    n = 8192 if device.startswith("cuda") else 2048
    a, threads = torch.randn(n, n, device=device, dtype=dtype), torch.get_num_threads()
    return 2 * n**3 / Timer("a @ a", globals={"a": a}, num_threads=threads).timeit(10).mean


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(model="sd3.5")
    parser.add_argument("--pairs", type=number(int, 1), help="noises (default: what fills one batch)")
    parser.add_argument("--branches", type=number(int, 2), default=2, help="images of a noise (default 2)")
    parser.add_argument("--train-steps", type=number(int, 1), help="random steps trained (default: all)")
    parser.add_argument("--rank", type=number(int, 1), default=32, help="of the LoRA (default 32)")
    parser.add_argument("--estimate", action="store_true", help="count from the shapes alone")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    args = parser.parse_args()
    if args.model not in ARCHITECTURES:
        raise UserError(f"--model {args.model}: known here are {', '.join(ARCHITECTURES)}")
    model = fill_defaults(args)
    args.pairs, args.tokens, args.churn = (
        args.pairs or max(1, args.batch // args.branches),
        model.tokens,
        model.churn,
    )
    print(f"{args.model}, {args.size} px, {args.steps} steps, {args.train_steps or 'all'} trained, ", end="")
    print(
        f"{args.pairs} noises x {args.branches} branches, batch {args.batch}, rank {args.rank}, {args.dtype}"
    )
    counted = measure(args, "cpu", fake=True)
    timed, rate = None, math.nan
    if not args.estimate:
        timed, rate = (
            measure(args, args.device, fake=False),
            matrix_rate(args.device, getattr(torch, args.dtype)),
        )
        print(torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device, end=", ")
        print(f"{rate / 1e12:.3g} TFLOP/s in a matrix product")
    pairs = args.pairs * args.branches / 2
    print("per 2 images  TFLOP  peak GiB" + ("   seconds  of the limit" if timed else ""))
    total = 0
    for phase in ("sampling", "decoding", "reward", "training"):
        operations, peak = counted[phase][1] / pairs, (timed or counted)[phase][2] or counted[phase][2]
        print(f"{phase:9}{operations / 1e12:10.4g}{peak / 2**30:10.4g}", end="")
        seconds = timed[phase][0] / pairs if timed else math.nan
        total += seconds
        print(f"{seconds:10.4g}{operations / rate / seconds:14.0%}" if timed else "")
    if timed:
        print(f"{total:.4g} seconds per 2 images, {2 / total:.4g} images a second")


if __name__ == "__main__":
    run(main)
