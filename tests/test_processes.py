"""Tests: many processes, as torchrun starts them, give what one gives.

pytest -q tests/test_processes.py
"""

import argparse
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import support.draws
from fdflow import central_difference, fdfo, micro_batches, spsa
from support.draws import draw_groups, drawn_prompts
from test_fdflow import draw, small_problem
from tests.commands import ROOT, metrics, run

ESTIMATORS = {
    "fdfo": partial(fdfo, train_steps=2, kl=0.1),
    "three branches": partial(fdfo, branches=3),
    "spsa": partial(spsa, directions=4),
    "central": partial(central_difference, coordinates=9),
}


def gradient(estimator, batch):
    """The gradient of a small problem, the number of images in all, and that of this process."""
    problem, (eps, cond), shares = small_problem(batch=batch), draw(12), []
    reward = problem.reward

    def count(x, c):  # a reward that is lost takes its group with it
        shares.append(len(x))
        return torch.where(c == cond[4], torch.nan, reward(x, c))

    problem.reward = count
    images = estimator(problem, eps, cond, torch.Generator().manual_seed(0))
    return torch.cat([p.grad.flatten() for p in problem.lora.parameters]), images, sum(shares)


BATCHES = (1000, 7, 4, 1)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
    )
    found = {
        (name, batch): gradient(e, batch) for name, e in ESTIMATORS.items() for batch in BATCHES
    }
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_neither_processes_nor_batch_change_the_gradient(tmp_path, world):
    mp.spawn(worker, (world, tmp_path), nprocs=world)
    found = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    for name, estimator in ESTIMATORS.items():
        alone, images, work = gradient(estimator, 1000)
        assert alone.norm() > 0 and images == work
        for batch in BATCHES:
            others, images_of_others, shares = zip(*(f[name, batch] for f in found))
            for other in others:  # float64, summed in another order
                torch.testing.assert_close(other, alone, rtol=1e-9, atol=1e-11)
            assert set(images_of_others) == {images} and sum(shares) == images
            # even shares, of whole groups, directions of 3 groups, or coordinates of 12
            assert max(shares) - min(shares) <= {"spsa": 6, "central": 24}.get(name, 0), (
                name,
                batch,
            )


def test_too_many_processes_are_a_mistake(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    problem, (eps, cond) = small_problem(), draw(4)
    with pytest.raises(ValueError, match="8 processes"):
        fdfo(problem, eps, cond, torch.Generator())


def trained(folder, launcher=()):
    """The records of a short training run of the tiny model, and what it printed."""
    folder.mkdir()
    names = (ROOT / "tiny" / "prompts_train.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(names[:60]))  # six of which are held out
    flags = "--reward colorfulness --groups 8 --batch 8 --steps 2 --lr 2e-3 --iterations 2"
    flags += " --prompts prompts.txt --watch= --out . --name run"
    code, out, err = run("train.py", *flags.split(), cwd=folder, launcher=launcher)
    assert code == 0, err
    return metrics(folder / "run"), out


@pytest.mark.ci
def test_torchrun_trains_as_one_process_does(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone, said = trained(tmp_path / "alone")
    both, both_said = trained(tmp_path / "both", torchrun)
    assert len(both) == len(alone) == 3
    for one, two in zip(alone, both):
        for key in one:
            # float32, summed in another order, through two steps of Adam
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert both[-1]["gain"] > 0 and both[-1]["images"] == 32

    # the first process alone writes and speaks
    assert both_said.count("\n") == said.count("\n") == 3
    for name in ("lora.safetensors", "state.pt", "report.png", "samples/000002.png"):
        assert (tmp_path / "both" / "run" / name).stat().st_size > 1000


@pytest.mark.parametrize("shared_out", [True, False])
def test_a_process_draws_the_prompts_that_were_encoded_for_it(shared_out, monkeypatch):
    args = argparse.Namespace(seed=0, iterations=3, groups=7)
    prompts, shares = 1000, []
    for rank in range(3):
        monkeypatch.setattr(support.draws, "processes", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        encoded = {*drawn_prompts(args, prompts, shared_out)}
        for iteration in (1, 2, 3):
            cond, _ = draw_groups(args.seed, iteration, prompts, args.groups)
            mine = torch.cat([part for (part,) in micro_batches(2, cond)])
            assert {*mine.tolist()} <= encoded
        shares.append(encoded)
    assert len(set.union(*shares)) <= 21 and (len(shares[0]) <= 9) == shared_out
