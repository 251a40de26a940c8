"""The models that have names, what suits them by default, and how to load a pipeline."""

import functools
import inspect
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import single_file_utils

from support.errors import UserError, first_line, why_unreachable
from support.prompts import TINY

for library in (transformers, diffusers):
    library.logging.set_verbosity(logging.CRITICAL)  # an error is raised, too
    library.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="huggingface_hub|peft")


@dataclass
class Model:
    """Where a model lies, and what suits it when the command line does not say otherwise.

    Steps, size and guidance are those of its own pipeline where they are None.
    """

    path: str
    steps: int | None = None
    size: str | None = None  # pixels, or width x height
    guidance: float | None = None  # as its pipeline takes it
    lr: float = 3e-5
    rank: int = 32
    scale: float = 2  # alpha / rank
    churn: float = 0.0025
    train_steps: int = 4  # random times at which each group is trained
    kl: float = 0  # weight of the pull to the base model
    batch: int = 12  # images in one network call
    layers: str = "attention"  # with a LoRA, as lora_files.layers_named has them
    rollout_steps: int = 10  # at most; as Flow-GRPO: docs/comparison.md
    iterations: int = 100
    groups: int = 32  # in an iteration
    tokens: int | None = None  # of a prompt, where not as many as its pipeline takes
    variant: str | None = None  # of the files to download: "fp16" are half as large


# few steps, far apart: stronger churn, and more images at a time, since these are small
TURBO = {"churn": 0.025, "batch": 16, "variant": "fp16"}
MODELS = {
    "tiny": Model(
        str(TINY / "tiny-sd3"), 4, "64", 1, lr=4e-4, scale=1, churn=0.05, train_steps=2, kl=0.7,
        batch=64, layers="modulation", iterations=88, tokens=1,
    ),
    # Stability AI's licences; the first three are gated
    "sd3": Model("stabilityai/stable-diffusion-3-medium-diffusers", 28, "512", 1, train_steps=7),
    "sd3.5": Model("stabilityai/stable-diffusion-3.5-medium", 40, "512", 1, train_steps=10),
    "sd3.5-large": Model(
        "stabilityai/stable-diffusion-3.5-large", 40, "512", 1, train_steps=10, batch=8
    ),
    "sd-turbo": Model("stabilityai/sd-turbo", 4, "512", 1, **TURBO),
    "sdxl-turbo": Model("stabilityai/sdxl-turbo", 4, "512", 1, **TURBO),
    # OpenRAIL
    "sd1.5": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 20, "512", 5, train_steps=5),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0", 30, "1024", 5, train_steps=8, batch=4,
        variant="fp16",
    ),
    "pixart-sigma": Model("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 20, "1024", 4.5),
    # Apache 2.0; schnell and z-image-turbo are distilled
    "flux-schnell": Model("black-forest-labs/FLUX.1-schnell", 4, "512", 1, churn=0.025, batch=8),
    "flux2-klein": Model("black-forest-labs/FLUX.2-klein-base-4B", 50, "512", 4, batch=8),
    "z-image": Model("Tongyi-MAI/Z-Image", 50, "512", 4, batch=8),
    "z-image-turbo": Model("Tongyi-MAI/Z-Image-Turbo", 8, "512", 0, churn=0.025, batch=8),
    "qwen-image": Model("Qwen/Qwen-Image", 50, "512", 4, batch=2),
    "lumina2": Model("Alpha-VLLM/Lumina-Image-2.0", 50, "1024", 4, batch=4),
    "chroma": Model("lodestones/Chroma1-Base", 35, "512", 5, batch=8),
    "auraflow": Model("fal/AuraFlow-v0.3", 50, "1024", 3.5, batch=4, variant="fp16"),
    "cogview4": Model("zai-org/CogView4-6B", 50, "1024", 3.5, batch=4),
    # not for commercial use
    "flux-dev": Model("black-forest-labs/FLUX.1-dev", 28, "512", 3.5, train_steps=7, batch=8),
    "sana": Model("Efficient-Large-Model/Sana_600M_512px_diffusers", 20, "512", 4.5),
    "krea2": Model("krea/Krea-2-Raw", 28, "512", 4.5, batch=4),
}  # fmt: skip


def find_model(name):
    """Return the Model for a name, a hub id, a folder or a file; UserError if it is neither."""
    named = MODELS | {model.path: model for model in MODELS.values()}
    if name in named:
        return named[name]
    if not Path(name).exists() and name.count("/") != 1:
        raise UserError(f"model {name!r} is no folder, no hub id and none of {', '.join(MODELS)}")

    parameters = call_parameters(name)
    guidance = parameters.get(guidance_argument(parameters))
    steps = parameters["num_inference_steps"].default
    return Model(name, steps, guidance=guidance.default if guidance else None)


@functools.cache
def config_path(path):
    """Find the configuration of a pipeline: for a single file of weights, its base model's."""
    if not Path(path).is_file():
        return path
    checkpoint = loaded(path, lambda: single_file_utils.load_single_file_checkpoint(path))
    return single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]


def read_index(path):
    """Read the index of a pipeline, from a folder or the hub; UserError if there is none."""
    path = config_path(path)
    return loaded(path, lambda: dict(diffusers.DiffusionPipeline.load_config(path)))


def pipeline_class(path):
    """Return a pipeline's class. UserError if it is not text to image by one network and a VAE."""
    name = read_index(path).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    plain = hasattr(kind, "encode_prompt") and hasattr(kind, "prepare_latents")

    # such a call asks for a prompt, and not also for a video's length or a picture to change
    if plain:
        call = {*inspect.signature(kind).parameters, *inspect.signature(kind.__call__).parameters}
        text = inspect.signature(kind.encode_prompt).parameters
        wanted = {"prompt", "height", "width", "num_inference_steps", "generator", "vae"}
        others = {"num_frames", "frames", "strength", "mask_image", "control_image", "prior"}
        network = {"transformer", "unet"} & call
        plain = wanted <= call and network and not others & call and "image" not in text
    if not plain:
        raise UserError(f"{path} is a {name}, not text to image with one network and a VAE")
    return kind


def call_parameters(path):
    """Return the parameters of a pipeline's call, {name: inspect.Parameter}."""
    return inspect.signature(pipeline_class(path).__call__).parameters


def guidance_argument(parameters):
    """Name the argument that guides: `true_cfg_scale` where `guidance_scale` is off by default."""
    own = parameters.get("guidance_scale")
    return "true_cfg_scale" if own is None or own.default is None else "guidance_scale"


def call_options(model, args):
    """Return what every call of a model's pipeline gets, as far as it has an argument for it.

    UserError if it has none for something that was asked for.
    """
    parameters = call_parameters(model.path)
    guidance = guidance_argument(parameters)
    options = {"output_type": "latent", "return_dict": False, guidance: args.guidance}
    options |= {"max_sequence_length": model.tokens}
    if args.size:
        width, height = (args.size.split("x") * 2)[:2]
        options |= {"width": int(width), "height": int(height)}
    if args.negative and "negative_prompt" not in parameters:
        raise UserError("--negative: this model's pipeline takes none")
    if args.negative or guidance == "true_cfg_scale":  # which is off without
        options["negative_prompt"] = args.negative or ""

    # with these a pipeline would change size, prompt or guidance on its own
    options |= {"use_resolution_binning": False, "enable_prompt_rewrite": False}
    options |= {"cfg_truncation": 2.0}  # of times from 0 to 1
    return {name: o for name, o in options.items() if name in parameters and o is not None}


def load_pipeline(model, args, without):
    """Load the diffusers pipeline of a Model, without some of its parts. UserError if it can't."""
    path = model.path
    kind, index = pipeline_class(path), read_index(path)
    without = {"safety_checker", *without}
    absent = {part: None for part in index if index[part] == [None, None] or part in without}

    variant = model.variant
    if Path(path).is_dir():
        files = [file.name for file in Path(path).glob("*/*.safetensors")]
        variant = "fp16" if files and all(".fp16" in name for name in files) else None
    options = {"dtype": getattr(torch, args.dtype), **absent}
    if Path(path).is_file():
        config = config_path(path)
        return loaded(path, lambda: kind.from_single_file(path, config=config, **options))
    return loaded(path, lambda: kind.from_pretrained(path, variant=variant, **options))


def network_config(path):
    """Return the name of the network in a pipeline, and its configuration."""
    index = read_index(path)
    name = "transformer" if "transformer" in index else "unet"
    kind, path = getattr(diffusers, index[name][1]), config_path(path)
    return name, FrozenDict(loaded(path, lambda: kind.load_config(path, subfolder=name)))


def loaded(path, load):
    """Call `load()` for a folder or a hub id; a failure becomes a UserError that says why."""
    try:
        return load()
    except Exception as error:  # whatever damage does
        if Path(path).exists() or not isinstance(error, OSError):
            raise UserError(f"{path} is damaged or incomplete: {first_line(error)}") from error
        raise UserError(why_unreachable(path, error) + "; --model tiny needs neither") from error
