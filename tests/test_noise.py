"""What studies/noise.py says of estimates whose signal is known.

pytest -q tests/test_noise.py
"""

import re
import sys

import pytest
import torch

from models.table import find_model
from studies import noise
from studies.baselines import backprop


def quarter(problem, eps, cond, generator):
    """The gradient, plus a random vector three times as long and nearly at right angles to it."""
    backprop(problem, eps, cond)
    g = torch.cat([p.grad.flatten() for p in problem.lora.parameters])
    for p in problem.lora.parameters:
        noise = torch.randn(p.shape, generator=generator)
        p.grad += 3 * g.norm() / len(g) ** 0.5 * noise
    return len(eps)


def test_the_cosine_of_what_is_known(monkeypatch, capsys):
    def train(problem, eps, cond, generator, **options):
        trained.append(problem.lora)
        for p in problem.lora.parameters:
            p.grad = torch.ones_like(p)

    trained = []
    methods = {"same": (backprop, 2, {}), "a quarter": (quarter, 2, {})}
    monkeypatch.setattr(noise, "METHODS", methods)
    monkeypatch.setattr(noise, "EXACT", (backprop, 2, {}))
    monkeypatch.setattr(noise, "fdfo", train)
    flags = "--steps 1 --estimates 2 --iterations 2"
    monkeypatch.setattr(sys, "argv", ["noise.py", *flags.split()])
    noise.main()

    # B begins at 0, and Adam's steps are as long as the learning rate
    assert len(trained) == 2 and trained[0] is trained[1]
    steps = torch.cat([layer.B.detach().flatten() for layer in trained[0].layers.values()])
    assert (steps / (-2 * find_model("tiny").lr) - 1).abs().max() < 0.01

    first, *lines = capsys.readouterr().out.splitlines()
    assert 0 < float(re.search(r"cosine of ([\d.]+)", first)[1]) < 1
    same, part = ([float(x) for x in re.findall(r"[-+]?\d+\.?\d*", x)] for x in lines)
    # that of an exact one with its own mean, over that of the mean, is larger than 1 for so few
    assert same[0] > 1 and same[2] == 2 * 3  # evaluations: two images, forward and backward
    assert part[0] == pytest.approx(same[0] / 10**0.5, rel=0.05)


def test_the_mean_of_noisy_estimates_is_as_pure_as_it_is():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(4000, generator=generator).double()
    exact = g + 2 * torch.randn(50, 4000, generator=generator).double()
    mean, purity = noise.mean_and_purity(exact)
    assert purity == pytest.approx(torch.cosine_similarity(mean, g, dim=0).item(), abs=0.01)
