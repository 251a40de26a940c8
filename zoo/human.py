"""A person as the reward: a page on this machine that shows the images of each group side by side.

Click the best, or press its number, or the left and right arrows for one of two; space for no preference.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from pictures import to_pil
from services import png

PAGE = Path(__file__).with_name("human.html")


class Human:
    """R = 1 for the image of a group that a person prefers, 0 for the others; without preference 1/2 for all.

    Groups are `branches` consecutive images, `groups` of them an iteration. Answers are added to
    preferences.jsonl in the run's folder, and their images side by side to preferences/KEY.png. A group that
    was answered before is not shown again: a run that was stopped goes on without asking twice. A call waits
    until all its groups are answered; the page may be closed and opened meanwhile.
    """

    def __init__(self, branches, groups):
        self.branches, self.groups = branches, groups
        self.answers, self.waiting, self.changed = {}, {}, threading.Condition()

    def open(self, folder):
        """Serve the page for a run, with the answers that its folder has; returns the address."""
        self.folder = Path(folder)
        path = self.folder / "preferences.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            answer = json.loads(line)
            self.answers[answer["key"]] = answer["choice"]
        handler = type("Handler", (Handler,), {"human": self})
        try:
            server = ThreadingHTTPServer(("127.0.0.1", 8765), handler)
        except OSError:  # that port is taken: any other
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *args: None  # of a page that was closed half-way
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    def __call__(self, images, prompts):
        groups, keys = list(zip(images.split(self.branches), prompts[:: self.branches])), []
        for group, prompt in groups:
            files = [png(image) for image in group]
            keys.append(hashlib.sha256("".join([prompt, *files]).encode()).hexdigest()[:16])
            if keys[-1] not in self.answers:
                picture = to_pil(torch.cat(list(group), dim=2))
                self.waiting[keys[-1]] = {"key": keys[-1], "prompt": prompt, "images": files}, picture
        with self.changed:
            while self.waiting:
                self.changed.wait(0.2)  # now and then, to notice Ctrl-C
        R = torch.full((len(groups), self.branches), 0.5)
        for row, key in zip(R, keys):
            if self.answers[key] is not None:
                row.zero_()[self.answers[key]] = 1
        return R.flatten()

    def first(self):
        """What the page is to show, as JSON, or None while there is nothing to compare."""
        for group, _ in list(self.waiting.values()):
            number, answered = len(self.answers) % self.groups + 1, len(self.answers)
            return {**group, "number": number, "total": self.groups, "answered": answered}

    def answer(self, key, choice):
        """Write an answer down; a group that is not waiting, or no longer, is passed over."""
        with self.changed:
            group, picture = self.waiting.get(key, (None, None))
            if group is None or choice not in (None, *range(len(group["images"]))):
                return
            (self.folder / "preferences").mkdir(exist_ok=True)
            picture.save(self.folder / "preferences" / f"{key}.png")
            with open(self.folder / "preferences.jsonl", "a") as file:
                file.write(json.dumps({"key": key, "prompt": group["prompt"], "choice": choice}) + "\n")
            self.answers[key] = choice
            del self.waiting[key]
            self.changed.notify()


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /group what to compare, POST /answer the choice; for a browser right here."""

    def do_GET(self):
        group = self.human.first()
        if not self.from_here():
            self.send(403)
        elif self.path == "/":
            self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path != "/group":
            self.send(404)
        elif group is None:
            self.send(204)
        else:
            self.send(200, json.dumps(group).encode(), "application/json")

    def do_POST(self):
        # pages from elsewhere cannot send this type without asking first, which is not granted
        if not self.from_here() or self.headers["Content-Type"] != "application/json":
            return self.send(403)
        if self.path != "/answer":
            return self.send(404)
        try:
            answer = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 1000)))
            self.human.answer(answer["key"], answer["choice"])
        except (ValueError, TypeError, KeyError):
            return self.send(400)
        self.send(204)

    def from_here(self):
        """Not by another name that was made to point here."""
        return (self.headers["Host"] or "").split(":")[0] in ("127.0.0.1", "localhost")

    def send(self, status, body=b"", kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing for every request."""
