"""A vision-language model behind an OpenAI-compatible API of chat completions, as the reward.

OPENAI_BASE_URL is its address, OPENAI_API_KEY the key, which is neither stored nor shown. Images
and prompts leave this machine, unless the address is on it.
"""

import functools
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from multiprocessing.pool import ThreadPool

import requests
import torch
import torch.distributed as dist

from support.errors import UserError
from support.pictures import png
from support.processes import count_over_processes, processes
from support.run import warn
from zoo.http import Http
from zoo.jsonl import append_line, read_lines
from zoo.vlm import MATCH, UNIFIED, Vlm, names_and_question, questions_about, unified_score

SCALE = re.compile(r"\b(?:from|of|between) (\d{1,3}) ?(?:to|and|-) ?(\d{1,3})\b", re.IGNORECASE)
NUMBER = re.compile("[xn][1-9][0-9]{0,2}")
WHY = {
    401: "refuses OPENAI_API_KEY",
    402: "is not paid for",
    403: "refuses OPENAI_API_KEY",
    404: "knows no such model",
    429: "is not paid for",
}
ELSE = "does not take the question (is it a chat completions API, can the model see images?)"


class Judge(Http):
    """Asks a model about each image, and returns a rating or the probability of yes in percent.

    A question with bounds, as "from 1 to 10", asks for a rating. {prompt} in it stands for the
    image's prompt. Both values are expectations over the likeliest tokens. A service that gives no
    logprobs is asked several times, and the mean counts. An answer that is neither counts as NaN.
    With QUESTIONS of zoo/vlm.py it asks those of each prompt, with UNIFIED for three scores.

    at: how many questions are asked at a time
    samples: answers to a question where there are no logprobs; by default 5, or 1 for a rating
    UserError if the service cannot be used.
    """

    timeout = 600
    attempts = 3  # until the first answer, so that a wrong address shows soon
    check = Vlm.check  # refuses prompts without the questions that are to be asked

    def __init__(self, model, question=MATCH, at=16, samples=None):
        url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        if not re.match("https?://", url):
            raise UserError("OPENAI_BASE_URL must be an address, as http://localhost:11434/v1")
        super().__init__(url.rstrip("/") + "/chat/completions")

        host = url.split("/")[2].rpartition("@")[2]
        self.name = f"judge {model} at {host}"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key and not self.on_this_machine:
            text = "wants a key: set OPENAI_API_KEY, or OPENAI_BASE_URL to another address"
            raise UserError(f"{self.name} {text}")
        if not re.fullmatch("[!-~]*", self.key):  # an error of requests would quote it
            raise UserError("OPENAI_API_KEY has characters that no key has")
        if self.key:
            self.headers = {"Authorization": f"Bearer {self.key}"}

        self.model = model
        self.question = question
        self.at = at
        scale = SCALE.search(question)
        self.bounds = sorted(map(int, scale.groups())) if scale else None
        self.samples = samples or (1 if self.bounds else 5)
        if question == UNIFIED:
            self.bounds, self.samples = None, 1
        self.answers = Answers()

        # taken out one by one if the service refuses them
        self.options = {"max_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        if question == UNIFIED:
            self.options = {"max_tokens": 160, "temperature": 0}
        self.reached = False
        self.warned = False

    def open(self, run):
        """Keep the answers in the folder of a run; all its judges share them and their limit."""
        self.answers = answers_of(run)

    def record(self):
        """Return what was asked of all judges by all processes since the run began."""
        return self.answers.record()

    def __call__(self, images, prompts):
        keys, bodies = [], {}  # keys of the questions about each image
        for image, prompt in zip(images, prompts):
            picture = {"url": f"data:image/png;base64,{png(image)}"}
            keys.append([])
            for text in questions_about(prompt, self.question):
                content = [{"type": "image_url", "image_url": picture}]
                content.append({"type": "text", "text": text})
                body = {"model": self.model, "messages": [{"role": "user", "content": content}]}

                key = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
                keys[-1].append(key)
                if key not in self.answers.values:
                    bodies[key] = body

        self.answer_all(list(bodies.items()))
        values = [torch.tensor([self.answers.values[key] for key in some]) for some in keys]
        return torch.stack([some.nanmean() for some in values])

    def answer_all(self, questions):
        """Find the value of each question (key, body), `at` of them at a time.

        After an error no more are begun, but those under way are finished and kept.
        """
        errors = []

        def answer(question):
            key, body = question
            try:
                if not errors:
                    self.answers.add(values={key: self.score(body)})
            except UserError as error:
                errors.append(error)

        alone = 0 if self.reached else 1  # the first, so that a wrong setting fails once
        with ThreadPool(self.at) as pool:  # unlike a ThreadPoolExecutor it lets Ctrl-C through
            pool.map(answer, questions[:alone], chunksize=1)
            pool.map(answer, questions[alone:], chunksize=1)
        if errors:
            raise errors[0]

    def score(self, body):
        """Return the value of the answer to a request."""
        if "logprobs" in self.options:
            said, tokens = self.ask(body)
            if tokens:
                return self.value(said, tokens)

            warn(f"{self.name} gives no logprobs: the mean of {self.samples} answers counts")
            self.options.pop("logprobs", None)
            self.options.pop("top_logprobs", None)
            if "temperature" in self.options and self.samples > 1:
                self.options["temperature"] = 1

        values = [self.value(*self.ask(body)) for _ in range(self.samples)]
        return torch.tensor(values).nanmean().item()

    def value(self, said, tokens):
        """Return the value of one answer, NaN if it is of no use."""
        if self.question == UNIFIED:
            value = unified_score(said)
        elif self.bounds:
            value = rating(said, tokens, *self.bounds)
        else:
            value = percent_yes(said, tokens)

        if math.isnan(value) and not self.warned:
            warn(f"{self.name} does not answer as asked: it says {self.shown(said)!r}")
            self.warned = True
        return value

    def post(self, body):
        """Return what `read` does of an answer.

        An error of requests if it is worth another try, UserError if it is not.
        """
        self.answers.add(requests=1)
        options = dict(self.options)
        response = self.send(body | options)
        self.reached = True
        self.attempts = 8

        status = response.status_code
        text = response.content.decode(errors="replace")
        if status == 200:
            return self.read(text)

        found = re.search(r'"(?:message|detail|error)": ?"([^"]+)', text)
        message = found[1] if found else text
        reason = f"status {status}: {self.shown(message)}"

        refused = [name for name in options if re.search(rf"\b{name}\b", message)]
        if status in (400, 403, 422) and refused:
            for name in refused:
                if options[name] == 20:
                    self.options[name] = 5  # the limit of many services for top_logprobs
                else:
                    self.options.pop(name, None)
            raise requests.HTTPError(reason)

        if (status in (408, 429) or status >= 500) and "insufficient_quota" not in text:
            raise requests.HTTPError(reason, response=response)
        raise UserError(f"{self.name} {WHY.get(status, ELSE)}: {reason}")

    def read(self, text):
        """Return what was said, and (word, {word: probability}) of each token if they are given."""
        try:
            data = json.loads(text)
            choice = data["choices"][0]
            said = str(choice["message"]["content"] or "")
            spent = int((data.get("usage") or {}).get("total_tokens") or 0)

            tokens = []
            for token in (choice.get("logprobs") or {}).get("content") or ():
                odds = Counter()
                for other in token.get("top_logprobs") or ():
                    odds[word(other["token"])] += math.exp(other["logprob"])
                if odds:
                    tokens.append((word(token["token"]), odds))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise requests.HTTPError(f"no chat completion, but {self.shown(text)}") from error

        self.answers.add(tokens=spent)
        return said, tokens

    def shown(self, text):
        """Return the beginning of a text, in one line and without the key."""
        text = " ".join(text.replace("\\/", "/").split())
        if len(self.key) > 7:  # not that of a local server, as "none"
            text = text.replace(self.key, "***")
        return text[:160]


class Answers:
    """What judges answered, {key: value}, and how many requests and tokens that took.

    With a folder both are kept in judge-RANK.jsonl, so that a resumed run asks nothing twice.

    limit: of requests in the whole run, or None; each process may make an even share of them
    """

    def __init__(self, folder=None, limit=None):
        self.values = {}
        self.spent = Counter(requests=0, tokens=0)
        self.lock = threading.Lock()
        self.path = None
        rank, world = processes()

        if folder:
            self.path = folder / f"judge-{rank}.jsonl"
            for path in folder.glob("judge-*.jsonl"):  # there may have been more processes
                for line in read_lines(path):
                    self.values.update(line.pop("values", {}))
                    self.spent.update(line)
        if folder and dist.is_initialized():
            dist.barrier()  # or another process would read what this one adds

        self.limit = limit
        self.left = ((limit or math.inf) - self.spent["requests"]) // world
        if rank > 0:  # what was spent before is counted by the first
            self.spent = Counter(requests=0, tokens=0)

    def add(self, values={}, requests=0, tokens=0):
        """Add values, and what was spent. UserError if no request is left."""
        with self.lock:
            if requests > self.left:
                raise UserError(f"the {self.limit} requests of --max-requests are used up")
            self.left -= requests
            self.values.update(values)
            self.spent.update(requests=requests, tokens=tokens)
            if self.path:
                line = {"values": values, "requests": requests, "tokens": tokens}
                append_line(self.path, line)

    def record(self):
        """Return the requests and tokens of all processes since the run began."""
        return {name: count_over_processes(number) for name, number in self.spent.items()}


@functools.cache
def answers_of(run):
    """Return the Answers of a run, the same for all its judges."""
    return Answers(run.folder, run.args.max_requests)


def word(token):
    """Return a token without case, spaces and other marks."""
    return re.sub("[^a-z0-9]", "", token.lower())


def percent_yes(text, tokens):
    """Return the probability of yes against no at the first word, in percent; NaN if it is neither.

    tokens: (word, {word: probability}) of each, if known
    """
    first = [odds for token, odds in tokens if token][:1]
    if not first:
        first = [{word(text): 1} for text in text.split()[:1]]
    odds = first[0] if first else {}

    yes, no = odds.get("yes", 0), odds.get("no", 0)
    return 100 * yes / (yes + no) if yes + no > 0.01 else math.nan


def rating(text, tokens, low, high):
    """Return the expectation of the first number in an answer; NaN if none is within bounds.

    A number of several tokens, as 7.5 is, counts as it was said. A token that may begin a longer
    number, as 1 may begin 10, is left out unless it was said.

    tokens: (word, {word: probability}) of each, if known
    """
    found = re.search(r"\d+(\.\d+)?", SCALE.sub("", text))
    if not found or not low <= float(found[0]) <= high:
        return math.nan

    said = float(found[0])
    for token, odds in tokens:
        if token == found[0] and odds.get(token):
            whole = [n for n in range(low, high + 1) if n in (0, said) or 10 * n > high]
            p = {n: odds.get(str(n), 0) for n in whole}
            return sum(n * p[n] for n in whole) / sum(p.values())
    return said


def load(device, *options):
    """Return the Judge of the options in a term `judge:...`.

    They are a model, whose name may have colons, a question in quotes, `questions` or `unified` (by
    default of the model "UnifiedReward", as its card has it served), x32 for 32 questions at a
    time, n9 for nine samples where the service gives no logprobs.
    """
    counts = {option[0]: int(option[1:]) for option in options if NUMBER.fullmatch(option)}
    others = [option for option in options if not NUMBER.fullmatch(option)]
    names, question = names_and_question("judge", others)
    if question == UNIFIED and not names:
        names = ["UnifiedReward"]
    if not names:
        raise UserError(f"reward judge:{':'.join(options)} must name a model")
    return Judge(":".join(names), question, counts.get("x", 16), counts.get("n"))
