"""What several tests need: small pipelines in folders, ours as flows, and diffusers' own."""

import argparse
import functools
import json
import tempfile
from pathlib import Path

import diffusers
import torch

from fdflow import LoRA
from models.flow import load_flow
from models.lora_files import layers_named
from models.table import TINY, find_model
from support.arguments import fill_defaults
from tests.pipelines import PIPELINES, randomize

torch.set_num_threads(1)
PROMPTS = ["red apple", "a robot that sings in the rain", "sun"]  # of different length
FLAGS = "steps size guidance negative device dtype batch compile checkpointing"
TOP = tempfile.TemporaryDirectory()  # is removed with this process


@functools.cache
def folder(name):
    """The folder of a small pipeline, made when first asked for; "tiny" is the bundled one."""
    if name == "tiny":
        return TINY / "tiny-sd3"
    for part in ("tiny-clip", "tiny-aesthetic"):
        link = Path(TOP.name, part)
        if not link.exists():
            link.symlink_to(TINY / part)

    torch.manual_seed(0)
    randomize(PIPELINES[name]()).save_pretrained(Path(TOP.name, name))
    return Path(TOP.name, name)


def make_flow(path, prompts=PROMPTS, needed=None, **options):
    """The flow that the command line would make of a folder or name with these options."""
    given = {"size": "64", "device": "cpu"} | options
    args = argparse.Namespace(model=str(path), **dict.fromkeys(FLAGS.split()) | given)
    model = find_model(args.model)
    fill_defaults(args, vars(model))
    return load_flow(model, args, list(prompts), needed)


@functools.cache
def shared_flow(name, **options):
    """A flow that several tests use and none changes."""
    return make_flow(folder(name), **options)


def load_theirs(path):
    """The pipeline as diffusers loads it, with a scheduler of Euler steps."""
    index = json.loads((path / "model_index.json").read_text())
    absent = {key: None for key, kind in index.items() if kind == [None, None]}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(path, **absent)
    pipe.set_progress_bar_config(disable=True)

    config = pipe.scheduler.config
    if config.get("prediction_type") == "flow_prediction":  # one of multiple steps: of first order
        pipe.scheduler = type(pipe.scheduler).from_config(config, solver_order=1)
    elif "prediction_type" in config:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    return pipe


def their_images(pipe, flow, prompts, seeds, steps):
    """What a pipeline draws with the options of a flow, each prompt alone."""
    options = dict(flow.options)
    options |= {"output_type": "pt", "num_inference_steps": steps}
    images = []
    for prompt, seed in zip(prompts, seeds):
        if "negative_prompt" in options:
            options["negative_prompt"] = [flow.options["negative_prompt"]]
        generator = [torch.Generator().manual_seed(seed)]
        images.append(pipe(prompt=[prompt], generator=generator, **options)[0])
    return torch.cat(images)


def random_lora(flow, which="attention", seed=0):
    """A LoRA that changes the images."""
    generator = torch.Generator().manual_seed(seed)
    layers = layers_named(flow.network, which)
    lora = LoRA(flow.network, layers, rank=4, alpha=8, generator=generator)
    for layer in lora.layers.values():
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator)
    return lora
