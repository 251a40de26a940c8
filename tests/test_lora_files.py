"""Tests: LoRA files, ours in diffusers and those of other programs here.

pytest -q tests/test_lora_files.py
"""

import itertools

import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import train
from fdflow import LoRA
from models.lora_files import LAYERS, layers_named, load_lora, make_lora, save_lora
from support.errors import UserError
from tests.commands import exit_code, metrics
from tests.models import (
    PROMPTS,
    folder,
    load_theirs,
    make_flow,
    random_lora,
    shared_flow,
    their_images,
)
from tests.pipelines import PIPELINES

COND, SEEDS = torch.arange(2), [5, 6]
SAME = 1e-3  # float32, but W x + B A x is summed in another order


def small_flow(name):
    return make_flow(folder(name), PROMPTS[:2], steps=2, guidance=1)


# ---- ours


# in every run: all layers, a UNet, fused layers, a pipeline that cannot read LoRA files
CASES = [("tiny", "all"), ("sdxl", "attention"), ("flux2-klein", "modulation")]
CASES += [("pixart-sigma", "attention")]
# in CI each pipeline, with the kinds of layers in turn
for name, which in zip(PIPELINES, itertools.cycle(("modulation", "all", "attention"))):
    CASES.append(pytest.param(name, which, marks=pytest.mark.ci))


@pytest.mark.parametrize("name, which", CASES)
def test_lora_loads_in_diffusers(name, which, tmp_path):
    flow, path = small_flow(name), tmp_path / "lora.safetensors"
    base = flow.images(COND, SEEDS)
    lora = random_lora(flow, which)
    changed = flow.images(COND, SEEDS)
    assert (changed - base).abs().mean() > 0.002
    with lora.switched_off():
        assert torch.equal(flow.images(COND, SEEDS), base)

    save_lora(lora, path, flow.network_name)
    pipe = load_theirs(folder(name))
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
    else:  # as docs/models.md says
        tensors = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(lora.layers))
        peft.inject_adapter_in_model(config, pipe.transformer)
        peft.set_peft_model_state_dict(pipe.transformer, tensors)
    assert (their_images(pipe, flow, PROMPTS[:2], SEEDS, steps=2) - changed).abs().max() < SAME

    again = small_flow(name)
    load_lora(again, tmp_path)
    assert (again.images(COND, SEEDS) - changed).abs().max() < SAME


def test_layers_are_those_named():
    def names(family, which):
        return layers_named(shared_flow(family).network, which)

    both_streams = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
    ends = {name.split("attn.")[1] for name in names("sd3", "attention") if "attn." in name}
    assert ends == {*both_streams.split()}
    last = [f"transformer_blocks.1.attn.{end}" for end in ("to_v", "to_out.0")]
    assert len(names("tiny", "last")) == 8 and names("sd3", "last")[-2:] == last
    assert {name.split(".")[1] for name in names("tiny", "last")} == {*"2345"}  # of six blocks
    norms = ("norm1", "norm1_context")
    modulation = [f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in norms]
    assert names("sd3", "modulation") == modulation
    assert {*names("sd3", "attention"), *modulation} < {*names("sd3", "all")}
    blocks = {name.split(".")[0] for name in names("flux-schnell", "all")}
    assert blocks == {"transformer_blocks", "single_transformer_blocks"}
    # where query, key, value and MLP are one layer
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in names("flux2-klein", "attention")

    chosen = [n for n in names("sd-turbo", "all") if n.endswith((".to_q", ".ff.net.2"))]
    assert names("sd-turbo", "to_q, ff.net.2") == chosen
    for which in ("to_q,to_x", "", "norm1"):
        with pytest.raises(UserError, match="no such linear layer"):
            names("sd3", which)


@pytest.mark.ci
@pytest.mark.parametrize("which", [*LAYERS, "all"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_network_has_every_kind_of_layers(name, which):
    assert layers_named(shared_flow(name).network, which)


# ---- going on from a LoRA


def train_from(lora, monkeypatch, out, *flags):
    """Train the bundled model for an iteration, from a LoRA; its folder."""
    (out / "prompts.txt").write_text("sun\nrobot")
    small = "--reward brightness --watch brightness --groups 2 --steps 2 --iterations 1 --lr 1e-9"
    command = ["train.py", *small.split(), "--prompts", out / "prompts.txt", "--out", out]
    code = exit_code(train.main, monkeypatch, *command, "--init-lora", lora, *flags)
    assert code == 0
    return out / "brightness"


def test_a_lora_is_trained_further_and_pulled_to_where_it_began(tmp_path, monkeypatch, capsys):
    first = small_flow("tiny")
    save_lora(random_lora(first, "modulation"), tmp_path / "lora.safetensors", "transformer")
    x, cond = first.noise([0, 1]), torch.tensor([0, 1])

    again = small_flow("tiny")
    layers = layers_named(again.network, "modulation")
    lora = make_lora(again, layers, 4, 8, None, tmp_path)
    with torch.no_grad():
        expected = first.velocity(x, 1.0, cond)
        found = again.velocity(x, 1.0, cond)
        for p in lora.parameters:
            p.data *= 2
        with lora.switched_off():  # the pull is to the start, not to the base model
            pulled_to = again.velocity(x, 1.0, cond)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pulled_to, expected, rtol=1e-4, atol=1e-5)

    # from the command line, with hardly a step
    run = train_from(tmp_path, monkeypatch, tmp_path, "--rank", 4)
    assert "frozen" not in capsys.readouterr().err
    before, after = load_file(tmp_path / "lora.safetensors"), load_file(run / "lora.safetensors")
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)
    assert metrics(run)[-1]["drift"] < 1e-4


def test_a_lora_of_other_layers_is_merged_into_the_weights(tmp_path, capsys):
    flow = small_flow("tiny")
    base = flow.images(COND, SEEDS)
    save_lora(random_lora(flow, "attention"), tmp_path / "lora.safetensors", "transformer")
    changed = flow.images(COND, SEEDS)
    assert (changed - base).abs().mean() > 0.002

    again = small_flow("tiny")
    layers = layers_named(again.network, "modulation")
    lora = make_lora(again, layers, 4, 8, None, tmp_path)
    assert "becomes part of the frozen weights" in capsys.readouterr().err
    assert not [m for m in again.network.modules() if isinstance(m, BaseTunerLayer)]
    assert (again.images(COND, SEEDS) - changed).abs().max() < SAME
    with lora.switched_off():
        assert (again.images(COND, SEEDS) - changed).abs().max() < SAME


# ---- those of other programs

PEFT = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True},
    "convolutions": {"target_modules": ["to_q", "pos_embed.proj"]},
    "patterns": {
        "rank_pattern": {"blocks.1.attn.to_q": 2, "to_out.0": 5},
        "alpha_pattern": {"to_q": 1, r"transformer_blocks\.[2-4]\.attn\.to_out\.0": 11},
    },
}


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # biases, says peft as it saves
@pytest.mark.parametrize("kind", PEFT)
def test_lora_of_peft_loads_here(kind, tmp_path):
    torch.manual_seed(0)
    flow, pipe = small_flow("tiny"), load_theirs(folder("tiny"))
    base = flow.images(COND, SEEDS)

    options = {"r": 3, "lora_alpha": 7, "target_modules": ["to_q", "to_out.0"]}
    config = peft.LoraConfig(**options | {"init_lora_weights": False} | PEFT[kind])
    pipe.transformer.add_adapter(config)
    expected = their_images(pipe, flow, PROMPTS[:2], SEEDS, steps=2)
    assert (expected - base).abs().max() > 0.05
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = _collate_lora_metadata({"transformer": pipe.transformer})
    pipe.save_lora_weights(tmp_path, layers, **metadata)

    load_lora(flow, tmp_path)
    assert (flow.images(COND, SEEDS) - expected).abs().max() < SAME


LAYOUTS = {  # a model, and how another program names the layers and matrices of its LoRA
    "kohya, SDXL": ("sdxl", "lora_unet_", "lora_down", "lora_up", "_"),
    "diffusers, SD": ("sd-turbo", "unet.", "lora_A", "lora_B", "."),
    "half kohya, Flux": ("flux-schnell", "transformer.", "lora_down", "lora_up", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_other_programs_load_with_their_alphas(layout, tmp_path):
    name, start, A, B, dot = LAYOUTS[layout]
    ours, theirs = small_flow(name), small_flow(name)
    tensors, rank = {}, 4
    for i, (key, layer) in enumerate(random_lora(ours).layers.items()):
        key = start + key.replace(".", dot)
        tensors |= {f"{key}.{A}.weight": layer.A.detach(), f"{key}.{B}.weight": layer.B.detach()}
        alpha = [rank, 1.0, 2.0][i % 3]
        if alpha != rank:  # which is the alpha of a layer that has none in the file
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        layer.scale = alpha / rank

    save_file(tensors, tmp_path / "lora.safetensors")
    load_lora(theirs, tmp_path)
    assert (ours.images(COND, SEEDS) - theirs.images(COND, SEEDS)).abs().max() < SAME


def test_a_fused_layer_is_split(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = small_flow("flux-schnell"), small_flow("flux-schnell")
    start = "transformer_blocks.0.attn.to_"
    lora = LoRA(ours.network, [start + end for end in "qkv"], rank=4)
    width = lora.parameters[0].shape[1]
    A = torch.randn(4, width, generator=generator) / 4
    B = torch.randn(3 * width, 4, generator=generator) / 4
    for end, part in zip("qkv", B.split(width)):
        layer = lora.layers[start + end]
        layer.A.data, layer.B.data = A, part

    names = (f"double_blocks.0.processor.qkv_lora1.{matrix}.weight" for matrix in ("down", "up"))
    save_file(dict(zip(names, (A, B))), tmp_path / "lora.safetensors")
    load_lora(theirs, tmp_path)
    assert (ours.images(COND, SEEDS) - theirs.images(COND, SEEDS)).abs().max() < SAME


Q = "transformer.transformer_blocks.0.attn.to_q"
BAD = [  # what is added to a good file, or taken away
    {f"{Q}.lora_magnitude_vector": torch.ones(128)},  # of one layer alone
    {f"{Q}.lora_B.bias": torch.ones(128)},
    {f"text_encoder.q_proj.lora_{matrix}.weight": torch.ones(4, 4) for matrix in "AB"},
    {f"transformer.block.lora_{matrix}.weight": torch.ones(4, 4) for matrix in "AB"},
    {f"other.lora_{matrix}.weight": torch.ones(4, 4) for matrix in "AB"},
    {"transformer.x_embedder.weight": torch.ones(4)},
    {f"{Q}.lora_A.weight": torch.ones(4, 127)},
    {f"{Q}.lora_B.weight": torch.ones(128, 3)},
    {f"{Q}.lora_B.weight": None},
    {f"{Q}.lora_A.weight": None},
]


def test_a_file_of_which_a_part_would_be_left_out_is_refused(tmp_path, capfd):
    flow, path = small_flow("tiny"), tmp_path / "lora.safetensors"
    save_lora(random_lora(small_flow("tiny")), path, "transformer")
    good, data = load_file(path), path.read_bytes()

    def complaint():
        with pytest.raises(UserError) as error:
            load_lora(flow, path)
        flow.pipe.unload_lora_weights()
        text = str(error.value)
        assert "\n" not in text and f"{path} is no LoRA for this model: " in text
        return text

    for change in BAD:
        tensors = {key: t for key, t in (good | change).items() if t is not None}
        save_file(tensors, path)
        assert complaint(), change
    save_file({}, path)
    assert "a part of it fits nowhere" in complaint()
    for damaged in (b"", data[:100], data[:-1], b"PK\x03\x04", b"\xff" * 100):
        path.write_bytes(damaged)
        complaint()
    for absent in (tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="no LoRA at"):
            load_lora(flow, absent)
    path.write_bytes(data)
    load_lora(flow, path)
    assert capfd.readouterr() == ("", "")
