"""Tests: every family of models against its diffusers pipeline, on small random models of the same classes.

pytest -q tests/test_models.py
"""

import argparse
import json
import os
import re
import shutil
import sys
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

import fdflow
import sample
import train
from fdflow import LoRA, Problem, central_difference, fdfo, spsa
from models import flows
from models.flows import load_flow
from models.lora_files import layers_named, load_lora, save_lora
from models.table import MODELS, TINY, fill_defaults, find_model, load_pipeline
from rewards import Reward
from support.commands import size
from support.errors import UserError
from support.evaluation import Counted
from tests.fake_gpu import fake_gpu

torch.set_num_threads(1)
PROMPTS = ["red apple", "robot", "sun"]


# ---- pipelines made from configurations, with the schedulers as published


def clip(width, projection=16):
    config = transformers.CLIPTextConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=projection,
        eos_token_id=2047, bos_token_id=2046, pad_token_id=2047,
    )  # fmt: skip
    return config, transformers.AutoTokenizer.from_pretrained(TINY / "tiny-sd3" / "tokenizer")


def t5(width):
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters]
    config = transformers.T5Config(
        vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5EncoderModel(config), transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def vae(channels, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=channels, norm_num_groups=4, **options,
    )  # fmt: skip


def sd3(with_t5=True, **shift):
    (config, tokenizer), (encoder_3, tokenizer_3) = clip(16), t5(40)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=32,
        out_channels=16, pos_embed_max_size=12, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(**shift or {"shift": 3.0}),
        vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        transformers.CLIPTextModelWithProjection(config), tokenizer,
        transformers.CLIPTextModelWithProjection(config), tokenizer,
        encoder_3 if with_t5 else None, tokenizer_3 if with_t5 else None,
    )  # fmt: skip


def flux(guidance_embeds):
    (config, tokenizer), (encoder_2, tokenizer_2) = clip(16), t5(24)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        transformers.CLIPTextModel(config), tokenizer, encoder_2, tokenizer_2, transformer,
    )  # fmt: skip


BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def unet(cross, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=(2, 4),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, use_linear_projection=True, **options,
    )  # fmt: skip


def sd(scheduler):
    config, tokenizer = clip(16)
    return diffusers.StableDiffusionPipeline(
        vae(4), transformers.CLIPTextModel(config), tokenizer, unet(16), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(scheduler):
    (config, tokenizer), (config_2, _) = clip(16), clip(24)
    network = unet(
        40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(4, scaling_factor=0.13025), transformers.CLIPTextModel(config),
        transformers.CLIPTextModelWithProjection(config_2), tokenizer, tokenizer, network, scheduler,
    )  # fmt: skip


PIPELINES = {
    "tiny": lambda: None,  # the bundled one
    "sd3": lambda: sd3(),
    "sd3-without-t5": lambda: sd3(with_t5=False),
    "sd3-dynamic-shift": lambda: sd3(use_dynamic_shifting=True),
    "flux-schnell": lambda: flux(False),
    "flux-dev": lambda: flux(True),
    "sd-turbo": lambda: sd(diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
    "sd1.5": lambda: sd(diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)),
    "sd2.1": lambda: sd(
        diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)
    ),
    "sdxl-turbo": lambda: sdxl(
        diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    ),
    "sdxl": lambda: sdxl(diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")),
}
# one of each network
FAMILIES = ["sd3", "flux-schnell", "sd-turbo", "sdxl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every pipeline saved as its own folder, beside the tiny CLIP and aesthetic head: {name: path}."""
    top, paths = tmp_path_factory.mktemp("models"), {}
    for name in ("tiny-clip", "tiny-aesthetic"):
        (top / name).symlink_to(TINY / name)
    for name, make in PIPELINES.items():
        torch.manual_seed(0)
        pipe, paths[name] = make(), top / name
        if pipe is None:
            paths[name] = TINY / "tiny-sd3"
            continue
        for part in ("transformer", "unet"):  # the output layers start at zero, or do too little
            for key, p in getattr(pipe, part, torch.nn.Module()).named_parameters():
                p.data += 0.05 * torch.randn(p.shape)
        pipe.save_pretrained(paths[name])
    return paths


def make_flow(path, prompts=PROMPTS, cache=None, **options):
    """The flow that the command line would make with these options."""
    names = ["steps", "size", "guidance", "device", "dtype", "batch", "compile", "checkpointing"]
    args = argparse.Namespace(model=str(path), **dict.fromkeys(names) | {"size": "64"} | options)
    return load_flow(fill_defaults(args), args, prompts, cache)


def load_theirs(path):
    """The pipeline as diffusers loads it, with its scheduler as an Euler one where it is of another kind."""
    index = json.loads((path / "model_index.json").read_text())
    absent = {key: None for key, kind in index.items() if kind == [None, None]}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(path, **absent)
    if index["scheduler"][1] not in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_images(pipe, prompts, seeds, steps, guidance, size="64", tokens=256):
    width, height = (int(side) for side in (size.split("x") * 2)[:2])
    options = {} if hasattr(pipe, "unet") else {"max_sequence_length": tokens}
    return pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt", **options,
    ).images  # fmt: skip


CASES = [(name, 4, 1.0, "64") for name in PIPELINES if name != "flux-dev"]
CASES += [("tiny", 5, 4.0, "64"), ("sd3", 4, 5.0, "64x96"), ("sd3-without-t5", 4, 5.0, "64")]
CASES += [
    ("sd3-dynamic-shift", 3, 1.0, "96x64"),
    ("flux-dev", 4, 3.5, "64x96"),
    ("flux-dev", 4, 1.0, "96x64"),
]
CASES += [("sd-turbo", 1, 1.0, "64"), ("sd1.5", 4, 7.5, "64x96"), ("sd2.1", 4, 5.0, "96x64")]
CASES += [("sdxl-turbo", 1, 1.0, "64"), ("sdxl", 4, 5.0, "96x64")]


@pytest.mark.parametrize("name, steps, guidance, size", CASES)
def test_images_are_those_of_the_pipeline(folders, name, steps, guidance, size):
    seeds = [5, 6, 7]
    flow = make_flow(folders[name], ["unused", *PROMPTS], steps=steps, guidance=guidance, size=size)
    images = flow.images(torch.tensor([1, 2, 3]), seeds, batch=2)
    tokens = 1 if name == "tiny" else 512 if name == "flux-dev" else 256
    theirs = pipeline_images(
        load_theirs(folders[name]), PROMPTS, seeds, steps, guidance, size, tokens
    )
    assert images.shape == theirs.shape and images.flatten(1).std(1).min() > 0.02
    assert (images[0] - images[1]).abs().mean() > 0.01
    # the same float32 operations in other batches: a hundredth of a pixel level of 1 / 255
    assert (images - theirs).abs().max() < 4e-5


def test_roll_outs_leave_out_only_a_step_that_moves_nothing(folders):
    flow = make_flow(folders["tiny"], steps=4, guidance=1)
    assert flow.times[:3] + flow.times[4:] == flow.train_times and len(flow.times) == 5
    eps, cond = flow.noise([0, 1, 2]), torch.arange(3)
    with torch.no_grad():
        images = [
            flow.decode(fdflow.sample(flow.velocity, eps, cond, times))
            for times in (flow.times, flow.train_times)
        ]
    assert 0 < (images[0] - images[1]).abs().max() < 1 / 255
    assert make_flow(folders["sd-turbo"], steps=4, guidance=1).train_times[-2] > 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_roll_outs_may_take_fewer_steps_than_drawing(folders, name):
    flow = make_flow(folders[name], steps=6, rollout_steps=3, guidance=1)
    six, three = (make_flow(folders[name], steps=steps, guidance=1) for steps in (6, 3))
    assert flow.times == six.times and flow.train_times == three.train_times
    eps, cond = three.noise([0, 1]), torch.arange(2)
    with torch.no_grad():
        x = fdflow.sample(flow.velocity, eps, cond, flow.train_times)
        assert torch.equal(x, fdflow.sample(three.velocity, eps, cond, three.train_times))
    assert torch.equal(flow.images(cond, [0, 1]), six.images(cond, [0, 1]))


def test_schedule_has_the_shift_of_the_pipeline(folders):
    times = make_flow(folders["sd3"], steps=4).times
    # SD3's shift, 3 t / (1 + 2 t), counts twice: the steps are even down to 1 / 1000 shifted, then shifted
    low = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1, (2 + low) / 3, (1 + 2 * low) / 3, low]
    assert times[:-1] == pytest.approx([3 * t / (1 + 2 * t) for t in even], abs=1e-6)
    assert times[-1] == 0 and len(times) == 5


@pytest.mark.parametrize(
    "name, guidance", [*((name, 1) for name in FAMILIES), ("sd3", 4), ("sdxl", 4)]
)
def test_every_image_may_have_its_own_time(folders, name, guidance):
    flow = make_flow(folders[name], steps=3, guidance=guidance)
    x, cond, times = (
        flow.noise([0, 1, 2]),
        torch.tensor([2, 0, 1]),
        torch.tensor(flow.times)[[2, 0, 1]],
    )
    with torch.no_grad():
        v = flow.velocity(x, times, cond)
        alone = [
            flow.velocity(x[i : i + 1], flow.times[k], cond[i : i + 1])
            for i, k in enumerate((2, 0, 1))
        ]
    # the same float32 operations, one image at a time
    torch.testing.assert_close(v, torch.cat(alone), rtol=1e-4, atol=1e-5 * v.abs().max().item())
    assert not torch.allclose(v[1], flow.velocity(x, flow.times[1], cond)[1], rtol=1e-2)


# ---- prompts


@pytest.mark.parametrize("name", ["sd3", "flux-schnell", "sdxl"])
def test_text_encoders_come_one_at_a_time_and_are_gone_before_the_network_moves(
    folders, name, monkeypatch
):
    loaded, moved = {}, []
    module_to = torch.nn.Module.to

    def load(model, dtype, encoder=None):
        assert not [
            kept for parts in loaded.values() for part in parts if (kept := part()) is not None
        ]
        pipe = load_pipeline(model, dtype, encoder)
        parts = {
            key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)
        }
        assert set(parts) == (
            {encoder} if encoder else {flows.FAMILIES[type(pipe).__name__].network_name, "vae"}
        )
        if encoder:
            loaded[encoder] = [weakref.ref(p) for p in parts[encoder].parameters()]
        return pipe

    def to(module, *args, **options):
        encoders = [
            key for key, parts in loaded.items() if any(part() is not None for part in parts)
        ]
        moved.append((type(module).__name__, len(encoders)))
        return module_to(module, *args, **options)

    monkeypatch.setattr(flows, "load_pipeline", load)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    make_flow(folders[name], [f"{word} {i}" for word in PROMPTS for i in range(50)])
    assert len(loaded) == {"sd3": 3, "flux-schnell": 2, "sdxl": 2}[name]
    assert moved[-1][1] == moved[-2][1] == 0  # VAE and network
    assert {count for kind, count in moved if "Model" in kind and "2D" not in kind} == {1}


@pytest.mark.parametrize("guidance", [1, 3])
def test_embeddings_are_kept_once_for_each_distinct_prompt(folders, guidance):
    prompts = [f"{word} {i}" for word in PROMPTS for i in range(40)]
    many = make_flow(folders["sdxl"], prompts * 5, steps=1, guidance=guidance)
    for chunks in many.embeddings:
        assert sum(len(chunk) for chunk in chunks) == len(prompts) + (guidance > 1)
    one = make_flow(folders["sdxl"], [prompts[100]], steps=1, guidance=guidance)
    images = many.images(torch.tensor([100, 4 * len(prompts) + 100]), [7, 7])
    # other prompts in the batch of the encoder
    assert (images - one.images(torch.tensor([0]), [7])).abs().max() < 1e-5


def test_many_embeddings_are_mapped_from_files_and_found_again(folders, tmp_path, monkeypatch):
    def forbid(*args):
        raise AssertionError

    def make(prompts=PROMPTS, cache=tmp_path / "cache", path=folders["sd3"], **options):
        return make_flow(path, prompts, cache, steps=2, guidance=3, **options)

    expected = make().images(torch.arange(3), range(3))
    assert not (tmp_path / "cache").exists()  # so few stay in memory
    monkeypatch.setattr(flows, "IN_MEMORY", 1)
    monkeypatch.setattr(flows, "CHUNK", 2)
    written = make()
    files = sorted((tmp_path / "cache").rglob("*"))[1:]
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert [file.name for file in files] == sorted(
        f"{name}-{i:06}.pt" for name in encoders for i in (0, 2)
    )
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text()
        assert all(str(file) in maps for file in files)
    # encoded two at a time
    assert (written.images(torch.arange(3), range(3)) - expected).abs().max() < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(flows.Flow, "run_encoder", forbid)
        again = make()
        assert torch.equal(
            again.images(torch.arange(3), range(3)), written.images(torch.arange(3), range(3))
        )
        assert not [
            part
            for part in again.pipe.components
            if "encoder" in part and getattr(again.pipe, part)
        ]
        shutil.copytree(folders["sd3"], tmp_path / "other")
        for change in (
            {"prompts": PROMPTS[::-1]},
            {"dtype": "bfloat16"},
            {"path": tmp_path / "other"},
        ):
            with pytest.raises(AssertionError):  # these are not the same embeddings
                make(**change)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged, delete it"):
        make()


def test_embeddings_appear_whole_or_not_at_all_and_other_processes_wait(tmp_path, monkeypatch):
    def fail():
        raise OSError("no space left on device")

    def first_process(seconds):
        monkeypatch.setenv("LOCAL_RANK", "0")
        flows.tensors_in(file, lambda: [torch.ones(2, 3)])
        monkeypatch.setenv("LOCAL_RANK", "1")

    file = tmp_path / "folder" / "text_encoder-000000.pt"
    with pytest.raises(OSError):
        flows.tensors_in(file, fail)
    assert not file.exists()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(flows.time, "sleep", first_process)
    (tensor,) = flows.tensors_in(file, fail)
    assert torch.equal(tensor, torch.ones(2, 3)) and os.listdir(file.parent) == [file.name]


# ---- LoRA files


def random_lora(flow, which="attention", seed=0):
    """A LoRA that changes the images."""
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA(
        flow.network, layers_named(flow.network, which), rank=4, alpha=8, generator=generator
    )
    for layer in lora.layers.values():
        layer.B.data = 0.2 * torch.randn(layer.B.shape, generator=generator)
    return lora


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_lora_loads_in_diffusers(folders, name, tmp_path):
    cond, seeds, pipe = torch.tensor([0, 1]), [0, 1], load_theirs(folders[name])
    base = make_flow(folders[name], steps=4, guidance=1).images(cond, seeds)
    for which in ("attention", "all", "modulation"):
        flow = make_flow(folders[name], steps=4, guidance=1)
        lora = random_lora(flow, which)
        changed = flow.images(cond, seeds)
        assert (changed - base).abs().mean() > 0.003
        with lora.switched_off():
            assert torch.equal(flow.images(cond, seeds), base)
        save_lora(lora, tmp_path / "lora.safetensors", flow.network_name)
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        theirs = pipeline_images(
            pipe, PROMPTS[:2], seeds, 4, 1.0, tokens=1 if name == "tiny" else 256
        )
        pipe.unload_lora_weights()
        # float32, but W x + B A x is summed in another order
        assert (theirs - changed).abs().max() < 1e-4
        again = make_flow(folders[name], steps=4, guidance=1)
        load_lora(again, tmp_path)
        assert (again.images(cond, seeds) - changed).abs().max() < 1e-4


def test_layers_are_those_named(folders):
    networks = {
        name: make_flow(folders[name]).network for name in ("sd3", "flux-schnell", "sd-turbo")
    }

    def names(family, which):
        return layers_named(networks[family], which)

    ends = {name.split("attn.")[1] for name in names("sd3", "attention") if "attn." in name}
    assert ends == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    }
    last = names("sd3", "last")
    assert len(last) == 8 and last[-2:] == [
        f"transformer_blocks.2.attn.{end}" for end in ("to_v", "to_out.0")
    ]
    modulation = [
        f"transformer_blocks.{i}.{part}.linear"
        for i in range(3)
        for part in ("norm1", "norm1_context")
    ]
    assert names("sd3", "modulation") == modulation
    assert set(names("sd3", "attention") + modulation) < set(names("sd3", "all"))
    assert {name.split(".")[0] for name in names("flux-schnell", "all")} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    unet = names("sd-turbo", "modulation")
    assert len(unet) == 8 and all(name.endswith("time_emb_proj") for name in unet)
    assert names("sd-turbo", "to_q,ff.net.2") == [
        name for name in names("sd-turbo", "all") if name.endswith(("to_q", "ff.net.2"))
    ]
    for which, absent in (("to_q,to_x", "'?to_x'?$"), ("", ""), ("norm1", "norm1")):
        with pytest.raises(UserError, match=f"^--layers: this model has no linear layer {absent}"):
            names("sd3", which)


PEFT = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True},
    "convolutions": {"target_modules": ["to_q", "pos_embed.proj"]},
    "dropout": {"lora_dropout": 0.5},
    "patterns": {
        "rank_pattern": {"blocks.1.attn.to_q": 2, "to_out.0": 5},
        "alpha_pattern": {"to_q": 1, r"transformer_blocks\.[2-4]\.attn\.to_out\.0": 11},
    },
}


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # biases, says peft as it saves
@pytest.mark.parametrize("kind", PEFT)
def test_lora_of_peft_loads_here(folders, kind, tmp_path):
    torch.manual_seed(0)
    pipe = load_theirs(folders["tiny"])
    options = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["to_q", "to_out.0"],
        "init_lora_weights": False,
    }
    base = pipeline_images(pipe, ["robot"], [3], 4, 1.0, tokens=1)
    pipe.transformer.add_adapter(peft.LoraConfig(**options | PEFT[kind]))
    pipe.transformer.eval()  # without dropout
    expected = pipeline_images(pipe, ["robot"], [3], 4, 1.0, tokens=1)
    assert (expected - base).abs().max() > 0.05
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": pipe.transformer})
    pipe.save_lora_weights(tmp_path, layers, **metadata)
    flow = make_flow(folders["tiny"], ["robot"])
    load_lora(flow, tmp_path)
    assert (flow.images(torch.tensor([0]), [3]) - expected).abs().max() < 1e-4


LAYOUTS = {  # a model, and how another program names the layers and matrices of its LoRA
    "kohya, SD": ("sd-turbo", "lora_unet_", "lora_down", "lora_up", "_"),
    "kohya, SDXL": ("sdxl", "lora_unet_", "lora_down", "lora_up", "_"),
    "diffusers, SD": ("sd-turbo", "unet.", "lora_A", "lora_B", "."),
    "diffusers, Flux": ("flux-schnell", "transformer.", "lora_A", "lora_B", "."),
    "half kohya, Flux": ("flux-schnell", "transformer.", "lora_down", "lora_up", "."),
}


@pytest.mark.parametrize("with_alphas", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_other_programs_load_with_their_alphas(folders, layout, with_alphas, tmp_path):
    name, start, A, B, dot = LAYOUTS[layout]
    ours, theirs = (make_flow(folders[name], steps=2, guidance=1) for _ in range(2))
    tensors, rank = {}, 4
    for i, (key, layer) in enumerate(random_lora(ours).layers.items()):
        key = start + key.replace(".", dot)
        tensors |= {f"{key}.{A}.weight": layer.A.detach(), f"{key}.{B}.weight": layer.B.detach()}
        alpha = [rank, 1.0, 2.0][i % 3] if with_alphas else rank
        if alpha != rank:  # which is the alpha of a layer that has none in the file
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        layer.scale = alpha / rank
    save_file(tensors, tmp_path / "lora.safetensors")
    load_lora(theirs, tmp_path)
    # the same float32 operations in another order
    cond = torch.arange(3)
    assert (ours.images(cond, [1, 2, 3]) - theirs.images(cond, [1, 2, 3])).abs().max() < 1e-4


def test_a_fused_layer_is_split(folders, tmp_path):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) / 4 for shape in ((4, 32), (96, 4)))
    ours, theirs = (make_flow(folders["flux-schnell"], steps=2, guidance=1) for _ in range(2))
    start = "transformer_blocks.0.attn.to_"
    lora = LoRA(ours.network, [start + end for end in "qkv"], rank=4)
    for end, part in zip("qkv", B.split(32)):
        layer = lora.layers[start + end]
        layer.A.data, layer.B.data = A, part
    names = (f"double_blocks.0.processor.qkv_lora1.{matrix}.weight" for matrix in ("down", "up"))
    save_file(dict(zip(names, (A, B))), tmp_path / "lora.safetensors")
    load_lora(theirs, tmp_path)
    cond = torch.arange(3)
    assert (ours.images(cond, [1, 2, 3]) - theirs.images(cond, [1, 2, 3])).abs().max() < 1e-4


Q, FITS_NOT = "transformer.transformer_blocks.0.attn.to_q", "left over or missing"
BAD_LORAS = [  # what is said, and what is added or taken away
    (FITS_NOT, {f"{Q}.lora_magnitude_vector": torch.ones(128)}),  # of one layer alone
    (FITS_NOT, {f"{Q}.dora_scale": torch.ones(128)}),
    (FITS_NOT, {f"{Q}.lora_B.bias": torch.ones(128)}),
    (FITS_NOT, {f"{Q}.diff_b.lora": torch.ones(128)}),
    ("adapts a text encoder", {"text_encoder.q_proj.lora_A.weight": torch.ones(4, 96)}),
    ("adapts a text encoder", {"lora_te1_q_proj.lora_down.weight": torch.ones(4, 96)}),
    (FITS_NOT, {"lora_unet_blocks_0_attn_to_q.lora_down.weight": torch.ones(4, 128)}),
    (FITS_NOT, {"other.lora_A.weight": torch.ones(4, 4), "other.lora_B.weight": torch.ones(4, 4)}),
    (FITS_NOT, {"transformer.pos_embed.proj.lora_A.weight": torch.ones(4, 16, 1, 1)}),
    ("", {"transformer.x_embedder.weight": torch.ones(4)}),
    (FITS_NOT, {f"transformer.block.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}),
    ("", {f"{Q}.lora_A.weight": torch.ones(4, 127)}),
    ("", {f"{Q}.lora_B.weight": torch.ones(128, 3)}),
    ("", {f"{Q}.lora_B.weight": torch.ones(128)}),
    ("", {f"{Q}.lora_B.weight": torch.ones(128, 0)}),
    ("", {f"{Q}.lora_A.weight": torch.ones(0, 128)}),
    (FITS_NOT, {f"{Q}.lora_B.weight": None}),
    (FITS_NOT, {f"{Q}.lora_A.weight": None}),
    ("damaged: .* not finite", {f"{Q}.lora_A.weight": torch.full((4, 128), float("nan"))}),
    ("damaged: .* not finite", {f"{Q}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}),
    ("damaged: .* not finite", {f"{Q}.alpha": torch.tensor(float("inf"))}),
    ("", {f"{Q}.alpha": torch.ones(2)}),
]
BAD_CONFIGURATIONS = [
    ("alpha that is not finite", {"lora_alpha": float("inf")}),
    ("alpha that is not finite", {"alpha_pattern": {"to_q": float("inf")}}),
    (FITS_NOT, {"use_dora": True}),
    (FITS_NOT, {"lora_bias": True}),
    ("", {"init_lora_weights": "pissa_niter_4"}),  # which would change the base model
    ("", {"lora_alpha": None}),
    ("", {"lora_alpha": "big"}),
    ("", {"alpha_pattern": [1]}),
    ("", {"alpha_pattern": {"(": 1}}),
    ("", {"r": 5}),
]


def test_lora_files_that_cannot_be_applied_in_full_are_refused_in_one_line(
    folders, tmp_path, capfd
):
    flow, path = make_flow(folders["tiny"]), tmp_path / "lora.safetensors"
    lora = random_lora(make_flow(folders["tiny"]))
    save_lora(lora, path, "transformer")
    good, data = load_file(path), path.read_bytes()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(lora.layers)).to_dict()

    def complaint():
        with pytest.raises(UserError) as error:
            load_lora(flow, path)
        flow.pipe.unload_lora_weights()
        assert "\n" not in str(error.value) and f"{path} is no LoRA for this model: " in str(
            error.value
        )
        return str(error.value)

    def configure(change):
        text = {f"transformer.{key}": value for key, value in (config | change).items()}
        save_file(good, path, {"lora_adapter_metadata": json.dumps(text, default=list)})

    for said, change in BAD_LORAS:
        tensors = good | change
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
        assert re.search(said, complaint()), change
    save_file({}, path)
    assert FITS_NOT in complaint()
    for said, change in BAD_CONFIGURATIONS:
        configure(change)
        assert said in complaint(), change
    for text in ("{", "1", '["a"]', "[" * 10**5, "{}", '{"transformer.lora_alpha": 4}'):
        save_file(good, path, {"lora_adapter_metadata": text})
        complaint()
    for damaged in (
        b"",
        data[:100],
        data[:-1],
        b"PK\x03\x04",
        b"\xff" * 100,
        data[:8] + b"\xe9" + data[9:],
    ):
        path.write_bytes(damaged)
        complaint()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    assert "its checksum is wrong" in complaint()
    for absent in (tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="no LoRA at"):
            load_lora(flow, absent)
    configure({})
    load_lora(flow, path)  # it was not the rest of the configuration
    assert capfd.readouterr() == ("", "")


def test_lora_of_another_model_is_a_mistake_of_one_line(folders, tmp_path):
    flow = make_flow(folders["sd-turbo"])
    save_lora(random_lora(flow), tmp_path / "lora.safetensors", flow.network_name)
    for name in ("sdxl", "sd3"):
        with pytest.raises(UserError, match="lora.safetensors is no LoRA for this model"):
            load_lora(make_flow(folders[name]), tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_has_the_device_and_type_of_its_network(
    folders, name, device, tmp_path, without_onednn
):
    flow, images = make_flow(folders[name], steps=2, guidance=1), []
    lora = random_lora(flow)
    save_lora(lora, tmp_path / "lora.safetensors", flow.network_name)
    images.append(flow.images(torch.arange(2), [0, 1]))
    with fake_gpu() if device == "cuda" else nullcontext():
        flow = make_flow(folders[name], steps=2, guidance=1, dtype="bfloat16", device=device)
        load_lora(flow, tmp_path)
        matrices = [p for key, p in flow.network.named_parameters() if "lora" in key]
        assert len(matrices) == len(lora.parameters)
        assert {(p.device.type, p.dtype, p.requires_grad) for p in matrices} == {
            (device, torch.bfloat16, False)
        }
        images.append(flow.images(torch.arange(2), [0, 1]))
    assert (images[0] - images[1]).abs().mean() < 0.01  # as without a LoRA


# ---- training


ESTIMATORS = {
    "fdfo": lambda *args: fdfo(*args, churn=0.1, train_steps=2, kl=0.1),
    "spsa": lambda *args: spsa(*args, directions=2),
    "central": lambda *args: central_difference(*args, coordinates=2),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_the_lora_and_nothing_else(folders, name, estimator):
    flow = make_flow(folders[name], steps=3, guidance=1)
    layers = layers_named(flow.network, "attention" if estimator == "fdfo" else "last")
    lora = LoRA(flow.network, layers, rank=2, generator=torch.Generator().manual_seed(0))
    parts = {"network": flow.network, "vae": flow.vae}
    before = {part: {k: v.clone() for k, v in m.state_dict().items()} for part, m in parts.items()}
    problem = Problem(
        flow.velocity, lambda x, cond: flow.decode(x).mean((1, 2, 3)), lora, flow.times, batch=4
    )
    optimizer = torch.optim.AdamW(lora.parameters, 1e-3)
    for seed in range(2):  # at the start A has no gradient, since B is zero
        optimizer.zero_grad()
        eps = flow.noise(range(4 * seed, 4 * seed + 4))
        ESTIMATORS[estimator](
            problem, eps, torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(seed)
        )
        assert all(p.grad.isfinite().all() for p in lora.parameters)
        optimizer.step()
    changed = {
        f"{part}.{k}"
        for part, m in parts.items()
        for k, v in m.state_dict().items()
        if not torch.equal(v, before[part][k])
    }
    layers = {f"network.{name}" for name in lora.layers}
    assert changed <= {f"{layer}.{matrix}" for layer in layers for matrix in "AB"}
    # every layer, though central differences take two coordinates: weight decay moves the others a little
    assert {key[:-2] for key in changed} == layers


def test_a_pair_costs_its_steps_and_no_more(folders):
    flow, calls = make_flow(folders["sd3"], [*PROMPTS, *PROMPTS], steps=5), {}

    def count_images(network, args, output):
        calls[torch.is_grad_enabled()] = calls.get(torch.is_grad_enabled(), 0) + len(args[0])

    lora, velocity = random_lora(flow), Counted(flow.velocity)
    flow.network.register_forward_hook(count_images)
    problem = Problem(velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=8)
    pairs, cond = 6, torch.arange(6)
    for options, forward, backward in [
        ({}, 2 * 5, 1),
        ({"branches": 4, "train_steps": 3, "kl": 1}, 4 * 5 + 3, 3),
    ]:
        calls.clear()
        fdfo(problem, flow.noise(range(pairs)), cond, torch.Generator().manual_seed(0), **options)
        assert calls == {False: forward * pairs, True: backward * pairs}
        assert (
            velocity.pop_count() == (forward + 3 * backward) * pairs and velocity.pop_count() == 0
        )


@pytest.fixture
def without_onednn():
    """Its kernels for half precision take seconds to get ready."""
    before = torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(*before)


@pytest.mark.parametrize(
    "dtype, tolerance, aligned", [("bfloat16", 0.01, 0.99), ("float16", 0.001, 0.9999)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_float32_but_for_rounding(
    folders, name, dtype, tolerance, aligned, without_onednn
):
    cond, images, grads, by_image = torch.tensor([0, 1]), [], [], []
    for kind in ("float32", dtype):
        guidance = 1 if name == "flux-schnell" else 2
        flow = make_flow(folders[name], steps=2, guidance=guidance, dtype=kind)
        assert {p.dtype for p in flow.network.parameters()} == {getattr(torch, kind)}
        lora = random_lora(flow)
        images.append(flow.images(cond, [0, 1]))
        x, target = flow.noise([0, 1]), flow.noise([2, 3])
        times = torch.tensor(flow.times)[:2]
        flow.scale_gradients(lora)
        x.requires_grad_()
        (1e-2 * (flow.velocity(x, times, cond) - target).square().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
        by_image.append(x.grad.flatten())
        assert images[-1].dtype == grads[-1].dtype == torch.float32 and grads[-1].norm() > 0
    # 8 or 11 bits, through a random network and two steps: hundredths or thousandths of the range
    assert (images[0] - images[1]).abs().mean() < tolerance
    for pair in (grads, by_image):  # the same direction and size
        assert torch.cosine_similarity(*pair, dim=0) > aligned
        assert (pair[1].norm() / pair[0].norm()).item() == pytest.approx(1, abs=0.05)


def test_the_vae_computes_in_float32_where_float16_is_too_small_for_it(folders, tmp_path):
    assert make_flow(folders["sd3"], dtype="bfloat16").vae.dtype == torch.bfloat16
    assert make_flow(folders["sd3"], dtype="float16").vae.dtype == torch.float32
    shutil.copytree(folders["sd3"], tmp_path / "sd3")
    config = json.loads((tmp_path / "sd3" / "vae" / "config.json").read_text())
    (tmp_path / "sd3" / "vae" / "config.json").write_text(
        json.dumps(config | {"force_upcast": False})
    )
    assert make_flow(tmp_path / "sd3", dtype="float16").vae.dtype == torch.float16


def test_cards_without_bfloat16_compute_in_float16(monkeypatch):
    def default(native):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native
        )
        names = ["steps", "size", "guidance", "dtype", "batch", "model"]
        args = argparse.Namespace(device="cuda:1", **dict.fromkeys(names))
        fill_defaults(args)
        return args.dtype

    assert default(native=True) == "bfloat16" and default(native=False) == "float16"


@pytest.mark.parametrize("name", ["sd3", "sd-turbo"])
def test_convolutions_have_channels_last_on_a_gpu_alone(folders, name):
    def layouts(flow):
        last = {"memory_format": torch.channels_last}
        modules = {"vae": flow.vae, "network": flow.network}
        kernels = {part: [p for p in m.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
                   for part, m in modules.items()}  # fmt: skip
        return {part: {p.is_contiguous(**last) for p in ps} for part, ps in kernels.items()}

    assert layouts(make_flow(folders[name])) == {"vae": {False}, "network": {False}}
    with fake_gpu():
        flow = make_flow(folders[name], device="cuda")
        assert layouts(flow) == {"vae": {True}, "network": {name == "sd-turbo"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradient(folders, name):
    grads = []
    for checkpointing in (False, True):
        flow = make_flow(folders[name], steps=2, guidance=1, size="64", checkpointing=checkpointing)
        assert flow.network.is_gradient_checkpointing == checkpointing
        lora = random_lora(flow)
        problem = Problem(
            flow.velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=4
        )
        fdfo(problem, flow.noise([0, 1]), torch.tensor([0, 1]), torch.Generator().manual_seed(0))
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


class Interrupted(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())

    @staticmethod
    def backward(ctx, grad):
        raise KeyboardInterrupt


def test_an_interrupt_of_a_compilation_shows_no_traceback(folders, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    make_flow(folders["sd3"], steps=2, guidance=1, compile=True)  # its compilation traces like this
    with warnings.catch_warnings(record=True) as said:
        with torch.autograd.detect_anomaly(check_nan=False), pytest.raises(KeyboardInterrupt):
            Interrupted.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert not [warning for warning in said if "Traceback" in str(warning.message)]


@pytest.mark.parametrize(
    "name", ["sd3", pytest.param("flux-schnell", marks=pytest.mark.ci), "sd-turbo"]
)
def test_compiled_blocks_are_whole_graphs_with_the_same_velocities(folders, name, monkeypatch):
    compiled, module_compile = [], torch.nn.Module.compile

    def trace(
        module,
    ):  # without generating code, which takes minutes; a break in the graph is an error
        compiled.append(module)
        module_compile(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    grads, vs = [], []
    for compile in (False, True):
        flow = make_flow(folders[name], steps=2, guidance=1, compile=compile)
        lora, x, cond = random_lora(flow), flow.noise([0, 1]), torch.tensor([0, 1])
        with torch.no_grad(), lora.switched_off():
            base = flow.velocity(x, flow.times[0], cond)
        with torch.no_grad():
            vs += [base, flow.velocity(x, flow.times[0], cond)]
        flow.velocity(x, torch.tensor(flow.times)[:2], cond).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
    assert len(compiled) >= 3 and {type(module).__name__ for module in compiled} <= set(flow.blocks)
    torch.testing.assert_close(vs[:2], vs[2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_train_and_sample_run_from_the_command_line(folders, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = ["--size", "64x96", "--steps", "2", "--guidance", "1", "--batch", "4"]
    command = [
        "train.py",
        "--model",
        str(folders[name]),
        *small,
        "--reward",
        "brightness",
        "--name",
        "run",
    ]
    command += ["--prompts", "prompts.txt", "--pairs", "4", "--iterations", "1", "--lr", "0.01"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    assert "held-out brightness" in capsys.readouterr().out
    last = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 8 and last["drift"] > 0
    # the run folder says which model and size
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", "--prompt", "robot", "--lora", "runs/run", "--compare", "--n", "1"],
    )
    sample.main()
    assert (tmp_path / "sample.png").stat().st_size > 1000


# ---- models that cannot be loaded


def test_models_that_cannot_be_loaded_say_why(folders, tmp_path):
    def complaint(path):
        with pytest.raises(UserError) as error:
            make_flow(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "none of tiny, sd3" in complaint("nowhere")
    assert "cannot reach model stabilityai/stable-diffusion-3.5-medium" in complaint("sd3.5")
    (tmp_path / "empty").mkdir()
    assert "no file named model_index.json" in complaint(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    assert "is a KandinskyPipeline; known are StableDiffusion3Pipeline" in complaint(
        tmp_path / "other"
    )
    shutil.copytree(folders["sd-turbo"], tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"1234")
    assert "is damaged or incomplete" in complaint(tmp_path / "broken")
    with pytest.raises(UserError, match="made to run without"):
        make_flow(folders["flux-schnell"], guidance=3.5)
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        make_flow(folders["sd3"], size="72")


def test_index_and_folder_of_a_model_may_hold_anything(folders, tmp_path):
    def complaint():
        with pytest.raises(UserError) as error:
            make_flow(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        return str(error.value)

    index = tmp_path / "model_index.json"
    for data in (
        b"[]",
        b"null",
        b"1",
        b"{",
        b"",
        b'{"_class_name": ["a"]}',
        b'{"a": "\xe9"}',
        b"{}",
    ):
        index.write_bytes(data)
        assert "known are" in complaint() or "is damaged" in complaint()
    index.write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": 1, "text_encoder": ["x", "Y"]}'
    )
    assert "is damaged or incomplete" in complaint()
    shutil.copytree(folders["flux-dev"], tmp_path, dirs_exist_ok=True)
    for data in (b"[]", b"null", b"\xe9"):
        (tmp_path / "transformer" / "config.json").write_bytes(data)
        assert "is damaged or incomplete" in complaint()


def test_a_folder_gets_the_defaults_of_its_like(folders):
    likes = {
        "sd3": "sd3",
        "sd2.1": "sd1.5",
        "sdxl": "sdxl",
        "flux-dev": "flux-dev",
        "flux-schnell": "flux-schnell",
    }
    for folder, like in likes.items():
        assert vars(find_model(str(folders[folder]))) == vars(MODELS[like]) | {
            "path": str(folders[folder]),
            "variant": None,
        }


def test_half_size_files_are_downloaded_where_there_are_some(folders, tmp_path, monkeypatch):
    asked = []
    index = json.loads((folders["sdxl"] / "model_index.json").read_text())
    for name in ("load_config", "from_pretrained"):
        returned = index if name == "load_config" else None

        def method(path, returned=returned, **options):
            asked.append(options.get("variant"))
            return returned

        monkeypatch.setattr(diffusers.DiffusionPipeline, name, method)
    for name, variant in {
        "sd-turbo": "fp16",
        "sdxl-turbo": "fp16",
        "sdxl": "fp16",
        "someone/sdxl": None,
    }.items():
        load_pipeline(find_model(name), torch.float16)
        assert asked[-1] == variant


def test_a_folder_of_half_size_files_loads(folders, tmp_path):
    """And one with both kinds loads those of full size."""
    images = {}
    pipe = load_theirs(folders["sdxl"])
    for kind in ("half", "both", "full"):
        if kind != "full":
            pipe.to(torch.float16).save_pretrained(tmp_path / kind, variant="fp16")
        if kind == "both":
            shutil.copytree(folders["sdxl"], tmp_path / kind, dirs_exist_ok=True)
        folder = folders["sdxl"] if kind == "full" else tmp_path / kind
        images[kind] = make_flow(folder, steps=2).images(torch.tensor([0]), [0])
    assert len(list((tmp_path / "half").glob("*/*.safetensors"))) == 4
    assert len(list((tmp_path / "both").glob("*/*.safetensors"))) == 8
    assert torch.equal(images["both"], images["full"])
    assert (
        0 < (images["half"] - images["full"]).abs().mean() < 0.002
    )  # the weights are rounded to 11 bits


def test_gated_models_say_what_to_do(monkeypatch):
    def refuse(*args, **options):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", refuse)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", refuse)
    for load in (lambda: make_flow("flux-dev"), lambda: Reward("clip", tiny=None)):
        with pytest.raises(
            UserError, match="gated: accept its licence on the hub, then run `hf auth"
        ):
            load()


def test_every_model_has_a_family():
    for model in MODELS.values():
        assert 1 <= model.train_steps <= model.steps and size(model.size)
