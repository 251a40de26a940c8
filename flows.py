"""A diffusers pipeline as a flow in the coordinates of fdflow.py, and LoRA files that diffusers reads."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import fdflow
from errors import UserError, first_line
from fdflow import LoRA

TINY = Path(__file__).resolve().parent / "tiny"


@dataclass
class Model:
    """Where a model lies and what suits it when the command line does not say otherwise."""

    path: str
    steps: int
    size: int  # pixels
    guidance: float  # 1 is none
    lr: float
    pad_tokens: int = 256  # zero tokens in place of an absent T5 encoder
    train_steps: int | None = None  # steps trained of each trajectory; None is all
    kl: float = 0.0  # pull to the base model


MODELS = {
    "tiny": Model(
        str(TINY / "tiny-sd3"), steps=4, size=64, guidance=1, lr=5e-4, pad_tokens=1, train_steps=2, kl=1.0
    ),
    "sd3": Model("stabilityai/stable-diffusion-3-medium-diffusers", steps=28, size=512, guidance=1, lr=3e-5),
    "sd3.5": Model("stabilityai/stable-diffusion-3.5-medium", steps=40, size=512, guidance=1, lr=3e-5),
}


def find_model(name):
    """The Model for an alias, a hub id or a local folder. UserError if it is none of them."""
    if name in MODELS:
        return MODELS[name]
    for model in MODELS.values():
        if name == model.path or Path(name).resolve() == Path(model.path):
            return model
    if not Path(name).is_dir() and name.count("/") != 1:
        raise UserError(f"model {name!r} is no folder, no hub id and none of {', '.join(MODELS)}")
    return Model(name, steps=28, size=512, guidance=1, lr=3e-5)


def load_pipeline(path, dtype):
    """Load a StableDiffusion3Pipeline, with None for what its index lists as null; or a UserError."""
    warnings.filterwarnings("ignore", module="huggingface_hub")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        if index["_class_name"] != "StableDiffusion3Pipeline":
            raise UserError(f"{path} is a {index['_class_name']}; this trains StableDiffusion3Pipeline")
        absent = {part: None for part, kind in index.items() if kind == [None, None]}
        return diffusers.StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **absent)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        if "gated" in str(error):
            message = f"{path} is gated: accept its licence on the hub, then run `hf auth login`"
        elif Path(path).is_dir():
            message = f"{path} is damaged or incomplete: {first_line(error)}"
        else:
            message = f"cannot reach model {path}: check its name and the network, or use --model tiny"
        raise UserError(message) from error


def attention_layers(transformer, few=False):
    """Names of the layers to train: all attention projections of both streams, as in the paper.

    Few: the value and output projections of the image stream in the last four blocks, for the estimators
    whose variance or cost grows with the number of parameters.
    """
    if few:
        blocks = range(len(transformer.transformer_blocks))[-4:]
        return [f"transformer_blocks.{i}.attn.{name}" for i in blocks for name in ("to_v", "to_out.0")]
    return ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class SD3Flow:
    """A StableDiffusion3Pipeline in the coordinates of fdflow.py.

    Latents x are float32 [B, C, H / 8, W / 8]; `cond` [B] holds indices into the prompts given to `encode`;
    `times` is the scheduler's own schedule of `steps` steps; guidance > 1 is classifier-free guidance.
    """

    def __init__(self, model, args):
        """args has device, dtype, steps, size (pixels) and guidance, as `fill_defaults` leaves them."""
        self.device, self.dtype, self.guidance = args.device, getattr(torch, args.dtype), args.guidance
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {self.device}: {first_line(error)}") from error
        self.pipe = load_pipeline(model.path, self.dtype).to(self.device)
        self.pad_tokens = model.pad_tokens
        self.transformer = self.pipe.transformer.eval().requires_grad_(False)
        self.vae = self.pipe.vae.eval().requires_grad_(False)
        pixels = self.pipe.vae_scale_factor * self.pipe.patch_size
        most = pixels * self.transformer.config.pos_embed_max_size
        if args.size % pixels or args.size > most:
            raise UserError(f"--size {args.size}: this model makes multiples of {pixels} pixels up to {most}")
        side = args.size // self.pipe.vae_scale_factor
        self.shape = (self.transformer.config.in_channels, side, side)
        self.pipe.scheduler.set_timesteps(args.steps)
        self.times = self.pipe.scheduler.sigmas.tolist()
        self.prompts = []

    @torch.no_grad()
    def encode(self, prompts):
        """Encode prompts once; from now on `cond` is an index into them."""
        self.prompts, parts = list(prompts), []
        for i in range(0, len(self.prompts), 64):
            batch = self.prompts[i : i + 64] + [""]  # the last is for guidance
            text, _, pooled, _ = self.pipe.encode_prompt(
                batch, None, None, self.device, max_sequence_length=self.pad_tokens,
                do_classifier_free_guidance=False,
            )  # fmt: skip
            parts.append((text[:-1].cpu(), pooled[:-1].cpu()))
        self.text, self.pooled = (torch.cat(part) for part in zip(*parts))
        self.empty = (text[-1:].cpu(), pooled[-1:].cpu())

    def velocity(self, x, t, cond):
        """v(x_t, t, cond) [B, C, h, w]; t is a float."""
        text, pooled = self.text[cond], self.pooled[cond]
        if self.guidance > 1:
            # each image beside its unconditional twin, so that the k-th part of the batch stays the k-th part
            x = x.repeat_interleave(2, 0)
            text, pooled = (
                torch.stack([empty.expand_as(a), a], 1).flatten(0, 1)
                for a, empty in zip((text, pooled), self.empty)
            )
        v = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=torch.full((len(x),), 1000 * t, device=self.device),
            encoder_hidden_states=text.to(self.device),
            pooled_projections=pooled.to(self.device),
            return_dict=False,
        )[0].float()
        if self.guidance > 1:
            base, v = v.unflatten(0, (-1, 2)).unbind(1)
            v = base + self.guidance * (v - base)
        return v

    @torch.no_grad()
    def decode(self, x):
        """Latents to images [B, 3, H, W], float32 in [0, 1]."""
        config, images = self.vae.config, []
        for part in (x / config.scaling_factor + config.shift_factor).split(16):
            image = self.vae.decode(part.to(self.dtype), return_dict=False)[0].float()
            images.append((image / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def noise(self, seeds):
        """Standard normal noise [N, C, h, w], image i that of torch.Generator().manual_seed(seeds[i])."""
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(self.device)

    @torch.no_grad()
    def images(self, cond, seeds, batch=64, progress=False):
        """The deterministic images [N, 3, H, W] of prompts `cond` [N] and noise `seeds`, on the CPU."""
        images = []
        for i in tqdm(range(0, len(seeds), batch), disable=not progress, leave=False, desc="sampling"):
            c = cond[i : i + batch]
            x = fdflow.sample(self.velocity, self.noise(seeds[i : i + batch]), c, self.times)
            images.append(self.decode(x).cpu())
        return torch.cat(images)


# ---- LoRA files in the format of diffusers


def save_lora(lora, path):
    """Write what `pipe.load_lora_weights` reads; the scale is folded into B, so alpha equals the rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.A.detach().cpu().clone()
        tensors[f"transformer.{name}.lora_B.weight"] = (layer.scale * layer.B).detach().cpu().contiguous()
    part = Path(f"{path}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def load_lora(transformer, path):
    """Put a LoRA file, or that of a run folder, around the layers of `transformer`; returns the LoRA."""
    path = Path(path)
    if path.is_dir():
        path = path / "lora.safetensors"
        if not path.exists():  # the name diffusers gives its own
            path = path.with_name("pytorch_lora_weights.safetensors")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except FileNotFoundError as error:
        raise UserError(f"no LoRA at {path}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a LoRA file: {first_line(error)}") from error
    start, end = "transformer.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in tensors if key.startswith(start) and key.endswith(end)]
    lora = LoRA(transformer, names or ["LoRA in diffusers format"], rank=1)
    for name in names:
        A, B = tensors[f"{start}{name}.lora_A.weight"], tensors[f"{start}{name}.lora_B.weight"]
        layer = lora.layers.get(name)
        if layer is None or (A.shape[1], B.shape[0]) != (layer.base.in_features, layer.base.out_features):
            raise UserError(f"the LoRA {path} does not fit this model at {name}")
        alpha = metadata.get("transformer.lora_alpha", len(A))
        layer.scale = float(tensors.get(f"{start}{name}.alpha", alpha)) / len(A)
        layer.A, layer.B = (torch.nn.Parameter(a.to(layer.A)) for a in (A, B))
    return lora
