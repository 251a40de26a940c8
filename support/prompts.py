"""Prompts: files of them, and which are held out."""

from pathlib import Path

from support.errors import UserError, first_line

TINY = Path(__file__).resolve().parents[1] / "tiny"


def read_prompts(path):
    """Read the non-empty lines of a text file. UserError if there are none, or it is no text."""
    if Path(path).suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise UserError(f"{path}: prompts are a text file, one a line; write their column to one")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors mark their files so
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a text file of prompts: {first_line(error)}") from error

    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; it needs one prompt a line")
    return prompts


def split_prompts(path):
    """Return training and held-out prompts: of a file, a tenth held out, or the bundled ones."""
    if path is None:
        return read_prompts(TINY / "prompts_train.txt"), read_prompts(TINY / "prompts_test.txt")

    prompts = read_prompts(path)
    if len(prompts) < 10:  # too few to spare any: the same prompts, from other noise
        return prompts, prompts
    return [prompt for i, prompt in enumerate(prompts) if i % 10], prompts[::10]
