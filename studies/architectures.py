"""The published architectures with random weights, for studies/bench.py: nothing is downloaded."""

import inspect

import diffusers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from models.flows import FAMILIES
from rewards import Clip

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
TURBO = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    timestep_spacing="trailing", steps_offset=1,
)  # fmt: skip
SDXL = dict(
    block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True, cross_attention_dim=2048, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, attention_head_dim=(5, 10, 20),
)  # fmt: skip
# pipeline, network, its configuration where it differs from the class's, what a toy has instead, scheduler,
# latent channels, widths of a prompt's embedding: of each token, and pooled
ARCHITECTURES = {
    "sd3.5": (
        diffusers.StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel,
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
             pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128, dual_attention_layers=(0,)),
        FLOW(shift=3.0), 16, (4096, 2048),
    ),
    "sd-turbo": (
        diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel,
        dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True),
        dict(block_out_channels=(32, 32, 32, 32), attention_head_dim=2), TURBO, 4, (1024,),
    ),
    "sdxl-turbo": (
        diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel, SDXL,
        dict(block_out_channels=(32, 32, 32), attention_head_dim=2, transformer_layers_per_block=1),
        TURBO, 4, (2048, 1280),
    ),
    "flux-schnell": (
        diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, {},
        dict(num_layers=2, num_single_layers=2, num_attention_heads=2), FLOW(shift=1.0), 16, (4096, 768),
    ),
}  # fmt: skip
# what others have instead
VARIANTS = {
    "sd3": ("sd3.5", dict(dual_attention_layers=(), qk_norm=None, pos_embed_max_size=192)),
    "sd3.5-large": ("sd3.5", dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                                  dual_attention_layers=(), pos_embed_max_size=192)),
    "sd1.5": ("sd-turbo", dict(attention_head_dim=8, cross_attention_dim=768, use_linear_projection=False)),
    "sdxl": ("sdxl-turbo", {}),
    "flux-dev": ("flux-schnell", dict(guidance_embeds=True)),
}  # fmt: skip


def build(name, tokens, toy, weights):
    """A pipeline without encoders, the shapes of one prompt's embeddings, and a Clip of PickScore's size.

    tokens: of the T5 encoder. weights: the context in which random weights are made.
    """
    name, instead = VARIANTS.get(name, (name, {}))
    pipeline, network, config, small, scheduler, channels, (width, *pooled) = ARCHITECTURES[name]
    config, width = config | instead, instead.get("cross_attention_dim", width)
    text = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    vision = text | dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14
    )
    if toy:
        config, small = (
            config | small,
            dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2),
        )
        text, vision = text | small, vision | small
    with weights:
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32,) * 4 if toy else (128, 256, 512, 512), latent_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )  # fmt: skip
        network = network(**config)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    needed = [
        key for key, p in inspect.signature(pipeline).parameters.items() if p.default is p.empty
    ]
    parts = {"vae": vae, "scheduler": scheduler, FAMILIES[pipeline.__name__].network_name: network}
    length = {"sd3.5": 77 + tokens, "flux-schnell": tokens}.get(name, 77)
    shapes = [(length, width), *((n,) for n in pooled)]
    return pipeline(**dict.fromkeys(needed) | parts), shapes, Clip(clip, None, CLIPImageProcessor())
