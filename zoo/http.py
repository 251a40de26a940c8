"""A reward that is a web service.

It is sent a POST of JSON, {"images": [PNG files in base64], "prompts": [strings]}, and answers with a JSON
list of one number for each image, higher being better.
"""

import itertools
import json
import multiprocessing.pool
import random
import re
import socket
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import requests

from support.errors import UserError, first_line
from support.pictures import png


class Http:
    """The reward of a service at `url`. UserError if that is no address, if the service stays down, or if it
    does not answer with JSON.

    timeout: seconds for a whole answer. It is asked `attempts` times at most, after pauses of about pause,
    2 pause, 4 pause ... seconds, or as long as it says, 60 seconds at most. No redirect is followed, and no
    more than `most` bytes are read. A service on this machine is asked directly, whatever proxy the
    environment names.
    """

    def __init__(self, url, timeout=60, attempts=6, pause=1, most=1_000_000):
        self.url, self.timeout, self.attempts, self.pause, self.most = (
            url,
            timeout,
            attempts,
            pause,
            most,
        )
        try:
            requests.Request("POST", url).prepare()
            host = urlsplit(url).hostname
            host.encode("idna")  # no empty part as in a..b, none of over 63 characters
            if re.fullmatch("[0-9.]+", host):
                socket.inet_aton(host)
        except (OSError, ValueError) as error:  # of requests, idna and inet_aton
            raise UserError(f"reward {url} is no address: {first_line(error)}") from error
        self.loopback = host in ("localhost", "::1") or host.startswith("127.")
        self.name, self.headers = f"reward {url}", {}

    def __call__(self, images, prompts):
        answer = self.ask({"images": [png(image) for image in images], "prompts": list(prompts)})
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"reward {self.url} did not answer with JSON: {first_line(error)}"
            ) from error

    def ask(self, body):
        """What `post` returns; asked again after an error of requests. UserError after the last attempt."""
        for attempt in itertools.count(1):
            # a thread, which is left alone after its time-out: that of requests starts anew with every byte
            with multiprocessing.pool.ThreadPool(1) as thread:
                try:
                    return thread.apply_async(self.post, [body]).get(self.timeout)
                except multiprocessing.TimeoutError:
                    reason, wait = f"timed out after {self.timeout} s", 0
                except requests.RequestException as error:
                    reason, wait = (
                        first_line(error).rpartition("Caused by ")[2],
                        retry_after(error.response),
                    )
            if attempt >= self.attempts:
                raise UserError(f"{self.name} did not answer, {attempt} times: {reason}")
            # by chance, so that not all who ask do so again at the same time
            time.sleep(min(60, max(wait, self.pause * 2 ** (attempt - 1) * random.uniform(1, 1.5))))

    def post(self, body):
        """The bytes of an answer. An error of requests if there is none, UserError if it breaks the rules."""
        answer, data = self.send(body)
        if answer.status_code >= 500:
            answer.raise_for_status()  # to be tried again
        if answer.status_code != 200:
            raise UserError(f"{self.name} answered with status {answer.status_code}, not 200")
        return data

    def send(self, body):
        """(response, bytes) of one request, whatever its status."""
        options = {"timeout": self.timeout, "allow_redirects": False, "stream": True}
        with requests.Session() as session:
            session.trust_env = not self.loopback
            with session.post(self.url, json=body, headers=self.headers, **options) as answer:
                data = b""
                for part in answer.iter_content(65536):
                    data += part
                    if len(data) > self.most:
                        raise UserError(f"{self.name} answered with more than {self.most} bytes")
        return answer, data


def retry_after(response):
    """How many seconds a response says to wait, as a number or a date; 0 if it does not."""
    header = getattr(response, "headers", {}).get("Retry-After", "")
    with suppress(ValueError, TypeError, OverflowError):
        return (
            int(header)
            if header.isdigit()
            else parsedate_to_datetime(header).timestamp() - time.time()
        )
    return 0
