"""Stable Diffusion 1.5 as a single file, with the names of its first authors, as Civitai has it."""

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip
BLOCK = re.compile(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.")


def renamed(name, table):
    """A dotted name with those of its parts that a table has replaced."""
    for ours, theirs in table.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\1{theirs}", name)
    return name


def unet_name(name):
    """The name of a parameter of a UNet of two levels with one layer each."""

    def place(match):
        side, level, kind, number = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{2 * level + 2}.0."
        if kind == "upsamplers":  # after an attention, where there is one
            return f"output_blocks.{2 * level + 1}.2."
        part = 0 if kind == "resnets" else 1
        if side == "down":
            return f"input_blocks.{2 * level + 1}.{part}."
        return f"output_blocks.{2 * level + number}.{part}."

    is_resnet = ".resnets." in name
    name = renamed(BLOCK.sub(place, name), UNET)
    name = renamed(name, RESNET) if is_resnet else name
    return re.sub(r"(input_blocks\.\d\.0)\.conv\.", r"\1.op.", name)


def vae_name(name):
    """The name of a parameter of a VAE of four levels."""

    def place(match):
        side, level, kind, number = match[1], int(match[2]), match[3], match[4]
        level = level if side == "down" else 3 - level
        if kind == "resnets":
            return f"{side}.{level}.block.{number}."
        return f"{side}.{level}.{side}sample."

    return renamed(BLOCK.sub(place, name), VAE)


def save_single_file(pipe, path):
    """Write the weights of a StableDiffusionPipeline as a single file."""
    tensors = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name)}"] = tensor.contiguous()
    for name, tensor in pipe.vae.state_dict().items():
        if re.search(r"attentions.*to_.*weight", name):
            tensor = tensor[:, :, None, None]  # there a convolution
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor.contiguous()
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = tensor.contiguous()
    save_file(tensors, path)
