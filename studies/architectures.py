"""The published architectures with random weights, for bench.py: nothing is downloaded."""

import inspect

import diffusers
import transformers

from flows import FAMILIES
from predictors import Clip

TURBO = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    timestep_spacing="trailing",
    steps_offset=1,
)
UNET_TOY = {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 2}
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# pipeline, network, its configuration where it differs from the class's, the same at toy size, scheduler,
# latent channels, and the widths of a prompt's embedding: of each token, and pooled
ARCHITECTURES = {
    "sd3.5": (
        diffusers.StableDiffusion3Pipeline,
        diffusers.SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm",
         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
        {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128,
         "dual_attention_layers": (0,)},
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 16, (4096, 2048),
    ),
    "sd-turbo": (
        diffusers.StableDiffusionPipeline,
        diffusers.UNet2DConditionModel,
        {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
        UNET_TOY, TURBO, 4, (1024,),
    ),
    "sdxl-turbo": (
        diffusers.StableDiffusionXLPipeline,
        diffusers.UNet2DConditionModel,
        {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), **SDXL_BLOCKS,
         "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
         "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        {"block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1},
        TURBO, 4, (2048, 1280),
    ),
    "flux-schnell": (
        diffusers.FluxPipeline,
        diffusers.FluxTransformer2DModel,
        {},
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2},
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), 16, (4096, 768),
    ),
}  # fmt: skip


def build(name, tokens, toy, weights):
    """A pipeline without encoders, the shapes of one prompt's embeddings, and a Clip of PickScore's size.

    tokens: of the T5 encoder. weights: the context in which random weights are made.
    """
    pipeline, network, published, small, scheduler, channels, (width, *pooled) = ARCHITECTURES[name]
    widths = (8, 8, 8, 8) if toy else (128, 256, 512, 512)
    text, vision = (
        {"hidden_size": 1024, "num_hidden_layers": 24},
        {"hidden_size": 1280, "num_hidden_layers": 32},
    )
    for part in (text, vision):  # CLIP ViT-H/14
        part |= {"hidden_size": 64, "num_hidden_layers": 2} if toy else {}
        part |= {"intermediate_size": 4 * part["hidden_size"], "num_attention_heads": 16, "patch_size": 14}
    with weights:
        vae = diffusers.AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, norm_num_groups=widths[0] // 4,
            latent_channels=channels, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
        network = network(**published | small if toy else published)
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
        )
    needed = [key for key, p in inspect.signature(pipeline).parameters.items() if p.default is p.empty]
    parts = {"vae": vae, "scheduler": scheduler, FAMILIES[pipeline.__name__].part: network}
    pipe = pipeline(**dict.fromkeys(needed) | parts)
    length = {"sd3.5": 77 + tokens, "flux-schnell": tokens}.get(name, 77)
    shapes = [(length, width), *((n,) for n in pooled)]
    return pipe, shapes, Clip(clip, None, transformers.CLIPImageProcessor())
