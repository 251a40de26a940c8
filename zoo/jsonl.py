"""Files of one JSON object a line, which a crash or a full disk may cut short anywhere."""

import json
import os
from contextlib import suppress


def append_line(path, record):
    """Add a line; if the last one was cut short, the new one starts on a line of its own."""
    text = json.dumps(record) + "\n"
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read_lines(path):
    """Return the objects in a file, none if it does not exist; other lines are left out."""
    records = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records
