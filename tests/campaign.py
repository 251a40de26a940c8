"""A campaign of hostile trials. Whatever a user, the machine, a file or a service does, a command ends with
0, or with 2 and one line that says why, or with 130; nothing is lost, and no number is silently another.

python -m tests.campaign --minutes 20 --seed 1      # counts by kind and outcome, and every failure
python -m tests.campaign --trials 5                 # so many trials of each kind
python -m tests.campaign --seed 1 --only kill:17    # one trial again, and what was said last
python -m tests.campaign --only each                # every hostile value and every code of a user, once

`line` draws command lines, good and bad; `kill` ends runs by SIGKILL and resumes them; `machine` fills the
disk, or takes the folder away; `file` damages files of a run; `service` is a reward that answers nonsense;
`page` sends nonsense to that of --reward human. Seed and number draw a trial, but for the moments of some
kills. Commands run in forks of this process, which has everything imported. Linux only.
"""

import base64
import errno
import fcntl
import functools
import gc
import importlib
import io
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from tqdm import tqdm

import sample
import train
import zoo.http
from support.commands import Parser, number
from support.errors import run_command
from support.run import read_metrics
from tests import hostile
from zoo.human import Human

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"train": train.main, "sample": sample.main}
for study in ("compare", "bench", "noise", "toy", "profiles", "taste"):
    if (ROOT / "studies" / f"{study}.py").exists():
        MAINS[study] = importlib.import_module(f"studies.{study}").main
RUN = "--reward brightness --watch brightness --prompts two.txt --steps 2 --eval-every 2 --lr 0.002 --batch 8"
RUN = [*RUN.split(), *"--rank 2 --size 32 --pairs 2 --name x --iterations".split()]
SMALL = {  # little work, unless what follows asks for more
    "train": "--reward brightness --watch clip --prompts two.txt --steps 1 --iterations 1 --pairs 2",
    "sample": "--prompt sun --n 1 --steps 1",
    "bench": "--smoke --estimate --size 128 --steps 1",
}
ESTIMATORS = {
    "fdfo": "--branches 3", "spsa": "--pairs 4 --directions 2", "central": "--coordinates 2",
    "fdfo_published": "--pairs 4 --updates 2", "flow_grpo": "--branches 2 --updates 2", "reinforce": "",
    "awm": "--branches 2", "backprop": "", "reward_gradient": "",
}  # fmt: skip
RESUME, SAMPLE = "--name x --resume".split(), "--prompt sun --n 1 --lora runs/x --out a.png".split()
OPERATIONS = mmap.mmap(-1, 8)  # on the files of a run, counted by a fork, for this process to read
SAID, LINES = [""], set()  # the last that a command said; the distinct command lines


def named(estimator):
    """What --estimator takes for an estimator of ours."""
    return (
        estimator if estimator in train.ESTIMATORS else f"{ROOT}/studies/baselines.py:{estimator}"
    )


def new_folder(rng):
    """A new folder below HOME with what hostile.furnish draws."""
    folder = Path(tempfile.mkdtemp(dir=HOME), "inner", "most")
    folder.mkdir(parents=True)
    hostile.furnish(folder, rng)
    return folder


def forked(folder, command, args, before=None, interrupt=90, kill=None):
    """Run a command in a fork. Returns its exit code, or minus a signal, and what it wrote to both pipes.

    before: called in the fork. interrupt: seconds until Ctrl-C, twice; what hangs after those ends with -9.
    kill: seconds until SIGKILL, instead.
    """
    pipes = [os.pipe() for _ in range(2)]
    for _, end in pipes:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20)  # so that all it says fits in
    if (pid := os.fork()) == 0:
        for fd, (_, end) in enumerate(pipes, 1):
            os.dup2(end, fd)
        os._exit(in_fork(folder, command, args, before))
    start, steps = time.time(), [(interrupt, signal.SIGINT), (interrupt + 2, signal.SIGINT)]
    steps = [(kill, signal.SIGKILL)] if kill else [*steps, (interrupt + 30, signal.SIGKILL)]
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if steps and time.time() - start > steps[0][0]:
            os.kill(pid, steps.pop(0)[1])
        time.sleep(0.003)
    said = []
    for end, other in pipes:
        os.close(other)
        os.set_blocking(end, False)
        with open(end, "rb", buffering=0) as file:
            said.append((file.read(2**20) or b"").decode(errors="replace"))
    SAID[0] = "\n".join(said)
    return os.waitstatus_to_exitcode(ended[1]), *said


def in_fork(folder, command, args, before):
    """The exit code of a command, run as if this process were all its own."""
    code = 1
    try:
        os.chdir(folder)
        torch.set_num_threads(
            1
        )  # which mends its thread pool, before threads of others meet the forked one
        signal.signal(signal.SIGINT, signal.default_int_handler)
        most = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # 4 GB are enough for what is small
        sys.argv = [f"{ROOT}/{command}.py", *args]
        zoo.http.Http.__init__.__defaults__ = (1, 3, 0.01, 10**6)  # of little patience
        if before:
            before()
        run_command(MAINS[command])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    return code


def quick(folder, args, before=None, rng=None, kill=None):
    """Train in a fork; four times in five without a report, which takes longer to draw than all else."""

    def prepare():
        if rng is None or rng.random() < 0.8:
            mock.patch("support.run.report").start()
        if before:
            before()

    return forked(folder, "train", args, prepare, kill=kill)


def complaint(command, code, out, err, codes=(0, 2)):
    """What is wrong with how a command ended; "" if nothing is."""
    lines = [
        line
        for line in re.split("[\r\n]+", err)
        if line.strip() and not re.search(r"\d%\||\?it/s", line)
    ]
    lines = [
        line for line in lines if not line.startswith(("warning: ", "finishing this iteration"))
    ]
    if code not in codes:
        return f"it ended with {code}: {(lines or ['silence'])[-1][:300]}"
    if "Traceback" in out + err:
        return f"a traceback: {(out + err)[(out + err).index('Traceback') :][-1500:]}"
    if code == 2 and (len(lines) != 1 or not lines[0].startswith(f"{command}.py: ")):
        return f"not one line on stderr: {lines}"
    return ""


def result(run):
    """What a run has come to: its records less what the machine decides, and its LoRA."""
    text = re.sub(r"127.0.0.1:\d+", "", (run / "metrics.jsonl").read_text())
    records = [json.loads(line) for line in text.splitlines()]
    metrics = json.dumps(
        [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    )
    return metrics, (run / "lora.safetensors").read_bytes()


def differs(folder, expected):
    """How the result of a run is another than expected, in words; "" if it is not."""
    metrics, lora = result(folder / "runs/x")
    return (
        "other metrics" if metrics != expected[0] else "another LoRA" if lora != expected[1] else ""
    )


def on_operation(at, act, again=False):
    """In this process call act() before operation number `at` on files of runs, or also before all later."""
    count, acting = 0, False

    def hook(event, args):
        nonlocal count, acting
        if acting or event not in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
            "os.scandir",
        ):
            return
        if isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith("runs"):
            count += 1
            OPERATIONS[:8] = count.to_bytes(8, "little")
            if count == at or again and count > at:
                acting = True
                try:
                    act()
                finally:
                    acting = False

    sys.addaudithook(hook)


def break_writes(size, disposition):
    """From now on no file grows beyond `size` bytes: a write breaks off there, by a signal or an OSError."""
    signal.signal(signal.SIGXFSZ, disposition)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@functools.cache
def undisturbed(estimator, iterations=4):
    """A run that nothing happens to: its folder, its result, its operations on files, its seconds."""
    folder, start = new_folder(random.Random(0)), time.time()
    args = [*RUN, str(iterations), "--estimator", named(estimator), *ESTIMATORS[estimator].split()]
    code, _, err = quick(folder, args, lambda: on_operation(10**9, None))
    assert code == 0, err
    return (
        folder,
        result(folder / "runs/x"),
        int.from_bytes(OPERATIONS[:8], "little"),
        time.time() - start,
    )


def ends_as(folder, args, expected, rng):
    """Go on with a run, or start it if there is none, and what is wrong with its end; "" if nothing is."""
    ended = quick(folder, RESUME if (folder / "runs/x").exists() else args, rng=rng)
    return complaint("train", *ended, [0]) or differs(folder, expected)


def kill(rng, folder):
    """Die at an operation on files, within a write, or at any time, one to three times; then to the end."""
    estimator = rng.choice(list(ESTIMATORS))
    _, expected, operations, seconds = undisturbed(estimator)
    args = [*RUN, "4", "--estimator", named(estimator), *ESTIMATORS[estimator].split()]
    for _ in range(rng.choice([1, 1, 2, 3])):
        size = rng.choice([None, int(10 ** rng.uniform(0, 5))])

        def act(size=size):
            os.kill(os.getpid(), signal.SIGKILL) if size is None else break_writes(
                size, signal.SIG_DFL
            )

        before = functools.partial(on_operation, rng.randint(1, operations), act)
        how = rng.choice([{"before": before}] * 3 + [{"kill": rng.uniform(0.01, seconds)}])
        ended = quick(folder, RESUME if (folder / "runs/x").exists() else args, rng=rng, **how)
        if wrong := complaint("train", *ended, (0, -signal.SIGKILL, -signal.SIGXFSZ)):
            return wrong, estimator
    return ends_as(folder, args, expected, rng), estimator


def machine(rng, folder):
    """Errors of the system, a full or read-only disk, the folder removed or renamed; then all is well."""
    estimator = rng.choice(["fdfo", "spsa", "reinforce"])
    _, expected, operations, _ = undisturbed(estimator)
    args = [*RUN, "4", "--estimator", named(estimator), *ESTIMATORS[estimator].split()]
    what = rng.choice("error errors short full readonly removed renamed replaced".split())
    code = rng.choice([errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
    size, runs, aside = int(10 ** rng.uniform(0, 5)), folder / "runs", folder / "aside"

    def act():
        if what in ("error", "errors"):
            raise OSError(code, os.strerror(code))
        elif what == "short" or what in ("full", "readonly") and not mounted:
            break_writes(size, signal.SIG_IGN)
        elif what == "full":
            with suppress(OSError), open("runs/filler", "wb", buffering=0) as file:
                while file.write(bytes(size % 4096 + 1)):
                    pass
        elif what == "readonly":
            mount("remount,ro", runs)
        elif what == "renamed":
            runs.rename(aside)
        else:
            shutil.rmtree(runs)
            if what == "replaced":
                runs.write_text("a file")

    mounted = what in ("full", "readonly") and not runs.mkdir() and mount("size=8m", runs)
    try:
        before = functools.partial(on_operation, rng.randint(1, operations), act, what == "errors")
        ended = quick(folder, args, before, rng)
        mount("remount,rw", runs) if mounted else None
        (runs / "filler").unlink() if (runs / "filler").exists() else None
        runs.unlink() if runs.is_file() else None
        aside.rename(runs) if aside.exists() and not runs.exists() else None
        wrong = complaint("train", *ended) or ends_as(folder, args, expected, rng)
    finally:
        subprocess.run(["umount", "-l", runs], check=True) if mounted else None
    return wrong, f"{what}: {ended[0]}"


def mount(options, folder):
    """Mount a disk in memory, or change how it is mounted; whether that is allowed here."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


@functools.cache
def picture(folder):
    """The bytes of what sample.py draws with the run of a folder."""
    assert forked(folder, "sample", SAMPLE)[0] == 0, SAID
    return (folder / "a.png").read_bytes()


def file(rng, folder):
    """A damaged file of a run that is resumed, or sampled from."""
    estimator = rng.choice(["fdfo", "fdfo", "spsa", "reinforce"])
    half, whole = undisturbed(estimator, 2)[0], undisturbed(estimator)[1]
    shutil.copytree(half / "runs", folder / "runs")
    run, names = folder / "runs/x", ["config.json", "lora.safetensors"]
    if rng.random() < 0.25:
        name = rng.choice(names)
        how = hostile.damage(rng, run / name)
        ended = forked(folder, "sample", SAMPLE)
        wrong = complaint("sample", *ended)
        if not wrong and ended[0] == 0 and (folder / "a.png").read_bytes() != picture(half):
            wrong = "silently another picture"
        return wrong, f"sample, {name}: {ended[0]}", how
    names += ["metrics.jsonl", "state.pt", "state.pt", "state.previous.pt", "samples/000002.png"]
    drawn = dict.fromkeys(rng.sample(names, rng.choice([1, 1, 1, 2])))
    hows = {name: hostile.damage(rng, run / name) for name in drawn}
    code, out, err = quick(folder, [*RESUME, "--iterations", "4"], rng=rng)
    wrong = complaint("train", code, out, re.sub(".* is damaged .*", "", err))
    if not wrong and code == 0:
        wrong = differs(folder, whole)
        if hows.get("state.pt", "gone") != "gone" and "state.pt is damaged" not in out + err:
            wrong = wrong or "nothing was said of the damage"
    return wrong, f"resume, {' '.join(sorted(hows))}: {code}", f"{hows}"


def serve(listener, answers):
    """Answer one request after another; when no answers are left, with the brightness of each image."""
    while True:
        connection, name = listener.accept()[0], answers.pop(0) if answers else "fine"
        connection.settimeout(5)
        with (
            suppress(OSError, ValueError, TypeError),
            connection,
            connection.makefile("rb") as request,
        ):
            head = b"".join(iter(request.readline, b"\r\n"))
            body = json.loads(request.read(int(re.search(rb"(?i)content-length: (\d+)", head)[1])))
            images = [
                Image.open(io.BytesIO(base64.b64decode(i))).convert("L") for i in body["images"]
            ]
            R = [sum(image.tobytes()) / image.width / image.height for image in images]
            data = hostile.ANSWERS[name] or hostile.answer("200", json.dumps(R).encode())
            for i in range(60 if name == "drip" else 0):
                connection.sendall(data[i : i + 1])
                time.sleep(0.03)
            time.sleep(1.5 if name == "mute" else 0)
            connection.sendall(data)


def with_service(folder, port, answers, rng=None):
    """Train with the reward of a service, which runs in a fork of its own, or go on with that run."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        if (pid := os.fork()) == 0:
            with suppress(BaseException):
                serve(listener, list(answers))
            os._exit(0)
    args = [*RUN, "3", "--reward", f"http://127.0.0.1:{port}/"]
    try:
        return quick(folder, RESUME if (folder / "runs/x").exists() else args, rng=rng)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@functools.cache
def undisturbed_service():
    """The result of a run with a good service."""
    folder = new_folder(random.Random(0))
    assert with_service(folder, free_port(), [])[0] == 0, SAID
    return result(folder / "runs/x")


def service(rng, folder):
    """A reward service with up to six bad answers, then good ones; where the run stopped, it is resumed."""
    answers, port = [rng.choice(hostile.PASSING) for _ in range(rng.randint(0, 5))], free_port()
    if rng.random() < 0.7:
        answers.insert(rng.randint(0, len(answers)), rng.choice(list(hostile.ANSWERS)))
    ended = with_service(folder, port, answers, rng)
    wrong = complaint("train", *ended)
    if not wrong and ended[0] == 2:
        wrong = complaint("train", *with_service(folder, port, [], rng), [0])
    numbers = any(
        answer.startswith("[") or answer == "heads" for answer in answers
    )  # taken for rewards
    wrong = wrong or ("" if numbers else differs(folder, undisturbed_service()))
    return wrong, f"{ended[0]}", f"{answers}"


def person():
    """A group waits for a person's choice: it is there after hostile requests, and takes a good one.

    In its folder are answers from before, in a damaged file.
    """
    rng, human, found, path = random.Random(sys.argv[1]), Human(2, 1), [], Path("preferences.jsonl")
    path.write_text(
        "".join(f'{{"key": "{i}", "prompt": "é", "choice": {i % 2}}}\n' for i in range(9))
    )
    hostile.damage(rng, path)
    port = int(re.search(r":(\d+)/", human.open("."))[1])
    images = torch.rand(2, 3, 8, 8)
    waiting = threading.Thread(target=lambda: found.append(human(images, ["sun", "sun"]).tolist()))
    waiting.start()
    while not human.waiting:
        time.sleep(0.001)
    (key,), answers = human.waiting, dict(human.answers)

    def ask(data):
        with (
            socket.create_connection(("127.0.0.1", port), 5) as connection,
            suppress(ConnectionError),
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    host = f"HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    for _ in range(20):
        ask(data := hostile.request(rng, key, port))
        shown = ask(f"GET /group {host}\r\n".encode()) or b""
        if (
            key.encode() not in shown
            or human.answers != answers
            or not {*answers.values()} <= {0, 1, None}
        ):
            return print(
                f"after {data[:400]!r} the page showed {shown[:100]!r} and had {human.answers}"
            )
    body = json.dumps({"key": key, "choice": 1})
    host += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    ask(f"POST /answer {host}\r\n{body}".encode())
    waiting.join(5)
    kept = dict(human.read_answers()) == {**answers, key: 1}
    print(
        "" if found == [[0, 1]] and kept else f"a good answer came to {found}, and is kept: {kept}"
    )


def page(rng, folder):
    """Twenty hostile requests to the page of --reward human."""
    ended = forked(folder, "page", [str(rng.random())])
    return complaint("page", *ended) or ended[1].strip(), f"{ended[0]}"


@functools.cache
def flags(command, estimator=None):
    """The flags of a command, from the parser that it makes itself."""
    if estimator:
        parser = train.make_parser(estimator)[0]
    else:
        with mock.patch.object(
            Parser, "parse_args", autospec=True, side_effect=InterruptedError
        ) as parse:
            with suppress(InterruptedError):
                MAINS[command]()
        parser = parse.call_args[0][0]
    return [action for action in parser._actions if action.option_strings]


def draw_line(rng):
    """A command and its arguments: little work, then up to three flags with values of all sorts."""
    command = rng.choice(
        ["train"] * 35 + ["sample"] * 10 + [name for name in MAINS if name != "page"]
    )
    args, estimator = SMALL.get(command, "").split(), None
    if command == "train" and rng.random() < 0.1:
        args, estimator = "--name old --resume".split(), "fdfo"
    elif command == "train":
        estimator = named(drawn := rng.choice([*ESTIMATORS, *["fdfo"] * 7]))
        args += ["--estimator", estimator, *ESTIMATORS[drawn].split()]
        if rng.random() < 0.3:  # with the flags of fdfo
            args, estimator = [*SMALL["train"].split(), "--estimator", "est.py:f"], "fdfo"
        if rng.random() < 0.3:
            args += [
                f"--{rng.choice(['reward', 'reward', 'reward', 'watch'])}={hostile.expression(rng)}"
            ]
    elif command == "bench" and rng.random() < 0.5:
        args.remove("--estimate")
    elif command == "sample" and rng.random() < 0.5:
        args += ["--lora", "runs/old"]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        action = rng.choice(flags(command, estimator))
        numeric = action.type and not action.choices
        value = rng.choice(
            hostile.NUMBERS if rng.random() < (0.9 if numeric else 0.2) else hostile.TEXTS
        )
        if action.dest in ("reward", "watch") and rng.random() < 0.8:
            value = hostile.expression(rng)
        elif action.choices and rng.random() < 0.5:
            value = rng.choice(list(action.choices))
        elif action.dest == "out" and value[:1] in ("/", "~"):
            value = "folder"  # the root of somebody's machine is left alone
        flag = action.option_strings[-1] + ("" if rng.random() < 0.95 else rng.choice("sé="))
        alone = action.nargs == 0 and rng.random() < 0.9
        args += [flag] if alone else [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
    if rng.random() < 0.03:
        args.insert(rng.randrange(len(args) + 1), rng.choice(hostile.TEXTS))
    return command, *args


def contents(folder):
    """{path of every file below a folder: its content}."""
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in paths}


def every_line():
    """Each value once, of every flag of every command, and all code of users: command, arguments, files."""
    train = ["train", *SMALL["train"].split()]
    for command in SMALL:  # the others take too long where their flags are good
        for action in flags(command, "fdfo" if command == "train" else None):
            flag, values = action.option_strings[-1], [*hostile.NUMBERS, *hostile.TEXTS]
            if action.dest == "out":  # the root of somebody's machine is left alone
                values = [value for value in values if value[:1] not in ("/", "~")]
            for text in [flag] if action.nargs == 0 else [f"{flag}={value}" for value in values]:
                yield [command, *SMALL[command].split(), text], {}
    for term in hostile.TERMS:
        for flag in ("--reward=", "--watch=", "--reward=brightness - "):
            yield [*train, f"{flag}{term}"], {}
    rewards = [(head, "return n * [1.0]") for head in hostile.HEADS]
    rewards += [("", body) for body in hostile.REWARDS]
    for head, body in rewards:
        for flag in ("--reward=", "--watch=", "--reward=brightness - "):
            yield [*train, f"{flag}mine.py:f"], {"mine.py": f"{head}\n{hostile.REWARD}{body}"}
    signature, fine = (
        "problem, eps, cond, generator",
        "problem.reward(eps, cond); grads(1.0); return 2",
    )
    parts = [(signature, "", body) for body in hostile.ESTIMATES]
    parts += [(s, words, fine) for s in hostile.SIGNATURES for words in hostile.HELPS]
    for part in parts:
        for more in ([], ["--help"], ["--h=1"], ["--no-b"]):
            yield (
                [*train, "--estimator", "est.py:f", *more],
                {"est.py": hostile.ESTIMATOR.format(*part)},
            )


def line(rng, folder, drawn=None):
    """A command line. What was there stays as it was, and nothing comes but what was asked for."""
    command, *args = drawn or draw_line(rng)
    LINES.add((command, *args))
    shutil.copytree(undisturbed("fdfo", 2)[0] / "runs/x", folder / "runs/old")
    before = contents(folder.parent)
    code, out, err = forked(folder, command, args, interrupt=8)
    wrong, after = complaint(command, code, out, err, (0, 2, 130)), contents(folder.parent)
    text = " ".join(args)
    for path in after.keys() | before.keys():
        if after.get(path) == before.get(path) or "__pycache__" in path:
            continue
        run = folder.parent / re.sub("/samples$", "", os.path.dirname(path))
        if (
            command == "train" and path not in before
        ):  # a run that trained, or one that a person was to judge
            good = (
                len(read_metrics(run)) > 1
                or "human" in text
                or path.endswith(".part")
                and code == 130
            )
        elif command == "train":
            good = "--resume" in args and path.startswith("most/runs/old/") and code != 2
        elif command == "sample":
            good = code == 0 and ("--out" in text or path == "most/sample.png")
        else:
            good = path not in before and code != 2
        wrong = wrong or ("" if good else f"{path} was changed, or came")
    return wrong, f"{command}: {code}", repr([command, *args])[:700]


def each(rng, folder, n):
    """The n-th command line of all that has one hostile thing in it."""
    drawn, files = list(every_line())[n]
    for name, text in files.items():
        (folder / name).write_text(text)
    return line(rng, folder, drawn)


MAINS["page"] = person
KINDS = {
    line: 35,
    kill: 22,
    machine: 12,
    file: 25,
    service: 4,
    page: 2,
}  # and their shares of the time


def trial(seed, kind, n):
    """One trial: what is wrong, or ""; what happened, in a word; and more of that."""
    rng = random.Random(f"{seed} {kind.__name__} {n}")
    folder = new_folder(rng)
    try:
        return kind(rng, folder, n) if kind is each else kind(rng, folder)
    finally:
        shutil.rmtree(folder.parent.parent)


def warm_up():
    """Train once in this process, so that its forks have everything imported; then it is as before."""
    tqdm.monitor_interval = 0  # no threads, which a fork would lack
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own is one for all forks, and the killed would keep it
    torch.set_num_threads(1)
    with chdir(new_folder(random.Random(0))), open("said", "w") as said:
        with redirect_stdout(said), redirect_stderr(said):
            with mock.patch.object(sys, "argv", ["train.py", *RUN, "1"]):
                train.main()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()  # what no fork goes through stays shared


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--minutes", type=number(float, 0, 10_000), default=1.0, help="in all (default 1)"
    )
    parser.add_argument(
        "--trials", type=number(int, 1), help="of each kind, however long they take"
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of all that is drawn (default 0)"
    )
    parser.add_argument("--only", help="a kind, each, or one trial as kind:17")
    args = parser.parse_args()
    name, _, n = (args.only or "").partition(":")
    kinds = [kind for kind in (*KINDS, each) if kind.__name__ == name] if name else list(KINDS)
    if kinds == [each]:
        args.trials = args.trials or sum(1 for _ in every_line())
    warm_up()
    if n:
        return print(*trial(args.seed, kinds[0], int(n)), *SAID, sep="\n")
    counts, spent, outcomes, start = Counter(), Counter(), defaultdict(Counter), time.time()
    with suppress(KeyboardInterrupt):  # which may end it early
        while kinds:
            kind = min(
                kinds, key=lambda kind: counts[kind] if args.trials else spent[kind] / KINDS[kind]
            )
            began = time.time()
            if counts[kind] == args.trials or not args.trials and began - start > 60 * args.minutes:
                break
            wrong, what, *more = trial(args.seed, kind, counts[kind])
            outcomes[kind]["FAILED" if wrong else what] += 1
            if wrong:
                again = f"python -m tests.campaign --seed {args.seed} --only {kind.__name__}:{counts[kind]}"
                print(f"FAILED {again}", what, *more, wrong, sep="\n    ", flush=True)
            counts[kind] += 1
            spent[kind] += time.time() - began
    for kind in kinds:
        print(f"{kind.__name__}: {counts[kind]} trials, {spent[kind]:.0f} s")
        print(*(f"{count:8} {what}" for what, count in outcomes[kind].most_common()), sep="\n")
    failures = sum(outcomes[kind]["FAILED"] for kind in kinds)
    minutes = (time.time() - start) / 60
    print(f"{len(LINES)} distinct command lines; {failures} failures in {minutes:.0f} minutes")
    sys.exit(failures > 0)


if __name__ == "__main__":
    if os.environ.get("HF_HUB_OFFLINE") != "1":  # which is read at import
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.campaign", *sys.argv[1:]], offline)
    with tempfile.TemporaryDirectory() as HOME:
        run_command(main)
