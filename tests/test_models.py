"""Tests: every family of models against its diffusers pipeline, on small random models of the same classes.

pytest -q test_flows.py
"""

import argparse
import json
import shutil
import sys
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError

import errors
import fdflow
import sample
import train
from adapters import attention_layers, load_lora, save_lora
from evaluation import Counted
from fdflow import LoRA, Problem, central_difference, fdfo, random_seeds, spsa
from flows import load_flow
from models import MODELS, TINY
from rewards import Reward
from sample import fill_defaults

torch.set_num_threads(2)
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
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        transformers.CLIPTextModel(config), tokenizer, encoder_2, tokenizer_2, transformer,
    )  # fmt: skip


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


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
    "sd2.1": lambda: sd(diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)),
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


def make_flow(path, prompts=PROMPTS, **options):
    """The flow that the command line would make with these options."""
    names = ["steps", "size", "guidance", "device", "dtype", "batch", "compile", "checkpointing"]
    args = argparse.Namespace(model=str(path), **dict.fromkeys(names) | options)
    return load_flow(fill_defaults(args), args, prompts)


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
    tokens = 1 if name == "tiny" else 512 if name.startswith("flux") else 256
    theirs = pipeline_images(load_theirs(folders[name]), PROMPTS, seeds, steps, guidance, size, tokens)
    assert images.shape == theirs.shape and images.flatten(1).std(1).min() > 0.02
    assert (images[0] - images[1]).abs().mean() > 0.01
    # the same float32 operations in other batches: a hundredth of a pixel level of 1 / 255
    assert (images - theirs).abs().max() < 4e-5


def test_roll_outs_leave_out_only_a_step_that_moves_nothing(folders):
    flow = make_flow(folders["tiny"], steps=4, guidance=1, size="64")
    assert flow.times[:3] + flow.times[4:] == flow.train_times and len(flow.times) == 5
    eps, cond = flow.noise([0, 1, 2]), torch.arange(3)
    with torch.no_grad():
        images = [
            flow.decode(fdflow.sample(flow.velocity, eps, cond, times))
            for times in (flow.times, flow.train_times)
        ]
    assert 0 < (images[0] - images[1]).abs().max() < 1 / 255
    assert make_flow(folders["sd-turbo"], steps=4, guidance=1, size="64").train_times[-2] > 0.2


def test_schedule_has_the_shift_of_the_pipeline(folders):
    times = make_flow(folders["sd3"], steps=4, size="64").times
    # SD3's shift, 3 t / (1 + 2 t), counts twice: the steps are even down to 1 / 1000 shifted, then shifted
    low = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1, (2 + low) / 3, (1 + 2 * low) / 3, low]
    assert times[:-1] == pytest.approx([3 * t / (1 + 2 * t) for t in even], abs=1e-6)
    assert times[-1] == 0 and len(times) == 5


# ---- LoRA files


def random_lora(flow, seed=0):
    """A LoRA on all attention layers that changes the images."""
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA(flow.network, attention_layers(flow.network), rank=4, alpha=8, generator=generator)
    for layer in lora.layers.values():
        layer.B.data = 0.2 * torch.randn(layer.B.shape, generator=generator)
    return lora


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_lora_loads_in_diffusers(folders, name, tmp_path):
    cond, seeds, tokens = torch.tensor([0, 1]), [0, 1], 512 if name.startswith("flux") else 256
    options = {"steps": 4, "guidance": 1, "size": "64"}
    flow = make_flow(folders[name], **options)
    base = flow.images(cond, seeds)
    lora = random_lora(flow)
    changed = flow.images(cond, seeds)
    assert (changed - base).abs().mean() > 0.003
    with lora.switched_off():
        assert torch.equal(flow.images(cond, seeds), base)
    save_lora(lora, tmp_path / "lora.safetensors", flow.part)
    pipe = load_theirs(folders[name])
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = pipeline_images(pipe, PROMPTS[:2], seeds, 4, 1.0, "64", 1 if name == "tiny" else tokens)
    # float32, but W x + B A x is summed in another order
    assert (theirs - changed).abs().max() < 1e-4
    again = make_flow(folders[name], **options)
    load_lora(again, tmp_path)
    assert (again.images(cond, seeds) - changed).abs().max() < 1e-4


def test_lora_of_peft_loads_here(folders, tmp_path):
    pipe = load_theirs(folders["tiny"])
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    expected = pipeline_images(pipe, ["robot"], [3], 4, 1.0, tokens=1)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": pipe.transformer})
    pipe.save_lora_weights(tmp_path, layers, **metadata)
    flow = make_flow(folders["tiny"], ["robot"])
    load_lora(flow, tmp_path)
    assert (flow.images(torch.tensor([0]), [3]) - expected).abs().max() < 1e-4


def test_lora_of_another_model_is_a_mistake_of_one_line(folders, tmp_path):
    flow = make_flow(folders["sd-turbo"], size="64")
    save_lora(random_lora(flow), tmp_path / "lora.safetensors", flow.part)
    for name in ("sdxl", "sd3"):
        with pytest.raises(errors.UserError, match="does not fit this model"):
            load_lora(make_flow(folders[name], size="64"), tmp_path)


# ---- training


ESTIMATORS = {
    "fdfo": lambda *args: fdfo(*args, churn=0.1, train_steps=2, kl=0.1),
    "spsa": lambda *args: spsa(*args, directions=2),
    "central": lambda *args: central_difference(*args, coordinates=2),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_the_lora_and_nothing_else(folders, name, estimator):
    flow = make_flow(folders[name], steps=3, guidance=1, size="64")
    few = attention_layers(flow.network, few=estimator != "fdfo")
    lora = LoRA(flow.network, few, rank=2, generator=torch.Generator().manual_seed(0))
    parts = {"network": flow.network, "vae": flow.vae}
    before = {part: {k: v.clone() for k, v in m.state_dict().items()} for part, m in parts.items()}
    problem = Problem(
        flow.velocity, lambda x, cond: flow.decode(x).mean((1, 2, 3)), lora, flow.times, batch=4
    )
    optimizer = torch.optim.AdamW(lora.parameters, 1e-3)
    for seed in range(2):  # at the start A has no gradient, since B is zero
        optimizer.zero_grad()
        eps = flow.noise(random_seeds(4, torch.Generator().manual_seed(seed)))
        ESTIMATORS[estimator](problem, eps, torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(seed))
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


def test_a_pair_costs_its_steps_and_no_more(folders, monkeypatch):
    encoded, calls = [], {True: 0, False: 0}
    encode = diffusers.StableDiffusion3Pipeline.encode_prompt

    def count_prompts(self, prompts, *args, **options):
        encoded.extend(prompts)
        return encode(self, prompts, *args, **options)

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "encode_prompt", count_prompts)
    flow = make_flow(folders["sd3"], [*PROMPTS, *PROMPTS], steps=5, size="64")
    assert encoded == PROMPTS
    assert not [name for name, part in flow.pipe.components.items() if "encoder" in name and part is not None]

    def count_images(network, args, output):
        calls[torch.is_grad_enabled()] += len(args[0])

    lora = random_lora(flow)
    flow.network.register_forward_hook(count_images)
    problem = Problem(flow.velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=8)
    pairs, cond = 6, torch.arange(6)
    fdfo(problem, flow.noise(range(pairs)), cond, torch.Generator().manual_seed(0), train_steps=2)
    assert calls[False] == 2 * 5 * pairs
    # two points in time may fall into one step, which then is trained once
    assert pairs <= calls[True] <= 2 * pairs
    calls[False] = calls[True] = 0
    fdfo(problem, flow.noise(range(pairs)), cond, torch.Generator().manual_seed(0), branches=4)
    assert calls == {False: 4 * 5 * pairs, True: 5 * pairs}
    calls[False] = calls[True] = 0
    velocity = Counted(flow.velocity)
    problem.velocity = velocity
    fdfo(problem, flow.noise(range(pairs)), cond, torch.Generator().manual_seed(0), train_branches=2)
    assert calls == {False: 2 * 5 * pairs, True: 2 * 5 * pairs}
    assert velocity.take() == calls[False] + 3 * calls[True] and velocity.take() == 0


@pytest.fixture
def without_onednn():
    """Its bfloat16 kernels take seconds to get ready."""
    before = torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(*before)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_float32_but_for_rounding(folders, name, without_onednn):
    cond, images, grads = torch.tensor([0, 1]), [], []
    for dtype in ("float32", "bfloat16"):
        guidance = 1 if name == "flux-schnell" else 2
        flow = make_flow(folders[name], steps=2, guidance=guidance, size="64", dtype=dtype)
        assert {p.dtype for p in flow.network.parameters()} == {getattr(torch, dtype)}
        lora = random_lora(flow)
        images.append(flow.images(cond, [0, 1]))
        problem = Problem(flow.velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=4)
        fdfo(problem, flow.noise([0, 1]), cond, torch.Generator().manual_seed(0), churn=0.5)
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
        assert images[-1].dtype == grads[-1].dtype == torch.float32
    # 8 bits, through a random network and two steps: hundredths of the range; and the same direction
    assert (images[0] - images[1]).abs().mean() < 0.02
    assert torch.cosine_similarity(*grads, dim=0) > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradient(folders, name):
    grads = []
    for checkpointing in (False, True):
        flow = make_flow(folders[name], steps=2, guidance=1, size="64", checkpointing=checkpointing)
        assert flow.network.is_gradient_checkpointing == checkpointing
        lora = random_lora(flow)
        problem = Problem(flow.velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=4)
        fdfo(problem, flow.noise([0, 1]), torch.tensor([0, 1]), torch.Generator().manual_seed(0))
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("name", ["sd3", "flux-schnell", "sd-turbo"])
def test_compiled_blocks_are_whole_graphs_with_the_same_images(folders, name, monkeypatch):
    compiled, module_compile = [], torch.nn.Module.compile

    def trace(module):  # without generating code, which takes minutes; a break in the graph is an error
        compiled.append(module)
        module_compile(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    grads, images = [], []
    for compile in (False, True):
        flow = make_flow(folders[name], steps=2, guidance=1, size="64", compile=compile)
        lora, cond = random_lora(flow), torch.tensor([0, 1])
        problem = Problem(flow.velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=4)
        fdfo(problem, flow.noise([0, 1]), cond, torch.Generator().manual_seed(0), kl=0.1)
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters]))
        images.append(flow.images(cond, [0, 1]))
    assert len(compiled) >= 3 and {type(module).__name__ for module in compiled} <= set(flow.blocks)
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_train_and_sample_run_from_the_command_line(folders, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = ["--size", "64x96", "--steps", "2", "--guidance", "1", "--batch", "4"]
    command = ["train.py", "--model", str(folders[name]), *small, "--reward", "brightness", "--name", "run"]
    command += ["--prompts", "prompts.txt", "--pairs", "4", "--iterations", "1", "--lr", "0.01"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train, "catch_interrupt", list)  # or Ctrl-C would no longer stop pytest
    train.main()
    assert "held-out brightness" in capsys.readouterr().out
    last = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 8 and last["drift"] > 0 and last["memory_mb"] > 0
    # the run folder says which model and size
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--prompt", "robot", "--lora", "runs/run", "--compare", "--n", "1"]
    )
    sample.main()
    assert (tmp_path / "sample.png").stat().st_size > 1000


# ---- models that cannot be loaded


def test_models_that_cannot_be_loaded_say_why(folders, tmp_path):
    def complaint(path):
        with pytest.raises(errors.UserError) as error:
            make_flow(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "none of tiny, sd3" in complaint("nowhere")
    assert "cannot reach model stabilityai/stable-diffusion-3.5-medium" in complaint("sd3.5")
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in complaint(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    assert "is a KandinskyPipeline; known are StableDiffusion3Pipeline" in complaint(tmp_path / "other")
    shutil.copytree(folders["sd-turbo"], tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"1234")
    assert "is damaged or incomplete" in complaint(tmp_path / "broken")
    with pytest.raises(errors.UserError, match="made to run without"):
        make_flow(folders["flux-schnell"], guidance=3.5, size="64")
    with pytest.raises(errors.UserError, match="multiples of 16 pixels"):
        make_flow(folders["sd3"], size="72")


def test_gated_models_say_what_to_do(monkeypatch):
    def refuse(*args, **options):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", refuse)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", refuse)
    for load in (lambda: make_flow("flux-dev"), lambda: Reward("clip", tiny=None)):
        with pytest.raises(errors.UserError, match="gated: accept its licence on the hub, then run `hf auth"):
            load()


def test_every_model_has_a_family():
    for model in MODELS.values():
        assert model.train_steps is None or model.train_steps < model.steps
        assert sample.size(model.size)
