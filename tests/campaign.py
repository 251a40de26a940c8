"""Try at random what people, machines and services do to a command; stop at the first fault.

python -m tests.campaign --minutes 20 --seed 1
python -m tests.campaign --seed 1 --only killed:17    # that trial again

Whatever happens, a command ends with exit code 0, or 2 and one line that says why, or 130 after
Ctrl-C; and the same command with --resume then comes to the numbers of an undisturbed run.

Seed and number draw a trial; only the moments of Ctrl-C differ a little from time to time. Commands
run in forks of this process, which has everything imported, so that each takes about a second.
Linux only; set HF_HUB_OFFLINE=1.
"""

import atexit
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import requests
import torch
from tqdm import tqdm

import sample
import train
import zoo.human
import zoo.judge
from support.arguments import Parser
from support.errors import run_command
from support.prompts import TINY
from support.run import read_metrics
from tests.commands import ROOT, metrics

MAINS = {"train.py": train.main, "sample.py": sample.main}
FORK = multiprocessing.get_context("fork")
PATIENCE = 120  # seconds after which a command hangs
OPERATIONS = 90  # on files, in a run of four iterations, about
KEY = "sk-a-key-that-nobody-may-see"
with ThreadingHTTPServer(("127.0.0.1", 0), None) as server:
    PORT = server.server_port  # that nobody else has

SMALL = "--prompts two.txt --model tiny --device cpu --steps 2 --size 32 --batch 8"
SAMPLE = f"sample.py {SMALL} --n 1 --lora lora.safetensors --out a.png"
TRAIN = f"train.py {SMALL} --reward brightness --watch brightness --estimator fdfo --layers last"
TRAIN += " --rank 2 --groups 2 --lr 0.002 --eval-every 2 --name x --iterations 4"
BASELINES = f"--estimator {ROOT}/studies/baselines.py"
RUNS = {
    "fdfo": "--branches 3",
    "further": "--init-lora lora.safetensors",
    "spsa": "--estimator spsa --groups 4 --directions 2",
    "central": "--estimator central --coordinates 2",
    "fdfo_published": f"{BASELINES}:fdfo_published --groups 4 --updates 2",
    "flow_grpo": f"{BASELINES}:flow_grpo --branches 2 --updates 2",
    "awm": f"{BASELINES}:awm --branches 2 --average-kl 1",
    "service": f"--reward http://127.0.0.1:{PORT}/score",
    "judge": "--reward judge:m",
    "human": "--reward human",
}


class Fault(Exception):
    """What a command did that it never should."""


# ---- a command in a fork


class Trial:
    """One trial: its random numbers, its folder, and the story of what was done in it."""

    home = Path()  # of all trials

    def __init__(self, kind, seed, number):
        self.rng = random.Random(f"{kind} {seed} {number}")
        self.folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{number}-", dir=Trial.home))
        self.story = []
        for name in ("two.txt", "runs/x/lora.safetensors"):
            shutil.copy(Trial.home / name, self.folder)

    def run(self, command, codes, prepare=lambda: None):
        """Run a command line, with --resume if it has begun. Returns exit code and output.

        codes: those that are right here; minus a signal that ends the process
        prepare: is called in the fork before the command
        """
        if (self.folder / "runs" / "x").exists():
            command += " --resume"
        self.story.append(f"python {command}")
        pipes = [os.pipe(), os.pipe()]
        ends = [end for _, end in pipes]
        process = FORK.Process(target=run_here, args=[self.folder, command, prepare, ends])
        process.start()
        for end in ends:
            os.close(end)
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()

        out, err = (open(end, errors="replace").read() for end, _ in pipes)
        process.join()
        self.story[-1] += f"  # exit code {process.exitcode}"
        check(command, process.exitcode, out, err, codes)
        return process.exitcode, out + err


def run_here(folder, command, prepare, ends):
    """Run a command as if this process were all its own, with its output in pipes."""
    os.dup2(ends[0], 1)
    os.dup2(ends[1], 2)
    os.chdir(folder)
    torch.set_num_threads(1)  # makes its thread pool anew
    atexit._clear()
    name, *args = shlex.split(command)
    sys.argv = [str(ROOT / name), *args]
    if random.random() < 0.8:  # the report takes longer than all else
        mock.patch("support.run.report").start()

    try:
        prepare()
        run_command(MAINS[name])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        atexit._run_exitfuncs()


def check(command, code, out, err, codes):
    """Raise a Fault unless a command ended as it should."""
    lines = []
    for line in re.split("[\r\n]+", err):
        if line.strip() and not re.search(r"\d%\||it/s|^warning: ", line):
            lines.append(line)

    right = code in codes and "Traceback" not in out + err and KEY not in out + err
    if code == 2:
        right = right and len(lines) == 1 and lines[0].startswith(f"{command.split()[0]}: ")
    if not right:
        raise Fault(f"{out}\n{err}\nThis was not to be expected.")


# ---- what happens to it


def at_operation(chosen, act):
    """Call `act` before one of the operations of this process on the files of a run."""
    numbers = itertools.count(1)

    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if str(args[0]).startswith("runs") and next(numbers) == chosen:
                act()

    sys.addaudithook(hook)


def end_files_at(size, how):
    """Let every write break off at the size that a file may have: by a signal, or an OSError."""
    signal.signal(signal.SIGXFSZ, how)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die(rng, seconds):
    """Die before an operation on files, or within a write: elsewhere it leaves the same behind."""
    size = int(10 ** rng.uniform(0, 5.5))
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    end_within = functools.partial(end_files_at, size, signal.SIG_DFL)
    at_operation(rng.randint(1, OPERATIONS), rng.choice([kill, end_within]))


def fill_disk(rng, seconds):
    """Let the disk be full from some moment on."""
    size = int(10 ** rng.uniform(0, 5.5))
    at_operation(rng.randint(1, OPERATIONS), lambda: end_files_at(size, signal.SIG_IGN))


def press_ctrl_c(rng, seconds):
    """Interrupt this process at any moment, once or again and again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    again = rng.choice([0, rng.uniform(0.1, 1)])
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, seconds), again)


# ---- who answers it


class Service(BaseHTTPRequestHandler):
    """Scores images, as a reward service or a judge; but the faults of its server come first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.faults.pop(0) if self.server.faults else {}
        time.sleep(fault.get("wait", 0))
        if "die" in fault:
            os._exit(0)

        right = judged(body) if "messages" in body else [len(image) for image in body["images"]]
        answer = fault.get("text", json.dumps(right)).encode()
        self.send_response(fault.get("status", 200))
        self.send_header("Content-Length", len(answer) + fault.get("missing", 0))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        """Say nothing."""


def judged(body):
    """Return a judge's answer: yes or no, and as certain without its logprobs."""
    picture = body["messages"][0]["content"][0]["image_url"]["url"]
    token = {"token": ["Yes", "No"][len(picture) // 4 % 2], "logprob": 0.0}
    choice = {"message": {"content": token["token"]}}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
    return {"choices": [choice], "usage": {"total_tokens": 9}}


FAULTS = [{"die": True}, {"missing": 1}, {"wait": 0.3}, {"wait": 1.5}]
FAULTS += [{"status": status, "text": ""} for status in (301, 401, 403, 404, 413, 429, 500, 503)]
for text in ("", "<html>Sign in</html>", "[]", "{}", "null", "3", "[1]", '["good"]', "[[1]]"):
    FAULTS.append({"text": text})
for text in ("no logprobs here", "max_tokens is unknown", "temperature", "insufficient_quota"):
    FAULTS.append({"status": 400, "text": text})


def serve(faults):
    """Answer the requests of a run."""
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Service)
    server.faults = list(faults)
    server.serve_forever()


def visit(faults):
    """Answer the groups of --reward human on one page; a second one answers late and wrongly."""
    keys = ["none"]
    while True:
        time.sleep(0.01)
        with suppress(requests.RequestException):  # it has not begun, or has ended
            key = requests.get(f"http://127.0.0.1:{PORT}/group", timeout=5).json()["key"]
            right = {"key": key, "choice": sum(key.encode()) % 2}
            answers = [right]
            if faults:
                wrong = right | {"choice": random.choice([2, -1, True, "0", 0.0, [], {}])}
                opposite = right | {"choice": 1 - right["choice"]}
                answers = [wrong, right | {"key": random.choice(keys)}, right, opposite]
            for answer in answers:
                requests.post(f"http://127.0.0.1:{PORT}/answer", json=answer, timeout=5)
            keys.append(key)


@contextmanager
def company(name, faults=()):
    """Inside, a run has what it needs beside it: a service, a judge or a person."""
    process = FORK.Process(target=visit if name == "human" else serve, args=[faults], daemon=True)
    process.start()
    yield
    process.kill()
    process.join()


# ---- runs that are disturbed


@functools.cache
def undisturbed(name, more=""):
    """Train, and nothing happens. Returns the command, its folder and its seconds."""
    trial, start = Trial(name, 0, 0), time.time()
    command = f"{TRAIN} {RUNS[name]} {more}"
    with company(name):
        trial.run(command, [0])
    return command, trial.folder, time.time() - start


def result(folder):
    """Return the numbers and the LoRA that a run has come to."""
    records = []
    for record in metrics(folder / "runs" / "x"):
        records.append({k: v for k, v in record.items() if k not in ("requests", "tokens")})
    return records, (folder / "runs" / "x" / "lora.safetensors").read_bytes()


def seconds_of(folder):
    """Return how long each iteration took, by which one is known again."""
    return [record.get("seconds") for record in read_metrics(folder / "runs" / "x")]


def disturb(trial, names, how, codes, faults=()):
    """Disturb a run one to three times, then let it end in peace: nothing may be lost."""
    name = trial.rng.choice(list(names))
    command, expected, seconds = undisturbed(name)
    with company(name, faults):
        for number in range(trial.rng.choice([1, 1, 2, 3])):
            rng = random.Random(f"{trial.folder.name[:-9]} {number}")
            trial.run(command, codes, lambda: how(rng, seconds))
    done = seconds_of(trial.folder)[:-1]  # the last may not have been saved
    with company(name):
        trial.run(command, [0])

    if result(trial.folder) != result(expected):
        raise Fault("it came to other numbers than an undisturbed run")
    if seconds_of(trial.folder)[: len(done)] != done:
        raise Fault("what was saved was done again")


def killed(trial):
    """The machine goes down, also in the middle of a write."""
    disturb(trial, RUNS, die, [0, -signal.SIGKILL, -signal.SIGXFSZ])


def interrupted(trial):
    """Somebody presses Ctrl-C."""
    disturb(trial, RUNS, press_ctrl_c, [0, 130])


def disk_full(trial):
    """The disk is full for a while; a person who answers would be asked again and again."""
    disturb(trial, RUNS.keys() - {"human"}, fill_disk, [0, 2])


def let_down(trial):
    """A service, a judge or a person answers late, wrongly, or not at all."""
    faults = trial.rng.choices(FAULTS, k=trial.rng.randint(1, 6))
    trial.story.append(f"faults of the service: {faults}")
    disturb(trial, ["service", "judge", "human"], lambda *_: None, [0, 2], faults)


# ---- damaged files


def damage(trial, name, ways=("flip", "cut", "empty")):
    """Flip a bit of a file, cut it or empty it."""
    path = trial.folder / name
    data = bytearray(path.read_bytes())
    how = trial.rng.choice(ways)
    # of a safetensors file the header: nobody can know of other numbers
    size = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    at = trial.rng.randrange(size)
    if how == "flip":
        data[at] ^= 1 << trial.rng.randrange(8)
    else:
        del data[at if how == "cut" else 0 :]
    path.unlink()  # it may be a link
    path.write_bytes(data)
    trial.story.append(f"{name}: {how} at {at}")


def damaged(trial):
    """Files of a run that is half done are damaged, then it is resumed."""
    name = trial.rng.choice(["fdfo", "spsa", "awm"])
    command, expected, _ = undisturbed(name)
    shutil.copytree(undisturbed(name, "--iterations 2")[1] / "runs", trial.folder / "runs")
    files = "state.pt state.pt state.previous.pt metrics.jsonl config.json lora.safetensors"
    files += " samples/000000.png samples/000002.png"
    chosen = sorted(set(trial.rng.choices(files.split(), k=trial.rng.choice([1, 1, 2]))))
    for file in chosen:
        damage(trial, f"runs/x/{file}")

    code, said = trial.run(command, [0, 2])
    if code == 0 and result(trial.folder) != result(expected):
        raise Fault("it came to other numbers than without the damage")
    if code == 0 and "state.pt" in chosen and "state.pt is damaged" not in said:
        raise Fault("it said nothing of the damage")


def lora_damaged(trial):
    """A LoRA is damaged, then drawn with, or trained further."""
    damage(trial, "lora.safetensors")
    trial.run(trial.rng.choice([SAMPLE, f"{TRAIN} {RUNS['further']}"]), [2])


# ---- mistyped commands

NAMES = "brightness fdfo two.txt tiny cpu last lora.safetensors".split()  # of which typos make none
MISTAKES = {
    "train.py": """--reward ; --reward '' ; --reward 2 ; --reward -clip ; --reward 'clip +'
        --reward 'clip ocr' ; --reward brightness/2 ; --reward mine.py ; --reward mine.py:no
        --reward no.py:few ; --reward mine.py:few ; --reward mine.py:words ; --reward mine.py:lost
        --reward http:/localhost ; --reward http:// ; --reward judge ; --reward taste:me
        --reward vlm:9b ; --reward human --estimator spsa ; --watch human ; --watch 'clip, jpg'
        --estimator grpo ; --estimator mine.py ; --estimator mine.py:few ; --estimator no.py:few
        --estimator spsa --churn 0.1 ; --h 0.5 ; --branch 3 ; --init-lora words ; --init-lora no
        --init-lora folder ; --init-lora models/tiny-sd3/vae/diffusion_pytorch_model.safetensors
        --layers to_x ; --layers '' ; --out two.txt ; --out /proc/runs ; --name ../x ; --name 'a b'
        --name old ; --name old --resume ; --name no --resume ; aesthetic ; –lr 0.1 ; --lr 10
        --groups 0 ; --groups ten ; --rank 2.5 ; --lr 1,5 ; --lr nan ; --seed -1""",
    "sample.py": """--prompt ; --n 0 ; --n 1e1 ; --lora no ; --lora words ; --lora folder
        --lora runs
        --lora models/tiny-sd3/vae/diffusion_pytorch_model.safetensors ; --out no/a.png
        --out a ; --out folder ; --out a.txt ; sun""",
    "both": """--prompts no.txt ; --prompts empty.txt ; --prompts a.bin ; --prompts folder
        --prompts a.csv ; --model tny ; --model some/where ; --model folder ; --model two.txt
        --model models/tiny-sd3 ; --model models/tiny-clip ; --steps 0 ; --steps ; --guidance high
        --size big ; --size 100 ; --size 64x ; --dtype fp16 ; --device gpu ; --device cuda:99""",
}
CODE = """
def few(images, prompts): return [1.0]
def words(images, prompts): return ["good"] * len(images)
def lost(images, prompts): return [float("nan")] * len(images)
"""


def furnish(trial):
    """Put into the folder what mistaken commands name, and a run from before."""
    folder = trial.folder
    texts = {"empty.txt": "\n", "a.csv": "prompt\nsun\n", "words": "no weights", "mine.py": CODE}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "a.bin").write_bytes(b"\x89PNG\xff\xfe\x00")
    (folder / "folder").mkdir()
    shutil.copytree(Trial.home / "runs" / "x", folder / "runs" / "old")

    # a model with a damaged file
    for name in ("tiny-sd3", "tiny-clip"):
        shutil.copytree(TINY / name, folder / "models" / name, copy_function=os.symlink)
    files = sorted(path for path in folder.glob("models/**/*") if path.is_file())
    damage(trial, trial.rng.choice(files).relative_to(folder), ["cut", "empty"])


def mistype(rng, word):
    """Leave out a letter of a word, type it twice, or swap it with the next."""
    typed = word
    while typed == word:
        at = rng.randrange(len(word))
        head, letter, tail = word[:at], word[at], word[at + 1 :]
        swapped = head + tail[:1] + letter + tail[1:]
        typed = rng.choice([head + tail, head + 2 * letter + tail, swapped])
    return typed


def mistyped(trial):
    """A command line has one or two mistakes: it says so, and leaves everything as it was."""
    furnish(trial)
    before = contents(trial.folder)
    words = shlex.split(trial.rng.choice([TRAIN, TRAIN, SAMPLE]))
    mistakes = re.split("[;\n]", f"{MISTAKES[words[0]]}\n{MISTAKES['both']}")
    for _ in range(trial.rng.choice([1, 1, 2])):
        if trial.rng.random() < 0.3:
            known = [i for i, word in enumerate(words) if word[:2] == "--" or word in NAMES]
            at = trial.rng.choice(known)
            words[at] = mistype(trial.rng, words[at])
        else:
            words += shlex.split(trial.rng.choice(mistakes))

    trial.run(shlex.join(words), [2])
    if contents(trial.folder) != before:
        raise Fault("files have come or changed")


def contents(folder):
    """Return the files in a folder and what they hold."""
    return {path: path.is_file() and path.read_bytes() for path in folder.glob("**/*")}


# ---- the campaign

KINDS = [mistyped, killed, interrupted, disk_full, let_down, damaged, lora_damaged]
SHARES = dict(zip(KINDS, [30, 25, 15, 10, 12, 10, 5]))  # of the time


def make_ready():
    """Train once in this process, so that its forks have everything imported."""
    Trial.home = Path(tempfile.mkdtemp(prefix="campaign-"))
    atexit.register(shutil.rmtree, Trial.home)
    os.chdir(Trial.home)
    Path("two.txt").write_text("sun\nrobot\n")
    sys.dont_write_bytecode = True
    tqdm.monitor_interval = 0  # no thread, which forks would lack
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and the killed keep it

    zoo.http.Http.pause, zoo.http.Http.timeout, zoo.judge.Judge.timeout = 0.01, 1, 1
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{PORT}/v1", "OPENAI_API_KEY": KEY}
    page = functools.partial(ThreadingHTTPServer, ("127.0.0.1", PORT))
    zoo.human.ThreadingHTTPServer = lambda address, handler: page(handler)
    sys.argv = shlex.split(TRAIN)
    train.main()


def attempt(kind, seed, number):
    """Make a trial. If it finds a fault, print what was done and end this command."""
    trial = Trial(kind.__name__, seed, number)
    try:
        kind(trial)
    except Fault as fault:
        atexit.unregister(shutil.rmtree)
        again = f"python -m tests.campaign --seed {seed} --only {kind.__name__}:{number}"
        print("FAULT", *trial.story, fault, f"in {trial.folder}; {again}", sep="\n")
        sys.exit(1)
    shutil.rmtree(trial.folder)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=1, help="in all")
    parser.add_argument("--seed", default="0", help="of all that is drawn")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one trial again")
    args = parser.parse_args()
    make_ready()
    if args.only:
        name, number = args.only.split(":")
        return attempt(globals()[name], args.seed, number)

    counts, spent = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    end = time.time() + 60 * args.minutes
    while time.time() < end:
        kind = min(KINDS, key=lambda kind: spent[kind] / SHARES[kind])
        start = time.time()
        attempt(kind, args.seed, counts[kind])
        counts[kind] += 1
        spent[kind] += time.time() - start
    print(*(f"{kind.__name__}: {counts[kind]} trials" for kind in KINDS), sep="\n")


if __name__ == "__main__":
    main()
