"""Diffusers pipelines as flows in the coordinates of fdflow.py: Stable Diffusion 1 to 3.5, SDXL, Flux.

Every family keeps the model code, schedule and encoders of its diffusers pipeline, and says here only how its
network becomes a velocity. Each makes the very images of its pipeline for the same noise.
"""

import functools
import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fdflow
from models.table import check_device, load_pipeline, read_index, text_encoders
from support.errors import UserError, first_line

CHUNK = 64  # texts encoded at a time
IN_MEMORY = 2**30  # bytes of embeddings at most that need no files


def load_flow(model, args, prompts, cache=None):
    """Load a Model as the Flow of its family and encode all prompts it will be asked for.

    args: what `fill_defaults` filled in. cache: a folder for embeddings of more than 1 GB: all processes of a
    machine then share one copy, and the next run finds them there.
    """
    check_device(args.device)
    pipe = load_pipeline(model, getattr(torch, args.dtype))
    flow = FAMILIES[type(pipe).__name__](pipe, args, model.tokens)
    flow.encode(prompts, model, cache)
    flow.to_device()
    return flow


class Flow:
    """A diffusers pipeline as a flow; the families below say what differs.

    Latents x are float32 [B, C, H / 8, W / 8]; `cond` [B] holds indices into the prompts given to `encode`;
    `times` is the scheduler's own schedule; `train_times` that of the roll-outs, which may have fewer steps,
    without a last one from below 0.01, which moves nothing. guidance > 1 is classifier-free guidance.
    `network` is the part that is trained, `network_name` its name in the pipeline, `blocks` the classes of
    its repeated blocks.

    `outputs` names the outputs of each text encoder that are kept, `join(*outputs)` makes of them what the
    network takes, text [B, N, C] and perhaps pooled text [B, D], and `predict(x, t, *joined)` the velocity.
    """

    network_name = "transformer"
    patch = 1  # latent pixels to a side of the network's patch
    noise_scale = 1.0  # times the noise of a pipeline is normal noise
    gradient_scale = 1.0  # of gradients within the network

    def __init__(self, pipe, args, tokens):
        self.pipe, self.device, self.dtype = pipe, args.device, getattr(torch, args.dtype)
        self.guidance, self.tokens = args.guidance, tokens
        self.network = getattr(pipe, self.network_name).eval().requires_grad_(False)
        # whether it takes a second, unconditional call; Flux has guidance built in
        self.guided = self.guidance > 1 and not self.network.config.get("guidance_embeds")
        self.vae = pipe.vae.eval().requires_grad_(False)
        if self.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # its activations leave the range of float16
        self.width, self.height = (int(side) for side in (args.size.split("x") * 2)[:2])
        scale = pipe.vae_scale_factor
        self.patch = getattr(pipe, "patch_size", self.patch)
        pixels = scale * self.patch
        most = pixels * self.network.config.get("pos_embed_max_size", 1000)
        if self.width % pixels or self.height % pixels or max(self.width, self.height) > most:
            raise UserError(
                f"--size {args.size}: this model makes multiples of {pixels} pixels up to {most}"
            )
        self.shape = (self.vae.config.latent_channels, self.height // scale, self.width // scale)
        train_times = self.schedule(getattr(args, "rollout_steps", args.steps))
        self.train_times = [t for t in train_times if t == 0 or t > 0.01]
        self.times = self.schedule(args.steps)
        self.last = None, None
        if args.checkpointing:
            self.network.enable_gradient_checkpointing()
        if args.compile:  # the repeated blocks only, which starts sooner than the whole network
            warnings.filterwarnings("ignore", "Error detected in")  # torch's traceback of a Ctrl-C
            # kinds of blocks x gradient or not x LoRA on or off x sizes of batches
            torch._dynamo.config.recompile_limit = 64
            for module in self.network.modules():
                if type(module).__name__ in self.blocks:
                    module.compile()

    def to_device(self):
        """Move the network and the VAE to the device; on CUDA convolutions are faster with channels last."""
        layout = {"memory_format": torch.channels_last} if self.device.startswith("cuda") else {}
        self.vae.to(self.device, **layout)
        self.network.to(self.device, **layout if self.network_name == "unet" else {})

    def schedule(self, steps, sigmas=None):
        """The times of a flow-matching scheduler, shifted by the size of the image where it is dynamic."""
        scheduler, c = self.pipe.scheduler, self.pipe.scheduler.config
        patches = self.shape[1] * self.shape[2] // self.patch**2
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        mu = c.base_shift + slope * (
            patches - c.base_image_seq_len
        )  # taken if the shift is dynamic
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return scheduler.sigmas.tolist()

    @torch.no_grad()
    def encode(self, prompts, model, cache=None):
        """Encode prompts, each distinct one once, by one text encoder after another: only one is in memory.

        `embeddings` has a list for each output of an encoder, of tensors [64, ...] for one 64 texts after
        another. In a `cache` they are files, in a folder named for all that they depend on.
        """
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.prompts, self.rows = list(prompts), torch.tensor([row[prompt] for prompt in prompts])
        self.embeddings, self.empty = [], len(row)
        texts = [*row, None] if self.guided else [*row]
        width = (
            self.network.config.get("joint_attention_dim")
            or self.network.config.cross_attention_dim
        )
        folder = None
        if cache and len(texts) * (77 + self.tokens) * width * self.dtype.itemsize > IN_MEMORY:
            files = [
                (str(file), file.stat().st_mtime) for file in sorted(Path(model.path).glob("*/*"))
            ]
            key = json.dumps([model.path, files, str(self.dtype), self.tokens, texts])
            folder = Path(cache, hashlib.sha256(key.encode()).hexdigest()[:16])
        for name in text_encoders(read_index(model.path)):
            # the first `embed` loads the encoder; by then nothing holds the one before
            load, chunks = (
                functools.cache(functools.partial(load_pipeline, model, self.dtype, name)),
                [],
            )
            bar = {"leave": False, "delay": 5, "disable": os.environ.get("LOCAL_RANK", "0") != "0"}
            for i in tqdm(range(0, len(texts), CHUNK), f"encoding prompts, {name}", **bar):
                embed = functools.partial(self.run_encoder, load, name, texts[i : i + CHUNK])
                chunks.append(
                    tensors_in(folder / f"{name}-{i:06}.pt", embed) if folder else embed()
                )
            self.embeddings += zip(*chunks)

    def run_encoder(self, load, name, texts):
        """The outputs of a text encoder that this family keeps, tensors [N, ...] on the CPU."""
        pipe = load()
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        encoder = getattr(pipe, name).to(self.device)
        length = self.tokens if encoder.config.model_type == "t5" else tokenizer.model_max_length
        words, fit = [text or "" for text in texts], {"padding": "max_length", "truncation": True}
        tokens = tokenizer(words, max_length=length, return_tensors="pt", **fit)
        hidden = "penultimate" in self.outputs[name]
        out = encoder(tokens.input_ids.to(self.device), output_hidden_states=hidden)
        kept = [
            out.hidden_states[-2] if key == "penultimate" else out[key]
            for key in self.outputs[name]
        ]
        if texts[-1] is None and pipe.config.get("force_zeros_for_empty_prompt"):
            for tensor in kept:
                tensor[-1] = 0
        return [tensor.to("cpu", self.dtype) for tensor in kept]

    def conditioning(self, cond):
        """What the network takes of prompts `cond` [B], on the device; with guidance for 2 B images."""
        rows = self.rows[cond.cpu()]
        if (
            self.guided
        ):  # each image after its unconditional twin: the k-th part of a batch stays the k-th
            rows = torch.stack([torch.full_like(rows, self.empty), rows], 1).flatten()
        outputs = [
            torch.stack([chunks[r // CHUNK][r % CHUNK] for r in rows]) for chunks in self.embeddings
        ]
        return self.join(*(tensor.to(self.device) for tensor in outputs))

    def velocity(self, x, t, cond):
        """v(x_t, t, cond) [B, C, h, w], float32; t is one of `times`, or a tensor of them [B] beside x."""
        if self.last[0] is not cond:  # a trajectory asks again and again for the same
            self.last = cond, self.conditioning(cond)
        t = t if torch.is_tensor(t) else x.new_full(x.shape[:1], t)
        x = scaled_gradient(x, 1 / self.gradient_scale)
        if not self.guided:
            return scaled_gradient(self.predict(x, t, *self.last[1]), self.gradient_scale)
        both = self.predict(x.repeat_interleave(2, 0), t.repeat_interleave(2), *self.last[1])
        base, v = scaled_gradient(both, self.gradient_scale).unflatten(0, (-1, 2)).unbind(1)
        return base + self.guidance * (v - base)

    def scale_gradients(self, lora):
        """In float16, where most gradients would be too small a number, let the network see them 16,384 times
        as large, and neither the LoRA's parameters nor x."""
        if self.dtype == torch.float16:
            self.gradient_scale = 16384.0
            for p in lora.parameters:
                p.register_hook(lambda grad: grad / self.gradient_scale)

    def decode(self, x):
        """Latents to images [B, 3, H, W], float32 in [0, 1]; a few at a time, to save memory."""
        config, images = self.vae.config, []
        for part in x.split(max(1, min(16, 2**20 // (self.width * self.height)))):
            part = part / config.scaling_factor + (config.shift_factor or 0)
            image = self.vae.decode(part.to(self.vae.dtype), return_dict=False)[0].float()
            images.append((image / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def noise(self, seeds):
        """Normal noise [N, C, h, w], image i that of torch.Generator().manual_seed(seeds[i])."""
        draws = [
            torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return self.noise_scale * torch.stack(draws).to(self.device)

    @torch.no_grad()
    def images(self, cond, seeds, batch=64, progress=False):
        """The deterministic images [N, 3, H, W] of prompts `cond` [N] and noise `seeds`, on the CPU."""
        images = []
        for i in tqdm(
            range(0, len(seeds), batch), disable=not progress, leave=False, desc="sampling"
        ):
            c = cond[i : i + batch]
            x = fdflow.sample(self.velocity, self.noise(seeds[i : i + batch]), c, self.times)
            images.append(self.decode(x).cpu())
        return torch.cat(images)


def scaled_gradient(x, factor):
    """x itself, with its gradient multiplied by a factor."""
    if factor != 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda grad: grad * factor)
    return x


class SD3Flow(Flow):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024), with or without its T5 encoder."""

    blocks = ("JointTransformerBlock",)
    clip = ["penultimate", "text_embeds"]
    outputs = {
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": ["last_hidden_state"],
    }

    def join(self, text, pooled, text_2, pooled_2, text_3=None):
        width = self.network.config.joint_attention_dim
        text = F.pad(torch.cat([text, text_2], 2), (0, width - text.shape[2] - text_2.shape[2]))
        text_3 = text.new_zeros(len(text), self.tokens, width) if text_3 is None else text_3
        return torch.cat([text, text_3], 1), torch.cat([pooled, pooled_2], 1)

    def predict(self, x, t, text, pooled):
        return self.network(x.to(self.dtype), text, pooled, 1000 * t, return_dict=False)[0].float()


class FluxFlow(Flow):
    """Flux: patches of 2 x 2 latent pixels as tokens; a distilled guidance is an input of the network."""

    blocks, patch = ("FluxTransformerBlock", "FluxSingleTransformerBlock"), 2
    outputs = {"text_encoder": ["pooler_output"], "text_encoder_2": ["last_hidden_state"]}

    def schedule(self, steps):
        if self.guidance > 1 and not self.network.config.guidance_embeds:
            raise UserError(f"--guidance {self.guidance}: this model was made to run without, at 1")
        return super().schedule(steps, sigmas=[1 - i / steps for i in range(steps)])

    def join(self, pooled, text):
        return text, pooled

    def predict(self, x, t, text, pooled):
        patches = F.pixel_unshuffle(x, 2)
        rows, columns = patches.shape[2:]
        places = self.pipe._prepare_latent_image_ids(len(x), rows, columns, x.device, self.dtype)
        guidance = (
            x.new_full(x.shape[:1], self.guidance) if self.network.config.guidance_embeds else None
        )
        v = self.network(
            patches.flatten(2).mT.to(self.dtype), text, pooled, t, places,
            text.new_zeros(text.shape[1], 3), guidance, return_dict=False,
        )[0].float()  # fmt: skip
        return F.pixel_shuffle(v.mT.unflatten(2, (rows, columns)), 2)


class SDFlow(Flow):
    """Stable Diffusion 1, 2 and Turbo, which predict noise, or v, of a variance-preserving process.

    With a the cumulative alpha of a timestep and sigma = sqrt((1 - a) / a) its noise over its signal,
    t = sigma / (1 + sigma) and x_vp = sqrt(a) (1 + sigma) x_t. An Euler step in t is one of DDIM.
    """

    network_name, blocks = "unet", ("BasicTransformerBlock",)
    outputs = {"text_encoder": ["last_hidden_state"]}
    table = torch.empty(3, 0)

    def schedule(self, steps):
        scheduler = diffusers.EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise UserError(f"this model predicts {self.kind}; known are epsilon and v_prediction")
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[:steps]
        rows = torch.stack([sigmas / (1 + sigmas), sigmas, scheduler.timesteps]).to(self.device)
        self.table = torch.cat(
            [self.table.to(rows), rows], 1
        )  # of all schedules that are asked for
        self.noise_scale = float(scheduler.init_noise_sigma / sigmas[0])
        return [*rows[0].tolist(), 0.0]

    def join(self, text):
        return [text]

    def predict(self, x, t, text, **added):
        times, sigmas, timesteps = self.table
        step = (t[:, None] - times).abs().argmin(1)
        sigma = sigmas[step].view(-1, 1, 1, 1)
        a = 1 / (1 + sigma**2)
        x_vp = a.sqrt() * (1 + sigma) * x
        out = self.network(x_vp.to(self.dtype), timesteps[step], text, return_dict=False, **added)[
            0
        ].float()
        eps = out if self.kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x_vp
        return (eps - x) * (1 + sigma)  # 1 / (1 - t) is 1 + sigma


class SDXLFlow(SDFlow):
    """SDXL and SDXL-Turbo, which also see the pooled text and the size of the image."""

    outputs = {"text_encoder": ["penultimate"], "text_encoder_2": ["penultimate", "text_embeds"]}

    def join(self, text, text_2, pooled):
        return torch.cat([text, text_2], 2), pooled

    def predict(self, x, t, text, pooled):
        size = [self.height, self.width]
        sizes = torch.tensor([size + [0, 0] + size], dtype=self.dtype, device=x.device).expand(
            len(x), -1
        )
        return super().predict(
            x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
        )


FAMILIES = {
    "StableDiffusion3Pipeline": SD3Flow,
    "StableDiffusionPipeline": SDFlow,
    "StableDiffusionXLPipeline": SDXLFlow,
    "FluxPipeline": FluxFlow,
}


def tensors_in(file, make):
    """Tensors mapped from a file, which `make` makes if there is none; under torchrun once on a machine."""
    while not file.exists() and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(0.1)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # another run may be writing the same
        with open(part, "wb") as opened:  # so that a full disk is an OSError
            torch.save(make(), opened)
        part.replace(file)
    try:
        return torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # whatever damage does
        raise UserError(f"{file} is damaged, delete it: {first_line(error)}") from error
