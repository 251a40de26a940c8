"""A vision-language model behind an OpenAI-compatible API of chat completions, asked about each image.

OPENAI_BASE_URL is its address, OPENAI_API_KEY the key, which is neither written down nor shown. Images and
prompts leave this machine, unless the address is on it.
"""

import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from contextlib import suppress
from multiprocessing.pool import ThreadPool

import requests
import torch
import torch.distributed as dist

from support.errors import UserError
from support.evaluation import gather_rows, processes
from support.pictures import png
from support.run import warn
from zoo.http import Http
from zoo.human import MALFORMED, append_line
from zoo.vlm import MATCH

SCALE = re.compile(r"\b(?:from|of|between) (\d{1,3}) ?(?:to|and|-) ?(\d{1,3})\b", re.IGNORECASE)
WHY = dict.fromkeys((400, 413, 415, 422), "does not take the question (can the model see images?)")
WHY |= dict.fromkeys((401, 403), "refuses OPENAI_API_KEY") | dict.fromkeys(
    (402, 429), "is not paid for"
)
WHY |= {404: "knows no such model"}


class Judge(Http):
    """What a model says of an image: a rating, if the question has bounds as "from 1 to 10", else the
    probability of yes in percent. Where the question holds {prompt}, the image's prompt is put in.

    Both are expectations over the likeliest tokens. A service that gives no logprobs is asked for `samples`
    answers, by default 5, but for one rating, and their mean counts. What is neither is NaN.
    at: questions asked at a time. UserError if the service cannot be used.
    """

    def __init__(self, model, question=MATCH, at=16, samples=None):
        url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.match("https?://", url):
            raise UserError("OPENAI_BASE_URL must be an address, as http://localhost:11434/v1")
        super().__init__(url.rstrip("/") + "/chat/completions", timeout=600, attempts=3)
        self.name = f"judge {model} at {url.split('/')[2].rpartition('@')[2]}"
        if not self.key and not self.loopback:
            raise UserError(
                f"{self.name} wants a key: set OPENAI_API_KEY, or OPENAI_BASE_URL to another"
            )
        if not re.fullmatch("[!-~]*", self.key):  # which an error of the library would quote
            raise UserError("OPENAI_API_KEY has characters that no key has")
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        scale = SCALE.search(question)
        self.bounds = sorted(map(int, scale.groups())) if scale else None
        self.model, self.question, self.at = model, question, at
        self.samples = samples or (1 if self.bounds else 5)
        self.answers = Answers()
        self.refused, self.top = (
            set(),
            20,
        )  # fields that the service refuses; logprobs it is asked for
        self.reached = self.no_logprobs = self.astray = False  # what it turns out to do

    def __call__(self, images, prompts):
        """[B]; what was not asked before is asked, in parallel once the first has shown what goes wrong."""
        keys, jobs = [], {}
        for image, prompt in zip(images, prompts):
            picture = {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{png(image)}"},
            }
            text = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
            talk = [{"role": "user", "content": [picture, text]}]
            body = {"model": self.model, "messages": talk, "max_tokens": 16}
            keys.append(hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16])
            if keys[-1] not in self.answers.values:
                jobs[keys[-1]] = body
        if jobs and not self.reached:
            self.answer_all([jobs.popitem()])
        if jobs:
            self.answer_all(jobs.items())
        return torch.tensor([self.answers.values[key] for key in keys])

    def answer_all(self, jobs):
        """Answer (key, body) of each question. After an error no more are begun; those under way are kept."""
        errors = []

        def work(job):
            try:
                if not errors:
                    self.answers.add(values={job[0]: self.score(job[1])})
            except UserError as error:
                errors.append(error)

        with ThreadPool(
            self.at
        ) as pool:  # a second Ctrl-C ends the process, whatever its threads do
            pool.map(work, jobs, chunksize=1)
        if errors:
            hint = "; mend this, then go on with --resume" if self.answers.path else ""
            raise UserError(f"{errors[0]}{hint}")

    def score(self, body):
        """The value of what a question is answered; NaN if that is nothing of use."""
        if not self.no_logprobs:
            said = [self.ask(body | {"temperature": 0, "logprobs": True, "top_logprobs": 20})]
            if not said[0][1]:
                warn(f"{self.name} gives no logprobs: the mean of {self.samples} answers counts")
                self.no_logprobs = True
        if self.no_logprobs:
            body = body | {"temperature": int(self.samples > 1)}
            said = [self.ask(body) for _ in range(self.samples)]
        values = [rating(*one, *self.bounds) if self.bounds else percent_yes(*one) for one in said]
        value = torch.tensor(values).nanmean().item()
        if math.isnan(value) and not self.astray:
            self.astray = True
            warn(f"{self.name} does not answer as asked: it says {self.shown(said[0][0])!r}")
        return value

    def post(self, body):
        """What `read` returns. An error of requests if it may be asked again, UserError if that is no use."""
        self.answers.add(requests=1)
        body = {name: value for name, value in body.items() if name not in self.refused}
        if "top_logprobs" in body:
            body["top_logprobs"] = self.top
        answer, data = self.send(body)
        status, text = answer.status_code, data.decode(errors="replace")
        said = self.read(text) if status == 200 else None
        self.reached, self.attempts = True, 8  # a wrong address shows sooner
        if said:
            return said
        message = (re.search(r'"(?:message|detail|error)": ?"([^"]+)', text) or ["", text])[1]
        reason = f"status {status}: {self.shown(message)}"
        fields = body.keys() - {"model", "messages"} if status in (400, 403, 422) else ()
        refused = {name for name in fields if re.search(rf"\b{name}\b", message)}
        if "top_logprobs" in refused and self.top > 5:  # which many services have as their limit
            self.top = 5
        else:
            self.refused |= refused
        again = (status in (408, 429) or status >= 500) and "insufficient_quota" not in text
        if again or refused:
            raise requests.HTTPError(reason, response=answer)
        raise UserError(f"{self.name} {WHY.get(status, 'is no chat completions API')}: {reason}")

    def read(self, text):
        """(what is said, [(word, {word: probability}) of each token, if the service gives them])."""
        try:
            data, tokens = json.loads(text), []
            choice, spent = (
                data["choices"][0],
                int((data.get("usage") or {}).get("total_tokens") or 0),
            )
            said = str(choice["message"]["content"] or "")
            for token in (choice.get("logprobs") or {}).get("content") or ():
                odds = Counter()
                for other in token.get("top_logprobs") or ():
                    odds[word(other["token"])] += math.exp(other["logprob"])
                tokens += [(word(token["token"]), odds)] if odds else []
        except MALFORMED as error:
            raise requests.HTTPError(f"no chat completion, but {self.shown(text)}") from error
        self.answers.add(tokens=spent)
        return said, tokens

    def shown(self, text):
        """The beginning of a text in one line and without the key."""
        text = " ".join(text.replace("\\/", "/").split())
        return (text.replace(self.key, "***") if len(self.key) > 7 else text)[:160]


class Answers:
    """What judges said, kept in the folder of the run, so that nothing is asked twice; and what it took.

    limit: of the requests in a run, or None; each of several processes has an even share. Each has a file of
    its own. UserError if there is a limit, but no judge.
    """

    def __init__(self, rewards=(), limit=None):
        self.judges = [
            term for r in rewards for term in r.terms.values() if isinstance(term, Judge)
        ]
        for judge in self.judges:
            judge.answers = self
        if limit and not self.judges:
            raise UserError("--max-requests: there is no judge in --reward or --watch")
        self.rank, self.world = processes()
        self.limit = limit // self.world if limit else math.inf
        self.values, self.spent = {}, Counter(requests=0, tokens=0)
        self.path, self.lock = None, threading.Lock()

    def open(self, folder):
        """Take over what is in the run's folder, and write there from now on."""
        if not self.judges:
            return
        if dist.is_initialized():
            dist.barrier()  # until the first process has made it
        new = {"values": self.values.copy(), **self.spent}
        for path in folder.glob("judge-*.jsonl"):
            mine = (
                int(path.stem[6:]) % self.world == self.rank
            )  # there may have been more processes
            for text in path.read_bytes().splitlines():
                with suppress(*MALFORMED):  # one that was cut short
                    line = json.loads(text)
                    self.values |= {key: float(value) for key, value in line["values"].items()}
                    self.spent.update({name: mine * int(line[name]) for name in self.spent})
        self.path = folder / f"judge-{self.rank}.jsonl"
        append_line(self.path, json.dumps(new))

    def add(self, values={}, requests=0, tokens=0):
        """Take in {key: value} of answers, and what it took; write it down. UserError above the limit."""
        with self.lock:
            if requests and self.spent["requests"] >= self.limit:
                raise UserError(f"--max-requests is used up: each process may ask {self.limit}")
            self.values |= values
            self.spent.update(requests=requests, tokens=tokens)
            if self.path:
                append_line(
                    self.path,
                    json.dumps({"values": values, "requests": requests, "tokens": tokens}),
                )

    def record(self):
        """The requests and tokens of all processes since the run began, for its records; or nothing."""
        counts = {name: torch.tensor([n]) for name, n in self.spent.items()}
        return (
            {name: int(n.sum()) for name, n in gather_rows([counts]).items()} if self.judges else {}
        )


def word(token):
    """A token without case, spaces and other marks."""
    return re.sub("[^a-z0-9]", "", token.lower())


def percent_yes(text, tokens):
    """The probability of yes against no at the first word, in percent; NaN if it is neither."""
    odds = (
        [odds for token, odds in tokens if token]
        or [{word(first): 1} for first in text.split()]
        or [{}]
    )
    yes, no = odds[0].get("yes", 0), odds[0].get("no", 0)
    return 100 * yes / (yes + no) if yes + no > 0.01 else math.nan


def rating(text, tokens, low, high):
    """The expectation of the first number in an answer; NaN if it has none in bounds.

    A number of several tokens, as 7.5 is, counts as it was said. A token that may begin a longer number, as 1
    may begin 10, is left out unless it was said.
    """
    found = re.search(r"\d+(\.\d+)?", SCALE.sub("", text))
    if not found or not low <= (said := float(found[0])) <= high:
        return math.nan
    for token, odds in tokens:
        if token == found[0] and odds.get(token):
            p = {
                n: odds.get(str(n), 0)
                for n in range(low, high + 1)
                if n in (0, said) or 10 * n > high
            }
            return sum(n * p[n] for n in p) / sum(p.values())
    return said


def load(device, *options):
    """The Judge of the options in a term `judge:...`: a model, whose name may have colons, a question in
    quotes, x32 for 32 questions at a time, n9 for nine samples where the service gives no logprobs.
    """
    numbers = [option for option in options if re.fullmatch("[xn][1-9][0-9]{0,2}", option)]
    texts = [option.strip('"') for option in options if option not in numbers]
    names, questions = [t for t in texts if " " not in t], [t for t in texts if " " in t]
    if not names or len(questions) > 1:
        raise UserError(
            f"reward judge:{':'.join(options)} must name a model, and one question at most"
        )
    given = {"at" if option[0] == "x" else "samples": int(option[1:]) for option in numbers}
    return Judge(":".join(names), *questions, **given)
