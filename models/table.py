"""The models that have names, what suits them by default, and how to load one from the hub or a folder."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import transformers
from safetensors import SafetensorError

from errors import UserError, first_line, why_unreachable

for library in (transformers, diffusers):
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="huggingface_hub")

TINY = Path(__file__).resolve().parent / "tiny"


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
    train_steps: int | None = None  # steps trained of each trajectory; None is all
    kl: float = 0  # pull to the base model
    batch: int = 12  # images in one network call
    tokens: int = 256  # of the T5 encoder, or zeros in its place


TINY_PATH = str(TINY / "tiny-sd3")
TURBO = {"steps": 4, "churn": 0.025, "batch": 16}
MODELS = {
    "tiny": Model(TINY_PATH, 4, "64", 1, 5e-4, 8, 1, 0.05, train_steps=1, kl=1, batch=64, tokens=1),
    "sd3": Model("stabilityai/stable-diffusion-3-medium-diffusers", 28, train_steps=7),
    "sd3.5": Model("stabilityai/stable-diffusion-3.5-medium", 40, train_steps=10),
    "sd3.5-large": Model("stabilityai/stable-diffusion-3.5-large", 40, train_steps=10, batch=8),
    "sd-turbo": Model("stabilityai/sd-turbo", **TURBO),
    "sd1.5": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 20, guidance=5, train_steps=5),
    "sdxl-turbo": Model("stabilityai/sdxl-turbo", **TURBO),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", 30, "1024", 5, train_steps=8, batch=4),
    "flux-schnell": Model("black-forest-labs/FLUX.1-schnell", 4, churn=0.025, batch=8),
    "flux-dev": Model("black-forest-labs/FLUX.1-dev", 28, guidance=3.5, train_steps=7, batch=8, tokens=512),
}
# a model that is not in the table gets what suits one of its class that is
LIKE = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "sd1.5",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux-dev",
}


def find_model(name):
    """The Model for an alias, a hub id or a local folder; UserError if it is none of them."""
    if name in MODELS:
        return MODELS[name]
    for model in MODELS.values():
        if name == model.path or Path(name).resolve() == Path(model.path):
            return model
    if not Path(name).is_dir() and name.count("/") != 1:
        raise UserError(f"model {name!r} is no folder, no hub id and none of {', '.join(MODELS)}")
    return replace(MODELS[LIKE[read_index(name)["_class_name"]]], path=name)


def read_index(path):
    """The index of a pipeline, from a folder or the hub; UserError if there is none or of no known class."""
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(why_not_loaded(path, error)) from error
    if index["_class_name"] not in LIKE:
        raise UserError(f"{path} is a {index['_class_name']}; known are {', '.join(LIKE)}")
    return index


def load_pipeline(path, dtype):
    """Load a diffusers pipeline, with None for what its index lists as null; or a UserError."""
    index = read_index(path)
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    if "safety_checker" in index:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        return getattr(diffusers, index["_class_name"]).from_pretrained(path, dtype=dtype, **absent)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(why_not_loaded(path, error)) from error


def why_not_loaded(path, error):
    if Path(path).is_dir():
        return f"{path} is damaged or incomplete: {first_line(error)}"
    return why_unreachable(path, error) + "; --model tiny needs neither"
