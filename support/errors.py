"""A user's mistake ends in one line, which says how to fix it, and in exit code 2."""

import sys
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError

AGAIN = "give the same command again, train.py with --resume"


class UserError(Exception):
    """A user's mistake. The message is one line and says how to fix it."""


def first_line(error):
    """Return the first line of an exception's message, at most 300 characters of it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def why_unreachable(path, error):
    """Say why a model of the hub did not come, and what to do."""
    # diffusers says "not a valid model identifier" while it handles the error that tells
    for e in (error, error.__context__):
        if isinstance(e, GatedRepoError) or "gated repo" in str(e):
            return f"{path} is gated: accept its licence on the hub, then run `hf auth login`"
    return f"cannot reach model {path}: check its name and the network"


def run_command(main):
    """Run a command, and turn users' mistakes and failures of the machine into lines."""
    try:
        main()
        return
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that is gone
        message = f"{first_line(error)}; what was saved before is whole: fix this, then {AGAIN}"
    except (RuntimeError, MemoryError) as error:
        # that of a CPU has no class of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            if "can't allocate memory" not in str(error):
                raise
        message = "out of memory: lower --batch, --size or --rank, or add --checkpointing"
        message += f"; then {AGAIN}"

    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
