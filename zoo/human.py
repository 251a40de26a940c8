"""A person as the reward: a page on this machine shows the images of each group side by side.

Click the best, or press its number, or the left and right arrows for one of two; space for no
preference.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from support.errors import UserError, first_line
from support.pictures import png, save_picture, to_pil
from support.processes import processes
from zoo.jsonl import append_line, read_lines

PAGE = Path(__file__).with_name("human.html")


class Human:
    """Gives 1 to the image of a group that a person prefers, 0 to the others; 1/2 if undecided.

    A group is `branches` consecutive images. Answers are added to preferences.jsonl in the run's
    folder, and the images of each, side by side, to preferences/KEY.png. What was answered before
    is not asked again. A call waits until all its groups are answered.
    """

    only_in_training = True  # nobody is asked about held-out images

    def __init__(self):
        self.folder = None
        self.answers = {}  # {key of a group: number of the image preferred, or None}
        self.waiting = {}  # {key of a group: what the page shows of it}
        self.lock = threading.Lock()
        self.more = {}  # what else the page is to show, by names that human.html knows

    def open(self, run):
        """Ask the person of a training run. UserError if its images do not come in groups."""
        if not hasattr(run.args, "branches"):
            raise UserError("reward human compares the images of a group: use --estimator fdfo")
        if processes()[1] > 1:
            raise UserError("reward human: a person can answer one process alone, without torchrun")
        self.serve(run.folder, run.args.branches, run.args.groups, run.interrupted)

    def serve(self, folder, branches, groups, interrupted=()):
        """Serve the page, print its address and return it; answers in the folder count as given.

        branches: images of a group
        groups: how many groups belong together, for the page to show how far one is
        interrupted: a list; once something is in it, waiting ends with KeyboardInterrupt
        """
        self.folder = Path(folder)
        self.branches = branches
        self.groups = groups
        self.interrupted = interrupted
        self.answers = read_answers(self.folder, branches)

        try:
            server = ThreadingHTTPServer(("127.0.0.1", 8765), Handler)
        except OSError:  # that port is taken: any other
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.human = self
        server.handle_error = lambda *args: None  # of a page that was closed half-way
        threading.Thread(target=server.serve_forever, daemon=True).start()

        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"compare the images at {address}", flush=True)
        return address

    def __call__(self, images, prompts):
        if self.folder is None:
            raise UserError("reward human: only train.py can ask a person")

        keys, waiting = [], {}
        for group, prompt in zip(images.split(self.branches), prompts[:: self.branches]):
            files = [png(image) for image in group]
            key = hashlib.sha256("".join([prompt, *files]).encode()).hexdigest()[:16]
            keys.append(key)
            if key not in self.answers:
                picture = to_pil(torch.cat(list(group), dim=2))
                waiting[key] = (picture, {"key": key, "prompt": prompt, "images": files})

        self.waiting = waiting
        while self.waiting:
            if self.interrupted:
                raise KeyboardInterrupt
            time.sleep(0.05)

        R = torch.full((len(keys), self.branches), 0.5)
        for row, key in zip(R, keys):
            choice = self.answers[key]
            if choice is not None:
                row.zero_()
                row[choice] = 1
        return R.flatten()

    def group(self):
        """Return what the page is to show now, or None while there is nothing to compare."""
        for _, group in list(self.waiting.values()):
            answered = len(self.answers)
            counts = {"number": answered % self.groups + 1, "total": self.groups}
            return {**group, **counts, "answered": answered, **self.more}

    def answer(self, key, choice):
        """Write an answer down; one for a group that is not waiting, or no longer, is passed over.

        ValueError if it is no choice. OSError if it cannot be written: the group goes on waiting.
        """
        if not is_choice(choice, self.branches):
            raise ValueError(choice)

        with self.lock:  # the page may be open twice
            if key not in self.waiting:
                return
            picture, group = self.waiting[key]
            (self.folder / "preferences").mkdir(exist_ok=True)
            save_picture(picture, self.folder / "preferences" / f"{key}.png")
            line = {"key": key, "prompt": group["prompt"], "choice": choice}
            append_line(self.folder / "preferences.jsonl", line)
            self.answers[key] = choice
            del self.waiting[key]


def read_answers(folder, branches=99):
    """Return the answers in a folder, {key of a group: number of an image, or None}."""
    lines = read_lines(Path(folder, "preferences.jsonl"))
    return {
        str(line["key"]): line["choice"]
        for line in lines
        if {"key", "choice"} <= line.keys() and is_choice(line["choice"], branches)
    }


def is_choice(choice, branches):
    """Say whether that is the number of an image, or None; JSON also has true and 0.0."""
    return choice is None or (type(choice) is int and 0 <= choice < branches)


class Handler(BaseHTTPRequestHandler):
    """Answers the browser: GET /group is what to compare, any other GET the page, POST a choice.

    A page from elsewhere cannot read a group, so it cannot name its key in a POST either.
    """

    def do_GET(self):
        if not self.from_here():
            return self.send(403)
        if self.path != "/group":
            return self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")

        group = self.server.human.group()
        if group is None:
            return self.send(204)
        self.send(200, json.dumps(group).encode(), "application/json")

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        try:
            answer = json.loads(self.rfile.read(length))
            self.server.human.answer(answer["key"], answer["choice"])
        except (ValueError, TypeError, LookupError):
            return self.send(400)
        except OSError as error:  # as a full disk
            return self.send(500, first_line(error).encode())
        self.send(204)

    def from_here(self):
        """Say whether this machine was named as itself, not by a name made to point here."""
        return (self.headers["Host"] or "").split(":")[0] in ("127.0.0.1", "localhost")

    def send(self, status, body=b"", kind="text/plain; charset=utf-8"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing for every request."""
