"""Post-train a text-to-image flow model on any reward, without gradients of reward or sampler.

python train.py --reward aesthetic                               # the bundled model, on a CPU
python train.py --reward "0.2*clip + aesthetic" --model sd3.5    # one GPU
python train.py --reward aesthetic --resume                      # go on after an interruption
python train.py --estimator spsa --help                          # the flags of another estimator
torchrun --standalone --nproc-per-node 8 train.py --model sd3.5  # many GPUs
"""

import math
import time
from functools import partial
from pathlib import Path

import torch

from fdflow import Problem, central_difference, fdfo, spsa
from models.flow import load_flow
from models.lora_files import layers_named, make_lora, save_lora
from models.table import find_model
from rewards import Reward, load_clip, load_function, split_expressions
from support.arguments import parse_training_args
from support.draws import draw_groups, drawn_prompts, seeded
from support.errors import UserError, first_line, run_command
from support.evaluation import Counted, HeldOut, Scorer, held_out_share, open_terms
from support.processes import start_processes
from support.prompts import split_prompts
from support.run import Run

# ---- settings; each has a flag, too, and those of a model are in models/table.py

ESTIMATORS = {"fdfo": fdfo, "spsa": spsa, "central": central_difference}
SUITS = {  # defaults that suit an estimator better than those of the model
    "spsa": {"groups": 128, "iterations": 20, "layers": "last", "rank": 1, "lr": 0.01},
    "central": {"groups": 2, "iterations": 30, "layers": "last", "rank": 1, "lr": 0.004},
}
WATCHED = "aesthetic,clip,edge_density,color_entropy"
WEIGHT_DECAY = 1e-4


def find_estimator(name):
    """Return the function of an estimator. UserError if there is none."""
    if ".py:" in name:
        return load_function("estimator", name)
    if name not in ESTIMATORS:
        known = ", ".join([*ESTIMATORS, "file.py:function"])
        raise UserError(f"there is no estimator {name!r}; known: {known}")
    return ESTIMATORS[name]


def optimizer_step(optimizer, parameters):
    """Apply the gradients if all are finite, then clear them; return their norm, or None."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else None


def main():
    # the command line, and the processes
    args, model, estimate = parse_training_args(__doc__, find_estimator, find_model, SUITS)
    start_processes(args)

    # the tiny CLIPs and aesthetic predictor are used if they lie beside the model
    folder = Path(model.path).parent
    tiny = folder if (folder / "tiny-clip").is_dir() else None
    if args.watch is None:
        args.watch = WATCHED + (",clip_h" if (folder / "tiny-clip-h").is_dir() else "")

    # the run's folder, and the rewards
    run = Run(args)
    reward = Reward(args.reward, tiny, args.device)
    watched = [Reward(term, tiny, args.device) for term in split_expressions(args.watch)]
    clip_embed = load_clip(tiny, args.device).embed_images

    # prompts are known by their index: first those to train on, then those held out
    prompts, held_prompts = split_prompts(args.prompts)
    chosen, mine = held_out_share(len(held_prompts))  # measured; measured by this process
    chosen, mine = len(prompts) + chosen, len(prompts) + mine

    # the model, with the text of the prompts that this process needs: fdfo shares out its groups
    drawn = drawn_prompts(args, len(prompts), shared_out=args.estimator == "fdfo")
    flow = load_flow(model, args, prompts + held_prompts, [*drawn, *mine.tolist()])

    # what is trained, and how
    layers = layers_named(flow.network, args.layers)
    alpha, generator = model.scale * args.rank, seeded(args.seed, "lora")
    lora = make_lora(flow, layers, args.rank, alpha, generator, args.init_lora)
    flow.scale_gradients(lora)  # in float16, where most would be too small a number
    if args.estimator == "central":
        # Adam would move each coordinate that was tried about as far, however small its slope
        optimizer = torch.optim.SGD(lora.parameters, args.lr)
    else:
        fused = args.device.startswith("cuda") or None
        options = {"weight_decay": WEIGHT_DECAY, "fused": fused}
        optimizer = torch.optim.AdamW(lora.parameters, args.lr, **options)
    step = partial(optimizer_step, optimizer, lora.parameters)
    velocity, scorer = Counted(flow.velocity), Scorer(flow, reward)
    problem = Problem(velocity, scorer, lora, flow.train_times, args.batch, step)
    run.print_settings(estimate.keywords, lora)

    # where the base model stands, on prompts that are not trained
    seed = seeded(args.seed, "held-out").initial_seed()
    held_out = HeldOut(flow, chosen, mine, reward, watched, clip_embed, args.batch, seed)
    open_terms([reward, *watched], run, flow.prompts)
    pictures, base = held_out()
    if held_out.scored and base["held_out"] is None:  # ocr, for one, needs words in quotes
        raise UserError(f"reward {args.reward} is undefined for all of the held-out prompts")

    # go on from the last checkpoint, if there is one and that was asked for
    record = {"iteration": 0, "images": 0, "evaluations": 0} | base | held_out.counts()
    state = lora.parameters, optimizer, problem.memory
    run.start(record, pictures, held_out.prompts, *state)
    flow.gradient_scale = problem.memory.get("gradient_scale", flow.gradient_scale)

    for iteration in run.iterations():
        started, last = time.time(), run.records[-1]

        # roll out and score groups, and estimate the gradient from the rewards
        cond, seeds = draw_groups(args.seed, iteration, len(prompts), args.groups)
        generator = seeded(args.seed, f"estimator {iteration}", args.device)
        eps, cond = flow.noise(seeds), cond.to(args.device)
        try:
            images = estimate(problem, eps, cond, generator)
        except ValueError as error:
            if args.estimator not in ESTIMATORS:
                raise  # its author needs the traceback
            raise UserError(f"estimator {args.estimator}: {first_line(error)}") from error

        # step; in float16 a gradient may be too large a number
        norm = step()
        if norm is None:
            flow.gradient_scale = max(1.0, flow.gradient_scale / 2)
            problem.memory["gradient_scale"] = flow.gradient_scale
        seconds = round(time.time() - started, 3)

        # measure the model now and then
        stop = run.stop_requested()
        measure = iteration % args.eval_every == 0 or iteration == args.iterations
        pictures, measured = held_out() if measure else (None, {})

        # log
        record = {"iteration": iteration, "images": last["images"] + images}
        record |= scorer.pop_record()
        record |= {"grad_norm": norm, "seconds": seconds}
        if args.device.startswith("cuda"):
            record["memory_mb"] = round(torch.cuda.max_memory_allocated(args.device) / 1e6)
        record["evaluations"] = last["evaluations"] + velocity.pop_count()
        run.log(record | measured | held_out.counts(), pictures)

        # save; the LoRA first, so that no checkpoint is ahead of it, and one beside each sample
        if (measure or stop) and run.first:
            save_lora(lora, run.folder / "lora.safetensors", flow.network_name)
        if measure and run.first:
            path = run.folder / "samples" / f"{iteration:06}.safetensors"
            save_lora(lora, path, flow.network_name)
        run.save()
        if stop and iteration < args.iterations:
            run.stop()

    run.print_summary()


if __name__ == "__main__":
    run_command(main)
