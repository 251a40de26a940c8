"""Tests: the commands on a pretended GPU, under PyTorch's own rules of which devices may mix.

pytest -q tests/test_gpu.py
"""

import inspect
import textwrap
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fdflow
import rewards
import sample
import support.run
import train
from models.flow import Flow
from support.evaluation import HeldOut
from tests.commands import exit_code, numbers, state_of
from tests.fake_gpu import fake_gpu

torch.set_num_threads(1)
QUICK = "--groups 2 --steps 2 --size 64 --iterations 1 --dtype float32".split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs train.py on a device and returns its folder."""
    (tmp_path / "prompts.txt").write_text("red apple\nrobot\n")
    monkeypatch.setattr(support.run, "report", lambda *args: None)  # the slowest part, on no device

    def train_on(device, *flags, name="run"):
        command = ["train.py", *QUICK, "--device", device, "--prompts", tmp_path / "prompts.txt"]
        command += ["--out", tmp_path / device, "--name", name, *flags]
        with fake_gpu() if device == "cuda" else nullcontext():
            assert exit_code(train.main, monkeypatch, *command) == 0
        return tmp_path / device / name

    yield train_on
    rewards.load_clip.cache_clear()  # no later test gets the one on the fake GPU


# on a real card, too, where there is one
CARDS = [fake_gpu, nullcontext] if torch.cuda.is_available() else [fake_gpu]


@pytest.mark.parametrize("card", CARDS)
def test_what_a_card_refuses_is_refused(card):
    with card():
        a, x, number = torch.arange(3.0), torch.arange(3.0, device="cuda"), torch.tensor(2.0)
        i, j = torch.tensor([2, 0]), torch.tensor([2, 0], device="cuda")
        on_cpu, on_gpu = torch.Generator(), torch.Generator("cuda")
        with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same"):
            a[j]
        for refused in (
            lambda: a + x, lambda: x - a, lambda: torch.cat([a, x]), lambda: torch.stack([x, a]),
            lambda: torch.where(x > 1, x, a), lambda: x.masked_fill(a > 1, 0.0), lambda: x @ a,
            lambda: x.gather(0, i), lambda: x.scatter(0, i, x[:2]), lambda: x.index_select(0, i),
            lambda: x.index_add(0, i, x[:2]), lambda: F.embedding(i, x[:, None]), lambda: a.dot(x),
            lambda: F.linear(a[None], x[None]), lambda: F.conv1d(x[None, None], a[None, None]),
            lambda: F.layer_norm(x, [3], a), lambda: torch.bucketize(x, a), lambda: x.add_(a),
            lambda: x.__setitem__(j, a[:2]), lambda: number.clone().add_(x[0]),
            lambda: x.clamp(number), lambda: torch.cat([x, number[None]]),
            lambda: torch.addcmul(x, number, number),
            lambda: F.scaled_dot_product_attention(*(b.expand(1, 1, 3, 3) for b in (x, x, a))),
            lambda: torch.randn(3, generator=on_cpu, device="cuda"),
            lambda: torch.randn(3, generator=on_gpu),
            lambda: x.clone().normal_(generator=on_cpu), lambda: x.numpy(),
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                refused()


@pytest.mark.parametrize("card", CARDS)
def test_what_a_card_allows_gives_its_values(card):
    with card():
        a, x, number = torch.arange(3.0), torch.arange(3.0, device="cuda"), torch.tensor(2.0)
        i, j = torch.tensor([2, 0]), torch.tensor([2, 0], device="cuda")
        for picked in (x[i], x[j], x[[2, 0]], x.index_select(0, j)):
            assert picked.tolist() == [2, 0]
        for result in (number * x + number, torch.where(x < 0, number, 2 * x + 2)):
            assert result.tolist() == [2, 4, 6]
        x[j], x[1] = number, 7
        assert x.tolist() == a.copy_(x).tolist() == [2, 7, 2] and a.device.type == "cpu"
        assert x.masked_fill(x > 3, number).sum().item() == 6 and x.to("cuda") is x and x.is_cuda
        for made in (x.new_tensor([1]), x.cpu().to("cuda"), torch.ones_like(x), a.type_as(x)):
            assert made.device == x.device == torch.device("cuda:0")

        y, b = x.clone().requires_grad_(), a.clone().requires_grad_()
        (y**2 + b.to("cuda")).sum().backward()
        assert y.grad.device == x.device
        assert (y.grad.tolist(), b.grad.tolist()) == ([4, 14, 4], [1, 1, 1])


SETTINGS = {
    "fdfo": "--branches 3 --train-steps 2 --kl 2 --guidance 2 --checkpointing",
    "spsa": "--directions 2 --layers all --guidance 2",
    "central": "--coordinates 2",
    "studies/baselines.py:flow_grpo": "--branches 2 --kl 1 --updates 2",
    "studies/baselines.py:awm": "--branches 2 --average-kl 1",
}
IN_CI = [pytest.param(name, marks=pytest.mark.ci) for name in SETTINGS if name != "fdfo"]


@pytest.mark.parametrize("estimator", ["fdfo", *IN_CI])
def test_training_gives_the_numbers_of_the_cpu(run, estimator):
    flags = ["--reward", "aesthetic+0.1*clip", "--watch", ",".join(rewards.PROGRAMS)]
    flags += ["--estimator", estimator, *SETTINGS[estimator].split()]
    ours, theirs = (numbers(run(device, *flags)) for device in ("cuda", "cpu"))
    sizes = [name for name in ours if "jpeg_size" in name]  # in whole bytes
    for name in sizes:
        assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=0.1)
    # the same operations, but for the memory layout of some: most agree to a hundredth of a per
    # cent, and changes, small differences of large numbers, to half a per cent; on some CPUs to
    # 1e-4 of rewards of 5
    assert ours == pytest.approx(theirs, rel=1e-2, abs=3e-4)


def test_a_run_is_saved_resumed_and_sampled_from(run, tmp_path, monkeypatch):
    flags = ["--reward", "brightness", "--watch", "brightness", "--eval-every", "1"]
    whole = run("cpu", *flags, "--iterations", "2", name="whole")
    folder = run("cpu", *flags)
    run("cuda", *flags, "--resume", "--iterations", "2", "--out", folder.parent)
    assert numbers(folder) == pytest.approx(numbers(whole), rel=1e-2, abs=1e-4)
    assert len(state_of(folder)["records"]) == 3  # can be read without a GPU

    pictures = []
    for device, lora in (("cuda", folder), ("cpu", whole)):
        picture = tmp_path / f"{device}.png"
        command = ["sample.py", "--prompt", "red apple", "--n", 2, "--compare", "--lora", lora]
        command += ["--device", device, "--dtype", "float32", "--out", picture]
        with fake_gpu() if device == "cuda" else nullcontext():
            assert exit_code(sample.main, monkeypatch, *command) == 0
        pictures.append(np.asarray(Image.open(picture)).astype(float))
    assert abs(pictures[0] - pictures[1]).mean() < 0.1  # levels of 255


def misplace(monkeypatch, function, before, after):
    """Change some words of a function, everywhere where it is used."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) == 1, f"{function.__qualname__} has changed: {before!r}"
    names = dict(function.__globals__)
    exec(source.replace(before, after), names)
    changed = inspect.unwrap(names[function.__name__])
    monkeypatch.setattr(function, "__code__", changed.__code__)


# an index on the device of the noise, while prompts are on the CPU
LOOKED_UP = (
    fdflow.roll_out,
    "x[::branches], c, g",
    "x[::branches], c[torch.arange(len(c), device=e.device)], g",
)
LEFT_BEHIND = {
    "prompts": (train.main, "cond.to(args.device)", "cond", "indices should be"),
    "network": (Flow.__init__, "module.to(args.device)", "module.to('cpu')", "same device"),
    "weights of a reward": (rewards.luma, "images.new_tensor", "torch.tensor", "same device"),
    "generators": (fdflow.roll_out, "tor(e.device)", "tor()", "type for generator"),
    "base": (HeldOut.__call__, "images = images", "images = images.to('cuda')", "same device"),
}


def test_an_index_on_the_device_of_the_noise_finds_its_prompts(run, monkeypatch):
    misplace(monkeypatch, *LOOKED_UP)
    run("cuda", "--watch", "brightness")


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_what_is_left_behind_is_noticed(run, monkeypatch, what):
    *change, message = LEFT_BEHIND[what]
    if what == "prompts":
        misplace(monkeypatch, *LOOKED_UP)
    misplace(monkeypatch, *change)
    with pytest.raises(RuntimeError, match=message):
        run("cuda", "--reward", "colorfulness", "--watch", "brightness")
