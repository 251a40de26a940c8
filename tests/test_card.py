"""Tests: the rows of studies/card.py, in toy sizes on the CPU and on the pretended GPU.

pytest -q tests/test_card.py
"""

from itertools import count

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from studies import card
from tests.fake_gpu import fake_gpu


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """No test gets a CLIP from the pretended GPU that another has made."""
    yield
    card.make_clip.cache_clear()
    card.train.load_clip.cache_clear()


def weights(module):
    return sum(p.numel() for p in module.parameters())


# ---- architectures


def test_architectures_have_the_published_numbers_of_weights():
    with torch.device("meta"):
        sd35, turbo = card.make_pipeline("sd3.5", False), card.make_pipeline("sd-turbo", False)
        clip = card.make_clip(False, "meta", torch.bfloat16)
    assert weights(sd35.transformer) == pytest.approx(2.24e9, rel=0.005)
    assert weights(turbo.unet) == 865_910_724  # that of Stable Diffusion 2.1
    assert weights(sd35.vae) == pytest.approx(83.8e6, rel=0.005)
    assert weights(clip.model) == pytest.approx(986e6, rel=0.005)


def test_sd35_takes_the_operations_of_its_layers():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = card.make_pipeline("sd3.5", False).transformer
        text, pooled = torch.randn(1, 333, 4096), torch.randn(1, 2048)
        network(torch.randn(1, 16, 64, 64), text, pooled, torch.tensor([500]))

    # a linear layer of d x d takes 2 d^2 a token: 12 of them in a block, 4 in a second attention;
    # the last block has 3 for the text. An attention takes 4 d for each two tokens
    d, image, text = 1536, 1024, 333
    linear = 2 * d**2 * (image * (24 * 12 + 13 * 4) + text * (23 * 12 + 3))
    attention = 4 * d * (24 * (image + text) ** 2 + 13 * image**2)
    assert counter.get_total_flops() == pytest.approx(linear + attention, rel=0.005)


# ---- rows


IN_CI = [
    pytest.param(row, marks=pytest.mark.ci)
    for row in ("sd-turbo 4 24 compiled", "sd3.5 40 6 published")
]


@pytest.mark.parametrize("row", ["sd3.5 10 12", *IN_CI])
def test_a_row_is_measured_on_a_gpu(row, monkeypatch):
    # every mark comes a second and a GiB after the one before
    seconds, peaks = count(), count(1)
    with fake_gpu():
        monkeypatch.setattr(card.time, "perf_counter", lambda: next(seconds))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 * next(peaks))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        cells = card.measure(row, True, "cuda")

    # one of two pairs takes half of the time
    phases = [cells[name] for name in ("sampling", "decoding", "reward", "training")]
    assert [seconds for seconds, _ in phases] == [0.5] * 4
    assert cells["pair"] == (2, cells["training"][1])
    assert cells["training"][1] == cells["sampling"][1] + 3
    assert cells["TFLOP"] > 0 and cells["TFLOP/s"] == round(cells["TFLOP"] / 2, 1)
