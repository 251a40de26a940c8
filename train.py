"""Post-train a text-to-image flow model on any reward, without gradients of the reward or of the sampler.

python train.py --reward aesthetic                               # the bundled tiny model, minutes on a CPU
python train.py --reward "0.2*clip + aesthetic" --model sd3.5    # one GPU
python train.py --name aesthetic --resume                        # go on after an interruption
python train.py --estimator spsa --help                          # the flags of another estimator
torchrun --standalone --nproc-per-node 8 train.py --model sd3.5  # many GPUs
"""

import argparse
import atexit
import math
import os
import re
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fdflow import LoRA, Problem, central_difference, fdfo, spsa
from models.flows import load_flow
from models.lora_files import layers_named, save_lora
from models.table import MODELS, add_model_arguments, fill_defaults
from rewards import Reward, load_clip, load_function
from support.commands import Parser, add_estimator_arguments, number, options_of
from support.draws import seeded
from support.errors import UserError, first_line, run_command
from support.evaluation import Counted, HeldOut, Scorer
from support.prompts import split_prompts
from support.run import Run, read_config
from zoo.human import Human
from zoo.judge import Answers
from zoo.loading import errors_of

WATCHED = "aesthetic,clip,edge_density,color_entropy"
ESTIMATORS = {"fdfo": fdfo, "spsa": spsa, "central": central_difference}
# what suits an estimator where the command line is silent; the model says the rest
SUITS = {
    "spsa": {"iterations": 20, "pairs": 128, "layers": "last", "rank": 1, "lr": 0.01},
    "central": {"iterations": 30, "pairs": 2, "layers": "last", "rank": 1, "lr": 0.004},
}
# what may differ between a run and its resumption
MAY_CHANGE = "iterations out name resume device batch compile checkpointing max_requests".split()


def make_parser(estimator):
    """The parser of all flags, those of the estimator included; returns it and the estimator's function."""
    if ".py:" in estimator:
        estimate = load_function("estimator", estimator)
    elif estimator in ESTIMATORS:
        estimate = ESTIMATORS[estimator]
    else:
        known = ", ".join([*ESTIMATORS, "file.py:function"])
        raise UserError(f"there is no estimator {estimator!r}; known: {known}")
    parser = Parser(description=__doc__)
    add, whole = parser.add_argument, number(int, 1)
    add(
        "--reward",
        default="aesthetic",
        help='an expression as "clip - 0.1*jpeg_size" (default aesthetic)',
    )
    add("--watch", default=WATCHED, help=f"rewards to measure, not train (default {WATCHED})")
    add(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, every tenth held out (default: emoji names)",
    )
    add(
        "--estimator",
        default="fdfo",
        help=f"{', '.join(ESTIMATORS)} or file.py:function (default fdfo)",
    )
    add(
        "--iterations",
        type=whole,
        help="roll-outs (default: tiny 88, others 100; spsa 20, central 30)",
    )
    add(
        "--rollout-steps",
        type=whole,
        help="sampling steps in training alone (default: the model's)",
    )
    add("--seed", type=number(int, 0, 10**6), default=0, help="of everything random (default 0)")
    add(
        "--pairs",
        type=whole,
        help="noises, groups, of an iteration (default: fdfo 32, spsa 128, central 2)",
    )
    add(
        "--lr",
        type=number(float, 0, 1),
        help="step size (default: the model's; spsa 0.01, central 0.004)",
    )
    add("--rank", type=whole, help="of the LoRA (default: the model's; spsa and central 1)")
    add(
        "--layers",
        help="with a LoRA: attention, modulation, all, last or names (default: the model's)",
    )
    add("--name", help="of the run (default: made from the reward)")
    add("--out", default="runs", help="folder of the runs (default runs)")
    add("--eval-every", type=whole, default=20, help="iterations between evaluations (default 20)")
    add("--resume", action="store_true", help="go on with the run --name")
    add(
        "--max-requests",
        type=whole,
        help="to judges in a run; where it needs more, it stops (default: any)",
    )
    add_model_arguments(parser)
    try:
        models = vars(MODELS["tiny"]) if estimator == "fdfo" else ()
        add_estimator_arguments(parser, estimator, estimate, models)
    except argparse.ArgumentError as error:
        raise UserError(f"estimator {estimator}: {first_line(error)} of train.py") from error
    return parser, estimate


def parse_args():
    """The arguments with all defaults filled in, the Model, the estimator as a function of four arguments."""
    early = Parser(add_help=False)
    for flag in ("--estimator", "--name", "--out"):
        early.add_argument(flag)
    early.add_argument("--resume", action="store_true")
    known, saved = early.parse_known_args()[0], []
    if known.resume:
        if known.name is None:
            raise UserError("--resume: say which run, with --name")
        saved = read_config(Path(known.out or "runs", known.name))
        known = early.parse_known_args(saved)[0]
    parser, estimate = make_parser(known.estimator or "fdfo")
    if saved:
        saved = vars(parser.parse_args(saved))  # so what stands in the file is checked as well
        parser.set_defaults(
            **{key: value for key, value in saved.items() if key not in ("name", "out")}
        )
    args = parser.parse_args()
    for key in set(saved) - set(MAY_CHANGE):
        if getattr(args, key) != saved[key]:
            raise UserError(
                f"--resume: the run was started with --{key.replace('_', '-')} {saved[key]}"
            )
    model = fill_defaults(args)
    suits = {"pairs": 32, **vars(model), **SUITS.get(args.estimator, {})}
    for key in ("iterations", "pairs", "lr", "rank", "layers"):
        setattr(args, key, suits[key] if getattr(args, key) is None else getattr(args, key))
    options = {}
    for key, parameter in options_of(estimate).items():
        default = (
            suits.get(key, parameter.default) if args.estimator == "fdfo" else parameter.default
        )
        options[key] = default if getattr(args, key) is None else getattr(args, key)
    vars(args).update(options)
    return args, model, partial(estimate, **options)


def start_processes(args):
    """Join the other processes, if torchrun started this one, and take the GPU of its number."""
    if not dist.is_torchelastic_launched():
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)


def load_rewards(args, model):
    """The reward that is trained, those that are watched, and the CLIP that measures diversity."""
    beside = Path(model.path).parent
    tiny = beside if (beside / "tiny-clip").is_dir() else None
    alone = args.estimator == "fdfo" and not dist.is_initialized()  # a person compares whole groups
    human = Human(args.branches, args.pairs) if alone else None
    reward = Reward(args.reward, tiny, args.device, human)
    terms = re.findall(r'(?:[^,"]|"[^"]*"?)+', args.watch)  # no comma in quotes parts them
    watched = [Reward(term, tiny, args.device) for term in terms if term.strip()]
    return reward, watched, load_clip(tiny, args.device).embed_images


def call_estimator(name, estimate, problem, *args):
    """How many images an estimator sampled. UserError if its options do not fit, or a user's own fails."""
    try:
        with errors_of(f"estimator {name}") if ".py:" in name else nullcontext():
            images = estimate(problem, *args)
    except ValueError as error:
        raise UserError(f"estimator {name}: {first_line(error)}") from error
    if not isinstance(images, int) or any(p.grad is None for p in problem.lora.parameters):
        raise UserError(
            f"estimator {name} must add to every .grad, and return how many images it sampled"
        )
    return images


def optimizer_step(optimizer, parameters):
    """Apply and clear the gradients, unless one is not finite; returns their norm, or None."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else None


def main():
    args, model, estimate = parse_args()
    start_processes(args)
    run = Run(args)
    prompts, held_prompts = split_prompts(args.prompts)
    flow = load_flow(model, args, prompts + held_prompts, cache=Path(args.out, "embeddings"))
    reward, watched, clip_embed = load_rewards(args, model)
    start, layers = seeded(args.seed, "lora"), layers_named(flow.network, args.layers)
    lora = LoRA(flow.network, layers, args.rank, model.scale * args.rank, start)
    flow.scale_gradients(lora)
    fused = args.device.startswith("cuda") or None
    optimizer = torch.optim.AdamW(lora.parameters, args.lr, weight_decay=1e-4, fused=fused)
    if (
        args.estimator == "central"
    ):  # Adam would move all of a block's coordinates alike, however steep
        optimizer = torch.optim.SGD(lora.parameters, args.lr)
    step = partial(optimizer_step, optimizer, lora.parameters)
    velocity, scorer = Counted(flow.velocity), Scorer(flow, reward)
    problem = Problem(velocity, scorer, lora, flow.train_times, args.batch, step)
    seed = seeded(args.seed, "held-out").initial_seed()
    held_out = HeldOut(flow, len(held_prompts), reward, watched, clip_embed, args.batch, seed)
    answers = Answers([reward, *watched], args.max_requests)
    if args.resume:
        answers.open(run.folder)
    pictures, base = held_out()  # before anything is written: a reward that fails shows itself here
    if base.get("held_out", 0) is None:  # ocr, for one, needs prompts with words in quotes
        raise UserError(f"reward {args.reward} is undefined for all of the held-out prompts")

    def restore(state):
        for p, saved in zip(lora.parameters, state["lora"], strict=True):
            if saved.shape != p.shape:  # which copy_ would spread out
                raise ValueError("its LoRA has another shape")
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        problem.memory.update(state["memory"])

    base = {"iteration": 0, "images": 0, "evaluations": 0, **base, **answers.record()}
    run.resume(restore) if args.resume else run.begin(base, pictures, held_out.prompts)
    if answers.judges and not args.resume:  # what is paid for is kept from here on
        run.make_folder()
        answers.open(run.folder)
    if "human" in reward.terms:
        run.make_folder()
        print(
            f"compare the images at {reward.terms['human'].open(run.folder, run.interrupted)}",
            flush=True,
        )

    for iteration in run.iterations():
        start, last = time.time(), run.records[-1]
        # new generators every iteration, so that resuming needs no state of them
        draws = seeded(args.seed, f"groups {iteration}")
        generator = seeded(args.seed, f"estimator {iteration}", args.device)
        cond = torch.randint(len(prompts), (args.pairs,), generator=draws).to(args.device)
        eps = flow.noise(torch.randint(2**31, (args.pairs,), generator=draws).tolist())
        images = call_estimator(args.estimator, estimate, problem, eps, cond, generator)
        norm = step()

        record = {"iteration": iteration, "images": last["images"] + images, **scorer.pop_record()}
        record |= {"grad_norm": norm, "seconds": round(time.time() - start, 3)}
        if args.device.startswith("cuda"):
            record["memory_mb"] = round(torch.cuda.max_memory_allocated(args.device) / 1e6)
        record["evaluations"] = last.get("evaluations", 0) + velocity.pop_count()
        stop, measure = (
            run.stop_requested(),
            iteration % args.eval_every == 0 or iteration == args.iterations,
        )
        pictures, measured = held_out() if measure else (None, {})
        run.log(record | measured | answers.record(), pictures, held_out.prompts)
        if (measure or stop) and run.first:  # first, so that no checkpoint is ahead of it
            save_lora(lora, run.folder / "lora.safetensors", flow.network_name)
        weights = [p.detach().cpu() for p in lora.parameters]
        run.save(lora=weights, optimizer=optimizer.state_dict(), memory=problem.memory)
        if stop and iteration < args.iterations:
            run.stop()
    run.print_summary()


if __name__ == "__main__":
    run_command(main)
