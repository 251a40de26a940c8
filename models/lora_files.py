"""LoRA files in the format of diffusers, and which layers to put a LoRA around."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from support.errors import UserError, first_line
from support.run import checksum, write_whole

LAYERS = {  # how names of layers end; in SD3 and Flux, of both streams
    "attention": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ],
    "last": ["to_v", "to_out.0"],
    "modulation": ["norm1.linear", "norm1_context.linear", "norm.linear", "time_emb_proj"],
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
    """Write what `pipe.load_lora_weights` reads, and a checksum; the scale is in B, so alpha is the rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{network_name}.{name}.lora_A.weight"] = layer.A.detach().cpu()
        tensors[f"{network_name}.{name}.lora_B.weight"] = (layer.scale * layer.B).detach().cpu()
    write_whole(Path(path), save(tensors, {"sha256": checksum(save(tensors))}))


def load_lora(flow, path):
    """Let diffusers put a LoRA file, or that of a run folder, around layers of `flow.network`.

    Whatever `pipe.load_lora_weights` reads for this model; UserError if it reads none of it, or not all.
    """
    path = Path(path)
    if path.is_dir():  # the second is the name diffusers gives its own
        names = ("lora.safetensors", "pytorch_lora_weights.safetensors")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    base = {id(p) for p in flow.network.parameters()}
    try:
        tensors, configured = read_tensors(path)
        flow.pipe.load_lora_weights(str(path) if configured else tensors, use_safetensors=True)
        added = {name: p for name, p in flow.network.named_parameters() if id(p) not in base}
        (A, others), (A_of_file, others_of_file) = numbers(added), numbers(tensors)
        # where diffusers splits a layer, each part gets all of A; on "meta" is what the file does not have
        complete = (
            A >= A_of_file
            and others == others_of_file
            and not any(p.is_meta for p in added.values())
        )
        if not added or not complete:
            raise ValueError("it does not fit, some of its numbers are left over or missing")
        scales = [s for m in flow.network.modules() for s in getattr(m, "scaling", {}).values()]
        if not torch.tensor(scales).isfinite().all():
            raise ValueError("it has an alpha that is not finite")
    except FileNotFoundError as error:
        raise UserError(f"no LoRA at {path}") from error
    except Exception as error:  # whatever safetensors, diffusers and peft raise
        raise UserError(f"{path} is no LoRA for this model: {first_line(error)}") from error
    flow.network.eval().requires_grad_(False)


def read_tensors(path):
    """The tensors of a LoRA file, alpha / rank in B, and whether it has a configuration; or ValueError."""
    with safe_open(path, "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if about.get("sha256") not in (
        None,
        checksum(save(tensors)),
    ):  # files of other programs have none
        raise ValueError("it is damaged, its checksum is wrong")
    for key, tensor in tensors.items():
        if key.startswith(("text_encoder", "lora_te")):
            raise ValueError(f"it adapts a text encoder, too, which is not done here ({key})")
        whole = not (tensor.is_floating_point() or key.endswith(".alpha"))
        if whole or not tensor.float().isfinite().all():
            raise ValueError(f"it is damaged: {key} has numbers that are not finite floats")
    # diffusers 0.42 applies the alphas of some layouts to other layers, or to none
    for key in [key for key in tensors if key.endswith(("lora_B.weight", "lora_up.weight"))]:
        rank = tensors[key].shape[1]
        alpha = tensors.pop(key[: key.rindex("lora_")] + "alpha", torch.tensor(rank))
        tensors[key] = tensors[key].float() * (alpha.item() / rank)
    return tensors, "lora_adapter_metadata" in about


def numbers(tensors):
    """How many numbers are in the matrices A of tensors {name: tensor}, and how many in all others."""
    A = sum(t.numel() for name, t in tensors.items() if "lora_A" in name or "down.weight" in name)
    return A, sum(t.numel() for t in tensors.values()) - A
