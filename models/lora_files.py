"""LoRA files in the format of diffusers, and which layers to put a LoRA around."""

import re
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parameters_to_vector

from fdflow import LoRA
from support.errors import UserError, first_line
from support.run import warn, write_whole

LAYERS = {  # what the name of a layer ends with, whatever the network
    "attention": r"(attn\d?|attention)\..+",
    "last": r"(attn\d?|attention)\.(to_v|to_out|to_out\.0)",
    "modulation": r"(norm|norm1|norm1_context|time_embed|adaln_single)\.linear|time_emb_proj"
    r"|\w*modulation\w*\.(linear|\d)|\w+_mod\.1|time_mod_proj|distilled_guidance_layer\.out_proj",
}


def layers_named(network, which):
    """Return the full names of the linear layers to put a LoRA around.

    which: "all" linear layers of the repeated blocks; "attention", those of attention in them;
    "last", the last eight value and output projections, for the estimators whose variance or cost
    grows with the number of parameters; "modulation", the layers through which the time steers the
    others; or ends of names, with commas. UserError if the network has no such layer.
    """
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    blocks = tuple(f"{name}." for name, _ in repeated_blocks(network))
    if which in ("all", "attention", "last"):
        linears = [name for name in linears if name.startswith(blocks)]
    if which == "all":
        return linears

    ends = [re.escape(end.strip()) for end in which.split(",")]
    if which in LAYERS:
        ends = [LAYERS[which]]
    patterns = [re.compile(rf"(.*\.)?({end})") for end in ends]
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name in linears):
            raise UserError(f"--layers {which}: this model has no such linear layer")

    chosen = [name for name in linears if any(p.fullmatch(name) for p in patterns)]
    return chosen[-8:] if which == "last" else chosen


def repeated_blocks(network):
    """Return [(name, module)] of the blocks of which a network has many."""
    kinds = network._repeated_blocks or network._no_split_modules
    kinds = [kind for kind in kinds if kind.endswith("Block")]
    return [(name, m) for name, m in network.named_modules() if type(m).__name__ in kinds]


def save_lora(lora, path, network_name):
    """Write what `pipe.load_lora_weights` reads; the scale is in B, so alpha is the rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{network_name}.{name}.lora_A.weight"] = layer.A.detach().cpu()
        tensors[f"{network_name}.{name}.lora_B.weight"] = (layer.scale * layer.B).detach().cpu()
    write_whole(Path(path), save(tensors))


def find_file(path):
    """Return the LoRA file of a path, which may be the folder of a run or of diffusers."""
    path = Path(path)
    if path.is_dir():
        own = path / "lora.safetensors"
        return own if own.exists() else path / "pytorch_lora_weights.safetensors"
    return path


def make_lora(flow, layers, rank, alpha, generator, path=None):
    """Put a LoRA around layers of a flow's network; training goes on from the one at a path.

    If that has other layers or another rank, it becomes part of the frozen weights.
    """
    start = read_own(find_file(path), flow.network_name, layers, rank) if path else None
    if path and start is None:
        merge_lora(flow, path)
        warn(f"{path} becomes part of the frozen weights: draw with both LoRAs")
    lora = LoRA(flow.network, layers, rank, alpha, generator)

    if start:
        for p, tensor in zip(lora.parameters, start):
            p.data.copy_(tensor)
        for layer in lora.layers.values():
            layer.B.data /= layer.scale  # which is in the B of a file
        lora.start = parameters_to_vector(lora.parameters).detach().clone()
    return lora


def read_own(path, network_name, layers, rank):
    """Read the matrices A and B of each layer in turn; None if a file has others."""
    try:
        tensors, _ = read_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"no LoRA at {path}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error

    names = [f"{network_name}.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"]
    if {*names} != {*tensors} or {len(tensors[name]) for name in names[0::2]} != {rank}:
        return None
    return [tensors[name] for name in names]


def merge_lora(flow, path):
    """Add a LoRA to the frozen weights of a flow's network."""
    load_lora(flow, path)
    for name, module in list(flow.network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            flow.network.set_submodule(name, module.get_base_layer())


def load_lora(flow, path):
    """Let diffusers put a LoRA file, or that of a run folder, around layers of `flow.network`.

    UserError if diffusers cannot read it for this model, or uses only a part of it.
    """
    path = find_file(path)
    base = {id(p) for p in flow.network.parameters()}
    try:
        tensors, has_config = read_tensors(path)
        if hasattr(flow.pipe, "load_lora_weights"):
            flow.pipe.load_lora_weights(str(path) if has_config else tensors)
        else:
            inject(flow.network, tensors, f"{flow.network_name}.")

        added = {name: p for name, p in flow.network.named_parameters() if id(p) not in base}
        if not added or count(added) != count(tensors) or any(p.is_meta for p in added.values()):
            raise ValueError("a part of it fits nowhere, or is missing")
    except FileNotFoundError as error:
        raise UserError(f"no LoRA at {path}") from error
    except Exception as error:  # whatever damage, or the layout of another program, does
        raise UserError(f"{path} is no LoRA for this model: {first_line(error)}") from error
    flow.network.eval().requires_grad_(False)


def switch_lora(network, on):
    """Switch the layers that `load_lora` has put around others on or off."""
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def inject(network, tensors, prefix):
    """Put LoRA tensors around a network whose pipeline cannot read them, as PixArt's."""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    layers = {key.rpartition(".lora_")[0] for key in tensors}
    rank = next(tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
    peft.inject_adapter_in_model(config, network)
    peft.set_peft_model_state_dict(network, tensors)


def read_tensors(path):
    """Read the tensors of a LoRA file, alpha / rank in B; and whether it has a configuration."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        has_config = "lora_adapter_metadata" in (file.metadata() or {})

    # diffusers 0.42 applies the alphas of some layouts to other layers, or to none
    for key in [key for key in tensors if key.endswith(("lora_B.weight", "lora_up.weight"))]:
        rank = tensors[key].shape[1]
        alpha = tensors.pop(key[: key.rindex("lora_")] + "alpha", torch.tensor(rank))
        tensors[key] = tensors[key].float() * (alpha.item() / rank)
    return tensors, has_config


def count(tensors):
    """Count the numbers in all matrices but A, of which split layers each get a copy."""
    return sum(t.numel() for name, t in tensors.items() if not re.search("lora_A|down", name))
