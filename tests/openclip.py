"""The reward hps against OpenCLIP itself, on a small random model.

pip install --no-deps --target openclip open_clip_torch torchvision ftfy wcwidth
PYTHONPATH=openclip pytest -q -n 0 tests/openclip.py
"""

import gzip
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

# kernels that are not in a torch for CPUs; the transforms need none
sys.modules["torchvision._meta_registrations"] = ModuleType("no kernels")
import open_clip  # noqa: E402

from rewards import Reward  # noqa: E402
from support.pictures import to_pil  # noqa: E402
from zoo import hps  # noqa: E402

SIDE = 32


def clip_tokenizer():
    """Make transformers' tokenizer of CLIP from the vocabulary that OpenCLIP brings."""
    path = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]

    tokens = open_clip.tokenizer.bytes_to_unicode().values()
    tokens = [*tokens, *(f"{token}</w>" for token in tokens), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """An OpenCLIP model whose weights `hps` finds as if they were its own."""
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": SIDE, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    model = open_clip.CLIP(48, vision, text, output_dict=True).eval()
    for p in model.parameters():  # biases are zero at first
        p.data += 0.05 * torch.randn(p.shape)
    state = model.state_dict() | {"attn_mask": torch.zeros(77, 77)}  # as the published file has
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")

    both = {"projection_dim": 48, "num_attention_heads": 2, "hidden_act": "gelu"}
    vision = {**both, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    vision |= {"patch_size": 8, "image_size": SIDE}
    text = {**both, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 128}
    text |= {"eos_token_id": 49407, "bos_token_id": 49406}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    parts = {
        transformers.CLIPConfig: config,
        transformers.CLIPTokenizer: clip_tokenizer(),
        transformers.CLIPImageProcessor: transformers.CLIPImageProcessor(),
    }
    monkeypatch.setattr(hps, "downloaded", lambda hub_id, file: tmp_path / file)
    monkeypatch.setattr(hps, "pretrained", lambda kind, path: parts[kind])
    return model


def features(model, image, prompt):
    """The embeddings that HPSv2's own code computes of an image and a prompt."""
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest")
    text = open_clip.get_tokenizer("ViT-H-14")([prompt])
    with torch.no_grad():
        found = model(transform(to_pil(image))[None], text)
    return found["image_features"][0], found["text_features"][0]


PROMPTS = ["Red apple", "a robot, that waters 3 tulips!", "  Ein schöner   Tag "]


@pytest.mark.parametrize("height, width", [(SIDE, SIDE), (20, SIDE), (SIDE, 14)])
def test_hps_is_openclip(model, height, width):
    # whole levels, at a size that is not resized: nothing is rounded
    images = torch.randint(256, (3, 3, height, width)) / 255
    reward = Reward("hps")
    (clip,) = reward.terms.values()
    R = reward(images, PROMPTS)
    for image, embedding, prompt, value in zip(images, clip.embed_images(images), PROMPTS, R):
        of_image, of_text = features(model, image, prompt)
        torch.testing.assert_close(embedding, of_image, rtol=0, atol=1e-5)
        torch.testing.assert_close(clip.embed_text(prompt), of_text, rtol=0, atol=1e-5)
        # HPSv2's own score
        torch.testing.assert_close(value, 100 * (of_image @ of_text), rtol=1e-5, atol=1e-4)
    assert R.std() > 1


@pytest.mark.parametrize("height, width", [(64, 64), (60, 48), (24, 40)])
def test_images_of_other_sizes_are_resized_alike(model, height, width):
    noise = torch.rand(1, 3, 6, 6)
    images = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    images = (images * 255).round() / 255
    R = Reward("hps")(images, PROMPTS[:1])
    of_image, of_text = features(model, images[0], PROMPTS[0])
    # PIL rounds to whole levels after each of its two passes
    assert R.item() == pytest.approx(100 * (of_image @ of_text).item(), abs=0.1)
