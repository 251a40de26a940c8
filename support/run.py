"""A run: its folder, the files in it, each whole or not at all; the progress bar; interruption."""

import hashlib
import io
import itertools
import json
import re
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import UserError, first_line
from support.evaluation import gather_rows, plus_minus, processes, signs_of_hacking
from support.pictures import animate, grid, read_grids, report, save_picture


def write_whole(path, data):
    """Write bytes beside their place, then move them there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def checksum(data):
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_config(folder, keys=None):
    """The arguments, all or those named, that a run was started with: ["--key=value", ...]."""
    path = Path(folder, "config.json")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is not the folder of a run: {first_line(error)}") from error
    missing = {
        *(keys or ["checksum"])
    } - config.keys()  # the configuration of a taste has no checksum
    if missing or config.pop("checksum", None) not in (None, checksum(json.dumps(config).encode())):
        raise UserError(
            f"{path} was damaged or changed, by its checksum: undo that, or start a new run"
        )
    flags = [
        (f"--{k.replace('_', '-')}", v) for k, v in config.items() if keys is None or k in keys
    ]
    # 0 is one of the values, though it equals False
    return [
        flag if v is True else f"{flag}={v}"
        for flag, v in flags
        if v is not None and v is not False
    ]


def read_metrics(folder):
    """The records of a run. A line that was cut short by a crash is passed over."""
    records, path = [], Path(folder, "metrics.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            records += [json.loads(line)] if json.loads(line)["iteration"] >= 0 else []
    return records


class Run:
    """What is written down of a run and said of it; of several processes the first alone does either.

    args: everything that the command line can say. `records`: the metrics, one dict an iteration, the first
    of the base model. UserError if the run's name cannot be used, or is taken and not to be resumed.
    """

    def __init__(self, args):
        if args.name is None:
            stem = re.sub(r"[^\w.]+", "-", args.reward, flags=re.ASCII).strip("-.")[-60:] or "run"
            names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
            args.name = next(name for name in names if not Path(args.out, name).exists())
        if not re.fullmatch(r"\w[\w.-]{0,99}", args.name, re.ASCII):
            raise UserError(f"--name {args.name[:100]}: at most 100 letters, digits, - . and _")
        self.args, self.folder = args, Path(args.out, args.name)
        if self.folder.exists() and not args.resume:
            raise UserError(f"the run {self.folder} exists: choose another --name, or add --resume")
        self.records, self.interrupted, self.first = [], [], processes()[0] == 0

    def begin(self, record, pictures, captions):
        """Start with the record and samples of the base model; they are written with the next ones."""
        self.records, self.base = [record], grid(pictures, captions, 8)

    def make_folder(self):
        """Make the folder with configuration, base record and samples: all of it, or none."""
        if self.first and not self.folder.exists():
            part = self.folder.with_name(f".{self.folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            (part / "samples").mkdir(parents=True)
            self.write_metrics(part)
            self.base.save(part / "samples" / "000000.png")
            part.rename(self.folder)

    def write_metrics(self, folder):
        """Write the configuration, and the records so far."""
        config = {key: value for key, value in vars(self.args).items() if key != "resume"}
        config["checksum"] = checksum(json.dumps(config).encode())
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_whole(folder / "metrics.jsonl", lines.encode())

    def resume(self, restore):
        """Go on from the newest checkpoint that `restore(state)` takes without error, or from the start.

        A damaged one, by its checksum or its contents, is passed over for the one before, and that is said.
        The records come from there, too, so damage to metrics.jsonl is mended. UserError if none is left.
        """
        self.records = [record for record in read_metrics(self.folder) if record["iteration"] == 0][
            :1
        ]
        for path in (self.folder / "state.pt", self.folder / "state.previous.pt"):
            try:
                first, data = path.read_bytes().split(b"\n", 1)
                if checksum(data).encode() != first:
                    raise ValueError("its checksum is wrong")
                state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
                restore(state)
                self.records = list(map(dict, state["records"]))
                break
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever damage does
                self.records = []
                tqdm.write(
                    f"{path} is damaged ({first_line(error)}): going back to the checkpoint before it"
                )
        if not self.records:
            raise UserError(
                f"{self.folder} cannot be resumed, its files are damaged: start a new run"
            )
        if self.first:
            self.write_metrics(self.folder)

    def iterations(self):
        """The iterations that are left, with a progress bar; from here on Ctrl-C asks to stop after one."""

        def on_interrupt(signum, frame):
            self.interrupted.append(signum)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.write(
                "finishing this iteration, then saving (Ctrl-C again to stop at once)", sys.stderr
            )

        signal.signal(signal.SIGINT, on_interrupt)
        done, total = self.records[-1]["iteration"], self.args.iterations
        steps = range(done + 1, total + 1)
        self.bar = tqdm(steps, self.args.name, initial=done, total=total, disable=not self.first)
        return self.bar

    def log(self, record, pictures, captions):
        """Add a record to metrics.jsonl, pictures (or None) to the samples, and show the progress."""
        self.make_folder()
        self.records.append(record)
        if not self.first:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if pictures is not None:
            path = self.folder / "samples" / f"{record['iteration']:06}.png"
            save_picture(grid(pictures, captions, 8), path)
        self.print_progress(record)

    def save(self, **state):
        """Write a checkpoint of tensors and numbers, after the last record; the one before stays."""
        if self.first:
            file, path = io.BytesIO(), self.folder / "state.pt"
            torch.save({**state, "records": self.records}, file)
            if path.exists():
                path.replace(self.folder / "state.previous.pt")
            write_whole(path, checksum(file.getvalue()).encode() + b"\n" + file.getvalue())

    def stop_requested(self):
        """Whether Ctrl-C was pressed in any of the processes."""
        return bool(gather_rows([{"": torch.tensor([len(self.interrupted)])}])[""].any())

    def stop(self):
        """End the process with code 130."""
        self.bar.close()
        if self.first:
            done, name = self.records[-1]["iteration"], self.args.name
            print(f"stopped after iteration {done}; go on with --name {name} --resume")
        sys.exit(130)

    def print_progress(self, record):
        """Rewards in the progress bar; warnings if they are no numbers, or are hacked."""
        held_out = [r["held_out"] for r in self.records if r.get("held_out") is not None][-1:]
        values = {"reward": record["reward"], "held-out": held_out[0] if held_out else None}
        shown = ", ".join(f"{k} {v:.2f}" for k, v in values.items() if v is not None)
        self.bar.set_postfix_str(shown + spent(record))
        if record["not_finite"]:
            total = sum(r.get("not_finite", 0) for r in self.records)
            warn(f"{total} rewards so far were no finite numbers; their groups were dropped")
        if fallen := signs_of_hacking(record):
            rose = f"the reward rose {record['gain']:.2f}, but at the cost of {changes(record, fallen)}"
            warn(f"{rose}; it may be hacked: look at the samples, stop earlier, or raise --kl")

    def print_summary(self):
        """Draw the pictures of the run, and say in one line what was gained."""
        if not self.first:
            return
        if grids := read_grids(self.folder):
            animate(self.folder, grids)
            report(self.folder, grids, self.records, self.args.reward)
        first, last = self.records[0], [r for r in self.records if "change" in r][-1]
        gained = changes(last, last["change"])
        if last.get("gain") is not None:
            before, after = (plus_minus(r["held_out"], r["held_out_se"], "") for r in (first, last))
            gained = f"{before} -> {after} (gain {plus_minus(last['gain'], last['gain_se'])})"
        seconds = sum(record.get("seconds", 0) for record in self.records)
        print(
            f"held-out {self.args.reward} {gained}, {last['images']} images, {seconds:.0f} s{spent(last)}; "
            f"see {self.folder / 'report.png'} and try: "
            f'python sample.py --lora {self.folder} --compare --prompt "red apple"'
        )


def warn(text):
    tqdm.write(f"warning: {text}", sys.stderr)


def spent(record):
    """What was asked of judges, as text to be added; empty if there is none."""
    return (
        f", {record['requests']:,} requests, {record['tokens']:,} tokens"
        if "requests" in record
        else ""
    )


def changes(record, names):
    """The changes of some watched rewards as text."""
    return ", ".join(
        f"{k} {plus_minus(record['change'][k], record['change_se'][k])}" for k in names
    )
