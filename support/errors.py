"""A mistake of the user ends in one line, which names it and the remedy, and in exit code 2."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError


class UserError(Exception):
    """A mistake that its message, of one line, tells how to mend."""


def first_line(error):
    """The first line of an exception's message, of at most 300 characters, to be quoted in a UserError."""
    try:
        text = str(error).strip()
    except Exception:  # a class of the user's own can fail even here
        text = ""
    return (text or type(error).__name__).splitlines()[0][:300]


def why_unreachable(path, error):
    """Why a model of the hub did not come, and what to do."""
    # diffusers says "not a valid model identifier" while it handles the error that tells
    if any(
        isinstance(e, GatedRepoError) or "gated repo" in str(e) for e in (error, error.__context__)
    ):
        return f"{path} is gated: accept its licence on the hub, then run `hf auth login`"
    return f"cannot reach model {path}: check its name and the network"


def interrupt_again(ignored):
    """A sys.unraisablehook: Python would print, and forget, a Ctrl-C that came within a finalizer."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(ignored)
    threading.Timer(
        0.1, os.kill, (os.getpid(), signal.SIGINT)
    ).start()  # once the finalizer is over


def run_command(main):
    """Run a command and turn its errors into lines and exit codes."""
    if sys.unraisablehook is sys.__unraisablehook__:  # and not one of pytest
        sys.unraisablehook = interrupt_again
    try:
        main()
    except UserError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        gpu = "GPU " * isinstance(error, torch.OutOfMemoryError)
        # for that of the CPU torch has no class
        if not (gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        message = f"out of {gpu}memory: lower --batch, --size or --rank, or add --checkpointing, then --resume"
    except OSError as error:  # a full disk, a folder that is gone
        message = (
            f"{first_line(error)}; what was saved before is whole: mend this, then start again"
        )
        message += ", a training with --resume"
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    message = "".join(c if c.isprintable() else " " for c in message)  # one line at most
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
