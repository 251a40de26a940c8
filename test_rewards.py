"""Tests of the rewards: closed forms, and what transformers itself computes.

pytest -q
"""

import io
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

import rewards
from errors import UserError
from rewards import Reward

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"


def grey(level, n=2, size=64):
    return torch.full((n, 3, size, size), level)


def test_programs_have_their_closed_forms():
    assert Reward("colorfulness")(grey(0.4), ["", ""]).abs().max() < 1e-4
    red = grey(0.0)
    red[:, 0] = 1.0
    # rg = 255, yb = 127.5 everywhere: no spread, 0.3 of the mean's length
    assert Reward("colorfulness")(red, ["", ""]).tolist() == pytest.approx([0.3 * math.hypot(255, 127.5)] * 2)
    half = red.clone()
    half[:, 0, :, :32] = 0  # half red, half black: spread of half the range, mean of half
    expected = 0.5 * math.hypot(255, 127.5) + 0.3 * 0.5 * math.hypot(255, 127.5)
    assert Reward("colorfulness")(half, ["", ""]).tolist() == pytest.approx([expected] * 2)
    assert Reward("brightness")(grey(0.25), ["", ""]).tolist() == pytest.approx([25, 25])
    assert Reward("brightness")(red, ["", ""]).tolist() == pytest.approx([29.9, 29.9])
    assert Reward("sharpness")(grey(0.25), ["", ""]).abs().max() < 1e-3
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    # on a checkerboard of 0 and 1 the Laplacian is +-4, so its variance is (4 * 255)^2
    assert Reward("sharpness")(board.float().expand(1, 3, 64, 64), [""]).item() == pytest.approx(1020**2)


def test_jpeg_size_is_that_of_the_file():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = Image.fromarray((noise[0].permute(1, 2, 0) * 255).round().byte().numpy())
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=95)
    both = Reward("jpeg_size")(torch.cat([noise, grey(0.5, 1)]), ["", ""])
    assert both[0].item() == pytest.approx(len(file.getvalue()) / 1000)
    assert both[1] < 1.0 < both[0]


@pytest.mark.parametrize("size", [{"shortest_edge": 224}, {"height": 64, "width": 64}])
@pytest.mark.parametrize("shape", [(64, 64), (300, 300), (256, 320)])
def test_preprocessing_is_that_of_transformers(size, shape):
    crop = size["shortest_edge"] if "shortest_edge" in size else 64
    processor = transformers.CLIPImageProcessor(
        size=size, crop_size={"height": crop, "width": crop}, do_center_crop="shortest_edge" in size
    )
    clip = rewards.Clip.__new__(rewards.Clip)
    clip.processor = processor
    smooth = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(smooth, shape, mode="bicubic").clamp(0, 1) * 255).round().byte()
    theirs = processor(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    ours = clip.pixels(pixels / 255)
    assert ours.shape == theirs.shape
    # PIL rounds to whole levels after each of its two passes: about one level of 1 / 255, over a std of 0.26
    assert (ours - theirs).abs().max() < 1.6 / 255 / 0.26


def test_clip_score_is_that_of_transformers():
    prompts = ["red apple", "robot", "an unseen caption"]
    images = torch.rand(3, 3, 64, 64)
    model = transformers.CLIPModel.from_pretrained(TINY / "tiny-clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tiny-clip")
    processor = transformers.CLIPImageProcessor.from_pretrained(TINY / "tiny-clip")
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    inputs = {
        **tokenizer(prompts, padding=True, return_tensors="pt"),
        **processor(pictures, return_tensors="pt"),
    }
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    images = (images * 255).round() / 255
    torch.testing.assert_close(
        Reward("clip")(images, prompts) / 100 * model.logit_scale.exp(), logits, rtol=1e-4, atol=1e-4
    )


def test_aesthetic_head_reads_the_published_layout(tmp_path):
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    linears = {i: nn.Linear(*width) for i, width in widths.items()}
    state = {
        f"layers.{i}.{key}": w for i, linear in linears.items() for key, w in linear.state_dict().items()
    }
    torch.save(state, tmp_path / "aesthetic-model.pth")
    x = torch.randn(3, 768)
    expected = x
    for linear in linears.values():
        expected = linear(expected)
    torch.testing.assert_close(rewards.laion_head(tmp_path / "aesthetic-model.pth")(x), expected)


def test_expressions_are_arithmetic(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n"
    )
    images = torch.rand(4, 3, 32, 32)
    a, b = Reward("brightness")(images, [""] * 4), Reward("colorfulness")(images, [""] * 4)
    red = images[:, 0].mean((1, 2))
    text = f"-brightness + 2*(colorfulness - 0.5) - 3*{tmp_path}/mine.py:red"
    torch.testing.assert_close(Reward(text)(images, [""] * 4), -a + 2 * (b - 0.5) - 3 * red)
    assert list(Reward(text).terms) == ["brightness", "colorfulness", f"{tmp_path}/mine.py:red"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("brightness +", "column"),
        ("nonsense", "known: aesthetic, clip"),
        ("2 * 3", "names no reward"),
        ("brightness ** 2", "column 1"),
        ("brightness / 2", "column 1"),
        ("brightness + open('x')", "column 14"),
        ("__import__('os')", "column 1"),
        ("brightness + True", "column 14"),
        ("missing.py:f", "no file missing.py"),
        ("fdflow.py:no_such", "no function no_such"),
        ("", "column"),
    ],
)
def test_bad_expressions_are_refused(text, complaint, monkeypatch):
    monkeypatch.chdir(HERE)
    with pytest.raises(UserError, match="reward") as error:
        Reward(text)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("raise KeyError('gone')", "raised KeyError"),
        ("return images.mean()", "[2] numbers"),
        ("return ['a', 'b']", "must return numbers"),
        ("return None", "must return numbers"),
    ],
)
def test_bad_rewards_are_named(tmp_path, body, complaint):
    (tmp_path / "bad.py").write_text(f"def f(images, prompts):\n    {body}\n")
    with pytest.raises(UserError) as error:
        Reward(f"{tmp_path}/bad.py:f")(grey(0.5), ["", ""])
    assert "bad.py:f" in str(error.value) and complaint in str(error.value)


def test_infinite_rewards_become_nan(tmp_path):
    (tmp_path / "inf.py").write_text("def f(images, prompts):\n    return [1.0, float('inf')]\n")
    R = Reward(f"2*{tmp_path}/inf.py:f")(grey(0.5), ["", ""])
    assert R[0] == 2 and R[1].isnan()
