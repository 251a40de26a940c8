"""What several tests need to run commands as a user does."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from support.errors import run_command

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(*args, cwd, launcher=()):
    """Start `python args`, with its output in pipes."""
    command = [sys.executable, *launcher, ROOT / args[0], *args[1:]]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args, cwd, launcher=()):
    """Run `python args`. Returns exit code, standard output and standard error."""
    process = start(*args, cwd=cwd, launcher=launcher)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def exit_code(main, monkeypatch, *command):
    """Run the main function of a command in this process, which saves the seconds of imports."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    try:
        run_command(main)
    except SystemExit as stop:
        return stop.code
    return 0


def metrics(folder):
    """The records of a run, without what depends on the machine."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "memory_mb")} for r in records]


def numbers(folder):
    """All numbers that a run logged, {"iteration name ...": number}."""

    def flat(name, value):
        if isinstance(value, dict):
            found = {}
            for key, part in value.items():
                found |= flat(f"{name} {key}", part)
            return found
        return {} if value is None else {name: value}

    found = {}
    for record in metrics(folder):
        found |= flat(str(record["iteration"]), record)
    return found


def state_of(folder):
    """The newest checkpoint of a run."""
    checksum, data = (folder / "state.pt").read_bytes().split(b"\n", 1)
    return torch.load(io.BytesIO(data), weights_only=True)


def last_line(capsys):
    """The last line of what was printed as an error."""
    return capsys.readouterr().err.splitlines()[-1]
