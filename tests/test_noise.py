"""What studies/noise.py says of estimates whose signal is known.

pytest -q tests/test_noise.py
"""

import re
import sys

import pytest
import torch

from studies import noise
from studies.baselines import backprop


def opposite(problem, *draws):
    images = backprop(problem, *draws)
    for p in problem.lora.parameters:
        p.grad = -p.grad
    return images


def half_random(problem, eps, cond, generator):
    """The gradient, and a random vector that is three times as long and nearly at right angles to it."""
    backprop(problem, eps, cond)
    lengths = torch.cat([p.grad.flatten() for p in problem.lora.parameters])
    for p in problem.lora.parameters:
        p.grad += (
            3 * lengths.norm() / len(lengths) ** 0.5 * torch.randn(p.shape, generator=generator)
        )
    return len(eps)


def test_the_cosine_of_what_is_known(monkeypatch, capsys):
    monkeypatch.setattr(noise, "EXACT", (backprop, 4, {}))
    methods = {"same": backprop, "opposite": opposite, "half random": half_random}
    monkeypatch.setattr(
        noise, "METHODS", {name: (method, 4, {}) for name, method in methods.items()}
    )
    monkeypatch.setattr(sys, "argv", ["noise.py", "--steps", "1", "--estimates", "3"])
    noise.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert 0 < float(re.search(r"cosine of ([\d.]+)", first)[1]) < 1
    found = {
        line[:22].strip(): [float(x) for x in re.findall(r"[-+]?\d\.\d+", line)] for line in lines
    }
    # that with its own mean, over the cosine of the mean, is larger than 1 for so few
    assert found["same"][0] > 1 and found["opposite"] == [-found["same"][0], found["same"][1]]
    assert found["half random"][0] == pytest.approx(found["same"][0] / 10**0.5, rel=0.05)
    assert all("12 evaluations" in line for line in lines)  # four images forward and backward


def test_the_model_may_be_trained_before(monkeypatch, capsys):
    monkeypatch.setattr(noise, "EXACT", (backprop, 2, {}))
    monkeypatch.setattr(noise, "METHODS", {"same": (backprop, 2, {})})
    said = {}
    for iterations in ("0", "2"):
        command = ["noise.py", "--steps", "1", "--estimates", "2", "--iterations", iterations]
        monkeypatch.setattr(sys, "argv", command)
        noise.main()
        said[iterations] = capsys.readouterr().out
    assert said["0"] != said["2"] and all("6 evaluations" in text for text in said.values())
