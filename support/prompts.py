"""Prompts: files of them, and which are held out."""

import json
from pathlib import Path

from support.errors import UserError, first_line

TINY = Path(__file__).resolve().parents[1] / "tiny"


class Prompt(str):
    """A prompt with questions about its image, to which the answer should be yes."""

    questions = ()


def read_prompts(path):
    """Read prompts from a text file, one a line, or from JSON lines, which may have questions.

    Those are {"prompt": "a red cat", "questions": ["Is there a cat?", "Is the cat red?"]}.
    UserError if there are none, or the file is something else.
    """
    kind = Path(path).suffix.lower()
    if kind in (".csv", ".tsv", ".json", ".parquet"):
        raise UserError(f"{path}: prompts are a text file, one a line; write their column to one")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors mark their files so
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a text file of prompts: {first_line(error)}") from error

    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise UserError(f"the prompt file {path} is empty; it needs one prompt a line")
    if kind == ".jsonl":
        return [read_json(path, number, line) for number, line in lines]
    return [line for _, line in lines]


def read_json(path, number, line):
    """Return the Prompt of a line of JSON. UserError if it is none."""
    try:
        record = json.loads(line)
        prompt, questions = record["prompt"].strip(), record.get("questions", [])
        if not prompt or not isinstance(questions, list):
            raise ValueError("no text, or no list")
        if not all(isinstance(question, str) for question in questions):
            raise ValueError("no text")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        form = '{"prompt": "a cat", "questions": ["Is there a cat?"]}'
        raise UserError(f"line {number} of {path} is not of the form {form}") from error

    prompt = Prompt(prompt)
    prompt.questions = questions
    return prompt


def split_prompts(path):
    """Return training and held-out prompts: of a file, a tenth held out, or the bundled ones."""
    if path is None:
        return read_prompts(TINY / "prompts_train.txt"), read_prompts(TINY / "prompts_test.txt")

    prompts = read_prompts(path)
    if len(prompts) < 10:  # too few to spare any: the same prompts, from other noise
        return prompts, prompts
    return [prompt for i, prompt in enumerate(prompts) if i % 10], prompts[::10]
