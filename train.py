"""Post-train a text-to-image flow model on any reward, without gradients of the reward or of the sampler.

python train.py --reward aesthetic                               # the bundled tiny model, minutes on a CPU
python train.py --reward "0.2*clip + aesthetic" --model sd3.5    # one GPU
python train.py --name aesthetic --resume                        # go on after an interruption
torchrun --standalone --nproc-per-node 8 train.py --model sd3.5  # many GPUs
"""

import argparse
import atexit
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from adapters import attention_layers
from baselines import backprop, flow_grpo, reinforce, reward_gradient
from errors import UserError, run
from evaluation import Counted, HeldOut, Scorer, joined, paid_with, rank, statistics
from fdflow import LoRA, Problem, central_difference, fdfo, random_seeds, spsa
from flows import load_flow
from human import Human
from models import TINY
from pictures import animate, grid, report, save_picture
from predictors import load_clip
from rewards import Reward
from runs import (
    append_metrics,
    catch_interrupt,
    load_state,
    new_folder,
    peak_memory,
    read_config,
    read_metrics,
    save_state,
    write_config,
    write_metrics,
)
from sample import Parser, add_model_arguments, fill_defaults, number, read_prompts

WATCHED = "aesthetic,clip,edge_density,color_entropy"
# what suits each estimator where the command line is silent; the model says the rest
ESTIMATORS = {
    "fdfo": {"iterations": 100, "pairs": 32, "branches": 2, "clip": 0.03},
    "spsa": {"iterations": 20, "pairs": 128, "rank": 1, "lr": 0.01, "h": 0.02},
    "central": {"iterations": 30, "pairs": 2, "rank": 1, "lr": 0.02, "h": 0.1},
    # for comparison: baselines.py
    "flow-grpo": {"iterations": 100, "pairs": 8, "branches": 8, "clip": 1e-4, "kl": 0.0, "lr": 1e-3},
    "reinforce": {"iterations": 100, "pairs": 64, "lr": 1e-3},
    "backprop": {"iterations": 100, "pairs": 32},
    "reward-gradient": {"iterations": 100, "pairs": 64},
}
DISTRIBUTED = ("fdfo", "spsa", "central")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole, positive = parser.add_argument, number(int, 1), number(float, 1e-6)
    add("--reward", default="aesthetic", help='an expression as "clip - 0.1*jpeg_size" (default aesthetic)')
    add("--watch", default=WATCHED, help=f"rewards to measure, not train (default {WATCHED})")
    add("--prompts", metavar="FILE", help="a prompt a line, every tenth held out (default: emoji names)")
    add("--estimator", default="fdfo", help=f"{', '.join(ESTIMATORS)} (default fdfo)")
    add("--iterations", type=whole, help="roll-outs (default: fdfo 100, spsa 20, central 30)")
    add("--seed", type=number(int, 0), default=0, help="of everything random (default 0)")
    add_model_arguments(parser)
    add("--pairs", type=whole, help="noises an iteration (default: fdfo 32, spsa 128, central 2)")
    add("--branches", type=number(int, 2), help="fdfo, flow-grpo: images of a group (default 2, 8)")
    add("--train-branches", type=whole, default=1, help="fdfo: how many of a group are trained (default 1)")
    add("--churn", type=positive, help="fdfo: how far they part (default: tiny 0.05, SD3.5 0.0025)")
    add("--train-steps", type=whole, help="fdfo: random steps trained (default: tiny 1, SD3.5 10 of 40)")
    add("--clip", type=positive, help="width of the trust region (default: fdfo 0.03, flow-grpo 0.0001)")
    add("--updates", type=whole, default=1, help="fdfo: optimiser steps per roll-out (default 1)")
    add("--kl", type=number(float, 0), help="fdfo: pull to the base model (default: tiny 1, others 0)")
    add("--shared-noise", action="store_true", help="flow-grpo: the images of a group start from one noise")
    add("--noise-level", type=positive, default=0.7, help="of flow-grpo and reinforce (default 0.7)")
    add("--last-steps", type=whole, help="backprop: steps differentiated (default all)")
    add("--h", type=positive, help="parameter step (default: spsa 0.02, central 0.1)")
    add("--directions", type=whole, default=16, help="spsa: directions an iteration (default 16)")
    add("--coordinates", type=whole, default=32, help="central: parameters an iteration (default 32)")
    add("--lr", type=number(float, 0, 1), help="of AdamW (default: the model's; spsa 0.01, central 0.02)")
    add("--rank", type=whole, help="of the LoRA (default: tiny 8, others 32; spsa and central 1)")
    add("--alpha", type=positive, help="the LoRA counts alpha / rank (default: tiny rank, others twice rank)")
    add("--name", help="of the run (default: made from the reward)")
    add("--out", default="runs", help="folder of the runs (default runs)")
    add("--eval-every", type=whole, default=20, help="iterations between evaluations (default 20)")
    add("--save-every", type=whole, default=10, help="iterations between checkpoints (default 10)")
    add("--resume", action="store_true", help="go on with the run --name")
    args = parser.parse_args()
    if args.resume:
        saved = read_config(Path(args.out, args.name or "(give its --name)"))
        parser.set_defaults(**saved)
        args = parser.parse_args()
        other = [f"--{k.replace('_', '-')} {saved[k]}" for k in saved if getattr(args, k) != saved[k]]
        other = [flag for flag in other if not flag.startswith("--iterations")]
        if other:
            raise UserError(f"--resume: the run was started with {', '.join(other)}")
    elif args.name and Path(args.out, args.name).exists():
        raise UserError(f"the run {Path(args.out, args.name)} exists: choose another --name, or add --resume")
    if args.estimator not in ESTIMATORS:
        raise UserError(f"there is no estimator {args.estimator!r}; known: {', '.join(ESTIMATORS)}")
    model = fill_defaults(args)
    for key, value in {**vars(model), **ESTIMATORS[args.estimator]}.items():
        if getattr(args, key, 0) is None:
            setattr(args, key, value)
    args.alpha = args.alpha or model.scale * args.rank
    if args.estimator == "fdfo" and args.train_branches > args.branches:
        raise UserError(f"--train-branches {args.train_branches} is more than --branches {args.branches}")
    if args.estimator == "spsa" and args.pairs % args.directions:
        raise UserError(f"--pairs {args.pairs} is not a multiple of --directions {args.directions}")
    return args, model


def split_prompts(path):
    """Training and held-out prompts: those of a file, every tenth held out, or the bundled ones."""
    if path is None:
        return read_prompts(TINY / "prompts_train.txt"), read_prompts(TINY / "prompts_test.txt")
    prompts = read_prompts(path)
    if len(prompts) < 10:  # too few to spare any: the same prompts, from other noise
        return prompts, prompts
    return [prompt for i, prompt in enumerate(prompts) if i % 10], prompts[::10]


def start_processes(args):
    """Join the other processes, if torchrun started this one, and take the GPU of its number."""
    if not dist.is_torchelastic_launched():
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    if args.estimator not in DISTRIBUTED:
        raise UserError(f"--estimator {args.estimator} runs in one process")
    share = args.updates * dist.get_world_size()
    if args.estimator == "fdfo" and args.pairs % share:
        raise UserError(f"--pairs {args.pairs} is not a multiple of {share}, processes times --updates")


def make_estimator(args, step):
    """The estimator that the arguments name, as a function of (problem, eps, cond, generator)."""
    if args.estimator == "spsa":
        return partial(spsa, h=args.h, directions=args.directions)
    if args.estimator == "central":
        return partial(central_difference, h=args.h, coordinates=args.coordinates)
    if args.estimator == "backprop":
        return partial(backprop, last_steps=args.last_steps)
    if args.estimator == "reward-gradient":
        return partial(reward_gradient, train_steps=args.train_steps)
    if args.estimator == "reinforce":
        return partial(reinforce, level=args.noise_level, train_steps=args.train_steps, baselines={})
    keys = ("branches", "train_steps", "clip", "kl", "updates")
    settings = {key: getattr(args, key) for key in keys} | {"step": step}
    if args.estimator == "flow-grpo":
        return partial(flow_grpo, shared_noise=args.shared_noise, level=args.noise_level, **settings)
    return partial(fdfo, churn=args.churn, train_branches=args.train_branches, **settings)


def show(bar, records, trained):
    """Reward and held-out reward in the progress bar; warnings if rewards are no numbers, or are hacked."""
    last = records[-1]
    held_out = [f"{record['held_out']:.2f}" for record in records if "held_out" in record][-1:]
    bar.set_postfix_str(", held-out ".join([f"reward {last['reward']:.2f}", *held_out]))
    if last["not_finite"]:
        total = sum(record.get("not_finite", 0) for record in records)
        tqdm.write(
            f"warning: {total} rewards so far were no finite numbers; their groups were dropped", sys.stderr
        )
    if fallen := paid_with(last, trained):
        falls = ", ".join(
            f"{name} {last['change'][name]:+.2f} ± {last['change_se'][name]:.2f}" for name in fallen
        )
        tqdm.write(
            f"warning: the reward rose {last['gain']:.2f}, but at the cost of {falls}; "
            "it may be hacked: look at the samples, stop earlier, or raise --kl",
            sys.stderr,
        )


def finish(folder, records, args):
    """Draw the pictures of the run and say in one line what was gained."""
    animate(folder)
    report(folder, records, args.reward)
    first, last = ([r for r in records if "change" in r][i] for i in (0, -1))
    seconds = sum(record.get("seconds", 0) for record in records)
    if "gain" in last:
        before, after = (f"{r['held_out']:.2f} ± {r['held_out_se']:.2f}" for r in (first, last))
        gained = f"{before} -> {after} (gain {last['gain']:.2f} ± {last['gain_se']:.2f})"
    else:
        gained = ", ".join(f"{k} {v:+.2f} ± {last['change_se'][k]:.2f}" for k, v in last["change"].items())
    print(
        f"held-out {args.reward} {gained}, {last['images']} images, {seconds:.0f} s; "
        f"see {folder / 'report.png'} and try: "
        f'python sample.py --lora {folder} --compare --prompt "red apple"'
    )


def main():
    args, model = parse_args()
    start_processes(args)
    prompts, held_prompts = split_prompts(args.prompts)
    flow = load_flow(model, args, prompts + held_prompts)
    beside = Path(model.path).parent
    tiny = beside if (beside / "tiny-clip").is_dir() else None
    alone = args.estimator == "fdfo" and not dist.is_initialized()
    human = Human(args.branches, args.pairs) if alone else None
    reward = Reward(args.reward, tiny, args.device, human)
    watched = [Reward(term, tiny, args.device) for term in args.watch.split(",") if term.strip()]
    layers = attention_layers(flow.network, few=args.estimator in ("spsa", "central"))
    lora = LoRA(flow.network, layers, args.rank, args.alpha, torch.Generator().manual_seed(args.seed))
    optimizer = torch.optim.AdamW(lora.parameters, args.lr, weight_decay=1e-4)
    velocity = Counted(flow.velocity)
    problem = Problem(velocity, Scorer(flow, reward), lora, flow.train_times, args.batch)
    embed = load_clip(tiny, args.device).embed_images
    held_out = HeldOut(flow, len(held_prompts), reward, watched, embed, args)
    pictures, base = held_out()  # before anything is written: a reward that fails shows itself here
    if math.isnan(base.get("held_out", 0)):  # ocr, for one, has none for prompts without words in quotes
        raise UserError(f"reward {args.reward} has no number for any of the held-out prompts")

    first = rank() == 0  # of the processes of torchrun; it alone writes
    records, folder, done = [], None, 0
    if args.resume:
        folder = Path(args.out, args.name)
        done = load_state(folder, lora, optimizer)
        records = read_metrics(folder, done)
    elif first:
        folder = new_folder(args)
    records = records or [{"iteration": 0, "images": 0, "evaluations": 0, **base}]
    if "human" in reward.terms:
        args.save_every = 1  # nobody likes to be asked twice
        print(f"compare the images at {human.open(folder)}", flush=True)
    if first:
        write_config(folder, args)
        write_metrics(folder, records)
        save_picture(grid(pictures, held_out.prompts, 8), folder / "samples" / "000000.png")

    def step():
        """An optimiser step, unless the gradient is not finite; returns the norm of the gradient."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in lora.parameters]).item()
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return norm if math.isfinite(norm) else None

    estimate = make_estimator(args, step)
    interrupted = catch_interrupt()
    steps = range(done + 1, args.iterations + 1)
    bar = tqdm(steps, args.name, initial=done, total=args.iterations, disable=not first)
    for iteration in bar:
        start = time.time()
        seed = args.seed * 1_000_003 + iteration  # so that resuming needs no state of a generator
        draws, generator = (torch.Generator(device).manual_seed(seed) for device in ("cpu", args.device))
        cond = torch.randint(len(prompts), (args.pairs,), generator=draws)
        eps = flow.noise(random_seeds(args.pairs, draws))
        try:
            made = estimate(problem, eps, cond, generator)["images"]
        except (UserError, torch.OutOfMemoryError):
            if first:
                save_state(folder, iteration - 1, flow.part, lora, optimizer)
            raise
        norm = step()

        values = problem.reward.take()
        R = reward.combine(values)
        record = {"iteration": iteration, "images": records[-1]["images"] + made}
        record |= statistics("reward", R)
        values = {name: v[v.isfinite()] for name, v in values.items()}
        record["terms"] = {name: v.mean().item() for name, v in values.items()}
        record["terms_std"] = {name: v.std().item() for name, v in values.items()}
        record |= {"not_finite": R.isnan().sum().item(), "grad_norm": norm}
        record |= {"seconds": round(time.time() - start, 3), "memory_mb": peak_memory(args.device)}
        last = iteration == args.iterations
        pictures, measured = held_out() if iteration % args.eval_every == 0 or last else (None, {})
        counts = joined([{"": torch.tensor([[len(interrupted), velocity.take()]])}])[""].sum(0).tolist()
        stop, record["evaluations"] = counts[0] > 0, records[-1].get("evaluations", 0) + counts[1]
        records.append(record | measured)
        if first:
            append_metrics(folder, records[-1])
            if pictures is not None:
                save_picture(grid(pictures, held_out.prompts, 8), folder / "samples" / f"{iteration:06}.png")
            if iteration % args.save_every == 0 or last or stop:
                save_state(folder, iteration, flow.part, lora, optimizer)
            show(bar, records, reward.terms)
        if stop and not last:
            bar.close()
            if first:
                print(f"stopped after iteration {iteration}; go on with --name {args.name} --resume")
            sys.exit(130)
    if first:
        finish(folder, records, args)


if __name__ == "__main__":
    run(main)
