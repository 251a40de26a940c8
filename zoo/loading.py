"""Loading what is not ours: models of the hub, and code of users, whose errors become one line."""

import os
from contextlib import contextmanager

import torch
from huggingface_hub import hf_hub_download

from support.errors import UserError, first_line, why_unreachable


@contextmanager
def errors_of(source):
    """Inside, what others' code raises, even by sys.exit, becomes a UserError that begins with the source."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # their remedies are known
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{source} raised {type(error).__name__}: {first_line(error)}") from error


def pretrained(kind, path, **options):
    """`kind.from_pretrained(path, **options)`, of the hub or a folder. UserError if it is not there."""
    with errors_of(f"{path} holds no {kind.__name__} that transformers can load; it"):
        try:
            return kind.from_pretrained(path, **options)
        except OSError as error:
            if os.path.isdir(path):
                raise
            raise UserError(why_unreachable(path, error)) from error


def downloaded(hub_id, file):
    """The path of a file of the hub, downloaded if need be. UserError if it is not there."""
    try:
        return hf_hub_download(hub_id, file)
    except OSError as error:
        raise UserError(why_unreachable(hub_id, error)) from error


def large_model_dtype(device):
    """What models too large for float32 are loaded in: bfloat16 on a GPU."""
    return torch.bfloat16 if str(device).startswith("cuda") else torch.float32
