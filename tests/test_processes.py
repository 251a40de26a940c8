"""Tests: many processes, as torchrun starts them, give what one gives.

pytest -q test_processes.py
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fdflow import central_difference, fdfo, spsa
from test_fdflow import draw, small_problem

HERE = Path(__file__).resolve().parent


def gradient(estimator):
    """The gradient of a small problem, the number of images, and how many numbers each reduction sent."""
    # micro-batches of 3 groups, whichever process has them; a reward that is lost takes its group with it
    problem, (eps, cond), sent, grads = small_problem(batch=6), draw(12), [], []
    reward, all_reduce = problem.reward, dist.all_reduce
    problem.reward = lambda x, c: torch.where(c == cond[4], torch.nan, reward(x, c))

    def count(x):
        sent.append(x.numel())
        all_reduce(x)

    def step():  # an optimiser that only looks
        grads.append(torch.cat([p.grad.flatten() for p in problem.lora.parameters]))
        for p in problem.lora.parameters:
            p.grad = None

    options = {"step": step} if estimator == ESTIMATORS["two updates"] else {}
    dist.all_reduce = count
    images = estimator(problem, eps, cond, torch.Generator().manual_seed(0), **options)["images"]
    dist.all_reduce = all_reduce
    step()
    return torch.cat(grads), images, sent


ESTIMATORS = {
    "fdfo": partial(fdfo, train_steps=2, kl=0.1),
    "two updates": partial(fdfo, updates=2),
    "spsa": partial(spsa, directions=4),
    "central": partial(central_difference, coordinates=9),
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: gradient(e) for name, e in ESTIMATORS.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    mp.spawn(worker, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, estimator in ESTIMATORS.items():
        alone, images, sent = gradient(estimator)
        assert alone.norm() > 0 and sent == []
        for other, other_images, _ in (first[name], second[name]):
            # float64, summed in another order
            torch.testing.assert_close(other, alone, rtol=1e-10, atol=1e-12)
            assert other_images == images
    P = len(alone)
    # fdfo: the unit of reward (a sum and a count), then the gradient, flat
    assert first["fdfo"][2] == [2, P] and first["two updates"][2] == [2, P, P]
    # in parameter space: one slope a direction or coordinate, and never a vector of parameters
    assert first["spsa"][2] == [4] and first["central"][2] == [9] and P == 54


def run(folder, *launcher):
    """The records of a short training run of the tiny model, with another number of processes each time."""
    train = [HERE / "train.py", "--reward", "colorfulness", "--pairs", "8", "--batch", "8", "--steps", "2"]
    options = ["--lr", "2e-3", "--iterations", "2", "--watch", "", "--out", folder, "--name", "run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *train, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ], done.stdout


def test_torchrun_trains_as_one_process_does(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (alone, said), (both, both_said) = run(tmp_path / "alone"), run(tmp_path / "both", *torchrun)
    assert len(both) == len(alone) == 3
    for one, two in zip(alone, both):
        for key in set(one) - {"seconds", "memory_mb"}:
            # float32, summed in another order, through two steps of Adam
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert both[-1]["gain"] > 5 * both[-1]["gain_se"] and both[-1]["images"] == 32
    # the first process alone writes and speaks
    assert both_said.count("\n") == said.count("\n") == 1
    for name in ("lora.safetensors", "state.pt", "report.png", "samples/000002.png"):
        assert (tmp_path / "both" / "run" / name).stat().st_size > 1000
