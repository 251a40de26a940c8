"""A run: its folder and the files in it, each whole or not at all; the progress bar; Ctrl-C."""

import atexit
import hashlib
import importlib.metadata
import io
import json
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.errors import UserError, first_line
from support.evaluation import plus_minus, signs_of_hacking
from support.pictures import animate, grid, read_grids, report, save_picture
from support.processes import count_over_processes, processes

# what may differ between a run and the command that resumes it
MAY_CHANGE = "iterations out name resume device batch compile checkpointing max_requests".split()
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def write_whole(path, data):
    """Write bytes beside their place, then move them there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def checksum(data):
    """Return the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_config(folder):
    """Read the arguments that a run was started with. UserError if there are none."""
    path = Path(folder, "config.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run: {first_line(error)}") from error


def run_of(path):
    """Return the folder of the run that a LoRA is from, or None; the path may be that folder."""
    path = Path(path).resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
            return folder
    return None


def read_metrics(folder):
    """Read the records of a run; a line that was cut short by a crash is passed over."""
    records = []
    path = Path(folder, "metrics.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def warn(text):
    """Print a warning above the progress bar."""
    tqdm.write(f"warning: {text}", sys.stderr)


class Run:
    """Everything a run writes and prints. Only the first of several processes does so.

    args: all arguments of the command line
    records: the metrics, a dict for each iteration, the first of the base model
    UserError if the folder exists and is not to be resumed, or cannot be written.
    """

    def __init__(self, args):
        self.args, self.first = args, processes()[0] == 0
        self.records, self.interrupted = [], []

        stem = re.sub(r"[^\w.]+", "-", args.reward, flags=re.ASCII).strip("-.")[-60:] or "run"
        name = args.name or stem
        if not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
            raise UserError(f"--name {name[:100]}: at most 100 letters, digits, - . and _")
        if self.first:
            try:
                name = self.find_folder(name) if args.resume else self.make_folder(name)
            except OSError as error:
                raise UserError(f"cannot write to {args.out}: {first_line(error)}") from error

        # the others take the name, and the size of a resumed run, that the first has found
        found = [name, args.size]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        args.name, args.size = found
        self.folder = Path(args.out, args.name)

    def make_folder(self, name):
        """Make a new folder of that name, or of one with a number if none was given."""
        number = 1
        while True:
            numbered = name if number == 1 else f"{name}-{number}"
            self.folder = Path(self.args.out, numbered)
            try:
                self.folder.mkdir(parents=True)  # fails if another run has it, however new
                break
            except FileExistsError:
                if self.args.name:
                    text = f"the run {self.folder} exists: choose another --name, or add --resume"
                    raise UserError(text) from None
                number += 1

        (self.folder / "samples").mkdir()
        self.write_config()
        atexit.register(self.remove_if_nothing_was_done)
        return numbered

    def find_folder(self, name):
        """Check that the command is that of the run which is to be resumed."""
        self.folder = Path(self.args.out, name)
        saved, given = read_config(self.folder), vars(self.args)
        self.args.size = self.args.size or saved.get("size")  # which the model may have chosen

        for key in saved.keys() & given.keys() - set(MAY_CHANGE):
            same = saved[key] == given[key]
            if key == "model":  # which may have moved
                same = Path(saved[key]).name == Path(given[key]).name
            if not same:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"--resume: the run was started with {flag} {saved[key]}")
        return name

    def write_config(self):
        """Write the arguments, and what the run is made with."""
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        made_with = {"command": " ".join(sys.argv), "python": sys.version.split()[0], **versions}
        if self.args.device.startswith("cuda"):
            made_with["card"] = torch.cuda.get_device_name(self.args.device)

        config = {key: value for key, value in vars(self.args).items() if key != "resume"}
        text = json.dumps(config | {"made_with": made_with}, indent=2) + "\n"
        write_whole(self.folder / "config.json", text.encode())

    def remove_if_nothing_was_done(self):
        """Free the name if the run has failed before its first record."""
        files = [path.name for path in self.folder.glob("*")]
        if not self.records and sorted(files) == ["config.json", "samples"]:
            (self.folder / "config.json").unlink()
            (self.folder / "samples").rmdir()
            self.folder.rmdir()

    def print_settings(self, options, lora):
        """Print with which values the estimator runs, and what is trained."""
        if self.first:
            text = ", ".join(f"{name} {value}" for name, value in options.items())
            args, numbers = self.args, sum(p.numel() for p in lora.parameters)
            print(f"{args.estimator}: {text}; lr {args.lr}, {args.groups} groups an iteration")
            print(f"LoRA: rank {args.rank} on {len(lora.layers)} layers, {numbers:,} parameters")

    def start(self, record, pictures, captions, parameters, optimizer, memory):
        """Begin with the record and samples of the base model, or where the run was left off.

        parameters, optimizer, memory: what a checkpoint holds, and restores
        """
        self.records, self.captions = [record], captions
        self.parameters, self.optimizer, self.memory = parameters, optimizer, memory
        if self.args.resume:
            self.load_checkpoint()
            self.compare_base(record)

        if self.first:
            self.write_config()  # all arguments are known by now
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_whole(self.folder / "metrics.jsonl", lines.encode())
            if len(self.records) == 1:
                save_picture(grid(pictures, captions, 8), self.folder / "samples" / "000000.png")

    def load_checkpoint(self):
        """Restore the newest checkpoint that is whole; with none at all the run begins anew.

        A damaged one is passed over for the one before, and that is said. UserError if all are
        damaged.
        """
        paths = [self.folder / "state.pt", self.folder / "state.previous.pt"]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                self.restore(path.read_bytes())
                return
            except Exception as error:  # whatever damage does
                tqdm.write(f"{path} is damaged ({first_line(error)}): trying the one before it")
        if paths:
            raise UserError(f"{self.folder} cannot be resumed, its files are damaged: start anew")

    def restore(self, data):
        """Take over a checkpoint. ValueError, or what torch raises, if it is damaged."""
        first, data = data.split(b"\n", 1)
        if checksum(data).encode() != first:
            raise ValueError("its checksum is wrong")
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")

        for p, saved in zip(self.parameters, state["lora"], strict=True):
            if saved.shape != p.shape:  # which copy_ would spread out
                raise ValueError("its LoRA has another shape")
            p.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.update(state["memory"])
        self.records = state["records"]

    def compare_base(self, record):
        """Warn if the base model has other rewards than when the run began."""
        now, before = record.get("held_out"), self.records[0].get("held_out")
        if None not in (now, before) and abs(now - before) > 0.1 * (record["held_out_se"] or 0):
            was = f"the base model's reward is {now:.3f}, and was {before:.3f} when the run began"
            warn(f"{was}: have the prompts, a reward or the model changed?")

    def iterations(self):
        """Count the iterations that are left, with a bar; Ctrl-C asks to stop after this one."""

        def on_interrupt(signum, frame):
            self.interrupted.append(signum)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.write("finishing this iteration, then saving (Ctrl-C again to stop at once)")

        signal.signal(signal.SIGINT, on_interrupt)
        done, total = self.records[-1]["iteration"], self.args.iterations
        steps = range(done + 1, total + 1)
        self.bar = tqdm(steps, self.args.name, total, initial=done, disable=not self.first)
        return self.bar

    def log(self, record, pictures):
        """Add a record to metrics.jsonl, pictures (or None) to the samples; show the progress."""
        self.records.append(record)
        if not self.first:
            return

        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if pictures is not None:
            path = self.folder / "samples" / f"{record['iteration']:06}.png"
            save_picture(grid(pictures, self.captions, 8), path)
        self.print_progress(record)

    def save(self):
        """Write a checkpoint, after log(); the one before stays."""
        if not self.first:
            return
        state = {"lora": [p.detach().cpu() for p in self.parameters], "memory": self.memory}
        state |= {"optimizer": self.optimizer.state_dict(), "records": self.records}
        file, path = io.BytesIO(), self.folder / "state.pt"
        torch.save(state, file)

        if path.exists():
            path.replace(self.folder / "state.previous.pt")
        write_whole(path, checksum(file.getvalue()).encode() + b"\n" + file.getvalue())

    def stop_requested(self):
        """Say whether Ctrl-C was pressed in any of the processes."""
        return count_over_processes(len(self.interrupted)) > 0

    def stop(self):
        """End the process with code 130."""
        self.bar.close()
        if self.first:
            done = self.records[-1]["iteration"]
            print(f"stopped after iteration {done}; the same command with --resume goes on")
        sys.exit(130)

    def print_progress(self, record):
        """Show rewards in the progress bar; warn if they are no numbers, or are hacked."""
        held_out = [r["held_out"] for r in self.records if r.get("held_out") is not None]
        shown = {"reward": record["reward"], "held-out": held_out[-1] if held_out else None}
        text = ", ".join(f"{name} {v:.2f}" for name, v in shown.items() if v is not None)
        self.bar.set_postfix_str(text + spent(record))

        if record["grad_norm"] is None:
            warn("the gradient was not finite, so this iteration has changed nothing")
        if record["not_finite"]:
            total = sum(r.get("not_finite", 0) for r in self.records)
            warn(f"{total} rewards so far were no finite numbers; their groups were dropped")
        fallen = signs_of_hacking(record, self.records[0]) if "change" in record else []
        if fallen:
            rose = f"the reward rose {record['gain']:.2f}, but at the cost of"
            advice = "it may be hacked: look at the samples, stop earlier, or raise --kl"
            warn(f"{rose} {changes(record, fallen)}; {advice}")

    def print_summary(self):
        """Draw the pictures of the run, and say in one line what was gained."""
        if not self.first:
            return
        grids = read_grids(self.folder)
        if grids:
            animate(self.folder, grids)
            report(self.folder, grids, self.records, self.args.reward)

        first, last = self.records[0], [r for r in self.records if "change" in r][-1]
        if last.get("gain") is None:
            gained = changes(last, last["change"])
        else:
            before, after = (plus_minus(r["held_out"], r["held_out_se"], "") for r in (first, last))
            gained = f"{before} -> {after} (gain {plus_minus(last['gain'], last['gain_se'])})"
        seconds = sum(record.get("seconds", 0) for record in self.records)
        print(
            f"held-out {self.args.reward} {gained}, {last['images']} images, {seconds:.0f} s"
            f"{spent(last)}; see {self.folder / 'report.png'} and try: "
            f'python sample.py --lora "{self.folder}" --compare --prompt "red apple"'
        )


def spent(record):
    """Say what was asked of judges, as text to be added; empty if there are none."""
    if "requests" not in record:
        return ""
    return f", {record['requests']:,} requests, {record['tokens']:,} tokens"


def changes(record, names):
    """Write the changes of some watched rewards as text."""
    parts = []
    for name in names:
        parts.append(f"{name} {plus_minus(record['change'][name], record['change_se'][name])}")
    return ", ".join(parts)
