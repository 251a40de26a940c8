"""Small random pipelines of many diffusers classes, complete with tokenizers and text encoders.

    torch.manual_seed(0)
    pipe = randomize(PIPELINES["sana"]())
    pipe(prompt=["red apple"], num_inference_steps=2, height=64, width=64)

Parts are of the classes that the published models have, schedulers are configured as theirs, and
no weight is left at zero, so that images depend on prompt, noise and time. Nothing is downloaded.
"""

import re
import string
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import processors

# ---- tokenizers

# Words that become tokens of their own; others are spelt. Qwen-Image and its kin cut off the first
# 34 tokens of what they tell the text encoder: with these words it has 34 here, too.
TEXT = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)

# a turn of the user and the start of the answer, as Qwen's own template has them
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}"""


def train_tokenizer(tokenizer):
    """Return a tokenizer of the same class that knows single characters and the words of TEXT."""
    words = re.findall(r" ?\S+", TEXT)
    return tokenizer.train_new_from_iterator(
        words, 500, initial_alphabet=list(string.printable), show_progress=False
    )


def qwen_tokenizer():
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(transformers.Qwen2Tokenizer(extra_special_tokens=marks))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma_tokenizer():
    return train_tokenizer(transformers.GemmaTokenizer(add_bos_token=True))


def llama_tokenizer():
    return train_tokenizer(transformers.LlamaTokenizer(add_eos_token=True, pad_token="</s>"))


def glm_tokenizer():
    """Return Qwen's tokenizer with what GLM's also has: two marks first, padding on the left."""
    marks = ["[gMASK]", "<sop>"]
    backend = qwen_tokenizer().backend_tokenizer
    backend.add_special_tokens(marks)
    backend.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A", special_tokens=[(mark, backend.token_to_id(mark)) for mark in marks]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", padding_side="left"
    )


def t5_tokenizer():
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def clip_tokenizer():
    """Load the tokenizer of the bundled model."""
    tiny = Path(__file__).resolve().parents[1] / "tiny"
    return transformers.CLIPTokenizer.from_pretrained(tiny / "tiny-sd3" / "tokenizer")


# ---- text encoders

T5 = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LANGUAGE_MODEL = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION_MODEL = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def clip_config(width):
    return transformers.CLIPTextConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=2046,
        eos_token_id=2047,
        pad_token_id=2047,
    )


def clip_encoder(width):
    return transformers.CLIPTextModel(clip_config(width))


def clip_encoder_with_projection(width):
    return transformers.CLIPTextModelWithProjection(clip_config(width))


def t5_encoder(width):
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=30, d_model=width, **T5))


def qwen3_config(layers=3):
    return transformers.Qwen3Config(**LANGUAGE_MODEL | {"num_hidden_layers": layers})


def vision_language_config(kind, **vision):
    """Return the config of a Qwen that could see images, too; pipelines show it none."""
    axes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return kind(
        text_config={**LANGUAGE_MODEL, "rope_parameters": axes},
        vision_config={**VISION_MODEL, "out_hidden_size": 16, **vision},
    )


def gemma_encoder():
    return transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE_MODEL))


# ---- VAEs, with 8 x 8 pixels for each latent

BLOCKS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
}


def vae(channels, **options):
    return diffusers.AutoencoderKL(**BLOCKS, latent_channels=channels, **options)


def sdxl_vae():
    return vae(4, scaling_factor=0.13025)


def flux_vae():
    return vae(16, scaling_factor=0.3611, shift_factor=0.1159)


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.5, 0.0, 0.5, 0.0],
        latents_std=[3.0, 2.0, 3.0, 2.0],
    )


def sana_vae():
    return diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


# ---- pipelines

FlowEuler = diffusers.FlowMatchEulerDiscreteScheduler
STABLE_DIFFUSION_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def unet(cross, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        use_linear_projection=True,
        **options,
    )


def sd(scheduler, **options):
    return diffusers.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(16),
        tokenizer=clip_tokenizer(),
        unet=unet(16),
        scheduler=scheduler(**STABLE_DIFFUSION_SCHEDULE, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler, **options):
    size_embedding = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }

    return diffusers.StableDiffusionXLPipeline(
        vae=sdxl_vae(),
        text_encoder=clip_encoder(16),
        text_encoder_2=clip_encoder_with_projection(24),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(40, **size_embedding),
        scheduler=scheduler(**STABLE_DIFFUSION_SCHEDULE, **options),
    )


# what many transformers have in common
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def sd3(with_t5=True, **shift):
    transformer = diffusers.SD3Transformer2DModel(
        **SMALL,
        sample_size=8,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    no_convs = {"use_quant_conv": False, "use_post_quant_conv": False}

    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowEuler(**shift),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, **no_convs),
        text_encoder=clip_encoder_with_projection(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder_with_projection(16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(40) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(guidance_embeds, **shift):
    transformer = diffusers.FluxTransformer2DModel(
        **SMALL,
        num_single_layers=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )

    return diffusers.FluxPipeline(
        scheduler=FlowEuler(**shift),
        vae=flux_vae(),
        text_encoder=clip_encoder(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(24),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def flux2_klein():
    transformer = diffusers.Flux2Transformer2DModel(
        **SMALL,
        in_channels=16,
        num_single_layers=2,
        joint_attention_dim=48,  # it sees layers 9, 18 and 27 of the text encoder
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )

    return diffusers.Flux2KleinPipeline(
        scheduler=FlowEuler(use_dynamic_shifting=True, shift=3.0),
        vae=diffusers.AutoencoderKLFlux2(**BLOCKS, latent_channels=4, layers_per_block=1),
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(layers=28)),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        **SMALL,
        num_single_layers=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )

    return diffusers.ChromaPipeline(
        scheduler=FlowEuler(use_dynamic_shifting=True, shift=3.0),
        vae=flux_vae(),
        text_encoder=t5_encoder(24),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        **SMALL, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    )

    return diffusers.OvisImagePipeline(
        scheduler=FlowEuler(use_dynamic_shifting=True, shift=3.0),
        vae=flux_vae(),
        text_encoder=transformers.Qwen3Model(qwen3_config()),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        **SMALL, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4)
    )
    config = vision_language_config(transformers.Qwen2_5_VLConfig, fullatt_block_indexes=[0])

    return diffusers.QwenImagePipeline(
        scheduler=FlowEuler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=qwen_vae(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def krea2():
    transformer = diffusers.Krea2Transformer2DModel(
        **SMALL,
        in_channels=16,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    config = vision_language_config(transformers.Qwen3VLConfig, deepstack_visual_indexes=[0])

    return diffusers.Krea2Pipeline(
        scheduler=FlowEuler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=transformers.Qwen3VLModel(config),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )

    return diffusers.ZImagePipeline(
        scheduler=FlowEuler(shift=3.0),
        vae=flux_vae(),
        text_encoder=transformers.Qwen3Model(qwen3_config()),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )

    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=sana_vae(),
        transformer=transformer,
        scheduler=scheduler,
    )


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )

    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowEuler(shift=6.0),
        vae=flux_vae(),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )


def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    )
    config = transformers.UMT5Config(vocab_size=512, d_model=16, **T5)

    return diffusers.AuraFlowPipeline(
        tokenizer=llama_tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(config),
        vae=sdxl_vae(),
        transformer=transformer,
        scheduler=FlowEuler(shift=1.73),
    )


def pixart_sigma():
    transformer = diffusers.PixArtTransformer2DModel(
        **SMALL, sample_size=8, caption_channels=24, cross_attention_dim=32
    )

    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(24),
        vae=sdxl_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),  # its defaults are those of the model
    )


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        **SMALL, text_embed_dim=16, time_embed_dim=16, condition_dim=8
    )
    shift = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}

    return diffusers.CogView4Pipeline(
        tokenizer=glm_tokenizer(),
        text_encoder=transformers.GlmModel(transformers.GlmConfig(**LANGUAGE_MODEL)),
        vae=flux_vae(),
        transformer=transformer,
        scheduler=FlowEuler(use_dynamic_shifting=True, **shift),
    )


PIPELINES = {
    "sd1.5": partial(sd, diffusers.PNDMScheduler, skip_prk_steps=True),
    "sd2.1": partial(
        sd,
        diffusers.DDIMScheduler,
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        clip_sample=False,
    ),
    "sd-turbo": partial(sd, diffusers.EulerDiscreteScheduler, timestep_spacing="trailing"),
    "sdxl": partial(sdxl, diffusers.EulerDiscreteScheduler, timestep_spacing="leading"),
    "sdxl-turbo": partial(
        sdxl, diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing"
    ),
    "sd3": partial(sd3, shift=3.0),
    "sd3-without-t5": partial(sd3, with_t5=False, shift=3.0),
    "sd3-dynamic-shift": partial(sd3, use_dynamic_shifting=True),
    "flux-dev": partial(flux, guidance_embeds=True, use_dynamic_shifting=True, shift=3.0),
    "flux-schnell": partial(flux, guidance_embeds=False, shift=1.0),
    "flux2-klein": flux2_klein,
    "chroma": chroma,
    "ovis": ovis,
    "qwen-image": qwen_image,
    "krea2": krea2,
    "z-image": z_image,
    "sana": sana,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "pixart-sigma": pixart_sigma,
    "cogview4": cogview4,
}


def randomize(pipe):
    """Add noise to all weights, of which some start at zero; no dropout, as after loading."""
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        part.eval()

        # with less the words of a prompt hardly show, and with more in the VAE images are clipped
        scale = 0.5 if name.startswith("text_encoder") else 0.05 if name == "vae" else 0.15
        for p in part.parameters():
            p.data += scale * torch.randn(p.shape)

    pipe.set_progress_bar_config(disable=True)
    return pipe
