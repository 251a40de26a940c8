"""A person as the reward: a page on this machine that shows the images of each group side by side.

Click the best, or press its number, or the left and right arrows for one of two; space for no preference.
"""

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from support.errors import first_line
from support.pictures import png, save_picture, to_pil

PAGE = Path(__file__).with_name("human.html")
# what may be raised by reading JSON that is damaged, or of another shape
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


class Human:
    """R = 1 for the image of a group that a person prefers, 0 for the others; without preference 1/2 for all.

    Groups are `branches` consecutive images, `groups` of them an iteration. Answers are added to
    preferences.jsonl in the run's folder, and their images side by side to preferences/KEY.png; what was
    answered before is not asked again. A call waits until all its groups are answered.
    """

    def __init__(self, branches, groups):
        self.branches, self.groups = branches, groups
        self.answers, self.waiting, self.lock = {}, {}, threading.Lock()
        self.more = {}  # what else the page is to say, by names that human.html knows

    def open(self, folder, interrupted=()):
        """Serve the page for a run, with the answers that its folder has; returns the address.

        interrupted: a list; once something is in it, nobody is waited for any longer: KeyboardInterrupt.
        """
        self.folder, self.interrupted = Path(folder), interrupted
        self.answers = dict(self.read_answers())
        try:
            server = ThreadingHTTPServer(("127.0.0.1", 8765), Handler)
        except OSError:  # that port is taken: any other
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.human = self
        server.handle_error = lambda *args: None  # of a page that was closed half-way
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    def read_answers(self):
        """(key, choice) of each line of preferences.jsonl; one that was cut short is passed over."""
        path = self.folder / "preferences.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with suppress(*MALFORMED):
                answer = json.loads(line)
                if self.is_choice(answer["choice"]):
                    yield str(answer["key"]), answer["choice"]

    def is_choice(self, choice):
        """Whether that is the number of an image, or None; json also has true and 0.0."""
        return choice is None or type(choice) is int and 0 <= choice < self.branches

    def __call__(self, images, prompts):
        groups = list(zip(images.split(self.branches), prompts[:: self.branches]))
        keys, waiting = [], {}
        for group, prompt in groups:
            files = [png(image) for image in group]
            keys.append(hashlib.sha256("".join([prompt, *files]).encode()).hexdigest()[:16])
            if keys[-1] not in self.answers:
                picture = to_pil(torch.cat(list(group), dim=2))
                waiting[keys[-1]] = {"key": keys[-1], "prompt": prompt, "images": files}, picture
        self.waiting = waiting
        while self.waiting:
            if self.interrupted:
                raise KeyboardInterrupt
            time.sleep(0.05)
        R = torch.full((len(groups), self.branches), 0.5)
        for row, key in zip(R, keys):
            if self.answers[key] is not None:
                row.zero_()[self.answers[key]] = 1
        return R.flatten()

    def first(self):
        """What the page is to show, as JSON, or None while there is nothing to compare."""
        for group, _ in list(self.waiting.values()):
            number, answered = len(self.answers) % self.groups + 1, len(self.answers)
            return {
                **group,
                "number": number,
                "total": self.groups,
                "answered": answered,
                **self.more,
            }

    def answer(self, key, choice):
        """Write an answer down; a group that is not waiting, or no longer, is passed over.

        ValueError if it is no choice. OSError if it cannot be written, and the group goes on waiting.
        """
        with self.lock:  # the same page may be open twice
            if not self.is_choice(choice):
                raise ValueError(choice)
            if key not in self.waiting:
                return
            group, picture = self.waiting[key]
            (self.folder / "preferences").mkdir(exist_ok=True)
            save_picture(picture, self.folder / "preferences" / f"{key}.png")
            line = json.dumps({"key": key, "prompt": group["prompt"], "choice": choice})
            append_line(self.folder / "preferences.jsonl", line)
            self.answers[key] = choice
            del self.waiting[key]


def append_line(path, text):
    """Add a line to a file; if a full disk or a crash has cut the last one short, it stays by itself."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else "\n" + text
        file.write(f"{text}\n".encode())


class Handler(BaseHTTPRequestHandler):
    """GET /group is what to compare, any other GET the page, POST the choice; for a browser right here."""

    timeout = 10  # seconds that a browser may say nothing

    def do_GET(self):
        group = self.server.human.first()
        if not self.from_here():
            self.send(403)
        elif self.path != "/group":
            self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif group is None:
            self.send(204)
        else:
            self.send(200, json.dumps(group).encode(), "application/json")

    def do_POST(self):
        # pages from elsewhere cannot send this type without asking first, which is not granted
        if not self.from_here() or self.headers["Content-Type"] != "application/json":
            return self.send(403)
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= 1000:
                raise ValueError(length)
            answer = json.loads(self.rfile.read(length))
            self.server.human.answer(answer["key"], answer["choice"])
        except MALFORMED:
            return self.send(400)
        except OSError as error:  # as a full disk
            return self.send(500, first_line(error).encode())
        self.send(204)

    def from_here(self):
        """Not by another name that was made to point here."""
        return (self.headers["Host"] or "").split(":")[0] in ("127.0.0.1", "localhost")

    def send(self, status, body=b"", kind="text/plain; charset=utf-8"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Content-Security-Policy", "frame-ancestors 'none'"
        )  # no click through another page
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing for every request."""
