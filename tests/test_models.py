"""Tests: every pipeline as a flow, against itself, on small random models of the published classes.

pytest -q tests/test_models.py
"""

import argparse
import json
import shutil
import sys
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from huggingface_hub.errors import GatedRepoError

import fdflow
import models.flow
import models.text
import sample
import train
from fdflow import LoRA, Problem, central_difference, fdfo, spsa
from models.lora_files import layers_named
from models.table import MODELS, find_model, load_pipeline
from rewards import Reward
from support.arguments import size
from support.errors import UserError
from support.evaluation import Counted
from tests.fake_gpu import fake_gpu
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
from tests.single_file import save_single_file

SEEDS = [5, 6, 7]
# the same float32 operations in other batches: a hundredth of a level of 255
SAME = 4e-5
# one of each way to be guided, to take text and to predict
FEW = ["sdxl", "sd3", "flux2-klein", "qwen-image", "z-image"]


def some_in_ci(names, in_every_run=FEW):
    """Parameters of a test of which only a few run everywhere."""
    return [n if n in in_every_run else pytest.param(n, marks=pytest.mark.ci) for n in names]


# of each kind of network one, where only the network matters
TWINS = ("sd3-without-t5", "sd3-dynamic-shift", "sd2.1", "sd-turbo", "sdxl-turbo", "flux-schnell")
NETWORKS = [name for name in PIPELINES if name not in TWINS]


def size_for(name):
    """Not a square, where the model draws others."""
    return "64" if name == "tiny" else "64x96"


# ---- images


@pytest.mark.parametrize("name", ["tiny", *PIPELINES])
def test_images_are_those_of_the_pipeline(name):
    """Guided and not, not square, and prompts of different length in one batch."""
    pipe = load_theirs(folder(name))
    for guidance in (0.0, 3.0):
        flow = shared_flow(name, steps=3, guidance=guidance, size=size_for(name))
        images = flow.images(torch.arange(3), SEEDS)
        theirs = their_images(pipe, flow, PROMPTS, SEEDS, steps=3)
        assert images.shape == theirs.shape == (3, 3, 64 if name == "tiny" else 96, 64)
        assert images.flatten(1).std(1).min() > 0.02 and (images[0] - images[1]).abs().mean() > 0.01
        assert (images - theirs).abs().max() < SAME


def test_what_is_left_out_of_a_flow_shows_in_its_images():
    """Churn, a time of another step, the guidance, another prompt: the test above notices each."""
    flow = shared_flow("sd3", steps=3, guidance=3.0, size="64x96")
    theirs = their_images(load_theirs(folder("sd3")), flow, PROMPTS, SEEDS, steps=3)

    def difference(times=flow.times, churn=0.0, flow=flow, cond=torch.arange(3)):
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            x = fdflow.sample(
                flow.velocity, flow.noise(SEEDS), cond, times, churn,
                lambda x: torch.randn(x.shape, generator=noise),
            )  # fmt: skip
            return (flow.decode(x) - theirs).abs().max()

    assert difference() < SAME
    assert difference(churn=0.01) > 100 * SAME
    assert difference(times=[flow.times[0], flow.times[1] - 0.01, *flow.times[2:]]) > 100 * SAME
    assert difference(cond=torch.tensor([0, 1, 1])) > 100 * SAME
    unguided = shared_flow("sd3", steps=3, guidance=0.0, size="64x96")
    assert difference(flow=unguided) > 100 * SAME


def test_a_pipeline_may_write_into_the_prompts_it_is_given():
    """Z-Image puts its chat template into the caller's own list: ours are never shown to it."""
    pipe = load_theirs(folder("z-image"))
    prompts = ["red apple"]
    pipe.encode_prompt(prompts)
    assert prompts != ["red apple"]

    flow = make_flow(folder("z-image"), prompts := ["red apple", "sun"], steps=1)
    assert prompts == ["red apple", "sun"] and flow.prompts == prompts


@pytest.mark.parametrize(
    "name", some_in_ci(["sdxl", "sd3", "qwen-image", "z-image"], ["sd3", "qwen-image"])
)
def test_a_negative_prompt_is_that_of_the_pipeline(name):
    flow = make_flow(folder(name), PROMPTS[:2], steps=2, guidance=4, negative="a smudge")
    theirs = their_images(load_theirs(folder(name)), flow, PROMPTS[:2], SEEDS, steps=2)
    images = flow.images(torch.arange(2), SEEDS[:2])
    assert (images - theirs).abs().max() < SAME
    without = make_flow(folder(name), PROMPTS[:2], steps=2, guidance=4)
    assert (images - without.images(torch.arange(2), SEEDS[:2])).abs().max() > 0.001


def test_a_negative_prompt_that_a_pipeline_does_not_take_is_an_error():
    with pytest.raises(UserError, match="--negative: this model's pipeline takes none"):
        make_flow(folder("flux2-klein"), negative="a smudge")


# ---- times


@pytest.mark.parametrize("name", ["tiny", *PIPELINES])
def test_every_image_may_have_its_own_time(name):
    flow = shared_flow(name, steps=3, guidance=3.0, size=size_for(name))
    assert flow.takes_times == (name != "auraflow")  # which makes a number of its time
    x, cond, order = flow.noise(SEEDS), torch.tensor([2, 0, 1]), [2, 0, 1]
    times = torch.tensor(flow.times)[order]
    with torch.no_grad():
        v = flow.velocity(x, times, cond)
        alone = [
            flow.velocity(x[i : i + 1], flow.times[k], cond[i : i + 1]) for i, k in enumerate(order)
        ]
        other = flow.velocity(x, flow.times[1], cond)
    torch.testing.assert_close(v, torch.cat(alone), rtol=1e-4, atol=1e-5 * v.abs().max().item())
    assert not torch.allclose(v[1], other[1], rtol=1e-2)


def test_schedule_has_the_shift_of_the_pipeline():
    times = shared_flow("sd3", steps=4).times
    # SD3's shift, 3 t / (1 + 2 t), counts twice: the steps are even down to 1 / 1000 shifted, then
    # shifted again
    low = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1, (2 + low) / 3, (1 + 2 * low) / 3, low]
    assert times[:-1] == pytest.approx([3 * t / (1 + 2 * t) for t in even], abs=1e-6)
    assert times[-1] == 0 and len(times) == 5


def test_roll_outs_leave_out_only_a_step_that_moves_nothing():
    flow = shared_flow("tiny", steps=4, guidance=1)
    assert flow.times[:3] + flow.times[4:] == flow.train_times and len(flow.times) == 5
    eps, cond = flow.noise(SEEDS), torch.arange(3)
    with torch.no_grad():
        whole, short = (
            flow.decode(fdflow.sample(flow.velocity, eps, cond, times))
            for times in (flow.times, flow.train_times)
        )
    assert 0 < (whole - short).abs().max() < 1 / 255


@pytest.mark.parametrize("name", ["sd3", "sdxl", "cogview4"])
def test_roll_outs_may_take_fewer_steps_than_drawing(name):
    flow = make_flow(folder(name), steps=6, rollout_steps=3, guidance=1)
    three = shared_flow(name, steps=3, guidance=1)
    assert flow.train_times == three.train_times and len(flow.times) == 7
    eps, cond = three.noise([0, 1]), torch.arange(2)
    with torch.no_grad():
        x, x_three = (fdflow.sample(f.velocity, eps, cond, f.train_times) for f in (flow, three))
    torch.testing.assert_close(x, x_three)


# ---- text


@pytest.mark.parametrize("name", FEW)
def test_text_encoders_are_gone_before_the_network_comes(name, monkeypatch):
    encoders = []
    load = models.flow.load_pipeline

    def load_and_look(*args, without, **options):
        assert encoders and all(p() is None for p in encoders)
        assert not {"transformer", "unet", "vae"} & {*without}
        pipe = load(*args, without=without, **options)
        networks = [k for k, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
        assert sorted(networks) == sorted(["vae", "unet" if name == "sdxl" else "transformer"])
        return pipe

    def load_encoders(*args, without):
        assert {*without} == {"transformer", "unet", "vae"}
        pipe = load(*args, without=without)
        modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
        encoders.extend(weakref.ref(p) for module in modules for p in module.parameters())
        return pipe

    monkeypatch.setattr(models.flow, "load_pipeline", load_and_look)
    monkeypatch.setattr(models.text, "load_pipeline", load_encoders)
    make_flow(folder(name), steps=1)
    assert encoders


@pytest.mark.parametrize("name", ["sdxl", "qwen-image"])
def test_text_is_kept_once_for_each_prompt_that_is_needed(name, monkeypatch):
    monkeypatch.setattr(models.text, "CHUNK", 3)
    prompts = [f"{word} {i}" for word in PROMPTS for i in range(3)]
    many = make_flow(folder(name), prompts * 5, needed=[0, 7, 7, 16, 40], steps=2, guidance=3)
    assert set(many.outputs) == {prompts[0], prompts[7], prompts[4], ""}
    one = make_flow(folder(name), [prompts[7]], steps=2, guidance=3)
    images = many.images(torch.tensor([7, 25, 43]), [7, 7, 7])
    # other prompts in the batch of the encoder
    assert (images - one.images(torch.tensor([0]), [7])).abs().max() < 1e-5
    with pytest.raises(KeyError):
        many.images(torch.tensor([1]), [7])


def test_what_all_prompts_share_is_kept_once():
    """Flux's places of tokens, and with guidance the outputs for the negative prompt."""
    for name, shared in (("flux-dev", [2]), ("sd3", [1, 3])):
        outputs = list(shared_flow(name, steps=3, guidance=3.0, size="64x96").outputs.values())
        for i in range(len(outputs[0])):
            same = all(row[i] is outputs[0][i] for row in outputs[:3])
            assert same == (i in shared)


def test_prompts_that_are_cut_are_counted(capsys):
    long = "a " * 40
    make_flow(folder("sd1.5"), ["sun", long, long + "b"], steps=1)
    assert "tokenizer takes 16 tokens: 2 of 4 prompts are cut, by" in capsys.readouterr().err
    make_flow(folder("sd1.5"), ["sun"], steps=1)
    assert capsys.readouterr().err == ""


# ---- training


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z-image", "krea2"])
def test_a_population_sees_each_its_own_parameters_with_guidance_too(name):
    """Where images go through the network twice, or as a list, or in two calls."""
    flow = make_flow(folder(name), steps=3, guidance=3)
    lora = random_lora(flow, "last")
    M, images = 3, 6
    P = sum(p.numel() for p in lora.parameters)
    offsets = 0.1 * torch.randn(M, P, generator=torch.Generator().manual_seed(0))
    x, cond = flow.noise(range(images)), torch.tensor([0, 1, 2, 2, 1, 0])
    t = flow.times[0]
    with torch.no_grad():
        with lora.perturbed(offsets):
            together = flow.velocity(x, t, cond)
        for i in range(images):
            with lora.perturbed(offsets[i % M][None]):
                alone = flow.velocity(x[i : i + 1], t, cond[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)
            if i >= M:
                with lora.perturbed(offsets[(i + 1) % M][None]):
                    other = flow.velocity(x[i : i + 1], t, cond[i : i + 1])
                assert not torch.allclose(other, alone, rtol=1e-3, atol=1e-4)


def test_a_population_refuses_prompts_that_cannot_share_a_call():
    flow = make_flow(folder("qwen-image"), steps=3, guidance=1)
    lora = random_lora(flow, "last")
    P = sum(p.numel() for p in lora.parameters)
    with lora.perturbed(torch.zeros(2, P)), torch.no_grad():
        flow.velocity(flow.noise([0, 1]), 1.0, torch.tensor([1, 1]))
        with pytest.raises(UserError, match="use --batch 1"):
            flow.velocity(flow.noise([0, 1]), 1.0, torch.tensor([0, 1]))


ESTIMATORS = {
    "fdfo": fdfo,
    "spsa": lambda *args: spsa(*args, directions=2),
    "central": lambda *args: central_difference(*args, coordinates=2),
}


@pytest.mark.parametrize(
    "name, estimator", [("sdxl", "fdfo"), ("sd3", "fdfo"), ("sd3", "spsa"), ("sd3", "central")]
)
def test_training_changes_the_lora_and_nothing_else(name, estimator):
    flow = make_flow(folder(name), steps=3, guidance=1)
    layers = layers_named(flow.network, "attention" if estimator == "fdfo" else "last")
    lora = LoRA(flow.network, layers, rank=2, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in flow.network.state_dict().items()}
    before_vae = {k: v.clone() for k, v in flow.vae.state_dict().items()}

    def brightness(x, cond):
        return flow.decode(x).mean((1, 2, 3))

    problem = Problem(flow.velocity, brightness, lora, flow.times, batch=4)
    optimizer = torch.optim.AdamW(lora.parameters, 1e-3)
    for seed in range(2):  # at the start A has no gradient, since B is zero
        optimizer.zero_grad()
        eps = flow.noise(range(4 * seed, 4 * seed + 4))
        generator = torch.Generator().manual_seed(seed)
        ESTIMATORS[estimator](problem, eps, torch.tensor([0, 1, 2, 0]), generator)
        assert all(p.grad.isfinite().all() for p in lora.parameters)
        optimizer.step()

    after = flow.network.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed <= {f"{layer}.{matrix}" for layer in lora.layers for matrix in "AB"}
    # every layer, though central differences take two coordinates: weight decay moves the others
    assert {k[:-2] for k in changed} == {*lora.layers}
    assert all(torch.equal(v, before_vae[k]) for k, v in flow.vae.state_dict().items())


def test_a_pair_costs_its_steps_and_no_more():
    flow, calls = make_flow(folder("sd3"), [*PROMPTS, *PROMPTS], steps=5, guidance=1), {}

    def count_images(network, args, named, output):
        grad = torch.is_grad_enabled()
        calls[grad] = calls.get(grad, 0) + len(named["hidden_states"])

    lora, velocity = random_lora(flow), Counted(flow.velocity)
    flow.network.register_forward_hook(count_images, with_kwargs=True)
    problem = Problem(velocity, lambda x, cond: x.mean((1, 2, 3)), lora, flow.times, batch=8)
    pairs, cond = 6, torch.arange(6)
    for options, forward, backward in [
        ({}, 2 * 5, 1),
        ({"branches": 4, "train_steps": 3, "kl": 1}, 4 * 5 + 3, 3),
    ]:
        calls.clear()
        eps = flow.noise(range(pairs))
        fdfo(problem, eps, cond, torch.Generator().manual_seed(0), **options)
        assert calls == {False: forward * pairs, True: backward * pairs}
        assert velocity.pop_count() == (forward + 3 * backward) * pairs
        assert velocity.pop_count() == 0


@pytest.fixture
def without_onednn():
    """Its kernels for half precision take seconds to get ready."""
    before = torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(*before)


HALF = [("bfloat16", 0.03, 0.95), ("float16", 0.003, 0.999)]  # of 8 or 11 bits


@pytest.mark.parametrize("dtype, tolerance, aligned", HALF)
@pytest.mark.parametrize("name", some_in_ci(["sd3", "sd1.5", "z-image"], ["sd3"]))
def test_half_precision_is_float32_but_for_rounding(
    name, dtype, tolerance, aligned, without_onednn
):
    cond, images, grads, by_image = torch.tensor([0, 1]), [], [], []
    for kind in ("float32", dtype):
        flow = make_flow(folder(name), steps=2, guidance=2, dtype=kind)
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

    # through a random network and two steps
    assert (images[0] - images[1]).abs().mean() < tolerance
    for pair in (grads, by_image):  # the same direction and size
        assert torch.cosine_similarity(*pair, dim=0) > aligned
        assert (pair[1].norm() / pair[0].norm()).item() == pytest.approx(1, abs=0.1)


def test_the_vae_computes_in_float32_where_float16_is_too_small_for_it(tmp_path):
    assert make_flow(folder("sd3"), dtype="bfloat16").vae.dtype == torch.bfloat16
    assert make_flow(folder("sd3"), dtype="float16").vae.dtype == torch.float32
    shutil.copytree(folder("sd3"), tmp_path / "sd3")
    config = json.loads((tmp_path / "sd3" / "vae" / "config.json").read_text())
    changed = json.dumps(config | {"force_upcast": False})
    (tmp_path / "sd3" / "vae" / "config.json").write_text(changed)
    assert make_flow(tmp_path / "sd3", dtype="float16").vae.dtype == torch.float16


@pytest.mark.parametrize("name", ["sd3", "sd-turbo"])
def test_convolutions_have_channels_last_on_a_gpu_alone(name):
    def layouts(flow):
        found = {}
        for part, module in (("vae", flow.vae), ("network", flow.network)):
            kernels = [p for p in module.parameters() if p.ndim == 4]
            kernels = [p for p in kernels if min(p.shape[1:]) > 1]
            last = {"memory_format": torch.channels_last}
            found[part] = {p.is_contiguous(**last) for p in kernels}
        return found

    assert layouts(make_flow(folder(name))) == {"vae": {False}, "network": {False}}
    with fake_gpu():
        flow = make_flow(folder(name), device="cuda")
        assert layouts(flow) == {"vae": {True}, "network": {True}}
        make_flow(folder("qwen-image"), device="cuda")  # whose VAE has kernels in three dimensions


def gradient_of_fdfo(flow):
    lora = random_lora(flow)

    def mean(x, cond):
        return x.flatten(1).mean(1)

    problem = Problem(flow.velocity, mean, lora, flow.times, batch=4)
    fdfo(problem, flow.noise([0, 1]), torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    # the last layers of a stream of text may have none
    return torch.cat([p.grad.flatten() for p in lora.parameters if p.grad is not None])


@pytest.mark.parametrize("name", some_in_ci(NETWORKS, ["chroma", "sdxl"]))
def test_checkpointing_gives_the_same_gradient(name):
    grads = []
    if name == "chroma":  # diffusers 0.42 leaves out a mask
        assert "--checkpointing" in complaint(folder(name), steps=2, checkpointing=True)
        return
    for checkpointing in (False, True):
        flow = make_flow(folder(name), steps=2, guidance=1, checkpointing=checkpointing)
        assert flow.network.is_gradient_checkpointing == checkpointing
        grads.append(gradient_of_fdfo(flow))
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("name", some_in_ci(NETWORKS, []))
def test_compiled_blocks_are_whole_graphs_with_the_same_gradient(name, monkeypatch):
    compiled, module_compile = [], torch.nn.Module.compile

    def trace(module):  # without generating code, which takes minutes
        compiled.append(module)
        # a break in the graph is an error, but where the network itself reads a number
        module_compile(module, backend="eager", fullgraph=name not in ("z-image", "sana"))

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    grads = []
    for compile in (False, True):
        grads.append(
            gradient_of_fdfo(make_flow(folder(name), steps=2, guidance=1, compile=compile))
        )
    assert len(compiled) >= 2
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * grads[0].abs().max().item())


@pytest.mark.parametrize("name", some_in_ci(["tiny", *PIPELINES], ["qwen-image"]))
def test_train_and_sample_run_on_a_gpu_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    """On the pretended one, under PyTorch's own rules of which devices may mix."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = ["--size", size_for(name), "--steps", "2", "--guidance", "2", "--batch", "4"]
    command = ["train.py", "--model", str(folder(name)), *small, "--reward", "brightness"]
    command += ["--prompts", "prompts.txt", "--groups", "2", "--iterations", "1", "--lr", "0.01"]
    command += ["--device", "cuda", "--dtype", "float32", "--name", "run"]
    monkeypatch.setattr(sys, "argv", command)
    with fake_gpu():
        train.main()
    assert "held-out brightness" in capsys.readouterr().out
    last = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 4 and last["drift"] > 0

    # the run folder says which model, size and guidance
    command = ["sample.py", "--prompt", "robot", "--lora", "runs/run", "--compare", "--n", "1"]
    monkeypatch.setattr(sys, "argv", command)
    sample.main()
    assert (tmp_path / "sample.png").stat().st_size > 1000


# ---- models that cannot be loaded


def complaint(path, **options):
    with pytest.raises(UserError) as error:
        make_flow(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_cannot_be_loaded_say_why(tmp_path):
    assert "none of tiny, sd3" in complaint("nowhere")
    assert "cannot reach model stabilityai/stable-diffusion-3.5-medium" in complaint("sd3.5")
    (tmp_path / "empty").mkdir()
    assert "no file named model_index.json" in complaint(tmp_path / "empty")
    shutil.copytree(folder("sd-turbo"), tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"1234")
    assert "is damaged or incomplete" in complaint(tmp_path / "broken")
    assert "divisible by" in complaint(folder("sd3"), size="72")
    assert "makes 64 of it" in complaint(folder("flux-schnell"), size="72")


# a cascade, a prior, a video, pixels without a VAE, pictures to change, controls, sound, nothing
OTHERS = "StableCascadeCombined Kandinsky Wan IF StableDiffusionImg2Img QwenImageEdit "
OTHERS += "FluxControlNet StableAudio SanaImageToVideo No"


@pytest.mark.parametrize("name", OTHERS.split())
def test_what_is_not_text_to_image_says_so(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"{name}Pipeline"}))
    assert f"is a {name}Pipeline, not text to image" in complaint(tmp_path)


def test_a_network_that_predicts_something_else_says_so(tmp_path):
    shutil.copytree(folder("sd-turbo"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    assert "predicts sample" in complaint(tmp_path)


def test_a_model_without_a_name_gets_the_defaults_of_its_pipeline():
    for name, steps, guidance in (
        ("sdxl", 50, 5.0),
        ("flux-dev", 28, 3.5),
        ("qwen-image", 50, 4.0),
    ):
        model = find_model(str(folder(name)))
        assert (model.steps, model.size, model.guidance) == (steps, None, guidance)
    flow = make_flow(folder("sd-turbo"), size=None, steps=1)
    assert flow.options.get("height") is None
    assert flow.decode(flow.noise([0])).shape[2:] == (64, 64)  # 8 latent pixels, as it was made for


def test_half_size_files_are_downloaded_where_there_are_some(monkeypatch):
    asked = []
    index = json.loads((folder("sdxl") / "model_index.json").read_text())
    pipeline = diffusers.DiffusionPipeline
    monkeypatch.setattr(pipeline, "load_config", lambda path, **options: index)

    def from_pretrained(path, **options):
        asked.append(options["variant"])

    monkeypatch.setattr(pipeline, "from_pretrained", from_pretrained)
    args = argparse.Namespace(dtype="float16")
    wanted = {"sd-turbo": "fp16", "sdxl": "fp16", "sd3.5": None, "someone/sdxl": None}
    for name in wanted:
        load_pipeline(find_model(name), args, without=[])
    assert asked == list(wanted.values())


def test_a_folder_of_half_size_files_loads(tmp_path):
    """And one with both kinds loads those of full size."""
    pipe = load_theirs(folder("sdxl"))
    full = make_flow(folder("sdxl"), steps=2).images(torch.tensor([0]), [0])
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = make_flow(tmp_path / "half", steps=2).images(torch.tensor([0]), [0])
    assert 0 < (half - full).abs().mean() < 0.005  # the weights are rounded to 11 bits
    shutil.copytree(folder("sdxl"), tmp_path / "half", dirs_exist_ok=True)
    assert torch.equal(make_flow(tmp_path / "half", steps=2).images(torch.tensor([0]), [0]), full)


def test_a_single_file_draws_what_its_pipeline_draws(tmp_path, monkeypatch):
    pipe = load_theirs(folder("sd1.5"))
    path = tmp_path / "model.safetensors"
    save_single_file(pipe, path)
    config = {"pretrained_model_name_or_path": str(folder("sd1.5"))}
    with monkeypatch.context() as patch:  # which of the hub's models it is
        patch.setattr(single_file_utils, "fetch_diffusers_config", lambda checkpoint: config)
        flow = make_flow(path, steps=2, guidance=2)
        images = flow.images(torch.arange(2), SEEDS[:2])
        assert (images - their_images(pipe, flow, PROMPTS[:2], SEEDS, steps=2)).abs().max() < SAME

    # without the network there is no configuration
    copy = shutil.copy(path, tmp_path / "other.safetensors")
    assert "cannot reach model stable-diffusion-v1-5/" in complaint(copy)
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    assert "is damaged or incomplete" in complaint(tmp_path / "broken.safetensors")


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


def test_the_table_of_models_makes_sense():
    for name, model in MODELS.items():
        assert 1 <= model.train_steps <= model.steps and size(model.size)
        assert name == "tiny" or model.path.count("/") == 1
