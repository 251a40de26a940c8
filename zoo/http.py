"""A web service as the reward.

It is sent a POST of JSON, {"images": [PNG files in base64], "prompts": [strings]}, and answers with
a JSON list of one number for each image, higher being better.
"""

import itertools
import json
import random
import time
from urllib.parse import urlsplit

import requests

from support.errors import UserError, first_line
from support.pictures import png


class Http:
    """The reward of a service at `url`.

    UserError if that is no address, if the service stays down, or does not answer with JSON.
    """

    timeout = 60  # seconds without a word from the service
    attempts = 6
    pause = 1  # seconds before the second attempt, about twice as many before each further one

    def __init__(self, url):
        self.url = url
        self.name = f"reward {url}"
        self.headers = {}
        try:
            requests.Request("POST", url).prepare()
        except ValueError as error:
            raise UserError(f"reward {url} is no address: {first_line(error)}") from error

        host = urlsplit(url).hostname
        self.on_this_machine = host in ("localhost", "::1") or host.startswith("127.")

    def __call__(self, images, prompts):
        body = {"images": [png(image) for image in images], "prompts": list(prompts)}
        answer = self.ask(body)
        try:
            return json.loads(answer)
        except ValueError as error:
            text = f"{self.name} did not answer with JSON: {first_line(error)}"
            raise UserError(text) from error

    def ask(self, body):
        """Return what `post` does, which is tried again after errors. UserError after the last."""
        for attempt in itertools.count(1):
            try:
                return self.post(body)
            except (OSError, ValueError) as error:  # those of requests
                reason = first_line(error).rpartition("Caused by ")[2]
                told_to_wait = retry_after(getattr(error, "response", None))

            if attempt >= self.attempts:
                raise UserError(f"{self.name} did not answer, {attempt} times: {reason}")

            # a random share, so that many processes do not all ask at the same moment
            wait = self.pause * 2 ** (attempt - 1) * random.uniform(1, 1.5)
            time.sleep(min(60, max(wait, told_to_wait)))

    def post(self, body):
        """Return the bytes of an answer.

        An error of requests if it is worth another try, UserError if it is not.
        """
        answer = self.send(body)
        if answer.status_code >= 500:
            answer.raise_for_status()
        if answer.status_code != 200:
            raise UserError(f"{self.name} answered with status {answer.status_code}, not 200")
        return answer.content

    def send(self, body):
        """Return the response to one request, whatever its status."""
        with requests.Session() as session:
            # a service on this machine is asked directly, whatever proxy the environment names
            session.trust_env = not self.on_this_machine
            return session.post(
                self.url,
                json=body,
                headers=self.headers,
                timeout=self.timeout,
                allow_redirects=False,
            )


def retry_after(response):
    """Return how many seconds a response says to wait, 0 if it does not."""
    header = response.headers.get("Retry-After", "") if response is not None else ""
    return int(header) if header.isdigit() else 0
