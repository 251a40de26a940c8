"""Tests of the judge: servers that answer well and badly, runs that are stopped, a server of transformers.

pytest -q tests/test_judge.py
"""

import base64
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
import transformers
from PIL import Image
from tokenizers import pre_tokenizers

from rewards import Reward
from support.errors import UserError
from support.pictures import png, to_pil
from zoo.judge import percent_yes, rating

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-Example/0123456789abcdef"
PAGE = "<!DOCTYPE html>\n<html><body>Welcome</body></html>"
QUOTA = '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
PIXEL = f"data:image/png;base64,{png(torch.zeros(3, 1, 1))}"


def error(text):
    return json.dumps({"error": {"message": text, "type": "invalid_request_error"}}, indent=2)


# what the service answers: (status, body, headers), for the first so many requests, for 99 always
FAILURES = {
    "busy": (429, error("slow down"), {"Retry-After": "1"}, 2),
    "busy-until": (429, error("slow down"), {"Retry-After": "date"}, 1),
    "busy-bare": (429, error("slow down"), {}, 2),
    "busy-long-ago": (429, error("slow down"), {"Retry-After": formatdate(0, usegmt=True)}, 1),
    "busy-oddly": (429, error("slow down"), {"Retry-After": "soon"}, 1),
    "down-once": (500, "oops", {}, 1),
    "half-json": (200, '{"choices": [{"message": {"con', {}, 1),
    "cut-always": (200, '{"choices": [{"message": {"con', {}, 99),
    "error-200": (200, '{"error": {"message": "upstream is down", "code": 502}}', {}, 99),
    "down": (503, PAGE, {}, 99),
    "no-credit": (429, QUOTA, {}, 99),
    "echo": (401, error(f"{'Incorrect key. ' * 9}{KEY}").replace("/", "\\/"), {}, 99),
    "forbidden": (403, error("not in your plan"), {}, 99),
    "missing": (404, error("The model `missing` does not exist"), {}, 99),
    "blind": (400, error("this model takes text alone"), {}, 99),
    "html": (200, PAGE, {}, 99),
    "redirect": (302, "", {"Location": "/elsewhere"}, 99),
    "huge": (200, " " * 1_100_000, {}, 99),
    "list": (200, "[1]", {}, 99),
    "no-choices": (200, '{"object": "list", "choices": []}', {}, 99),
    "odd-tokens": (200, '{"choices": [{"message": {"content": ""}, "logprobs": {"content": [7]}}]}', {}, 9),
    "deep": (200, "[" * 100_000, {}, 99),
}  # fmt: skip
# services that do not take a field
REFUSED = {
    "few": ("top_logprobs", 20, "top_logprobs must be at most 5"),
    "none": ("logprobs", True, "'logprobs' is not supported with this model"),
    "long": ("max_tokens", 16, "Use 'max_completion_tokens' instead of 'max_tokens'."),
    "cold": ("temperature", 0, "temperature does not support 0 with this model"),
}


class Service(BaseHTTPRequestHandler):
    """Says yes with the image's mean as probability, or what the name of the model says goes wrong."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = body["model"]
        image, question = (part for part in body["messages"][0]["content"])
        url = image["image_url"]["url"]
        with server.lock:
            server.asked.append((mode, self.headers["Authorization"], question["text"], url))
            server.under_way += 1
            server.together = max(server.together, server.under_way)
            number = server.modes[mode] = server.modes[mode] + 1
        time.sleep(server.delay)
        with server.lock:
            server.under_way -= 1
        assert url.startswith("data:image/png;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        p = min(max(sum(picture.resize((1, 1)).getpixel((0, 0))) / 765, 0.001), 0.999)
        status, text, headers, times = FAILURES.get(mode, (200, "", {}, 0))
        field, value, message = REFUSED.get(mode, ("", "", ""))
        if field and body.get(field) == value:
            status, text, times = 400, error(message), 99
        if number > times:
            status, text, headers = 200, json.dumps(self.completion(mode, p, body)), {}
        if headers.get("Retry-After") == "date":
            headers = {"Retry-After": formatdate(time.time() + 2, usegmt=True)}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text) + 10 * (mode == "cut" and number == 1)))
        self.end_headers()
        self.wfile.write(text.encode())

    def completion(self, mode, p, body):
        """The official answer: https://platform.openai.com/docs/api-reference/chat/object."""
        token = "Yes" if p > 0.5 else " no"
        odds = {
            "Yes": 0.8 * p,
            " yes": 0.1 * p,
            "YES": 0.1 * p,
            "No": 0.9 - p * 0.9,
            " no": 0.1 - p * 0.1,
        }
        if mode == "refusal":
            token, odds = "I", {"I": 0.99, "Yes": 1e-6}
        top = [
            {"token": k, "logprob": math.log(q), "bytes": list(k.encode())} for k, q in odds.items()
        ]
        top = top[: body.get("top_logprobs", 0)]
        content = [
            {
                "token": token,
                "logprob": math.log(max(odds.values())),
                "bytes": None,
                "top_logprobs": top,
            }
        ]
        token = token if mode != "refusal" else "I cannot judge people."
        logprobs = {"content": content} if body.get("logprobs") and mode != "silent" else None
        choices, sampled = [], body.get("temperature") == 1
        for i in range(body.get("n", 1)):
            with self.server.lock:
                self.server.samples += sampled
            said = ["No.", "yes", "Yes!"][self.server.samples % 3] if sampled else token
            choice = {"index": i, "finish_reason": "stop", "logprobs": logprobs}
            choices.append(choice | {"message": {"role": "assistant", "content": said}})
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": mode}
        return {**head, "choices": choices, "usage": usage}

    def do_GET(self):
        self.server.asked.append(("elsewhere", None, "", ""))

    def log_message(self, *args):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # questions come together


@pytest.fixture
def server(monkeypatch):
    """The service, at OPENAI_BASE_URL."""
    server = Server(("127.0.0.1", 0), Service)
    server.asked, server.modes, server.lock, server.delay = [], Counter(), threading.Lock(), 0
    server.under_way = server.together = server.samples = 0
    server.handle_error = lambda *args: None  # of a caller who does not wait for the answer
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


def judge(term, **settings):
    """A reward of one judge, and the judge, which does not pause for long."""
    reward = Reward(term)
    (one,) = reward.terms.values()
    vars(one).update({"pause": 0.01, "attempts": 3, **settings})
    return reward, one


def greys(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def test_yes_is_a_probability_and_nothing_is_asked_twice(server):
    reward, one = judge('2*judge:fine:x4:"Is it like {prompt}? (Yes - No)" - 1')
    server.delay = 0.05
    R = reward(greys(0, 0.2, 0.4, 1, 0.8, 0.6, 0.2), [*"abcdefb"])
    # the levels are those of 8 bits
    assert R.tolist() == pytest.approx([-1 + 0.2, 39, 79, 199.8 - 1, 159, 119, 39], abs=0.01)
    assert sorted(text for _, _, text, _ in server.asked) == [
        f"Is it like {c}? (Yes - No)" for c in "abcdef"
    ]
    assert {head for _, head, _, _ in server.asked} == {f"Bearer {KEY}"}
    assert server.together == 4  # five after the first, four at a time
    assert torch.equal(reward(greys(0, 0.2), ["a", "b"]), R[:2]) and len(server.asked) == 6
    assert (one.answers.spent["requests"], one.answers.spent["tokens"]) == (6, 600)
    reward(greys(0.2), ["a"])
    assert len(server.asked) == 7  # another picture


def test_names_may_have_colons_and_options_are_told_from_them(server):
    for term, model, at, samples in (
        ("judge:qwen2.5vl:7b", "qwen2.5vl:7b", 16, 5),
        ('judge:m:"Rate it from 1 to 9."', "m", 16, 1),
        ('judge:x32:"Is it red?":a/b-1.5:free:n9', "a/b-1.5:free", 32, 9),
        ('judge:"model@v1"', "model@v1", 16, 5),
    ):
        _, one = judge(term)
        assert (one.model, one.at, one.samples) == (model, at, samples)
    for term in ("judge", "judge:x32", 'judge:m:"Is it red?":"Is it blue?"'):
        with pytest.raises(UserError, match="must name a model, and one question at most"):
            Reward(term)


@pytest.mark.parametrize(
    "mode, asked, least",
    [
        ("busy", 3, 2), ("busy-until", 2, 1), ("busy-bare", 3, 0), ("busy-long-ago", 2, 0),
        ("busy-oddly", 2, 0), ("down-once", 2, 0), ("half-json", 2, 0), ("cut", 2, 0),
    ],
)  # fmt: skip
def test_a_service_that_recovers_is_asked_again_when_it_says(server, mode, asked, least):
    reward, one = judge(f"judge:{mode}")
    start = time.monotonic()
    assert reward(greys(0.2), [""]).tolist() == pytest.approx([20])
    assert len(server.asked) == one.answers.spent["requests"] == asked
    assert least <= time.monotonic() - start < least + 1.5


@pytest.mark.parametrize(
    "mode, asked, complaint",
    [
        ("down", 8, "did not answer, 8 times: status 503"),
        ("slow", 3, "did not answer, 3 times: .*timed out"),
        ("no-credit", 1, "is not paid for: status 429: You exceeded your quota"),
        ("echo", 1, "refuses OPENAI_API_KEY: status 401: Incorrect key"),
        ("forbidden", 1, "refuses OPENAI_API_KEY: status 403: not in your plan"),
        ("missing", 1, "knows no such model: status 404"),
        ("blind", 1, r"\(can the model see images\?\): status 400: this model takes text alone"),
        ("html", 3, "did not answer, 3 times: no chat completion, but <!DOCTYPE html>"),
        ("redirect", 1, "is no chat completions API: status 302"),
        ("huge", 1, "more than 1000000 bytes"),
        ("list", 3, "did not answer, 3 times: no chat completion, but "),
        ("no-choices", 3, "did not answer, 3 times: no chat completion, but "),
        ("odd-tokens", 3, "did not answer, 3 times: no chat completion, but "),
        ("cut-always", 3, "did not answer, 3 times: .*choices"),
        ("error-200", 3, "did not answer, 3 times: .*upstream"),
        ("deep", 3, "did not answer, 3 times: no chat completion, but "),
    ],
)
def test_a_service_that_fails_is_named_in_one_line(server, mode, asked, complaint):
    reward, _ = judge(f"judge:{mode}", timeout=0.2 if mode == "slow" else 10)
    server.delay = 0.5 * (mode == "slow")
    with pytest.raises(UserError, match=complaint) as error:
        reward(greys(0.2, 0.4), ["", ""])
    text = str(error.value)
    assert text.startswith(f"judge {mode} at 127.0.0.1:") and "\n" not in text and len(text) < 300
    assert len(server.asked) == asked  # the second picture waits for what becomes of the first
    assert not any(KEY[i : i + 8] in text for i in range(len(KEY) - 7))


def test_a_wrong_address_shows_soon(server, monkeypatch):
    with Server(("127.0.0.1", 0), Service) as closed:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{closed.server_port}/v1")
    start = time.monotonic()
    with pytest.raises(UserError, match="did not answer, 3 times: .*refused"):
        Reward("judge:fine")(greys(0.2, 0.4), ["", ""])
    assert 1 < time.monotonic() - start < 5


@pytest.mark.parametrize(
    "mode, asked, again, value",
    [
        ("long", 2, 1, 20), ("cold", 2, 1, 20), ("few", 2, 1, 20),
        ("none", 2 + 5, 5, 80), ("silent", 1 + 5, 5, 80),
    ],
)  # fmt: skip
def test_a_service_that_cannot_do_all_is_asked_for_what_it_can(
    server, mode, asked, again, value, capfd
):
    """Where there are no logprobs, the share of yes in five answers; and no lesson is learned twice."""
    reward, one = judge(f"judge:{mode}")
    assert reward(greys(0.2), [""]).tolist() == pytest.approx([value])
    assert len(server.asked) == one.answers.spent["requests"] == asked
    reward(greys(0.4, 0.6), ["", ""])
    assert len(server.asked) == asked + 2 * again
    said = capfd.readouterr().err
    assert said.count("gives no logprobs") == said.count("\n") == (value == 80)


def test_a_refusal_is_a_lost_reward_and_said_once(server, capfd):
    reward, _ = judge("judge:refusal")
    assert reward(greys(0.2, 0.3, 0.4), [""] * 3).isnan().all()
    err = capfd.readouterr().err
    assert (
        err.count("does not answer as asked: it says 'I cannot judge people.'")
        == 1
        == err.count("\n")
    )


def tokens(*odds):
    """The first of each dictionary is what was said."""
    return [(next(iter(one)), one) for one in odds]


@pytest.mark.parametrize(
    "text, said, low, high, value",
    [
        ("8", tokens({"8": 0.5, "7": 0.25, "9": 0.25}), 1, 10, 8),
        ("8", tokens({"8": 0.4, "10": 0.4, "the": 0.2}), 1, 10, 9),
        ("10", tokens({"1": 0.8, "9": 0.2}, {"0": 1.0}), 1, 10, 10),  # two tokens
        ("9", tokens({"9": 0.5, "1": 0.5}), 1, 10, 9),  # the 1 may have become a 10
        ("2", tokens({"2": 0.5, "1": 0.5}), 1, 9, 1.5),
        ("1", tokens({"1": 0.5, "2": 0.5}), 1, 10, 1.5),
        ("0", tokens({"0": 0.5, "4": 0.5}), 0, 5, 2),
        ("85", tokens({"85": 0.5, "90": 0.25, "8": 0.25}), 0, 100, 260 / 3),
        (
            "My rating: 3/5",
            tokens({"my": 1.0}, {"rating": 1.0}, {"": 1.0}, {"3": 0.5, "4": 0.5}),
            1,
            5,
            3.5,
        ),
        ("From 1 to 10: 7", [], 1, 10, 7),
        ("7.5 out of 10", tokens({"7": 0.5, "8": 0.5}, {"": 1.0}, {"5": 1.0}), 1, 10, 7.5),
        ("**6**", [], 1, 10, 6),
        ("11", [], 1, 10, math.nan),
        ("I cannot tell.", tokens({"i": 1.0}), 1, 10, math.nan),
        ("", [], 1, 10, math.nan),
    ],
)
def test_a_rating_is_the_expected_number(text, said, low, high, value):
    assert rating(text, said, low, high) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    "text, said, value",
    [
        ("Yes", tokens({"yes": 0.6, "no": 0.2, "maybe": 0.2}), 75),
        ("**Yes**", tokens({"": 1.0}, {"yes": 0.9, "no": 0.1}), 90),
        ("No.", [], 0),
        ("**yes**, it is", [], 100),
        ("I see no cat.", tokens({"i": 0.995, "no": 0.005}, {"see": 1.0}, {"no": 1.0}), math.nan),
        ("I see no cat.", [], math.nan),
        ("", [], math.nan),
    ],
)
def test_yes_or_no_is_the_first_word(text, said, value):
    assert percent_yes(text, said) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    "question, bounds",
    [
        ("How red is it, from 1 to 10?", [1, 10]),
        ("Rate it on a scale of 0-100.", [0, 100]),
        ("Say a number between 1 and 5.", [1, 5]),
        ("Are there 2 to 3 cats in it?", None),
    ],
)
def test_a_question_with_bounds_asks_for_a_rating(server, question, bounds):
    assert judge(f'judge:fine:"{question}"')[1].bounds == bounds


def test_the_key_and_the_address_are_checked_before_anything_is_sent(monkeypatch):
    for url, key, complaint in (
        (None, "", "judge m at api.openai.com wants a key: set OPENAI_API_KEY"),
        ("http://192.168.1.2:8000/v1", "", "judge m at 192.168.1.2:8000 wants a key"),
        ("localhost:11434/v1", KEY, "OPENAI_BASE_URL must be an address"),
        ("http://a..b/v1", KEY, "is no address"),
        (None, "sk-123456 78", "OPENAI_API_KEY has characters"),
        (None, "sk-\u2026123456", "OPENAI_API_KEY has characters"),
    ):
        monkeypatch.setenv("OPENAI_BASE_URL", url or "")
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=complaint) as error:
            Reward("judge:m")
        assert "123456" not in str(error.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert Reward("judge:m").terms["judge:m"].url == "http://localhost:11434/v1/chat/completions"


# ---- whole runs


@pytest.fixture
def start(server, tmp_path):
    """A function that starts a short run, three held-out prompts and eight images an iteration."""
    lines = (ROOT / "tiny" / "prompts_train.txt").read_text().splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:24]))

    def start(*args, launcher=(), **variables):
        small = (
            "--pairs 4 --steps 2 --prompts prompts.txt --name run --iterations 3 --watch".split()
        )
        args = (
            args if "--resume" in args else (*small, 'judge:fine:x1:"Is it red, or blue?"', *args)
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *args], cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def wait_until(seen, timeout=60):
    end = time.monotonic() + timeout
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.005)


def finish(run, code):
    """Standard output, and what standard error says below the progress bar."""
    out, err = run.communicate(timeout=120)
    assert run.returncode == code, err
    return out, re.split("[\r\n]", err.strip())[-1]


def records(folder):
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.ci
def test_a_killed_run_asks_nothing_twice(server, start, tmp_path):
    """Six held-out images before and after, eight in each of three iterations; the six are watched, too."""
    runs, server.delay = tmp_path / "runs", 0.05
    run = start("--reward", "judge:fine:x1 - 1")
    wait_until(lambda: len(server.asked) == 23)  # in the second iteration, as 12 + 8 + 3 tell
    run.kill()
    run.communicate()
    out, err = finish(start("--name", "run", "--resume"), 0)
    lost = len(server.asked) - 48  # the one that was under way
    assert len(set(server.asked)) == 48 and lost in (0, 1)
    assert [r["iteration"] for r in records(runs)] == [0, 1, 2, 3]
    assert records(runs)[1]["requests"] == 20 and records(runs)[1]["tokens"] == 2000
    spent = f"{records(runs)[-1]['requests']} requests, 4,800 tokens"
    assert records(runs)[-1]["requests"] in (48, 48 + lost)
    assert f" s, {spent}; see" in out and out.count("\n") == 1 and f"{spent}]" in err
    for path in runs.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.mark.ci
def test_a_run_stops_at_its_limit(server, start, tmp_path):
    out, err = finish(start("--reward", "judge:fine", "--max-requests", "24"), 2)
    limit = (
        "--max-requests is used up: each process may ask 24; mend this, then go on with --resume"
    )
    assert err == f"train.py: {limit}" and not out and len(server.asked) == 24
    assert [(r["iteration"], r["requests"]) for r in records(tmp_path / "runs")] == [
        (0, 12),
        (1, 20),
    ]
    finish(start("--name", "run", "--resume"), 2)
    finish(start("--name", "run", "--resume", "--max-requests", "48"), 0)
    assert len(server.asked) == len(set(server.asked)) == 48
    out, err = finish(start("--reward", "judge:fine", "--name", "other", "--max-requests", "11"), 2)
    assert err == "train.py: --max-requests is used up: each process may ask 11"
    assert len(server.asked) == 48 + 11 and not (tmp_path / "runs" / "other").exists()
    _, err = finish(
        start("--reward", "brightness", "--watch", "", "--name", "other", "--max-requests", "11"), 2
    )
    assert err == "train.py: --max-requests: there is no judge in --reward or --watch"


@pytest.mark.ci
def test_a_service_that_fails_ends_the_run_in_one_line_and_ctrl_c_at_once(
    server, start, tmp_path, monkeypatch
):
    server.delay = 0.1
    run = start("--reward", "judge:fine", PYTHONUNBUFFERED="1")
    wait_until(lambda: len(server.asked) >= 14)
    monkeypatch.setitem(FAILURES, "fine", FAILURES["echo"])  # the key is taken back
    out, err = finish(run, 2)
    monkeypatch.delitem(FAILURES, "fine")
    assert "refuses OPENAI_API_KEY" in err and err.endswith("mend this, then go on with --resume")
    assert KEY not in out + err
    server.delay = 30
    asked = len(server.asked)
    run = start("--name", "run", "--resume")
    wait_until(lambda: len(server.asked) > asked)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    before = time.monotonic()
    run.send_signal(signal.SIGINT)
    finish(run, 130)
    assert time.monotonic() - before < 5
    server.delay = 0
    out, _ = finish(start("--name", "run", "--resume"), 0)
    assert "requests" in out and records(tmp_path / "runs")[-1]["iteration"] == 3


@pytest.mark.ci
def test_processes_share_the_limit_and_the_answers(server, start, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = tmp_path / "runs"
    # both images of a prompt in a batch, so that the pixels are the same however prompts are shared
    run = start(
        "--reward", "judge:fine:x1", "--max-requests", "28", "--batch", "2", launcher=torchrun
    )
    _, err = run.communicate(timeout=120)
    assert (
        run.returncode
        and "--max-requests is used up: each process may ask 14" in err
        and len(server.asked) <= 28
    )
    assert sorted(path.name for path in runs.glob("run/judge-*")) == [
        "judge-0.jsonl",
        "judge-1.jsonl",
    ]
    run = start(
        "--name", "run", "--resume", "--max-requests", "60", "--iterations", "2", launcher=torchrun
    )
    finish(run, 0)
    twice = len(server.asked) - len(set(server.asked))
    assert twice <= 2  # one that each waited for when they were stopped
    assert len(server.asked) - twice <= records(runs)[-1]["requests"] <= len(server.asked) + 2
    asked = len(server.asked)
    finish(start("--name", "run", "--resume"), 0)
    assert (
        len(server.asked) == asked
    )  # the first evaluation again, whose twelve answers are in the two files


# ---- the real API


@pytest.mark.ci
def test_the_service_of_these_tests_answers_as_the_official_package_reads(server):
    """Which pip install "transformers[serving]" brings along."""
    from openai.types.chat import ChatCompletion

    talk = [
        {
            "role": "user",
            "content": [{"image_url": {"url": PIXEL}}, {"type": "text", "text": "Is it red?"}],
        }
    ]
    for mode, fields in (("fine", {"logprobs": True, "top_logprobs": 3}), ("silent", {"n": 2})):
        url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
        answer = requests.post(
            url, json={"model": mode, "messages": talk, **fields}, timeout=10
        ).json()
        read = ChatCompletion.model_validate(answer, strict=True)
        assert len(read.choices) == fields.get("n", 1) and read.usage.total_tokens == 100
        assert mode == "silent" or len(read.choices[0].logprobs.content[0].top_logprobs) == 3


def save_llava(folder, answers, scale=0.3):
    """A folder with a small random LLaVA that can say nothing but one of the tokens `answers`."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=56, patch_size=14, **small),
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **small),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for p in model.parameters():  # or all answers are alike
        p.data += scale * torch.randn(p.shape)
    ids = tokenizer.convert_tokens_to_ids(answers)
    others = [i for i in range(len(tokenizer)) if i not in ids]
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, eos_token_id=ids, pad_token_id=0, suppress_tokens=others
    )
    model.save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    )
    template += "{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def odds_of(folder, image, question, answers):
    """What transformers itself makes of a picture and a question: a probability for each answer."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": to_pil(image)}, {"type": "text", "text": question}]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return logits[processor.tokenizer.convert_tokens_to_ids(answers)].softmax(0)


@pytest.fixture
def transformers_serve(tmp_path, monkeypatch):
    """The address of `transformers serve`, which wants pip install "transformers[serving]"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = (
        f"http://127.0.0.1:{port}",
        [Path(sys.executable).with_name("transformers"), "serve"],
    )
    with open(tmp_path / "serve.log", "w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        options = [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
            "--default-seed",
            "0",
        ]
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)

    def ready():
        assert server.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
        with suppress(requests.ConnectionError):
            return requests.get(f"{url}/health", timeout=5).ok

    wait_until(ready)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield url
    server.terminate()
    server.wait(timeout=30)


@pytest.mark.ci
def test_transformers_serve_judges_a_run(transformers_serve, tmp_path):
    """It gives no logprobs and does not know n: yes is counted among samples, one at a time."""
    words, digits = ["Yes", "No"], list("123456789")
    save_llava(tmp_path / "words", words)
    save_llava(tmp_path / "digits", digits)
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    odds = torch.stack(
        [odds_of(tmp_path / "words", image, "Is it red?", words)[0] for image in images]
    )
    both = torch.stack([images[odds.argmin()], images[odds.argmax()]])
    assert odds.max() - odds.min() > 0.4  # so it depends on the image
    R = Reward(f'judge:{tmp_path}/words:"Is it red?":n200')
    (one,) = R.terms.values()
    # 200 samples: a standard error of at most 3.5 %, four of which are exceeded once in 15,000 times
    shares = [100 * odds.min().item(), 100 * odds.max().item()]
    assert R(both, ["", ""]).tolist() == pytest.approx(shares, abs=14)
    assert one.answers.spent["requests"] == 1 + 2 * 200 and one.answers.spent["tokens"] > 401 * 16
    question = "How red, from 1 to 9?"
    likeliest = [
        1 + odds_of(tmp_path / "digits", image, question, digits).argmax().item()
        for image in images
    ]
    assert Reward(f'judge:{tmp_path}/digits:"{question}"')(images, [""] * 6).tolist() == likeliest
    assert len(set(likeliest)) > 1

    lines = [f"a {colour} cat" for colour in "red blue green grey white".split() * 4]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    small = "--pairs 4 --steps 2 --iterations 2 --prompts prompts.txt --name run"
    save_llava(tmp_path / "unsure", words, scale=0.05)
    term = f"judge:{tmp_path}/unsure:n3"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *small.split(), "--reward", term], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = finish(run, 0)
    # of two held-out prompts four images before and after, in each iteration eight; and one to find out
    assert f"{3 * (4 + 16 + 4) + 1} requests" in out
    last = records(tmp_path / "runs")[-1]
    assert last["not_finite"] == 0 and 0 < last["held_out"] < 100 and last["grad_norm"] > 0
