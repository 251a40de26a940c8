"""The scheduler that makes a pipeline a velocity: models/flow.py says how."""

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from support.errors import UserError


class OneStep:
    """The scheduler we put into a pipeline: it offers the times we say, and keeps the velocity.

    A network that predicts the velocity of a flow is taken as it is. One that predicts the noise,
    or v, of a variance-preserving process is converted. With a the cumulative alpha of a timestep
    and sigma = sqrt((1 - a) / a), noise over signal: t = sigma / (1 + sigma), the network's input
    is x_vp = sqrt(a) (1 + sigma) x_t, and v = (eps - x_t) / (1 - t). An Euler step in t is a step
    of DDIM.
    """

    order = 1  # calls of the network in a step, as pipelines want to know
    init_noise_sigma = 1.0  # a pipeline starts from its noise times this

    def __init__(self, scheduler):
        self.predicts = scheduler.config.get("prediction_type", "flow_prediction")
        if self.predicts not in ("flow_prediction", "epsilon", "v_prediction"):
            raise UserError(f"this model predicts {self.predicts}: neither velocity, noise nor v")

        self.is_flow = self.predicts == "flow_prediction"
        if not self.is_flow:
            scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
        self.scheduler, self.config = scheduler, scheduler.config
        self.table = torch.zeros(2, 1)  # rising times, and what the network is told at each
        self.timesteps = None

    def set_timesteps(
        self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None
    ):
        """Keep what was offered; where nothing was, note the schedule asked for, and offer none."""
        if self.timesteps is not None:
            return

        # the scheduler's own way, from whatever this pipeline tells it
        asked = {"num_inference_steps": num_inference_steps, "sigmas": sigmas}
        asked |= {"mu": mu, "timesteps": timesteps}
        asked = {name: value for name, value in asked.items() if value is not None}
        self.scheduler.set_timesteps(device=device, **asked)

        sigmas = self.scheduler.sigmas.cpu()
        times = sigmas if self.is_flow else sigmas / (1 + sigmas)
        self.times = times.tolist()
        # fdflow.sample starts from times[0] eps, the scheduler perhaps from a little more
        self.noise_scale = float(getattr(self.scheduler, "init_noise_sigma", 1) / sigmas[0])

        new = torch.stack([times[:-1], self.scheduler.timesteps.cpu().float()])
        table = torch.cat([self.table.cpu(), new], 1)
        self.table = table[:, table[0].argsort()]
        self.offer_nothing()

    def offer_nothing(self):
        """Offer no time, so that the pipeline draws its noise, or decodes."""
        self.timesteps = self.table[1, :0]

    def offer(self, x, t):
        """Offer latents x [B, ...] their times t: one for all [1], or one for each [B]."""
        self.x, self.t = x, t
        if t.device != self.table.device:
            self.table = self.table.to(t.device)

        # between the times of the schedules, what the network is told is interpolated
        times, timesteps = self.table
        above = torch.searchsorted(times, t).clamp(1, len(times) - 1)
        share = (t - times[above - 1]) / (times[above] - times[above - 1])
        told = torch.lerp(timesteps[above - 1], timesteps[above], share)
        self.timesteps = told if len(t) == 1 else told[None].as_subclass(Times)

    def sigma(self, x):
        """Noise over signal of latents x, which may be all twice, in their shape [B, 1, ...]."""
        t = self.t.repeat(len(x) // len(self.t)).view(-1, *[1] * (x.dim() - 1))
        return t / (1 - t)

    def scale_model_input(self, x, timestep=None):
        """x_t to x_vp. Only pipelines of variance-preserving models call this."""
        sigma = self.sigma(x)
        return (x * (1 + sigma) / (1 + sigma**2).sqrt()).to(x.dtype)

    def step(self, model_output, timestep, sample, *args, **options):
        """Keep the velocity, and take no step."""
        self.v = model_output.float()
        if not self.is_flow:
            sigma = self.sigma(self.x)
            a = 1 / (1 + sigma**2)
            eps = self.v
            if self.predicts == "v_prediction":
                x_vp = a.sqrt() * (1 + sigma) * self.x
                eps = a.sqrt() * self.v + (1 - a).sqrt() * x_vp
            self.v = (eps - self.x) * (1 + sigma)  # 1 / (1 - t) is 1 + sigma
        return SchedulerOutput(prev_sample=sample)

    def set_begin_index(self, begin_index=0):
        """Do nothing: there are no steps to count."""


class Times(torch.Tensor):
    """One time for each image, where a pipeline expands a single one to its batch.

    With guidance many pipelines show their network all images twice: hence `repeat`.
    """

    def expand(self, *size):
        images = size[0] if isinstance(size[0], int) else size[0][0]
        return self.as_subclass(torch.Tensor).repeat(images // len(self))
