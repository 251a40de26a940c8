"""Any text-to-image pipeline of diffusers as a flow: velocity, noise, schedule and decoder.

A pipeline encodes its prompts, draws noise, asks its scheduler for times, asks its network for an
output at each of them, asks its scheduler for the step that follows, and decodes what it has in the
end. Put a scheduler in that offers a single time and keeps the output instead of taking a step: now
a call of the pipeline is the velocity at that time, with whatever packing, guidance and text the
model has. Offer no time at all: now a call draws the noise, or decodes the latents it is given. So
a model's images are those of its own pipeline by construction, and no family of models needs code
of its own.

    pipe.scheduler = OneStep(pipe.scheduler)
    pipe.scheduler.offer(x, t)
    pipe(prompt, num_inference_steps=1)  # with the latents x in place of its noise
    v = pipe.scheduler.v
"""

import inspect

import torch
from tqdm import tqdm

import fdflow
from fdflow import LoRALinear
from models.lora_files import repeated_blocks
from models.scheduler import OneStep
from models.table import call_options, load_pipeline
from models.text import batched, encode, run, shapes
from support.errors import UserError, first_line
from support.run import warn

LARGER = 16384.0  # gradients in float16


def load_flow(model, args, prompts, needed=None):
    """Load a Model as a Flow, with the text of the prompts that it will be asked for.

    args: what `fill_defaults` filled in; a size that is None becomes the pipeline's own.
    needed: the indices of those prompts (default all). UserError if the model cannot be used so.
    """
    texts = prompts if needed is None else [prompts[i] for i in needed]
    try:
        outputs, encoders = encode(model, args, texts)
        pipe = load_pipeline(model, args, without=encoders)
        return Flow(pipe, model, args, prompts, outputs)
    except ValueError as error:  # which pipelines raise for a size they cannot draw
        raise UserError(f"{model.path}: {first_line(error)}") from error


class Flow:
    """A diffusers pipeline as a flow.

    Latents x are float32 [B, ...], as the pipeline has them; cond [B] holds indices of `prompts`;
    `times` is the schedule of drawing, and `train_times` that of roll-outs, which may have fewer
    steps, without a last one from below 0.01, which moves nothing. `network` is what is trained,
    `network_name` its name in the pipeline.
    """

    gradient_scale = 1.0  # of gradients within the network
    takes_times = False  # whether one call of the pipeline takes a time for each image
    decoded_at_once = 1

    def __init__(self, pipe, model, args, prompts, outputs):
        self.pipe, self.prompts, self.outputs = pipe, list(prompts), outputs
        self.device, self.dtype = args.device, getattr(torch, args.dtype)
        self.text, self.cond, self.batches = next(iter(outputs)), None, {}

        # network and VAE, frozen; on CUDA convolutions are faster with channels last
        self.network_name = "transformer" if hasattr(pipe, "transformer") else "unet"
        self.network = getattr(pipe, self.network_name).eval().requires_grad_(False)
        self.vae = pipe.vae.eval().requires_grad_(False)
        if self.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.float()  # its activations leave the range of float16
        for module in (self.vae, self.network):
            module.to(args.device)
            kernels = {p.dim() for p in module.parameters() if p.dim() > 2}
            if args.device.startswith("cuda") and kernels == {4}:
                module.to(memory_format=torch.channels_last)

        # our scheduler, latents and texts stand in for those of the pipeline
        pipe.set_progress_bar_config(disable=True)
        self.options = call_options(model, args)
        pipe.scheduler = self.scheduler = OneStep(pipe.scheduler)
        self.prepare, pipe.prepare_latents = pipe.prepare_latents, self.prepare_latents
        self.encode_arguments = inspect.signature(pipe.encode_prompt).bind
        pipe.encode_prompt = self.encode_prompt

        self.train_times = self.schedule(getattr(args, "rollout_steps", args.steps))
        self.train_times = [t for t in self.train_times if t == 0 or t > 0.01]
        self.times = self.schedule(args.steps)
        self.try_out(args)

        if args.compile:  # the repeated blocks only, which starts sooner than the whole network
            # kinds of blocks x gradient or not x LoRA on or off x sizes of batches
            torch._dynamo.config.recompile_limit = 64
            for _, block in repeated_blocks(self.network):
                block.compile()

    # ---- what stands in for the pipeline's own

    def prepare_latents(self, *positional, **named):
        """Do what the pipeline's own does, with our latents, if any, in place of its noise."""
        prepared = self.prepare(*positional, **named)
        self.noise_drawn, *others = prepared if isinstance(prepared, tuple) else [prepared]
        x = self.noise_drawn if self.x is None else self.x
        return (x, *others) if others else x

    def encode_prompt(self, *positional, **named):
        """Return what the pipeline's own returned for each prompt, put together for the batch."""
        texts = tuple(self.encode_arguments(*positional, **named).arguments["prompt"])
        if texts not in self.batches:
            self.batches[texts] = batched([self.outputs[text] for text in texts], self.device)
        return self.batches[texts]

    # ---- calls of the pipeline

    def call(self, texts, x=None, **options):
        """Call the pipeline on texts, with latents x where there are some."""
        self.x = x
        return run(self.pipe, texts, self.options | options)

    def schedule(self, steps):
        """Return the times [1, ..., 0] of the pipeline's own schedule."""
        self.scheduler.timesteps = None
        self.call([self.text], num_inference_steps=steps)
        return self.scheduler.times

    def noise(self, seeds):
        """Draw the pipeline's noise [N, ...], for image i from a torch.Generator with seeds[i]."""
        drawn = []
        self.scheduler.offer_nothing()
        for i in range(0, len(seeds), 16):
            some = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 16]]
            self.call([self.text] * len(some), generator=some)
            drawn.append(self.noise_drawn.float())
        return self.scheduler.noise_scale * torch.cat(drawn)

    def decode(self, x):
        """Decode latents to images [B, 3, H, W] in [0, 1]; a few at a time, to save memory."""
        images = []
        self.scheduler.offer_nothing()
        for part in x.to(self.vae.dtype).split(self.decoded_at_once):
            images.append(self.call([self.text] * len(part), part, output_type="pt").float())
        return torch.cat(images)

    def velocity(self, x, t, cond):
        """Return v(x_t, t, cond) [B, ...], float32; t is a float, or [B], a time for each image."""
        if cond is not self.cond:  # a trajectory asks again and again for the same
            self.cond, self.batches = cond, {}
            self.texts = [self.prompts[i] for i in cond.tolist()]
            self.shapes = [shapes(self.outputs[text]) for text in self.texts]

        # one call takes texts of one shape and, with some pipelines, one time
        keys = self.shapes
        if torch.is_tensor(t) and not self.takes_times:
            keys = list(zip(keys, t.tolist()))
        if all(key == keys[0] for key in keys):
            return self.one_velocity(x, t, self.texts)

        self.refuse_population()
        v = torch.empty_like(x)
        for key in dict.fromkeys(keys):
            part = [i for i, other in enumerate(keys) if other == key]
            t_part = t[part] if torch.is_tensor(t) else t
            v[part] = self.one_velocity(x[part], t_part, [self.texts[i] for i in part])
        return v

    def one_velocity(self, x, t, texts):
        """Return the velocity, by one call of the pipeline."""
        t = t if torch.is_tensor(t) else x.new_full((1,), t)
        x = scaled_gradient(x, 1 / self.gradient_scale)
        self.scheduler.offer(x, t if self.takes_times else t[:1])
        self.call(texts, x.to(self.noise_drawn.dtype), num_inference_steps=1)
        return scaled_gradient(self.scheduler.v, self.gradient_scale)

    def refuse_population(self):
        """UserError if perturbed models share a batch, which several calls would mix up."""
        for layer in self.network.modules():
            if isinstance(layer, LoRALinear) and layer.population and len(layer.population[0]) > 1:
                raise UserError("prompts of different length cannot share a batch: use --batch 1")

    @torch.no_grad()
    def try_out(self, args):
        """Find out whether one call takes a time for each image, and which size images have.

        UserError if that is not the size asked for, or if the network cannot be checkpointed.
        """
        x = self.noise([0, 1])
        cond = torch.tensor([self.prompts.index(self.text)] * 2)
        t = self.times[0] * x.new_tensor([1, 0.5])
        apart, swapped = (self.velocity(x, times, cond) for times in (t, t.flip(0)))

        if args.negative and not getattr(self.pipe, "do_classifier_free_guidance", True):
            warn(f"--negative has no effect with --guidance {args.guidance}")

        self.takes_times = True
        try:
            v = self.velocity(x, t, cond)
            self.takes_times = bool((v - apart).norm() < 0.1 * (swapped - apart).norm())
        except (TypeError, ValueError, RuntimeError):  # what it does with a time takes only one
            self.takes_times = False

        if args.checkpointing:
            before = self.velocity(x, t, cond)
            self.network.enable_gradient_checkpointing()
            with torch.enable_grad():
                after = self.velocity(x, t, cond).detach()
            if (after - before).norm() > 1e-3 * before.norm():  # some networks leave out a mask
                raise UserError("--checkpointing: this network computes something else with it")

        height, width = self.decode(x[:1]).shape[2:]
        self.decoded_at_once = max(1, min(16, 2**20 // (width * height)))
        made = f"{width}x{height}" if width != height else str(width)
        if args.size not in (None, made, f"{width}x{height}"):
            raise UserError(f"--size {args.size}: this model makes {made} of it")
        args.size = args.size or made

    def scale_gradients(self, lora):
        """Let the network, and nothing else, see gradients 16,384 times as large in float16.

        Most of them would be too small a number otherwise.
        """
        if self.dtype == torch.float16:
            self.gradient_scale = LARGER
            for p in lora.parameters:
                p.register_hook(lambda grad: grad / self.gradient_scale)

    @torch.no_grad()
    def images(self, cond, seeds, batch=64, progress=False):
        """Sample images [N, 3, H, W], on the CPU, of prompts cond [N] and noise seeds, no churn."""
        images = []
        for i in tqdm(range(0, len(seeds), batch), "sampling", disable=not progress, leave=False):
            c = cond[i : i + batch]
            x = fdflow.sample(self.velocity, self.noise(seeds[i : i + batch]), c, self.times)
            images.append(self.decode(x).cpu())
        return torch.cat(images)


def scaled_gradient(x, factor):
    """Return x itself, with its gradient multiplied by a factor."""
    if factor != 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda grad: grad * factor)
    return x
