"""The folder of a run: configuration, metrics, checkpoints, whole or not at all; interruption and memory."""

import itertools
import json
import pickle
import re
import signal
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from adapters import save_lora
from errors import UserError, first_line


def new_folder(args):
    """Make the folder out/name of a new run, with a name after the reward if none is given."""
    if args.name is None:
        stem = re.sub(r"[^\w.]+", "-", args.reward).strip("-.")[-60:]
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        args.name = next(name for name in names if not Path(args.out, name).exists())
    folder = Path(args.out, args.name)
    try:
        folder.mkdir(parents=True)
        (folder / "samples").mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {first_line(error)}") from error
    return folder


def write_config(folder, args):
    config = {key: value for key, value in vars(args).items() if key != "resume"}
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(folder):
    """The configuration of a run. UserError if `folder` is none."""
    try:
        return json.loads(Path(folder, "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not the folder of a run: {first_line(error)}") from error


def write(path, text):
    """Write a text file beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def write_metrics(folder, records):
    """Write metrics.jsonl: one JSON object a line."""
    write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def append_metrics(folder, record):
    """Add a line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(folder, last):
    """The records up to iteration `last`; a line that was cut short by a crash is passed over."""
    records, path = [], folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [record for record in records if record["iteration"] <= last]


def save_state(folder, iteration, part, lora, optimizer):
    """Write lora.safetensors and state.pt; the checkpoint before stays as state.previous.pt.

    part: the pipeline's name for the network that the LoRA is around.
    """
    save_lora(lora, folder / "lora.safetensors", part)
    weights = [p.detach().cpu() for p in lora.parameters]
    state = {"iteration": iteration, "lora": weights, "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "state.part")
    if (folder / "state.pt").exists():
        (folder / "state.pt").replace(folder / "state.previous.pt")
    (folder / "state.part").replace(folder / "state.pt")


def load_state(folder, lora, optimizer):
    """Restore the newest checkpoint that can be read; returns its iteration, 0 if there is none."""
    for path in (folder / "state.pt", folder / "state.previous.pt"):
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError:
            continue
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            print(f"{path} is damaged: falling back to the checkpoint before it")
            continue
        with torch.no_grad():
            for p, saved in zip(lora.parameters, state["lora"]):
                p.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["iteration"]
    return 0


def peak_memory(device):
    """The most memory that has been in use, in MB: on the GPU since the last call, else by this process."""
    if not device.startswith("cuda"):
        return round(psutil.Process().memory_info().rss / 1e6)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak / 1e6)


def catch_interrupt():
    """A list that gets an element at the first Ctrl-C, for the loop to stop at; the second stops at once."""
    interrupted = []

    def note(signum, frame):
        interrupted.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("finishing this iteration, then saving (Ctrl-C again to stop at once)")

    signal.signal(signal.SIGINT, note)
    return interrupted
