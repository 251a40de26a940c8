"""Tests of the judge: servers that answer well and badly, runs that stop, a server of transformers.

pytest -q tests/test_judge.py
"""

import json
import math
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
import transformers

from rewards import Reward
from support.errors import UserError
from support.pictures import png, to_pil
from support.prompts import Prompt
from tests import commands, test_rewards
from tests.test_rewards import Service, mean_level, random_images, serve, tiny_tokenizer
from zoo.jsonl import read_lines
from zoo.judge import percent_yes, rating

pauses = test_rewards.pauses  # a fixture
KEY = "sk-Example/0123456789abcdef"
PAGE = "<!DOCTYPE html>\n<html><body>Welcome</body></html>"
QUOTA = '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
ODD = '{"choices": [{"message": {"content": ""}, "logprobs": {"content": [7]}}]}'


def error(text):
    return json.dumps({"error": {"message": text, "type": "invalid_request_error"}}, indent=2)


ECHO = error(f"{'Incorrect key. ' * 9}{KEY}").replace("/", "\\/")
# what the service answers, to how many requests, and what is to be said of it
FAILURES = {
    "busy": (429, error("slow down"), 2, None),
    "half-json": (200, '{"choices": [{"message": {"con', 1, None),
    "down": (503, PAGE, 8, "did not answer, 8 times: status 503"),
    "html": (200, PAGE, 8, "did not answer, 8 times: no chat completion, but <!DOCTYPE html>"),
    "odd": (200, ODD, 8, "did not answer, 8 times: no chat completion, but "),
    "error-200": (200, error("upstream is down"), 8, "did not answer, 8 times: .*upstream"),
    "no-credit": (429, QUOTA, 1, "is not paid for: status 429: You exceeded your quota"),
    "echo": (401, ECHO, 1, "refuses OPENAI_API_KEY: status 401: Incorrect key"),
    "missing": (404, error("no such model"), 1, "knows no such model: status 404"),
    "blind": (400, error("text alone"), 1, r"the model see images\?\): status 400: text alone"),
    "redirect": (302, "", 1, "is it a chat completions API, .*: status 302"),
}
# services that do not take an option
REFUSED = {
    "few": ("top_logprobs", 20, "top_logprobs must be at most 5"),
    "none": ("logprobs", True, "'logprobs' is not supported with this model"),
    "long": ("max_tokens", 16, "Use 'max_completion_tokens' instead of 'max_tokens'."),
    "cold": ("temperature", 0, "temperature does not support 0 with this model"),
}
ODDS = {"refusal": {"I": 0.99, "Yes": 1e-6}, "rates": {"7": 0.6, "9": 0.4}}


class Judge(Service):
    """Says yes with the image's mean as probability, or fails as the name of the model says."""

    def answer(self, body):
        server, mode = self.server, body["model"]
        image, question = body["messages"][0]["content"]
        url = image["image_url"]["url"]
        server.asked.append((mode, self.headers["Authorization"], question["text"], url))
        number = [asked[0] for asked in server.asked].count(mode)
        server.under_way.append(1)
        time.sleep(server.delay)
        server.under_way.append(-1)

        status, text, times, _ = FAILURES.get(mode, (200, "", 0, None))
        if number <= times:
            return status, text
        option, value, message = REFUSED.get(mode, ("", "", ""))
        if body.get(option, "absent") == value:
            return 400, error(message)

        p = min(max(mean_level(url.split(",")[1]), 0.001), 0.999)
        if "not" in question["text"]:
            p = 1 - p
        return 200, json.dumps(self.completion(mode, p, number, body))

    def completion(self, mode, p, number, body):
        """The official answer: https://platform.openai.com/docs/api-reference/chat/object."""
        odds = {"Yes": 0.8 * p, " YES": 0.2 * p, "No": 0.9 * (1 - p), " no": 0.1 * (1 - p)}
        odds = ODDS.get(mode, odds)
        top = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in odds.items()]
        likeliest = max(top, key=lambda token: token["logprob"])
        content = [{**likeliest, "top_logprobs": top[: body.get("top_logprobs", 0)]}]
        logprobs = {"content": content} if body.get("logprobs") and mode != "silent" else None

        said = likeliest["token"]
        if mode == "refusal":
            said = "I cannot judge people."
        if mode == "UnifiedReward":
            said = f"Alignment Score (1-5): {5 * p}\nCoherence Score (1-5): 1\nStyle Score (1-5): 3"
            said = said[: 4 * body["max_tokens"]]
        if body.get("temperature") == 1:
            said = ["No.", "yes", "Yes!"][number % 3]

        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": logprobs, "message": message}
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": mode}
        return {**head, "choices": [choice], "usage": usage}


@pytest.fixture
def server(monkeypatch):
    """The service, at OPENAI_BASE_URL."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)  # questions come together
    with serve(Judge) as server:
        server.delay, server.under_way = 0, []
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def greys(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


# ---- one judge


def test_yes_is_a_probability_and_nothing_is_asked_twice(server):
    reward = Reward('2*judge:fine:x4:"Is it like {prompt}? (Yes - No)" - 1')
    server.delay = 0.1
    R = reward(greys(0, 0.2, 0.4, 1, 0.8, 0.6, 0.2, 0.6), [*"abcdefba"])
    # the levels are those of 8 bits
    expected = [-1 + 0.2, 39, 79, 199.8 - 1, 159, 119, 39, 119]
    assert R.tolist() == pytest.approx(expected, abs=0.01)
    texts = sorted(text for _, _, text, _ in server.asked)
    assert texts == [f"Is it like {c}? (Yes - No)" for c in "aabcdef"]
    assert {key for _, key, _, _ in server.asked} == {f"Bearer {KEY}"}
    assert max(accumulate(server.under_way)) == 4  # six after the first, four at a time

    (judge,) = reward.terms.values()
    assert judge.record() == {"requests": 7, "tokens": 700}
    assert reward(greys(0, 0.2), ["a", "b"]).equal(R[:2]) and len(server.asked) == 7


def test_names_options_and_bounds_are_told_apart(server):
    for term, *expected in (
        ("judge:qwen2.5vl:7b", "qwen2.5vl:7b", 16, 5, None),
        ('judge:x32:"Is it red?":"a/b@1.5":free:n9', "a/b@1.5:free", 32, 9, None),
        ('judge:m:"How red is it, from 1 to 10?"', "m", 16, 1, [1, 10]),
        ('judge:m:"Rate it on a scale of 0-100."', "m", 16, 1, [0, 100]),
        ('judge:m:"Say a number between 1 and 5."', "m", 16, 1, [1, 5]),
        ('judge:m:"Are there 2 to 3 cats in it?"', "m", 16, 5, None),
    ):
        (judge,) = Reward(term).terms.values()
        assert [judge.model, judge.at, judge.samples, judge.bounds] == expected
    with pytest.raises(UserError, match="must name a model"):
        Reward("judge:x32")


def test_a_judge_is_asked_the_questions_of_each_prompt(server):
    prompts = [Prompt("a"), Prompt("b")]
    prompts[0].questions = ["Is it white?", "Is it not white?"]
    prompts[1].questions = ["Is it white?"]
    R = Reward("judge:fine:questions")(greys(0.2, 0.6), prompts)
    assert R.tolist() == pytest.approx([50, 60], abs=0.01)
    texts = {text for _, _, text, _ in server.asked}
    assert texts == {"Is it white? Answer Yes or No.", "Is it not white? Answer Yes or No."}


def test_unifiedreward_is_asked_in_its_own_words(server):
    R = Reward("judge:unified")(greys(0.2, 0.6), ["a", "b"])
    assert R.tolist() == pytest.approx([5 / 3, 7 / 3])
    mode, _, text, _ = server.asked[0]
    assert mode == "UnifiedReward" and text.endswith("Text Caption: [a]")
    assert len(server.asked) == 2


def test_a_service_that_recovers_is_asked_again_when_it_says(server, pauses):
    for mode, asked in (("busy", 3), ("half-json", 2)):
        server.asked.clear()
        assert Reward(f"judge:{mode}")(greys(0.2), [""]).tolist() == pytest.approx([20])
        assert len(server.asked) == asked
    assert pauses[:2] == [17, 17] and len(pauses) == 3


@pytest.mark.parametrize("mode", [mode for mode in FAILURES if FAILURES[mode][3]])
def test_a_service_that_fails_is_named_in_one_line(server, pauses, mode):
    _, _, times, complaint = FAILURES[mode]
    with pytest.raises(UserError, match=complaint) as error:
        Reward(f"judge:{mode}")(greys(0.2, 0.4), ["", ""])
    text = str(error.value)
    assert text.startswith(f"judge {mode} at 127.0.0.1:") and "\n" not in text and len(text) < 300
    assert len(server.asked) == times  # the second picture waits for what becomes of the first
    assert not any(KEY[i : i + 8] in text for i in range(len(KEY) - 7))


def test_a_wrong_address_shows_soon_and_an_error_ends_all_questions(server, pauses, monkeypatch):
    reward = Reward("judge:fine:x2")
    server.delay = 0.02
    reward(greys(0.2), [""])
    monkeypatch.setitem(FAILURES, "fine", (401, ECHO, 99, None))  # the key is taken back
    with pytest.raises(UserError, match="refuses OPENAI_API_KEY"):
        reward(greys(*torch.linspace(0, 1, 40).tolist()), [""] * 40)
    assert len(server.asked) <= 1 + 2  # no more than were under way

    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="did not answer, 3 times: .*refused"):
        Reward("judge:fine")(greys(0.2, 0.4), ["", ""])
    assert sum(pauses) < 5


@pytest.mark.parametrize(
    "mode, asked, again",
    [("long", 2, 1), ("cold", 2, 1), ("few", 2, 1), ("none", 7, 5), ("silent", 6, 5)],
)
def test_a_service_is_asked_for_what_it_can(server, pauses, mode, asked, again, capfd):
    """Where there are no logprobs, for five answers; and no lesson is learned twice."""
    value = 20 if again == 1 else 60
    reward = Reward(f"judge:{mode}")
    assert reward(greys(0.2), [""]).tolist() == pytest.approx([value])
    assert len(server.asked) == asked
    reward(greys(0.4, 0.6), ["", ""])
    assert len(server.asked) == asked + 2 * again
    said = capfd.readouterr().err
    assert said.count("gives no logprobs") == said.count("\n") == (value == 60)


def test_a_rating_is_an_expectation_or_one_answer(server, pauses, monkeypatch):
    rates = 'judge:rates:"From 1 to 9?"'
    assert Reward(rates)(greys(0.2), [""]).item() == pytest.approx(0.6 * 7 + 0.4 * 9)
    monkeypatch.setitem(REFUSED, "rates", REFUSED["none"])
    assert Reward(rates)(greys(0.2), [""]).item() == 7
    assert len(server.asked) == 1 + 3


def test_a_refusal_is_a_lost_reward_and_said_once(server, capfd):
    assert Reward("judge:refusal")(greys(0.2, 0.3, 0.4), [""] * 3).isnan().all()
    said = capfd.readouterr().err
    assert said.count("does not answer as asked: it says 'I cannot judge people.'") == 1
    assert said.count("\n") == 1


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
        ("1", tokens({"1": 0.5, "2": 0.5}), 1, 10, 1.5),
        ("4", tokens({"4": 0.5, "0": 0.5}), 0, 5, 2),
        ("Rating: 3/5", tokens({"rating": 1.0}, {"": 1.0}, {"3": 0.5, "4": 0.5}), 1, 5, 3.5),
        ("From 1 to 10: 7", [], 1, 10, 7),
        ("7.5 out of 10", tokens({"7": 0.5, "9": 0.5}, {"": 1.0}, {"5": 1.0}), 1, 10, 7.5),
        ("11", [], 1, 10, math.nan),
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
    ],
)
def test_yes_or_no_is_the_first_word(text, said, value):
    assert percent_yes(text, said) == pytest.approx(value, nan_ok=True)


def test_the_key_and_the_address_are_checked_before_anything_is_sent(monkeypatch):
    for url, key, complaint in (
        ("", "", "judge m at api.openai.com wants a key: set OPENAI_API_KEY"),
        ("localhost:11434/v1", KEY, "OPENAI_BASE_URL must be an address"),
        ("", "sk-123456 78", "OPENAI_API_KEY has characters"),
    ):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=complaint) as error:
            Reward("judge:m")
        assert "123456" not in str(error.value)

    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    (judge,) = Reward("judge:m").terms.values()
    assert judge.url == "http://localhost:11434/v1/chat/completions"


class Run:
    """What a judge wants to know of a run."""

    def __init__(self, folder, max_requests=None):
        self.folder, self.args = folder, SimpleNamespace(max_requests=max_requests)


def open_judges(run, *models):
    """The rewards of judges that were opened for a run, and the first of the judges."""
    judged = [Reward(f"judge:{model}") for model in models]
    judges = [judge for reward in judged for judge in reward.terms.values()]
    for judge in judges:
        judge.open(run)
    return *judged, judges[0]


def test_the_judges_of_a_run_share_what_is_kept_and_the_limit(server, tmp_path):
    images = greys(0.2, 0.4, 0.6)
    first, second, judge = open_judges(Run(tmp_path, 5), "fine", "other")
    R = first(images, [""] * 3)
    second(images[:1], [""])
    with pytest.raises(UserError, match="the 5 requests of --max-requests are used up"):
        second(images, [""] * 3)
    assert len(server.asked) == 5 and judge.record() == {"requests": 5, "tokens": 500}

    # resumed after a line was cut short, with a higher limit: only what is not kept is asked
    with open(tmp_path / "judge-0.jsonl", "a") as file:
        file.write('{"values": {"ab')
    first, second, judge = open_judges(Run(tmp_path, 8), "fine", "other")
    assert first(images, [""] * 3).equal(R)
    second(images, [""] * 3)
    assert len(server.asked) == 6 and judge.record() == {"requests": 6, "tokens": 600}


def test_each_process_has_its_share_of_the_limit_and_its_file(server, tmp_path, monkeypatch):
    reward, judge = open_judges(Run(tmp_path), "fine")
    reward(greys(0.1, 0.3), ["", ""])
    for rank, left, counted in ((0, 5, 3), (1, 4, 1)):
        monkeypatch.setattr("zoo.judge.processes", lambda: (rank, 2))
        reward, judge = open_judges(Run(tmp_path, 12), "fine")
        assert judge.answers.left == left  # half of what all have left
        reward(greys(0.1, 0.3, 0.5 + rank / 4), [""] * 3)
        assert judge.record()["requests"] == counted  # the first counts what was before
    assert len(server.asked) == 4
    assert len(read_lines(tmp_path / "judge-1.jsonl")) == 3  # a request, its tokens, its value


# ---- whole runs


@pytest.fixture
def start(server, tmp_path, monkeypatch):
    """A function that starts a short run: three held-out prompts, eight images an iteration."""
    lines = (commands.ROOT / "tiny" / "prompts_train.txt").read_text().splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:24]))
    small = "--groups 4 --steps 2 --prompts prompts.txt --name run --iterations 3"
    watch = ("--watch", 'judge:fine:x1:"Is it red, or blue?"')

    for name, value in (("OPENAI_BASE_URL", f"{server.url}/v1"), ("OPENAI_API_KEY", KEY)):
        monkeypatch.setitem(commands.ENVIRONMENT, name, value)

    def start(*args, launcher=()):
        command = ("train.py", *small.split(), *watch, *args)
        return commands.start(*command, cwd=tmp_path, launcher=launcher)

    return start


def wait_until(seen, timeout=60):
    end = time.monotonic() + timeout
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.005)


def finish(run, code):
    out, err = run.communicate(timeout=120)
    assert run.returncode == code, err
    return out, err


@pytest.mark.ci
def test_a_run_that_is_killed_or_stopped_asks_nothing_twice(server, start, tmp_path):
    """Six held-out images before and after, eight in each of three iterations; six are watched."""
    server.delay = 0.05
    judge = ("--reward", "judge:fine:x1 - 1")
    run = start(*judge, "--max-requests", "40")
    wait_until(lambda: len(server.asked) == 23)  # in the second iteration, as 12 + 8 + 3 tell
    run.kill()
    run.communicate()
    _, err = finish(start(*judge, "--resume", "--max-requests", "40"), 2)
    assert "the 40 requests of --max-requests are used up" in err
    out, _ = finish(start(*judge, "--resume"), 0)

    lost = len(server.asked) - 48  # the one that was under way
    assert len(set(server.asked)) == 48 and lost in (0, 1)
    records = commands.metrics(tmp_path / "runs" / "run")
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert records[1]["requests"] == 20 and records[1]["tokens"] == 2000
    assert records[-1]["requests"] in (48, 48 + lost)
    assert f"{records[-1]['requests']} requests, 4,800 tokens" in out
    for path in (tmp_path / "runs").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.mark.ci
def test_ctrl_c_does_not_wait_for_a_judge(server, start):
    server.delay = 0.1
    run = start("--reward", "judge:fine")
    wait_until(lambda: len(server.asked) >= 14)
    server.delay = 30
    time.sleep(1)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(1)
    before = time.monotonic()
    finish(run, 130)
    assert time.monotonic() - before < 5
    server.delay = 0
    finish(start("--reward", "judge:fine", "--resume"), 0)


@pytest.mark.ci
def test_processes_share_the_limit_and_the_answers(server, start, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # both images of a prompt in a batch, so that the pixels do not depend on who draws them
    args = ("--reward", "judge:fine:x1", "--batch", "2", "--iterations", "2")
    run = start(*args, "--max-requests", "28", launcher=torchrun)
    _, err = run.communicate(timeout=120)
    assert run.returncode and "requests of --max-requests are used up" in err
    assert len(server.asked) <= 28
    kept = sorted(path.name for path in tmp_path.glob("runs/run/judge-*"))
    assert kept == ["judge-0.jsonl", "judge-1.jsonl"]

    finish(start(*args, "--resume", launcher=torchrun), 0)
    twice = len(server.asked) - len(set(server.asked))
    assert twice <= 2  # one that each waited for when they were stopped
    last = commands.metrics(tmp_path / "runs" / "run")[-1]
    assert len(server.asked) - twice <= last["requests"] <= len(server.asked)


# ---- the real API

LLAVA = """{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else
%}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"""


@pytest.mark.ci
def test_the_service_of_these_tests_answers_as_the_official_package_reads(server):
    """Which pip install "transformers[serving]" brings along."""
    from openai.types.chat import ChatCompletion

    picture = {"url": f"data:image/png;base64,{png(torch.zeros(3, 1, 1))}"}
    content = [{"image_url": picture}, {"type": "text", "text": "Is it red?"}]
    talk = [{"role": "user", "content": content}]
    for mode in ("fine", "silent"):
        body = {"model": mode, "messages": talk, "logprobs": True, "top_logprobs": 3}
        answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10).json()
        read = ChatCompletion.model_validate(answer, strict=True)
        assert len(read.choices) == 1 and read.usage.total_tokens == 100
        if mode == "fine":
            assert len(read.choices[0].logprobs.content[0].top_logprobs) == 3


def make_llava(folder):
    """Save a small random LLaVA that can say nothing but Yes or No; the model and its processor."""
    tokenizer = tiny_tokenizer(["<image>"])
    small = {"hidden_size": 32, "intermediate_size": 64}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(image_size=56, patch_size=14, **small)
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), **small)
    image, *answers = tokenizer.convert_tokens_to_ids(["<image>", "Yes", "No"])
    ids = {"image_token_id": image, "image_seq_length": 16}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, **ids)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for p in model.parameters():  # or all answers are alike
        p.data += 0.3 * torch.randn(p.shape)

    sampling = {"do_sample": True, "eos_token_id": answers, "pad_token_id": 0}
    sampling["suppress_tokens"] = [i for i in range(len(tokenizer)) if i not in answers]
    model.generation_config = transformers.GenerationConfig(**sampling)
    crop = {"height": 56, "width": 56}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=crop)
    options = {"patch_size": 14, "num_additional_image_tokens": 1, "chat_template": LLAVA}
    options["vision_feature_select_strategy"] = "default"
    processor = transformers.LlavaProcessor(pictures, tokenizer, **options)
    for part in (model, processor):
        part.save_pretrained(folder)
    return model.eval(), processor


@pytest.mark.ci
def test_transformers_serve_a_judge(tmp_path, monkeypatch):
    """It gives no logprobs, so that yes is counted among samples; pip install "[serving]"."""
    model, processor = make_llava(tmp_path / "llava")
    answers = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    images, odds = random_images(6), []
    for image in images:
        inputs = processor(images=to_pil(image), text="<image>Is it red?", return_tensors="pt")
        with torch.no_grad():
            odds.append(model(**inputs).logits[0, -1, answers].softmax(0)[0].item())
    low, high = odds.index(min(odds)), odds.index(max(odds))
    assert odds[high] - odds[low] > 0.4  # so it depends on the image

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"serve --host 127.0.0.1 --port {port} --device cpu --default-seed 0"
    server = subprocess.Popen([Path(sys.executable).with_name("transformers"), *options.split()])
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def ready():
        assert server.poll() is None
        with suppress(requests.ConnectionError):
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok

    try:
        wait_until(ready)
        # 200 samples: a standard error of at most 3.5 %; four are exceeded once in 15,000 times
        reward = Reward(f'judge:{tmp_path}/llava:"Is it red?":n200')
        R = reward(images[[low, high]], ["", ""])
        assert R.tolist() == pytest.approx([100 * odds[low], 100 * odds[high]], abs=14)
        (judge,) = reward.terms.values()
        assert judge.record()["requests"] == 1 + 2 * 200
    finally:
        server.terminate()
        server.wait(timeout=30)
