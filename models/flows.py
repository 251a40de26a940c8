"""Diffusers pipelines as flows in the coordinates of fdflow.py: Stable Diffusion 1 to 3.5, SDXL, Flux.

Every family keeps the model code, schedule and encoders of its diffusers pipeline, and says here only how its
network becomes a velocity. Each makes the very images of its pipeline for the same noise.
"""

import math

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fdflow
from errors import UserError, first_line
from models import load_pipeline


def load_flow(model, args, prompts):
    """Load a Model as the Flow of its family and encode all prompts it will be asked for."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {first_line(error)}") from error
    pipe = load_pipeline(model.path, getattr(torch, args.dtype))
    flow = FAMILIES[type(pipe).__name__](pipe, args, model.tokens)
    flow.encode(prompts)
    return flow


class Flow:
    """A diffusers pipeline as a flow; the families below say what differs.

    Latents x are float32 [B, C, H / 8, W / 8]; `cond` [B] holds indices into the prompts given to `encode`;
    `times` is the scheduler's own schedule, `train_times` the same without a last step from below 0.01, which
    moves nothing. guidance > 1 is classifier-free guidance. `network` is the part that is trained, `part` its
    name in the pipeline, `blocks` the classes of its repeated blocks.

    A family has `embed(prompts, unconditional)`, the tensors that its encoders make of prompts, or of none
    (pipelines return both in turn: text, none, pooled, none), and `predict(x, t, *tensors)`, the velocity.
    """

    part = "transformer"
    patch = 1  # latent pixels to a side of the network's patch
    noise_scale = 1.0  # times the noise of a pipeline is normal noise

    def __init__(self, pipe, args, tokens):
        """args has device, dtype, steps, size, guidance, compile and checkpointing, all filled in."""
        self.pipe, self.device, self.dtype = pipe, args.device, getattr(torch, args.dtype)
        self.guidance, self.tokens = args.guidance, tokens
        self.network = getattr(pipe, self.part).eval().requires_grad_(False)
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.width, self.height = (int(side) for side in (args.size.split("x") * 2)[:2])
        pixels = pipe.vae_scale_factor * self.patch
        most = pixels * self.network.config.get("pos_embed_max_size", 1000)
        if self.width % pixels or self.height % pixels or max(self.width, self.height) > most:
            raise UserError(f"--size {args.size}: this model makes multiples of {pixels} pixels up to {most}")
        scale = pipe.vae_scale_factor
        self.shape = (self.vae.config.latent_channels, self.height // scale, self.width // scale)
        self.times = self.schedule(args.steps)
        self.train_times = [t for t in self.times if t == 0 or t > 0.01]
        self.prompts, self.last = [], (None, None)
        if args.checkpointing:
            self.network.enable_gradient_checkpointing()
        if args.compile:  # the repeated blocks only, which starts sooner than the whole network
            # kinds of blocks x gradient or not x LoRA on or off x sizes of batches
            torch._dynamo.config.recompile_limit = 64
            for module in self.network.modules():
                if type(module).__name__ in self.blocks:
                    module.compile()

    def schedule(self, steps, sigmas=None):
        """The times of a flow-matching scheduler, shifted by the size of the image where it is dynamic."""
        scheduler, c = self.pipe.scheduler, self.pipe.scheduler.config
        patches, mu = self.shape[1] * self.shape[2] // self.patch**2, None
        if c.use_dynamic_shifting:  # linear in the number of patches
            slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
            mu = c.base_shift + slope * (patches - c.base_image_seq_len)
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return scheduler.sigmas.tolist()

    @torch.no_grad()
    def encode(self, prompts):
        """Encode prompts, once for all: `cond` is an index into them, and the encoders are let go."""
        encoders = {k: e for k, e in self.pipe.components.items() if k.startswith("text_encoder") and e}
        for encoder in encoders.values():
            encoder.to(self.device)
        distinct, self.prompts = list(dict.fromkeys(prompts)), list(prompts)
        parts = [self.embed(distinct[i : i + 64], False) for i in range(0, len(distinct), 64)]
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        self.embeddings = [torch.cat([a.cpu() for a in part])[rows] for part in zip(*parts)]
        self.empty = [a.cpu() for a in self.embed(distinct[:1], True)] if self.guided else None
        for name in encoders:
            setattr(self.pipe, name, None)
        self.network.to(self.device)
        self.vae.to(self.device)

    @property
    def guided(self):
        """Whether guidance takes a second, unconditional call of the network."""
        return self.guidance > 1

    def velocity(self, x, t, cond):
        """v(x_t, t, cond) [B, C, h, w], float32; t is a float, one of `times`."""
        if self.last[0] is not cond:  # a trajectory asks again and again for the same
            self.last = cond, [a[cond].to(self.device) for a in self.embeddings]
        embeddings = self.last[1]
        if not self.guided:
            return self.predict(x, t, *embeddings)
        # each image beside its unconditional twin, so that the k-th part of the batch stays the k-th part
        twins = [(empty.to(a).expand_as(a), a) for a, empty in zip(embeddings, self.empty)]
        twins = [torch.stack(twin, 1).flatten(0, 1) for twin in twins]
        base, v = self.predict(x.repeat_interleave(2, 0), t, *twins).unflatten(0, (-1, 2)).unbind(1)
        return base + self.guidance * (v - base)

    def decode(self, x):
        """Latents to images [B, 3, H, W], float32 in [0, 1]; a few at a time, to save memory."""
        config, images = self.vae.config, []
        for part in x.split(max(1, min(16, 2**20 // (self.width * self.height)))):
            part = part / config.scaling_factor + (config.shift_factor or 0)
            image = self.vae.decode(part.to(self.dtype), return_dict=False)[0].float()
            images.append((image / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def noise(self, seeds):
        """Normal noise [N, C, h, w], image i that of torch.Generator().manual_seed(seeds[i])."""
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return self.noise_scale * torch.stack(draws).to(self.device)

    @torch.no_grad()
    def images(self, cond, seeds, batch=64, progress=False):
        """The deterministic images [N, 3, H, W] of prompts `cond` [N] and noise `seeds`, on the CPU."""
        images = []
        for i in tqdm(range(0, len(seeds), batch), disable=not progress, leave=False, desc="sampling"):
            c = cond[i : i + batch]
            x = fdflow.sample(self.velocity, self.noise(seeds[i : i + batch]), c, self.times)
            images.append(self.decode(x).cpu())
        return torch.cat(images)

    def full(self, x, value):
        """One number for each image, as networks take times and guidance: float32 [B]."""
        return torch.full((len(x),), value, device=x.device)


class SD3Flow(Flow):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024), with or without its T5 encoder."""

    blocks = ("JointTransformerBlock",)

    @property
    def patch(self):
        return self.pipe.patch_size

    def embed(self, prompts, unconditional):
        embeddings = self.pipe.encode_prompt(
            prompts, None, None, self.device, do_classifier_free_guidance=unconditional,
            max_sequence_length=self.tokens,
        )  # fmt: skip
        return embeddings[unconditional::2]

    def predict(self, x, t, text, pooled):
        timestep = self.full(x, 1000 * t)
        return self.network(x.to(self.dtype), text, pooled, timestep, return_dict=False)[0].float()


class FluxFlow(Flow):
    """Flux: patches of 2 x 2 latent pixels as tokens; a distilled guidance is an input of the network."""

    blocks, patch = ("FluxTransformerBlock", "FluxSingleTransformerBlock"), 2
    guided = False

    def schedule(self, steps):
        if self.guidance > 1 and not self.network.config.guidance_embeds:
            raise UserError(f"--guidance {self.guidance}: this model was made to run without, at 1")
        return super().schedule(steps, sigmas=np.linspace(1.0, 1 / steps, steps))

    def embed(self, prompts, unconditional):
        return self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=self.tokens)[:2]

    def predict(self, x, t, text, pooled):
        patches = F.pixel_unshuffle(x, 2)
        rows, columns = patches.shape[2:]
        places = self.pipe._prepare_latent_image_ids(len(x), rows, columns, x.device, self.dtype)
        guidance = self.full(x, self.guidance) if self.network.config.guidance_embeds else None
        v = self.network(
            patches.flatten(2).mT.to(self.dtype), text, pooled, self.full(x, t), places,
            text.new_zeros(text.shape[1], 3), guidance, return_dict=False,
        )[0].float()  # fmt: skip
        return F.pixel_shuffle(v.mT.unflatten(2, (rows, columns)), 2)


class SDFlow(Flow):
    """Stable Diffusion 1, 2 and Turbo, which predict noise, or v, of a variance-preserving process.

    With a the cumulative alpha of a timestep and sigma = sqrt((1 - a) / a) its noise over its signal,
    t = sigma / (1 + sigma) and x_vp = sqrt(a) (1 + sigma) x_t. An Euler step in t is one of DDIM.
    """

    part, blocks = "unet", ("BasicTransformerBlock",)

    def schedule(self, steps):
        scheduler = diffusers.EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise UserError(f"this model predicts {self.kind}; known are epsilon and v_prediction")
        scheduler.set_timesteps(steps)
        self.timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas
        self.noise_scale = float(scheduler.init_noise_sigma / sigmas[0])
        return (sigmas / (1 + sigmas)).tolist()

    def embed(self, prompts, unconditional):
        return self.pipe.encode_prompt(prompts, self.device, 1, unconditional)[unconditional::2]

    def predict(self, x, t, text, **added):
        sigma = t / (1 - t)
        a = 1 / (1 + sigma**2)
        x_vp = math.sqrt(a) * (1 + sigma) * x
        timestep = self.full(x, self.timesteps[self.times.index(t)])
        out = self.network(x_vp.to(self.dtype), timestep, text, return_dict=False, **added)[0].float()
        eps = out if self.kind == "epsilon" else math.sqrt(a) * out + math.sqrt(1 - a) * x_vp
        return (eps - x) / (1 - t)


class SDXLFlow(SDFlow):
    """SDXL and SDXL-Turbo, which also see the pooled text and the size of the image."""

    def embed(self, prompts, unconditional):
        return self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=unconditional
        )[unconditional::2]

    def predict(self, x, t, text, pooled):
        size = [self.height, self.width]
        sizes = torch.tensor([size + [0, 0] + size], dtype=self.dtype, device=x.device).expand(len(x), -1)
        return super().predict(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})


FAMILIES = {
    "StableDiffusion3Pipeline": SD3Flow,
    "StableDiffusionPipeline": SDFlow,
    "StableDiffusionXLPipeline": SDXLFlow,
    "FluxPipeline": FluxFlow,
}
