"""The models that have names, what suits them by default, their flags, and how to load one."""

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers

from support.commands import number, size
from support.errors import UserError, first_line, why_unreachable

for library in (transformers, diffusers):
    library.logging.set_verbosity(logging.CRITICAL)  # an error is raised, too
    library.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="huggingface_hub|peft")

TINY = Path(__file__).resolve().parents[1] / "tiny"


@dataclass
class Model:
    """Where a model lies and what suits it when the command line does not say otherwise."""

    path: str
    steps: int
    size: str = "512"  # pixels, or width x height
    guidance: float = 1  # 1 is none
    lr: float = 3e-5
    rank: int = 32
    scale: float = 2  # alpha / rank
    churn: float = 0.0025
    train_steps: int = 4  # random times at which each group is trained
    kl: float = 0  # pull to the base model
    batch: int = 12  # images in one network call
    layers: str = "attention"  # with a LoRA, as lora_files.layers_named has them
    rollout_steps: int | None = 10  # at most; as Flow-GRPO: docs/comparison.md
    iterations: int = 100
    tokens: int = 256  # of the T5 encoder, or zeros in its place
    variant: str | None = None  # of the files to download: "fp16" are half as large


TINY_TRAINING = {
    "batch": 64,
    "layers": "modulation",
    "rollout_steps": None,
    "iterations": 88,
    "tokens": 1,
}
TURBO = {"steps": 4, "churn": 0.025, "batch": 16, "rollout_steps": None, "variant": "fp16"}
SDXL = {"guidance": 5, "train_steps": 8, "batch": 4, "variant": "fp16"}
MODELS = {
    "tiny": Model(
        str(TINY / "tiny-sd3"), 4, "64", 1, 4e-4, 32, 1, 0.05, 2, kl=0.7, **TINY_TRAINING
    ),
    "sd3": Model("stabilityai/stable-diffusion-3-medium-diffusers", 28, train_steps=7),
    "sd3.5": Model("stabilityai/stable-diffusion-3.5-medium", 40, train_steps=10),
    "sd3.5-large": Model("stabilityai/stable-diffusion-3.5-large", 40, train_steps=10, batch=8),
    "sd-turbo": Model("stabilityai/sd-turbo", **TURBO),
    "sd1.5": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 20, guidance=5, train_steps=5),
    "sdxl-turbo": Model("stabilityai/sdxl-turbo", **TURBO),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", 30, "1024", **SDXL),
    "flux-schnell": Model(
        "black-forest-labs/FLUX.1-schnell", 4, churn=0.025, batch=8, rollout_steps=None
    ),
    "flux-dev": Model(
        "black-forest-labs/FLUX.1-dev", 28, "512", 3.5, train_steps=7, batch=8, tokens=512
    ),
}
# a model that is not in the table gets what suits one of its class that is
LIKE = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "sd1.5",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux-dev",
}


def folder_or_name(text):
    """An argparse type: a folder by its whole path, so that it is found from elsewhere, or any other name."""
    return str(Path(text).resolve()) if text not in MODELS and Path(text).is_dir() else text


def add_model_arguments(parser):
    """The flags that sample.py and train.py share; None leaves the choice to the model or the run."""
    add = parser.add_argument
    add(
        "--model",
        type=folder_or_name,
        help=f"{', '.join(MODELS)}, a hub id or a folder (default tiny)",
    )
    add("--steps", type=number(int, 1, 1000), help="sampling steps (default: the model's)")
    add(
        "--guidance",
        type=number(float, 1, 100),
        help="guidance scale, 1 is none (default: the model's)",
    )
    add("--size", type=size, help="in pixels: 512, or 768x512 (width first; default: the model's)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    dtypes = ["float32", "bfloat16", "float16"]
    add(
        "--dtype",
        choices=dtypes,
        help="of the model (default: on cuda bfloat16 or float16, else float32)",
    )
    add(
        "--batch",
        type=number(int, 1, 10_000),
        help="images in one network call (default: the model's)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network's blocks: a slow start, then faster",
    )
    add(
        "--checkpointing",
        action="store_true",
        help="compute twice what training would store: less memory",
    )


def fill_defaults(args):
    """Fill in the arguments of `add_model_arguments` that were not given; returns the Model."""
    args.model = args.model or "tiny"
    model = find_model(args.model)
    args.steps, args.size = args.steps or model.steps, args.size or model.size
    args.guidance, args.batch = args.guidance or model.guidance, args.batch or model.batch
    if getattr(args, "rollout_steps", 0) is None:  # of training alone
        args.rollout_steps = min(model.rollout_steps or args.steps, args.steps)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype is None and args.device.startswith(
        "cuda"
    ):  # cards before 2020 only emulate bfloat16
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if native else "float16"
    args.dtype = args.dtype or "float32"
    return model


def check_device(device):
    """UserError if tensors cannot go to a device and come back."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_line(error)}") from error


def find_model(name):
    """The Model for an alias, a hub id or a local folder; UserError if it is none of them."""
    named = MODELS | {model.path: model for model in MODELS.values()}
    if name in named:
        return named[name]
    if not Path(name).is_dir() and name.count("/") != 1:
        raise UserError(f"model {name!r} is no folder, no hub id and none of {', '.join(MODELS)}")
    like = LIKE[read_index(name)["_class_name"]]
    if like == "flux-dev":
        load = diffusers.FluxTransformer2DModel.load_config
        config = loaded(name, lambda: dict(load(name, subfolder="transformer")))
        like = "flux-dev" if config.get("guidance_embeds") else "flux-schnell"
    return replace(MODELS[like], path=name, variant=None)


def read_index(path):
    """The index of a pipeline, from a folder or the hub; UserError if there is none or of no known class."""
    index = loaded(path, lambda: dict(diffusers.DiffusionPipeline.load_config(path)))
    kind = index.get("_class_name")
    if kind not in [*LIKE]:
        raise UserError(f"{path} is a {kind}; known are {', '.join(LIKE)}")
    return index


def text_encoders(index):
    """The names of a pipeline's text encoders, in the order of its arguments."""
    return sorted(
        name for name in index if name.startswith("text_encoder") and index[name] != [None, None]
    )


def load_pipeline(model, dtype, encoder=None):
    """Load the diffusers pipeline of a Model: one text encoder alone, or all but those; or a UserError."""
    path, index = model.path, read_index(model.path)
    kept = {encoder} if encoder else {"transformer", "unet", "vae"}
    left_out = {"transformer", "unet", "vae", "safety_checker", *text_encoders(index)} - kept
    absent = {
        part: None for part, kind in index.items() if kind == [None, None] or part in left_out
    }
    variant = model.variant
    if Path(path).is_dir():
        files = [file.name for file in Path(path).glob("*/*.safetensors")]
        variant = "fp16" if files and all(".fp16" in name for name in files) else None
    kind = getattr(diffusers, index["_class_name"])
    return loaded(path, lambda: kind.from_pretrained(path, dtype=dtype, variant=variant, **absent))


def loaded(path, load):
    """What `load()` makes of a folder or a hub id; or a UserError that says what is wrong with that."""
    try:
        return load()
    except Exception as error:  # whatever damage does
        if Path(path).is_dir() or not isinstance(error, OSError):
            raise UserError(f"{path} is damaged or incomplete: {first_line(error)}") from error
        raise UserError(why_unreachable(path, error) + "; --model tiny needs neither") from error
