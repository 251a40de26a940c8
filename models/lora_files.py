"""LoRA files in the format of diffusers, and which layers to put a LoRA around."""

import hashlib
import json
import math
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fdflow import LoRA
from support.errors import UserError, first_line
from support.run import write_whole

LAYERS = {  # how names of layers end; in SD3 and Flux, of both streams
    "attention": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "last": ["to_v", "to_out.0"],
    "modulation": ["norm1.linear", "norm1_context.linear", "norm.linear", "time_emb_proj"],
}
BEYOND = {  # what a file is that has such keys
    "lora_te|text_encoder": "adapts a text encoder, which is not done here",
    "magnitude|dora_scale": "is a DoRA, which is not supported",
    "bias": "adapts biases, which is not supported",
    "lora_down|lora_up|lora_unet": "is in kohya's layout: load it in diffusers, then pipe.save_lora_weights",
}


def layers_named(network, which):
    """The full names of the linear layers to put a LoRA around.

    which: "attention", all attention projections; "last", the value and output projections of the last four
    attention layers, for the estimators whose variance or cost grows with the number of parameters;
    "modulation", the layers through which the time steers the others; "all", every linear layer of the
    repeated blocks; or ends of names, with commas. UserError if the network has no such layer.
    """
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if which == "all":
        return [name for name in linears if "transformer_blocks." in name]
    ends = LAYERS.get(which, which.split(","))
    absent = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in linears)]
    if absent == ends or absent and which not in LAYERS:
        raise UserError(f"--layers: this model has no linear layer {' or '.join(absent)}")
    chosen = [name for name in linears if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    return chosen[-8:] if which == "last" else chosen


def save_lora(lora, path, network_name):
    """Write what `pipe.load_lora_weights` reads, and a checksum; the scale is in B, so alpha is the rank.

    network_name: the pipeline's name for the network, "transformer" or "unet".
    """
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{network_name}.{name}.lora_A.weight"] = layer.A.detach().cpu()
        tensors[f"{network_name}.{name}.lora_B.weight"] = (layer.scale * layer.B).detach().cpu()
    write_whole(Path(path), save(tensors, {"sha256": checksum(tensors)}))


def checksum(tensors):
    """SHA-256 of tensors {name: tensor}, as a file that has nothing else."""
    return hashlib.sha256(save(tensors)).hexdigest()


def load_lora(flow, path):
    """Put a LoRA file, or that of a run folder, around the layers of `flow.network`; returns the LoRA.

    UserError if it holds more than can be applied here, or does not fit the network.
    """
    path = Path(path)
    if path.is_dir():  # the second is the name diffusers gives its own
        names = ("lora.safetensors", "pytorch_lora_weights.safetensors")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            about = file.metadata() or {}
        if about.get("sha256", checksum(tensors)) != checksum(tensors):
            raise ValueError("it is damaged, its checksum is wrong")
        metadata = dict(json.loads(about.get("lora_adapter_metadata", "{}")))
    except FileNotFoundError as error:
        raise UserError(f"no LoRA at {path}") from error
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is not a LoRA file: {first_line(error)}") from error
    try:
        layers = matrices_and_scales(flow, tensors, metadata)
    except ValueError as error:
        raise UserError(f"the LoRA {path} {first_line(error)}") from error
    lora = LoRA(flow.network, list(layers), rank=1)
    for name, (A, B, scale) in layers.items():
        layer = lora.layers[name]
        layer.A.data, layer.B.data, layer.scale = A.to(layer.A), B.to(layer.B), scale
    return lora


def matrices_and_scales(flow, tensors, metadata):
    """{name of a layer: (A [rank, in], B [out, rank], scale)} of a LoRA file; ValueError: what is wrong."""
    parts, start = {}, f"{flow.network_name}."
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{flow.network_name}\.(.+)\.(lora_A\.weight|lora_B\.weight|alpha)", key)
        if not match:
            known = [text for part, text in BEYOND.items() if re.search(part, key)]
            raise ValueError(f"{known[0] if known else 'does not fit this model'} ({key})")
        if tensor.ndim == 4:
            raise ValueError(f"adapts convolutions, which is not supported ({key})")
        whole = match[2] != "alpha" and not tensor.is_floating_point()
        if whole or not tensor.float().isfinite().all():
            raise ValueError(f"is damaged: {key} has numbers that are not finite floats")
        parts.setdefault(match[1], {})[match[2]] = tensor
    config = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    usual = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal")}  # others change the base model
    for key in ("use_dora", "lora_bias", "init_lora_weights"):
        if config.get(key) not in (None, False, *usual.get(key, ())):
            raise ValueError(f"has {key} {config[key]}, which is not supported")
    layers, modules = {}, dict(flow.network.named_modules())
    for name, part in parts.items():
        A, B, base = part.get("lora_A.weight"), part.get("lora_B.weight"), modules.get(name)
        if A is None or B is None:
            raise ValueError(f"is incomplete: {name} has no {'A' if A is None else 'B'}")
        rank, linear = A.shape[0] if A.ndim else 0, isinstance(base, nn.Linear)
        if not (rank and linear and A.shape[1:] + B.shape == (base.in_features, base.out_features, rank)):
            raise ValueError(f"does not fit this model at {name}")
        try:
            patterns = (config.get("alpha_pattern") or {}).items()
            alphas = [alpha for end, alpha in patterns if re.match(rf"(.*\.)?({end})$", name)]
            alpha = float(part.get("alpha", [*alphas, config.get("lora_alpha", rank)][0]))
        except (TypeError, ValueError, AttributeError, RuntimeError, re.error):
            alpha = math.nan
        if not math.isfinite(alpha):
            raise ValueError(f"has no number for the alpha of {name}")
        layers[name] = A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not layers:
        raise ValueError("is empty")
    return layers
