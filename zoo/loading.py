"""Loading what is not ours: models of the hub, and functions in users' files."""

import importlib.util
import os
import sys

import torch
from huggingface_hub import hf_hub_download

from support.errors import UserError, first_line, why_unreachable

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # from which hps and pickscore were tuned


def load_function(what, term):
    """Return the function of a term "path/to/file.py:function".

    The file may import what is in its folder. What it raises is shown as Python shows it.

    what: "reward" or "estimator", for messages
    UserError if there is no such file, or no such function in it.
    """
    path, name = term.rsplit(":", 1)
    path = os.path.expanduser(path.strip('"'))
    if not os.path.isfile(path):
        raise UserError(f"{what} {term}: there is no file {path}")

    # last, so that it hides no module of Python or of ours
    sys.path.append(os.path.dirname(os.path.abspath(path)))

    # a name no other module has, by which dataclasses and pickle find it
    module_name = f"{what}_file_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)

    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{what} {term}: {path} has no function {name}")
    return function


def pretrained(kind, path, **options):
    """Return kind.from_pretrained(path, **options), of a folder or of the hub.

    UserError if it cannot be had.
    """
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # whatever a damaged or foreign folder makes transformers raise
        if isinstance(error, OSError) and not os.path.isdir(path):
            raise UserError(why_unreachable(path, error)) from error
        text = f"{path} holds no {kind.__name__} that transformers can load"
        raise UserError(f"{text}: {first_line(error)}") from error


def downloaded(hub_id, file):
    """Return the path of a file of the hub, downloaded if need be. UserError if it is not there."""
    try:
        return hf_hub_download(hub_id, file)
    except OSError as error:
        raise UserError(why_unreachable(hub_id, error)) from error


def large_model_dtype(device):
    """Return what models too large for float32 are loaded in: bfloat16 on a GPU."""
    return torch.bfloat16 if str(device).startswith("cuda") else torch.float32
