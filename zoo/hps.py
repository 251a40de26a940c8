"""HPS v2.1 (Wu et al. 2023): a CLIP ViT-H/14 tuned on 800,000 choices of people.

The score is 100 x the cosine of image and prompt, as tables have it; typically 25 to 32. The
published checkpoint has OpenCLIP's names of the weights, and is loaded into transformers' CLIP.
"""

import re
from types import SimpleNamespace

import torch
import transformers

from zoo.loading import CLIP_H, downloaded, large_model_dtype, pretrained

# names of OpenCLIP -> names of transformers, applied in this order
NAMES = [
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


def renamed(weights):
    """Return the weights of an OpenCLIP model, {name: tensor}, by transformers' names."""
    result = {}
    for name, tensor in weights.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)

        if ".in_proj_" in name:  # queries, keys and values in one
            for part, third in zip("qkv", tensor.chunk(3)):
                result[name.replace("in_proj_", f"{part}_proj.")] = third
        elif name.endswith("_projection.weight"):
            result[name] = tensor.T.contiguous()
        else:
            result[name] = tensor
    result.pop("attn_mask", None)  # which is no weight
    return result


def load(Clip, device):
    """Return a Clip, the class of rewards.py, with the weights of HPS v2.1."""
    path = downloaded("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]

    model = transformers.CLIPModel(pretrained(transformers.CLIPConfig, CLIP_H))
    model.load_state_dict(renamed(weights))
    model.to(device, large_model_dtype(device))

    # its own preprocessing keeps the whole image, on black
    side = model.config.vision_config.image_size
    published = pretrained(transformers.CLIPImageProcessor, CLIP_H)
    processor = SimpleNamespace(
        size={"longest_edge": side},
        do_center_crop=False,
        image_mean=published.image_mean,
        image_std=published.image_std,
    )
    return Clip(model, pretrained(transformers.CLIPTokenizer, CLIP_H), processor)
