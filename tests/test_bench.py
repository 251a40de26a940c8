"""What studies/bench.py counts and times.

pytest -q tests/test_bench.py
"""

import sys

import pytest
import torch

from studies import bench
from studies.profiler import Profiler


def test_operations_and_live_memory_are_counted():
    profiler, n = Profiler("cpu"), 1000
    with profiler, torch.device("meta"):
        weight = torch.randn(n, n, requires_grad=True)

        def product():
            hidden = torch.randn(n, n) @ weight
            return (hidden * hidden).sum()

        loss = profiler.profiled("forward", product)()
        profiler.profiled("backward", loss.backward)()
        q = torch.randn(2, 3, 64, 16)
        profiler.profiled("attention", torch.nn.functional.scaled_dot_product_attention)(q, q, q)
    seconds, operations, peak = zip(
        *(profiler.table[name] for name in ("forward", "backward", "attention"))
    )
    # 2 n^3 for a product, the same for the gradient of the weight; scores and sums of 64 x 64 at 2 x 16 each
    assert operations == (2 * n**3, 2 * n**3, 2 * (2 * 3 * 64 * 64 * 16 * 2))
    # the weight, the input, the hidden layer and its square; then no square, but the gradients of the rest
    assert peak[0] == pytest.approx(4 * 4 * n**2, rel=1e-4)
    assert 5 * 4 * n**2 * 0.999 < peak[1] < 7 * 4 * n**2
    assert peak[2] < peak[1] and min(seconds) > 0


def run(monkeypatch, capsys, *flags):
    """What a phase costs two images: {phase: [TFLOP, peak GiB, seconds if timed]}."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--smoke", "--size", "128", *flags])
    bench.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    phases = ("sampling", "decoding", "reward", "training")
    return {line[0]: [float(a) for a in line[1:4]] for line in lines if line[0] in phases}


# of SD3.5's schedule the last step moves nothing and is left out
@pytest.mark.parametrize("model, steps", [("sd3.5", "23"), ("flux-schnell", "12")])
def test_images_cost_their_steps_and_no_more(model, steps, monkeypatch, capsys):
    options = ["--model", model, "--estimate", "--steps"]
    one, two = (run(monkeypatch, capsys, *options, number) for number in steps)
    twice = run(monkeypatch, capsys, *options, steps[0], "--train-steps", "2")
    rel = 1e-3  # they are printed to 4 digits
    assert two["sampling"][0] == pytest.approx(2 * one["sampling"][0], rel=rel)
    assert (
        two["training"][0] == one["training"][0] == pytest.approx(twice["training"][0] / 2, rel=rel)
    )
    assert twice["sampling"][0] == one["sampling"][0]
    assert one["decoding"][0] == two["decoding"][0] and one["reward"][0] == two["reward"][0]
    # of two images one is trained; with frozen weights a backward costs a forward, attention, LoRA a bit more
    assert 0.9 * one["sampling"][0] < one["training"][0] < 1.3 * one["sampling"][0]


def test_the_pull_to_the_base_model_costs_a_forward(monkeypatch, capsys):
    options = ["--estimate", "--model", "sd3.5", "--steps", "2", "--kl"]
    without, pulled = (run(monkeypatch, capsys, *options, kl) for kl in "01")
    more = (
        pulled["training"][0] - without["training"][0]
    )  # for one of the two images that are sampled
    assert more == pytest.approx(without["sampling"][0] / 2, rel=0.01)


def test_bench_times_real_tensors(monkeypatch, capsys):
    options = ["--model", "sdxl-turbo", "--steps", "1", "--device", "cpu", "--pairs", "1"]
    real = run(monkeypatch, capsys, *options)
    assert set(real) == {"sampling", "decoding", "reward", "training"}
    assert all(len(row) == 3 and min(row) > 0 for row in real.values())


@pytest.mark.parametrize("flags", ["--model tiny", "--pairs 0", "--noise-level 1"])
def test_wrong_arguments_are_refused(flags, monkeypatch, capsys):
    with pytest.raises((SystemExit, bench.UserError)):
        run(monkeypatch, capsys, *flags.split())
