"""A reward that is a web service.

It is sent a POST of JSON, {"images": [PNG files in base64], "prompts": [strings]}, and answers with a JSON
list of one number for each image, higher being better.
"""

import json
import re
import socket
import threading
import time
from concurrent import futures
from urllib.parse import urlsplit

import requests

from support.errors import UserError, first_line
from support.pictures import png


class Http:
    """The reward of a service at `url`. UserError if that is no address, if the service stays down, or if it
    does not answer with a list.

    timeout: seconds for a whole answer. It is asked `attempts` times at most, after pauses of pause, 2 pause,
    4 pause ... seconds. No redirect is followed, and no more than `most` bytes are read. A service on this
    machine is asked directly, whatever proxy the environment names.
    """

    def __init__(self, url, timeout=60, attempts=6, pause=1, most=1_000_000):
        self.url, self.timeout, self.attempts, self.pause, self.most = url, timeout, attempts, pause, most
        try:
            requests.Request("POST", url).prepare()
            host = urlsplit(url).hostname
            host.encode("idna")  # no empty part as in a..b, none of over 63 characters
            if re.fullmatch("[0-9.]+", host):
                socket.inet_aton(host)
        except (OSError, ValueError) as error:  # of requests, idna and inet_aton
            raise UserError(f"reward {url} is no address: {first_line(error)}") from error
        self.loopback = host in ("localhost", "::1") or host.startswith("127.")

    def __call__(self, images, prompts):
        body = {"images": [png(image) for image in images], "prompts": list(prompts)}
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                text = self.ask(body)
                break
            except OSError as error:  # which is what requests raises, too
                reason = first_line(error)
        else:
            raise UserError(f"reward {self.url} did not answer, {self.attempts} times: {reason}")
        try:
            R = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"reward {self.url} did not answer with JSON: {first_line(error)}") from error
        if not isinstance(R, list):
            raise UserError(f"reward {self.url} must answer with a list of numbers, not {type(R).__name__}")
        return R

    def ask(self, body):
        """The bytes of an answer. OSError if there is no whole one in time.

        The time-out of requests starts anew with every byte that comes. So the request has a thread of its
        own, which is left alone when its time is over.
        """
        answer = futures.Future()

        def post():
            try:
                answer.set_result(self.post(body))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=post, daemon=True).start()
        try:
            return answer.result(self.timeout)
        except futures.TimeoutError as error:
            raise TimeoutError(f"timed out after {self.timeout} s") from error

    def post(self, body):
        """The bytes of an answer. OSError if there is none, UserError if it breaks the rules."""
        with requests.Session() as session:
            session.trust_env = not self.loopback
            with session.post(
                self.url, json=body, timeout=self.timeout, allow_redirects=False, stream=True
            ) as answer:
                if answer.status_code >= 500:
                    answer.raise_for_status()  # to be tried again
                if answer.status_code != 200:
                    raise UserError(f"reward {self.url} answered with status {answer.status_code}, not 200")
                text = b""
                for part in answer.iter_content(65536):
                    text += part
                    if len(text) > self.most:
                        raise UserError(f"reward {self.url} answered with more than {self.most} bytes")
        return text
