"""What tests/campaign.py throws at the commands, drawn at random: values of flags, files that
they name, code of users, damage to the files of a run, answers of a service, requests to a person's page.
"""

import hashlib
import io
import json
import math
import re

import torch
from safetensors.torch import load, save


def split(text):
    """The parts of a text between | and line breaks."""
    return re.split(r"[|\n]", text)


NUMBERS = """0 -1 1 2 3 7 0.5 1.0 1e5 1e999 -0 1e-400 nan inf -inf 1_0 ٣ 0x10 + e . 1e 4096 100000
    99999999999999999999""".split()
NUMBERS += ["9" * 400, "1e" + "9" * 18, "", " ", "1\n"]
TEXTS = r"""-- - --reward ' " % %s %(default)s {} \ * $HOME ~ . .. / /etc /dev/null /dev/full folder two.txt
    empty.txt bytes.bin loop dangling missing missing/deep ../escape runs/old x/../y None vlm:/etc cpu cuda
    cuda:99 meta mps cpu:7 xla tiny folder/x.png two.txt/x.png x.gif x.PNG old last all é 🍎""".split()
TEXTS += [
    "",
    " ",
    "a\nb",
    "a\rb",
    "\t",
    "\x1b[2J",
    "\udcff",
    "a" * 300,
    "-" * 5000,
    "9" * 400,
    "x," * 300,
]
TERMS = r"""brightness clip jpeg_size aesthetic sharpness 0.1 2 1e400 1_0 0x1 1j True None unknown x.y a[0]
    é 💡 mine.py:f mine.py:g ./mine.py:f missing.py:f mine.py:__name__ folder.py:f vlm:/etc vlm:7b vlm:
    vlm:"" judge:x taste:x ocr ocr:x pickscore http:// http://a..b/ http://127.0.0.1:1/ lambda:0 f(x) () []
    'a' ; # \ """.split()
TERMS += ['"with space.py":f', "import os", "9" * 400, "-" * 5000, "(" * 300]

REWARDS = split(r"""return n * [True]|return n * ['1']|return n * [None]|return n * [[1.0]]|return 1.0|1 / 0
raise ValueError('a\nb')|raise ValueError|raise KeyError('é')|import sys; sys.exit(0)|raise SystemExit('x')
import sys; sys.exit(130)|raise MemoryError|raise RecursionError|raise StopIteration|raise OSError(28, 'full')
raise Mean|return None|return n * [10 ** 400]|return n * [1j]|return {}|return range(n)|return f()
return (n + 1) * [1.0]|return []|return images.sum()|return n * [float('nan')]|import missing_module|assert 0
return [float('nan')] + (n - 1) * [1.0]|return torch.ones(n, device='meta')|return iter(n * [1.0])
return torch.ones(n).to_sparse()|images.zero_(); prompts.clear(); return n * [1.0]|return n * [Mean()]
images.resize_(0); return n * [0.5]|import neighbour; return n * [neighbour.x]|print('hm'); return n * [1.0]
return torch.ones(n, requires_grad=True)|return torch.ones(n, dtype=torch.int64)|return numpy.ones(n)
return images.mean((1, 2, 3)) * 1e38|import warnings; warnings.warn('hm'); return n * [1.0]
return numpy.array(n * ['a'])|return torch.ones(n, dtype=torch.complex64)|return images.mean((1, 2, 3))""")
REWARD = """import numpy, torch
class Mean(Exception):
    def __str__(self):
        raise ValueError
    __repr__ = __float__ = __str__
g = 3
def f(images, prompts):
    n = len(images)
    """
HEADS = [*[""] * 5, *split("raise ValueError|def (|\0|import sys; sys.exit(0)|\tx|1/0")]
ESTIMATES = split(r"""return 0|return True|return 1.5|return None|raise ValueError('a\nb')|raise Exception
import sys; sys.exit(0)|grads(0); return 4|grads(float('nan')); return 4|grads(1.0); return 10 ** 30
grads(1.0); return -3|problem.reward(eps[:1], cond); return 1|problem.step(); return 2
R = problem.reward(eps, cond); grads(R.mean()); return len(R)|problem.velocity(eps, 7, cond); return 0
grads(1e30); problem.reward(eps, cond); return 2|problem.reward(eps, cond); grads(1.0); return -3
problem.memory['x'] = print; problem.reward(eps, cond); grads(1.0); return 2
problem.memory['x'] = 1; problem.reward(eps, cond); grads(1.0); return 2
problem.lora.parameters.clear(); problem.reward(eps, cond); return 2""")
OPTIONS = split("""*more|**x|h: float = 0.1|h=[1]|h|*, k: int = 3|lr=1|é=1|n: 'str' = 'x'|b: bool = True
b: bool = False|h=object()|h=None|h=float('nan')""")
SIGNATURES = [f"problem, eps, cond, generator, {option}" for option in [*OPTIONS, *[""] * 6]] + [
    "",
    "problem",
]
ESTIMATOR = """import torch
def grads(x):
    for p in now.lora.parameters:
        p.grad = torch.ones_like(p) * x
def f({}):
    '''{}'''
    global now
    now = problem
    {}
"""
HELPS = ["", "h: 100 % of it", "h: %(x)s", "h: é", "b: \\x1b[2J", "h: %d %s"]


def furnish(folder, rng):
    """Put files into a folder that command lines may name: prompts, a reward and an estimator as drawn."""
    (folder / "folder").mkdir()
    (folder / "folder.py").mkdir()
    for name, text in {
        "two.txt": "sun\nrobot\n",
        "empty.txt": "\n",
        "neighbour.py": "x = 1.0\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "bytes.bin").write_bytes(b"\x89PNG\xff\xfe\x00")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    reward, coding = (
        f"{rng.choice(HEADS)}\n{REWARD}{rng.choice(REWARDS)}",
        rng.choice(["utf-8"] * 9 + ["utf-16"]),
    )
    for name in ("mine.py", "with space.py"):
        (folder / name).write_text(reward, encoding=coding)
    parts = (rng.choice(choices) for choices in (SIGNATURES, HELPS, ESTIMATES))
    (folder / "est.py").write_text(ESTIMATOR.format(*parts))


def expression(rng):
    """A reward, or what looks like one."""
    text = rng.choice(TERMS)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 5])):
        text += rng.choice(split(" + |*| - |-|**|/| |,| - -|+ (|@|\t")) + rng.choice(TERMS)
    if rng.random() < 0.1:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice("()\n\t'\"*é:./") + text[at + 1 :]
    return text


def damage(rng, path):
    """Damage a file in one of many ways, and say in which."""
    data = bytearray(path.read_bytes())
    at, size = rng.randrange(len(data)), int(10 ** rng.uniform(0, 4))
    kind = rng.choice(
        split("bit|bit|bits|zeros|cut|garbage|text|empty|more|gone|folder") + ["edit"] * 4
    )
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else 20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == "cut":
        del data[at:]
    elif kind == "garbage":
        data[at : at + size] = rng.randbytes(size)
    elif kind == "text":
        texts = [
            "[]",
            "{}",
            "null",
            "\ufeff{}",
            "[" * 9999,
            "3",
            '"x"',
            "é\n" * 99,
            "1e999",
            '{"a":' * 5000,
        ]
        data = rng.choice(texts).encode()
    elif kind == "empty":
        data = b""
    elif kind == "more":
        data += rng.choice([b"\n", b"{}\n", b"\0" * size, b'{"iteration": 9}\n', bytes(data)])
    elif kind == "edit":
        edits = {".pt": edit_state, ".safetensors": edit_lora, ".png": lambda rng, data: data[::-1]}
        data = edits.get(path.suffix, edit_json)(rng, bytes(data))
    if kind != "edit" and data == path.read_bytes():  # what changes nothing is no damage
        data[at] ^= 1
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(data)
    return kind


def edit_json(rng, data):
    """JSON, or lines of it, as a hand may leave them: a key without or with another value, lines swapped."""
    lines = [json.loads(line) for line in ([data] if data[:2] == b"{\n" else data.splitlines())]
    line = rng.choice(lines)
    key = rng.choice([*line, "unknown"])
    line.pop(key, None)
    if rng.random() < 0.8:
        values = [None, "", "x", "--", "../x", "\0", "a\nb", [], {}, True]
        values += [-1, 0, 1, 2, 0.5, 1e999, 10**30, math.nan]
        line[key] = rng.choice(values)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def edit_state(rng, data):
    """A checkpoint with a right checksum, and something else in one place, or nothing."""
    state = torch.load(io.BytesIO(data.split(b"\n", 1)[1]), weights_only=True)
    key = rng.choice(
        [key for key in state if key not in ("memory", "records")]
    )  # which may be missing
    lora = state["lora"]
    state[key] = rng.choice(
        [None, [], {}, 3, "x", torch.ones(3), [w[:1] for w in lora], lora[1:], lora[::-1]]
    )
    if rng.random() < 0.3:
        del state[key]
    torch.save(state, file := io.BytesIO())
    return hashlib.sha256(file.getvalue()).hexdigest().encode() + b"\n" + file.getvalue()


def edit_lora(rng, data):
    """A LoRA file of another program, with a tensor of another shape, type or name, or without it."""
    tensors = load(data)
    key = rng.choice(list(tensors))
    w = tensors.pop(key)
    others = [
        w[:1],
        w.T.contiguous(),
        w * math.nan,
        w.to(torch.int8),
        w[..., None],
        torch.ones(()),
        None,
    ]
    if (other := rng.choice(others)) is not None:
        tensors[key.replace("lora", rng.choice(["lora", "lora", "lora", "lora_te", "x"]), 1)] = (
            other
        )
    return save(
        tensors,
        rng.choice([None, {"format": "pt"}, {"lora_adapter_metadata": "[1]"}, {"sha256": "0"}]),
    )


def answer(status, body=b"", *headers):
    """A whole answer of HTTP."""
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, "")).encode() + body


PASSING = (
    "fine",
    "500",
    "503",
    "503 nan",
    "503 minus",
    "503 date",
    "drop",
    "half",
    "drip",
    "mute",
    "length",
)  # after these it is asked again
ANSWERS = {  # what a service may send
    "fine": None, "drip": None, "mute": None, "drop": b"", "500": answer("500 No"), "404": answer("404 No"),
    "503 nan": answer("503", b"", "Retry-After: nan"), "503 minus": answer("503", b"", "Retry-After: -9"),
    "503 date": answer("503", b"", "Retry-After: Mon, 99 Jan"), "429": answer("429", b"", "Retry-After: é"),
    "503": answer("503", b"", "Retry-After: 0.1"), "half": answer("200", b"[1", "Content-Length: 99"),
    "to itself": answer("302 F", b"", "Location: /"), "to a file": answer("301", b"", "Location: file:///"),
    "204": answer("204"), "gzip": answer("200", b"no gzip", "Content-Encoding: gzip"), "noise": b"\xff" * 99,
    "huge": answer("200", b" " * 3_000_000), "heads": answer("200", b"[1, 2]", *["A: b"] * 500),
    "chunks": answer("200", b"fffffff\r\n[1", "Transfer-Encoding: chunked"), "head": b"HTTP/9 x y\r\n\r\n",
    "length": answer("200", b"[1, 2]", "Content-Length: 7"), "continue": answer("100 C") * 50,
}  # fmt: skip
BODIES = split("""|[|{}|null|3|"x"|[1]|[[1], [2]]|["1", "2"]|[null]|[1e999]|[NaN]|[true, false]
[1, 2, 3, 4, 5]|[{}]|[Infinity, -Infinity, 0, 1]|[1e39, 1]|\ufeff[1, 2]""")
BODIES += ["[" * 99999, "[" + "9" * 5000 + "]", "[1, " + "9" * 400]
ANSWERS |= {body[:20]: answer("200", body.encode()) for body in BODIES}


def request(rng, key, port):
    """A request to the page of a person, which may not answer the group of that key."""
    choice = rng.choice(
        [True, False, 0.0, 1.0, -1, 2, 10**400, 1e999, "0", "", [], [0], {}, math.nan]
    )
    host, kind = f"127.0.0.1:{port}", "application/json"
    if rng.random() < 0.5:  # from another page, or by another name, even a right choice is none
        choice = rng.choice([0, 1, None])
        if rng.random() < 0.5:
            host = rng.choice(
                split(f"evil.com|127.0.0.1.evil.com:{port}||[::1]|é|127.0.0.2|x@127.0.0.1.x")
            )
        else:
            kind = rng.choice(
                split("text/plain|application/x-www-form-urlencoded||application/json;x|json")
            )
    text = json.dumps(
        {"key": rng.choice([key, "", "x", None, [key], 3, "a" * 700]), "choice": choice}
    )
    if rng.random() < 0.3:
        others = split('|null|[]|"x"|{|\0|{"key": 1}|{"choice": 0}|é') + [
            "[" * 900,
            "\ufeff" + text,
            text[:-1],
        ]
        text = rng.choice(others)
    method = rng.choice(["POST"] * 8 + split("GET|PUT|OPTIONS|HEAD||P T|post") + ["A" * 70000])
    path = rng.choice(
        ["/answer"] * 8 + split("/|//|*|/../../etc/passwd|/answer?x|http://evil.com/answer|/%00|é")
    )
    length = rng.choice(
        [len(text.encode())] * 6 + ["", -1, 0, "٣", "1e3", 10**30, 1001, len(text) + 9, "0x9"]
    )
    more = rng.choice(
        [[]] * 4 + [["Transfer-Encoding: chunked"], ["A: b"] * 200, ["Expect: 100-continue"], ["x"]]
    )
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
    ]
    data = ("\r\n".join([*lines, *more]) + "\r\n\r\n" + text).encode()
    if rng.random() < 0.2:
        data = rng.choice([data[: rng.randrange(len(data))], rng.randbytes(999)])
    return data
