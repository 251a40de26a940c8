"""A vision-language model behind an OpenAI-compatible API of chat completions, asked about each image.

OPENAI_BASE_URL is its address, OPENAI_API_KEY the key, which is neither written down nor shown. Images and
prompts leave this machine, unless the address is on it.
"""

import hashlib
import json
import math
import os
import random
import re
import threading
import time
from collections import defaultdict
from concurrent import futures
from contextlib import suppress
from email.utils import parsedate_to_datetime

import requests
import torch
import torch.distributed as dist

from support.errors import UserError, first_line
from support.evaluation import gather_rows, process_rank
from support.pictures import png
from support.run import warn
from zoo.http import Http
from zoo.human import append_line
from zoo.vlm import MATCH

SCALE = re.compile(r"\b(?:from|of|between) (\d{1,3}) ?(?:to|and|-) ?(\d{1,3})\b", re.IGNORECASE)
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


class Judge(Http):
    """What a model says of an image: a rating, if the question has bounds as "from 1 to 10", else the
    probability of yes in percent. Where the question holds {prompt}, the image's prompt is put in.

    Both are expectations over the likeliest tokens. A service that gives no logprobs is asked for `samples`
    answers to a yes-or-no question, whose share of yes counts, and for one rating. What is neither is NaN.
    at: questions asked at a time. UserError if the service cannot be used.
    """

    def __init__(self, model, question=MATCH, at=16, samples=5, timeout=600, attempts=8, pause=1):
        url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.match("https?://", url):
            raise UserError("OPENAI_BASE_URL must be an address, as http://localhost:11434/v1")
        super().__init__(url.rstrip("/") + "/chat/completions", timeout, attempts, pause)
        self.name = f"judge {model} at {self.url.split('/')[2].split('@')[-1]}"
        if not self.key and not self.loopback:
            raise UserError(f"{self.name} wants a key: set OPENAI_API_KEY, or OPENAI_BASE_URL to another")
        if not re.fullmatch("[!-~]*", self.key):  # which an error of the library would quote
            raise UserError("OPENAI_API_KEY has characters that no key has")
        scale = SCALE.search(question)
        self.bounds = sorted(map(int, scale.groups())) if scale else None
        self.model, self.question, self.at, self.samples = model, question, at, samples
        self.answers, self.errors, self.warned, self.reached = Answers(), None, set(), False
        self.changed, self.sampling = {}, False  # what the service turns out not to take, and not to give

    def __call__(self, images, prompts):
        keys, jobs = [], {}
        for image, prompt in zip(images, prompts):
            picture, question = png(image), self.question.replace("{prompt}", prompt)
            text = "\n".join([self.model, question, picture])
            keys.append(hashlib.sha256(text.encode()).hexdigest()[:16])
            if keys[-1] not in self.answers.values:
                jobs[keys[-1]] = picture, question
        jobs, alone = list(jobs.items()), int(self.errors is None)  # the first of all shows what goes wrong
        for part in filter(None, (jobs[:alone], jobs[alone:])):
            self.answer_all(part)
        return torch.tensor([self.answers.values[key] for key in keys])

    def answer_all(self, jobs):
        """Answer [(key, (picture, question))]. After an error no more are begun; those under way are kept.

        The process may end before its threads: a second Ctrl-C stops at once.
        """
        self.errors, todo, threads = [], iter(jobs), [futures.Future() for _ in jobs[: self.at]]

        def work(thread):
            try:
                for key, job in todo:  # which all share
                    if not self.errors:
                        self.answers.write({"key": key, "value": self.score(*job)})
            except Exception as error:
                self.errors.append(error)
            thread.set_result(None)

        for thread in threads:
            threading.Thread(target=work, args=(thread,), daemon=True).start()
        futures.wait(threads)
        for error in self.errors:
            raise error

    def score(self, picture, question):
        """The value of a picture, or None."""
        said = []
        if self.bounds or not self.sampling:
            said = self.ask_model(picture, question, temperature=0, logprobs=True, top_logprobs=20)[:1]
            if not said[0][1]:
                instead = f"the share of yes in {self.samples} answers counts"
                self.say("gives no logprobs", "its ratings are taken as they are" if self.bounds else instead)
                self.sampling, said = not self.bounds, said if self.bounds else []
        while self.sampling and len(said) < self.samples:  # a service that does not know n gives one
            said += self.ask_model(picture, question, temperature=1, n=self.samples - len(said))
        values = [rating(*one, *self.bounds) if self.bounds else percent_yes(*one) for one in said]
        value = torch.tensor(values).nanmean().item()
        if math.isnan(value):
            self.say("does not answer as asked", f"it says {self.shown(said[0][0])!r}; such rewards are lost")
        return None if math.isnan(value) else value

    def ask_model(self, picture, question, **fields):
        """What `read` returns of the answers; asked again after 429, 5xx and what is not whole."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        talk = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        fields |= {"model": self.model, "messages": talk, "max_tokens": 16}
        for attempt in range(1, self.attempts + 1):
            tokens, body = 0, {key: self.changed.get(key, value) for key, value in fields.items()}
            self.answers.spend()
            try:
                said, tokens = self.ask({key: value for key, value in body.items() if value is not None})
                return said
            except OSError as error:  # which is what requests raises, too
                reason, wait = self.shown(error), seconds(getattr(error, "response", None))
            finally:
                self.answers.write({"tokens": tokens})
            if self.errors or attempt == (self.attempts if self.reached else 3):  # a wrong address shows soon
                raise self.failure(f"did not answer, {attempt} times: {reason}")
            # by chance, so that not all ask again at the same time
            time.sleep(min(60, wait or self.pause * 2**attempt * random.uniform(0.25, 0.5)))

    def post(self, body):
        """What `read` returns. OSError if the service may be asked again, UserError if that is no use."""
        with requests.Session() as session:
            session.trust_env = not self.loopback
            options = {"timeout": self.timeout, "allow_redirects": False, "stream": True}
            if self.key:
                options["headers"] = {"Authorization": f"Bearer {self.key}"}
            with session.post(self.url, json=body, **options) as answer:
                self.reached, data = True, b""
                for part in answer.iter_content(65536):
                    data += part
                    if len(data) > self.most:
                        raise self.failure(f"answered with more than {self.most} bytes")
        status, text = answer.status_code, data.decode(errors="replace")
        if status == 200:
            return self.read(text)
        message = re.search(r'"(?:message|detail|error)": ?"([^"]+)', text)
        message = message[1] if message else text
        reason = f"status {status}: {self.shown(message)}"
        if (status in (408, 429) or status >= 500) and "insufficient_quota" not in text:
            raise requests.HTTPError(reason, response=answer)
        refused = [k for k in body if k not in ("model", "messages") and re.search(rf"\b{k}\b", message)]
        if refused and status in (400, 403, 422):  # once more without; but some services give 5 logprobs
            refused += ["top_logprobs"] if "logprobs" in refused else []
            some = refused == ["top_logprobs"] and body["top_logprobs"] > 5
            self.changed |= {"top_logprobs": 5} if some else dict.fromkeys(refused)
            raise requests.HTTPError(reason)
        why = {401: "refuses OPENAI_API_KEY", 403: "refuses OPENAI_API_KEY", 404: "knows no such model"}
        why |= dict.fromkeys((400, 413, 415, 422), "does not take the question (can the model see images?)")
        why |= {402: "is not paid for", 429: "is not paid for"}
        raise self.failure(f"{why.get(status, 'is no chat completions API')}: {reason}")

    def read(self, text):
        """Of each answer its text and its tokens [(word, {word: probability})], and all tokens in number."""
        try:
            data, said = json.loads(text), []
            for choice in data["choices"]:
                tokens = []
                for token in (choice.get("logprobs") or {}).get("content") or ():
                    odds = defaultdict(float)
                    for other in token["top_logprobs"]:
                        odds[word(other["token"])] += math.exp(other["logprob"])
                    tokens += [(word(token["token"]), odds)] if odds else []
                said.append((str(choice["message"]["content"] or ""), tokens))
            return [said[0], *said[1:]], int((data.get("usage") or {}).get("total_tokens") or 0)
        except MALFORMED as error:
            cut = text.lstrip().startswith("{") and isinstance(error, json.JSONDecodeError)
            if cut or '"error":' in text:  # some say with status 200 what went wrong
                raise OSError(self.shown(text)) from error
            raise self.failure(f"is no chat completions API, it says {self.shown(text)!r}") from error

    def failure(self, text):
        """The UserError that says so."""
        resume = "; mend this, then go on with --resume" if self.answers.path else ""
        return UserError(f"{self.name} {text}{resume}")

    def shown(self, text):
        """The beginning of a text or an error without the key, to be shown."""
        text = " ".join(str(text).replace("\\/", "/").split()).rpartition("Caused by ")[2]
        return first_line(text.replace(self.key, "***") if len(self.key) > 7 else text)[:160]

    def say(self, what, text):
        """Warn once that something is so."""
        if what not in self.warned and process_rank() == 0:
            self.warned.add(what)
            warn(f"{self.name} {what}: {text}")


class Answers:
    """What judges said, kept in the folder of the run, so that nothing is asked twice; and what it took.

    limit: of the requests in a run, or None; each of several processes has an even share. Each has a file of
    its own. UserError if there is a limit, but no judge.
    """

    def __init__(self, rewards=(), limit=None):
        terms = [term for reward in rewards for term in reward.terms.values()]
        self.judges = [term for term in terms if isinstance(term, Judge)]
        for judge in self.judges:
            judge.answers = self
        if limit and not self.judges:
            raise UserError("--max-requests: there is no judge in --reward or --watch")
        self.rank, self.world = process_rank(), dist.get_world_size() if dist.is_initialized() else 1
        self.limit, self.path, self.lines = limit // self.world if limit else math.inf, None, []
        self.values, self.requests, self.tokens, self.lock = {}, 0, 0, threading.Lock()

    def open(self, folder):
        """Take over what is in the run's folder, and write there from now on."""
        if not self.judges:
            return
        if dist.is_initialized():
            dist.barrier()  # until the first process has made it
        for path in folder.glob("judge-*.jsonl"):
            mine = int(path.stem[6:]) % self.world == self.rank  # there may have been more processes
            for line in path.read_bytes().splitlines():
                with suppress(*MALFORMED):  # one that was cut short
                    self.take(line := json.loads(line), mine)
                    self.requests += mine and "tokens" in line
        self.path = folder / f"judge-{self.rank}.jsonl"
        for line in self.lines:
            append_line(self.path, line)

    def take(self, line, mine=True):
        """Take in a line: an answer {"key", "value"}, or what a request took, {"tokens"}."""
        if "key" in line:
            self.values[line["key"]] = math.nan if line["value"] is None else float(line["value"])
        elif mine:
            self.tokens += int(line["tokens"])

    def write(self, line):
        """Take in a line, and write it down as soon as there is a folder."""
        with self.lock:
            self.take(line)
            if self.path:
                append_line(self.path, json.dumps(line))
            else:
                self.lines.append(json.dumps(line))

    def spend(self):
        """Count a request. UserError if it would be one too many."""
        with self.lock:
            if self.requests >= self.limit:
                share = f", of which each of {self.world} processes has its share," if self.world > 1 else ""
                what = "raise it, and go on with --resume" if self.path else "the first evaluation needs more"
                raise UserError(f"--max-requests{share} is used up after {self.requests}: {what}")
            self.requests += 1

    def record(self):
        """The requests and tokens of all processes since the run began, for its records; or nothing."""
        counts = {"requests": torch.tensor([self.requests]), "tokens": torch.tensor([self.tokens])}
        return {name: int(n.sum()) for name, n in gather_rows([counts]).items()} if self.judges else {}


def word(token):
    """A token without case, spaces and other marks."""
    return re.sub("[^a-z0-9]", "", token.lower())


def seconds(response):
    """How long a response says to wait, in seconds or until a date; 0 if it does not."""
    with suppress(*MALFORMED):
        header = response.headers["Retry-After"]
        then = time.time() + float(header) if header.isdigit() else parsedate_to_datetime(header).timestamp()
        return max(0, then - time.time())
    return 0


def percent_yes(text, tokens):
    """The probability of yes against no at the first word, in percent; NaN if it is neither."""
    odds = [odds for token, odds in tokens if token] or [{word(first): 1} for first in text.split()] or [{}]
    yes, no = odds[0].get("yes", 0), odds[0].get("no", 0)
    return 100 * yes / (yes + no) if yes + no > 0.01 else math.nan


def rating(text, tokens, low, high):
    """The expectation of the first number in an answer, at its first token; NaN if it has none in bounds.

    A number may be several tokens, and which one a "1" begins is known only of the one that was said: of the
    others the nearest to it counts.
    """
    found = re.search(r"\d+(\.\d+)?", SCALE.sub("", text))
    if not found or not low <= float(found[0]) <= high:
        return math.nan
    number = float(found[0])
    odds = [odds for token, odds in tokens if token and found[0].startswith(token)]
    if "." in found[0] or not odds:
        return number
    whole, total, expected = any(len(token) > 1 and token.isdigit() for token in odds[0]), 0, 0
    for token, p in odds[0].items():
        numbers = [n for n in range(low, high + 1) if token and str(n).startswith(token)]
        if numbers:
            n = int(token) if whole else min(numbers, key=lambda n: abs(n - number))
            total, expected = total + p, expected + p * n
    return expected / total if total else number


def load(device, *options):
    """The Judge of the options in a term `judge:...`: a model, whose name may have colons, a question in
    quotes, x32 for 32 questions at a time, n9 for nine samples where the service gives no logprobs.
    """
    numbers, names, questions = {}, [], []
    for option in options:
        if re.fullmatch("[xn][1-9][0-9]{0,2}", option):
            numbers[option[0]] = int(option[1:])
        else:
            (questions if " " in option else names).append(option.strip('"'))
    if not names or len(questions) > 1:
        raise UserError(f"reward judge:{':'.join(options)} must name a model, and one question at most")
    at, samples = numbers.get("x", 16), numbers.get("n", 5)
    return Judge(":".join(names), *questions or [MATCH], at=at, samples=samples)
