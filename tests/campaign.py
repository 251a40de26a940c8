"""Try at random what people, machines and services do to a command; stop at the first fault.

python -m tests.campaign --minutes 20 --seed 1
python -m tests.campaign --seed 1 --only killed:17    # that trial again

Whatever happens, a command ends with exit code 0, or 2 and one line that says why, or 130 after
Ctrl-C; and the same command with --resume then comes to the numbers of an undisturbed run.

Seed and number draw a trial; only the moments of Ctrl-C differ a little from time to time. Commands
run in forks of this process, which has everything imported, so that each takes about a second;
they draw no report. Linux only; set HF_HUB_OFFLINE=1.
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

import requests
import torch
from tqdm import tqdm

import sample
import support.run
import train
import zoo.http
import zoo.human
from support.arguments import Parser
from support.errors import run_command
from support.run import read_metrics
from tests.commands import ROOT, metrics

MAINS = {"train.py": train.main, "sample.py": sample.main}
FORK = multiprocessing.get_context("fork")
with ThreadingHTTPServer(("127.0.0.1", 0), None) as server:
    PORT = server.server_port  # that nobody else has

SMALL = "--prompts two.txt --model tiny --device cpu --steps 2 --size 32 --batch 8"
SAMPLE = f"sample.py {SMALL} --n 1 --lora lora.safetensors --out a.png"
TRAIN = f"train.py {SMALL} --reward brightness --watch brightness --estimator fdfo --layers last"
TRAIN += " --rank 2 --groups 2 --lr 0.002 --eval-every 2 --name x --iterations 4"
RUNS = {
    "fdfo": "--branches 3",
    "further": "--init-lora lora.safetensors",
    "spsa": "--estimator spsa --groups 4 --directions 2",
    "awm": f"--estimator {ROOT}/studies/baselines.py:awm --branches 2 --average-kl 1",
    "service": f"--reward http://127.0.0.1:{PORT}/score",
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
        pipes = [os.pipe(), os.pipe()]
        ends = [end for _, end in pipes]
        process = FORK.Process(target=run_here, args=[self.folder, command, prepare, ends])
        process.start()
        for end in ends:
            os.close(end)
        process.join(120)
        process.kill()  # if it hangs

        out, err = (open(end, errors="replace").read() for end, _ in pipes)
        process.join()
        code = process.exitcode
        self.story.append(f"python {command}  # exit code {code}")
        lines = [line for line in re.split("[\r\n]+", err) if line.strip()]
        lines = [line for line in lines if not re.search(r"\d%\||it/s|^warning: ", line)]

        right = code in codes and "Traceback" not in out + err
        if code == 2:
            right = right and len(lines) == 1 and lines[0].startswith(f"{command.split()[0]}: ")
        if not right:
            raise Fault(f"{out}\n{err}\nThis was not to be expected.")
        return code, out + err


def run_here(folder, command, prepare, ends):
    """Run a command as if this process were all its own, with its output in pipes."""
    os.dup2(ends[0], 1)
    os.dup2(ends[1], 2)
    os.chdir(folder)
    torch.set_num_threads(1)  # makes its thread pool anew
    atexit._clear()
    name, *args = shlex.split(command)
    sys.argv = [name, *args]

    try:
        prepare()
        run_command(MAINS[name])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        atexit._run_exitfuncs()


# ---- what happens to it


def at_operation(rng, act):
    """Call `act` before one of the operations of this process on the files of a run."""
    numbers, chosen = itertools.count(1), rng.randint(1, 90)  # about as many as there are

    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if str(args[0]).startswith("runs") and next(numbers) == chosen:
                act()

    sys.addaudithook(hook)


def end_files(rng, how):
    """Let every write break off at a size that a file may have: by a signal, or an OSError."""
    size = int(10 ** rng.uniform(0, 5.5))
    signal.signal(signal.SIGXFSZ, how)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die(rng):
    """Die before an operation on files, or within a write: elsewhere it leaves the same behind."""
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    end_within = functools.partial(end_files, rng, signal.SIG_DFL)
    at_operation(rng, rng.choice([kill, end_within]))


def fill_disk(rng):
    """Let the disk be full from some moment on."""
    at_operation(rng, functools.partial(end_files, rng, signal.SIG_IGN))


def press_ctrl_c(rng):
    """Interrupt this process at any moment, once or again and again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    again = rng.choice([0, rng.uniform(0.1, 1)])
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 2), again)


# ---- who answers it


class Service(BaseHTTPRequestHandler):
    """Scores images, as a reward service; but its faults come first."""

    faults = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.faults.pop(0) if self.faults else {}
        time.sleep(fault.get("wait", 0))
        if "die" in fault:
            os._exit(0)

        right = [len(image) for image in body["images"]]
        answer = fault.get("text", json.dumps(right)).encode()
        self.send_response(fault.get("status", 200))
        self.send_header("Content-Length", len(answer) + fault.get("missing", 0))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        """Say nothing."""


FAULTS = [{"die": True}, {"missing": 1}, {"wait": 0.3}, {"wait": 1.5}]
FAULTS += [{"status": status, "text": ""} for status in (301, 401, 404, 429, 500)]
FAULTS += [{"text": text} for text in ("", "<html>Sign in</html>", "{}", "3", "[1]", '["good"]')]


def serve(faults):
    """Answer the requests of a run."""
    Service.faults = [*faults]
    ThreadingHTTPServer(("127.0.0.1", PORT), Service).serve_forever()


def visit(faults):
    """Answer the groups of --reward human on one page; a second one answers late and wrongly."""
    key = "none"
    while True:
        time.sleep(0.01)
        with suppress(requests.RequestException):  # it has not begun, or has ended
            before = key
            key = requests.get(f"http://127.0.0.1:{PORT}/group", timeout=5).json()["key"]
            right = sum(key.encode()) % 2
            answers = [(key, right)]
            if faults:
                answers = [(key, wrong) for wrong in (2, -1, True, "0", 0.0, [])]
                answers += [(before, 1), (key, right), (key, 1 - right)]
            for named, choice in answers:
                answer = {"key": named, "choice": choice}
                requests.post(f"http://127.0.0.1:{PORT}/answer", json=answer, timeout=5)


@contextmanager
def company(name, faults=()):
    """Inside, a run has what it needs beside it: a service or a person."""
    process = FORK.Process(target=visit if name == "human" else serve, args=[faults], daemon=True)
    process.start()
    yield
    process.kill()
    process.join()


# ---- runs that are disturbed


@functools.cache
def undisturbed(name):
    """Train, and nothing happens. Returns the command and its folder."""
    trial = Trial(name, 0, 0)
    command = f"{TRAIN} {RUNS[name]}"
    with company(name):
        trial.run(command, [0])
    return command, trial.folder / "runs" / "x"


def result(folder):
    """Return the numbers and the LoRA that a run has come to."""
    return metrics(folder), (folder / "lora.safetensors").read_bytes()


def seconds_of(folder):
    """Return how long each iteration took, by which one is known again."""
    return [record.get("seconds") for record in read_metrics(folder)]


def disturb(trial, names, how, codes, faults=()):
    """Disturb a run one to three times, then let it end in peace: nothing may be lost."""
    name, folder = trial.rng.choice(names), trial.folder / "runs" / "x"
    command, expected = undisturbed(name)
    with company(name, faults):
        for _ in range(trial.rng.choice([1, 1, 2, 3])):
            rng = random.Random(trial.rng.random())
            trial.run(command, codes, lambda: how(rng))
    done = seconds_of(folder)[:-1]  # the last may not have been saved
    with company(name):
        trial.run(command, [0])

    if result(folder) != result(expected):
        raise Fault("it came to other numbers than an undisturbed run")
    if seconds_of(folder)[: len(done)] != done:
        raise Fault("what was saved was done again")


def killed(trial):
    """The machine goes down, also in the middle of a write."""
    disturb(trial, [*RUNS], die, [0, -signal.SIGKILL, -signal.SIGXFSZ])


def interrupted(trial):
    """Somebody presses Ctrl-C."""
    disturb(trial, [*RUNS], press_ctrl_c, [0, 130])


def disk_full(trial):
    """The disk is full for a while; a person who answers would be asked again and again."""
    disturb(trial, [name for name in RUNS if name != "human"], fill_disk, [0, 2])


def let_down(trial):
    """A service or a person answers late, wrongly, or not at all."""
    faults = trial.rng.choices(FAULTS, k=trial.rng.randint(1, 6))
    trial.story.append(f"faults of the service: {faults}")
    disturb(trial, ["service", "human"], lambda rng: None, [0, 2], faults)


# ---- damaged files


def damage(trial, name):
    """Flip a bit of a file, or cut it."""
    path = trial.folder / name
    data = bytearray(path.read_bytes())
    # of a safetensors file the header: nobody can know of other numbers
    size = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    at = trial.rng.choice([0, trial.rng.randrange(size)])
    how = trial.rng.choice(["flip", "cut"])
    if how == "flip":
        data[at] ^= 1 << trial.rng.randrange(8)
    else:
        del data[at:]
    path.write_bytes(data)
    trial.story.append(f"{name}: {how} at {at}")


def damaged(trial):
    """Files of a run that is half done are damaged, then it is resumed."""
    command, expected = undisturbed(trial.rng.choice(["fdfo", "spsa", "awm"]))
    trial.run(f"{command} --iterations 2", [0])
    files = "state.pt state.pt state.previous.pt metrics.jsonl config.json lora.safetensors"
    files += " samples/000000.png samples/000002.png"
    chosen = set(trial.rng.choices(files.split(), k=trial.rng.choice([1, 1, 2])))
    for file in sorted(chosen):
        damage(trial, f"runs/x/{file}")

    code, said = trial.run(command, [0, 2])
    if code == 0 and result(trial.folder / "runs" / "x") != result(expected):
        raise Fault("it came to other numbers than without the damage")
    if code == 0 and "state.pt" in chosen and "state.pt is damaged" not in said:
        raise Fault("it said nothing of the damage")


def lora_damaged(trial):
    """A LoRA is damaged, then drawn with, or trained further."""
    damage(trial, "lora.safetensors")
    trial.run(trial.rng.choice([SAMPLE, f"{TRAIN} {RUNS['further']}"]), [2])


# ---- mistyped commands

MISTAKES = """--reward ; --reward 2 ; --reward -clip ; --reward 'clip +' ; --reward brightnes ;
    --reward no.py:f ; --reward http:/localhost ; --reward judge ; --reward taste:me ;
    --reward human --estimator spsa ; --watch 'clip, jpg' ; --estimator grpo ;
    --estimator spsa --churn 0.1 ; --h 0.5 ; --branch 3 ; --init-lora two.txt ;
    --init-lora folder ; --layers to_x ; --out two.txt ; --name ../x ; --name old --rank 3 ;
    --name old --resume --rank 3 ; --name no --resume ; –lr 0.1 ; --lr 10 ; --lr 1,5 ;
    --groups 0 ; --rank 2.5 ; --seed -1 ; --prompt ; --n 0 ; --lora no ; --lora two.txt ;
    --lora runs ; sun ; --prompts no.txt ; --prompts empty.txt ; --prompts a.bin ;
    --prompts folder ; --prompts a.csv ; --model tny ; --model some/where ; --model folder ;
    --model two.txt ; --steps 0 ; --steps ; --size big ; --size 100 ; --dtype fp16 ;
    --device gpu ; --device cuda:99"""


def mistyped(trial):
    """A command line has one or two mistakes: it says so, and leaves everything as it was."""
    folder = trial.folder
    (folder / "empty.txt").write_text("\n")
    (folder / "a.csv").write_text("prompt\nsun\n")
    (folder / "a.bin").write_bytes(b"\x89PNG\xff\xfe\x00")
    (folder / "folder").mkdir()
    shutil.copytree(Trial.home / "runs" / "x", folder / "runs" / "old")
    before = contents(folder)

    for _ in range(3):
        command = trial.rng.choice([TRAIN, TRAIN, SAMPLE])
        for _ in range(trial.rng.choice([1, 1, 2])):
            command += f" {trial.rng.choice(MISTAKES.split(';')).strip()}"

        trial.run(command, [2])
        if contents(folder) != before:
            raise Fault("files have come or changed")


def contents(folder):
    """Return the files in a folder and what they hold."""
    return {path: path.is_file() and path.read_bytes() for path in folder.glob("**/*")}


# ---- the campaign

KINDS = [mistyped, killed, interrupted, disk_full, let_down, damaged, lora_damaged]


def make_ready():
    """Train once in this process, so that its forks have everything imported."""
    Trial.home = Path(tempfile.mkdtemp(prefix="campaign-"))
    atexit.register(shutil.rmtree, Trial.home)
    os.chdir(Trial.home)
    Path("two.txt").write_text("sun\nrobot\n")
    sys.dont_write_bytecode = True
    tqdm.monitor_interval = 0  # no thread, which forks would lack
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and the killed keep it

    zoo.http.Http.pause, zoo.http.Http.timeout = 0.01, 1
    page = functools.partial(ThreadingHTTPServer, ("127.0.0.1", PORT))
    zoo.human.ThreadingHTTPServer = lambda address, handler: page(handler)
    support.run.report = lambda *args: None  # takes longer than all else
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

    end = time.time() + 60 * args.minutes
    for trials in itertools.count():
        attempt(KINDS[trials % len(KINDS)], args.seed, trials // len(KINDS))
        if time.time() > end:
            return print(f"{trials + 1} trials, no fault")


if __name__ == "__main__":
    main()
