"""A reward that is a web service.

It is sent a POST of JSON, {"images": [PNG files in base64], "prompts": [strings]}, and answers with a JSON
list of one number for each image, higher being better.
"""

import base64
import io
import json
import time

import requests

from errors import UserError, first_line
from pictures import to_pil


class Http:
    """The reward of a service at `url`. UserError if it stays down or does not answer with a list.

    timeout: seconds to wait for an answer. It is asked `attempts` times at most, after pauses of pause,
    2 pause, 4 pause ... seconds. No redirect is followed, and no more than `most` bytes are read.
    """

    def __init__(self, url, timeout=60, attempts=6, pause=1, most=1_000_000):
        self.url, self.timeout, self.attempts, self.pause, self.most = url, timeout, attempts, pause, most

    def __call__(self, images, prompts):
        body = {"images": [png(image) for image in images], "prompts": list(prompts)}
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self.ask(body)
            except requests.RequestException as error:
                reason = first_line(error)
        raise UserError(f"reward {self.url} did not answer, {self.attempts} times: {reason}")

    def ask(self, body):
        with requests.post(
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
        try:
            R = json.loads(text)
        except ValueError as error:
            raise UserError(f"reward {self.url} did not answer with JSON: {first_line(error)}") from error
        if not isinstance(R, list):
            raise UserError(f"reward {self.url} must answer with a list of numbers, not {type(R).__name__}")
        return R


def png(image):
    """[3, H, W] in [0, 1] as a PNG file in base64."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
