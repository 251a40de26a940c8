"""LoRA files in the format of diffusers, and which layers to put a LoRA around."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from errors import UserError, first_line
from fdflow import LoRA


def attention_layers(network, few=False):
    """Names of the layers to train: all attention projections, in SD3 and Flux of both streams.

    Few: the value and output projections of the last four attention layers, for the estimators whose variance
    or cost grows with the number of parameters.
    """
    if few:
        linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linears if name.endswith((".to_v", ".to_out.0"))][-8:]
    return ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def save_lora(lora, path, part):
    """Write what `pipe.load_lora_weights` reads; the scale is folded into B, so alpha equals the rank.

    part: the pipeline's name for the network, "transformer" or "unet".
    """
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{part}.{name}.lora_A.weight"] = layer.A.detach().cpu().clone()
        tensors[f"{part}.{name}.lora_B.weight"] = (layer.scale * layer.B).detach().cpu().contiguous()
    beside = Path(f"{path}.part")
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(path)


def load_lora(flow, path):
    """Put a LoRA file, or that of a run folder, around the layers of `flow.network`; returns the LoRA."""
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
    start, end = f"{flow.part}.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in tensors if key.startswith(start) and key.endswith(end)]
    linears = {name for name, module in flow.network.named_modules() if isinstance(module, nn.Linear)}
    if not names or not linears.issuperset(names):
        raise UserError(f"the LoRA {path} does not fit this model")
    lora = LoRA(flow.network, names, rank=1)
    for name in names:
        A, B = tensors[f"{start}{name}.lora_A.weight"], tensors[f"{start}{name}.lora_B.weight"]
        layer = lora.layers[name]
        if (A.shape[1], B.shape[0]) != (layer.base.in_features, layer.base.out_features):
            raise UserError(f"the LoRA {path} does not fit this model at {name}")
        alpha = metadata.get(f"{start}lora_alpha", len(A))
        layer.scale = float(tensors.get(f"{start}{name}.alpha", alpha)) / len(A)
        layer.A.data, layer.B.data = A.to(layer.A), B.to(layer.B)
    return lora
