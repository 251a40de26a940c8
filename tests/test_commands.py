"""Tests of the commands, run as a user runs them: arguments good and bad, interruptions, same numbers again.

pytest -q
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load, load_file, save

import sample
import train
import zoo.http
from studies import bench, toy
from support.errors import UserError, run_command
from support.evaluation import mean_and_error, signs_of_hacking
from support.run import checksum, read_config

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--reward",
    "colorfulness",
    "--pairs",
    "8",
    "--steps",
    "2",
    "--lr",
    "2e-3",
    "--eval-every",
    "4",
]
SHORT += ["--prompts", ROOT / "tiny" / "prompts_test.txt"]  # 13 of which are held out


def start(*args, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / args[0], *map(str, args[1:])],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def command(*args, cwd):
    """Exit code, standard output and standard error of `python args`."""
    process = start(*args, cwd=cwd)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def metrics(folder):
    """The records of a run, less what depends on the machine."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "memory_mb")} for r in records]


def state_of(folder):
    """The newest checkpoint of a run, without its checksum."""
    return torch.load(
        io.BytesIO((folder / "state.pt").read_bytes().split(b"\n", 1)[1]), weights_only=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short training run that nothing interrupts: its folder and what it said."""
    cwd = tmp_path_factory.mktemp("whole")
    code, out, err = command("train.py", *SHORT, "--iterations", 8, cwd=cwd)
    assert code == 0, err
    return cwd / "runs" / "colorfulness", out


def test_training_raises_the_reward_and_leaves_a_complete_folder(whole):
    folder, out = whole
    names = "config.json evolution.webp lora.safetensors metrics.jsonl report.png samples"
    names += " state.previous.pt state.pt"
    assert [path.name for path in sorted(folder.iterdir())] == names.split()
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        "000000.png",
        "000004.png",
        "000008.png",
    ]
    records = metrics(folder)
    assert [record["iteration"] for record in records] == list(range(9))
    assert records[-1]["images"] == 8 * 16
    # the same noise before and after, so that the gain has a small error; four of them
    assert records[-1]["gain"] > 4 * records[-1]["gain_se"]
    assert records[-1]["held_out"] - records[0]["held_out"] == pytest.approx(
        records[-1]["gain"], abs=1e-3
    )
    assert records[0]["drift"] == 0 < records[-1]["drift"] < 0.2
    watched = {"colorfulness", "aesthetic", "clip", "edge_density", "color_entropy", "diversity"}
    assert set(records[-1]["watched"]) == set(records[-1]["change"]) == watched
    assert (
        out.startswith("held-out colorfulness")
        and "sample.py --lora" in out
        and out.count("\n") == 1
    )
    assert Image.open(folder / "report.png").size[0] > 1000
    assert Image.open(folder / "evolution.webp").n_frames == 3


def kill_when(seen, process, timeout=120):
    """SIGKILL the process as soon as `seen()`."""
    end = time.time() + timeout
    while not seen():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_resumed_gives_the_same_numbers(whole, tmp_path):
    folder = tmp_path / "runs" / "again"
    args = ["train.py", *SHORT, "--name", "again", "--iterations", 8]
    lines = folder / "metrics.jsonl"
    # while an iteration runs, and while the file that will be state.pt grows
    kill_when(
        lambda: lines.exists() and len(lines.read_text().splitlines()) >= 4,
        start(*args, cwd=tmp_path),
    )
    assert not (folder / "report.png").exists()
    kill_when((folder / "state.pt.part").exists, start(*args, "--resume", cwd=tmp_path))
    # one bit of the newest checkpoint is flipped; what was damaged is said, and nothing is lost
    state = folder / "state.pt"
    if not state.exists():  # killed between the two renamings
        state.write_bytes((folder / "state.previous.pt").read_bytes())
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    picture = folder / "samples" / "000000.png"
    picture.write_bytes(bytes(len(picture.read_bytes())))
    code, out, err = command("train.py", "--name", "again", "--resume", "--batch", 6, cwd=tmp_path)
    assert code == 0, err
    assert "state.pt is damaged (its checksum is wrong)" in out + err
    assert "000000.png is damaged" in out and Image.open(folder / "evolution.webp").n_frames == 2
    for one, two in zip(metrics(folder), metrics(whole[0]), strict=True):
        assert one == two if one["iteration"] < 3 else one.keys() == two.keys()
        for key in ("reward", "grad_norm", "drift", "gain", "images", "evaluations"):
            if key in one:  # in batches of another size, float32 sums in another order
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


def resume_changed(file, old, new, whole, tmp_path, monkeypatch):
    """Resume a copy of the run with other words in one of its files; returns that file."""
    shutil.copytree(whole[0].parent, tmp_path / "runs")
    path = tmp_path / "runs" / whole[0].name / file
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", whole[0].name, "--resume"])
    run_command(train.main)
    return path


def test_a_run_with_another_configuration_is_not_resumed(whole, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        resume_changed("config.json", b'"lr": 0.002', b'"lr": 0.003', whole, tmp_path, monkeypatch)
    complaint = "config.json was damaged or changed"
    assert stop.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]


def test_changed_metrics_are_mended(whole, tmp_path, monkeypatch):
    path = resume_changed(
        "metrics.jsonl", b'"images": 32', b'"images": 33', whole, tmp_path, monkeypatch
    )
    assert metrics(path.parent) == metrics(whole[0])


def write_config(folder, config):
    """Write what `Run` writes of a run's arguments."""
    config["checksum"] = checksum(json.dumps(config).encode())
    (folder / "config.json").write_text(json.dumps(config))


def test_a_zero_is_resumed_as_a_zero(tmp_path):
    write_config(tmp_path, {"kl": 0.0, "seed": 0, "compile": False, "prompts": None})
    assert read_config(tmp_path) == ["--kl=0.0", "--seed=0"]


@pytest.mark.parametrize("keys", [None, ["model", "steps"]])
def test_a_configuration_that_lacks_something_is_damaged(keys, tmp_path):
    for text in ("{}", '{"steps": 2}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="was damaged or changed"):
            read_config(tmp_path, keys)


@pytest.mark.parametrize(
    "damage, complaint", [("bit", "its checksum is wrong"), ("type", "not finite floats")]
)
def test_a_damaged_lora_is_refused(damage, complaint, whole, tmp_path, monkeypatch, capsys):
    data, path = (
        bytearray((whole[0] / "lora.safetensors").read_bytes()),
        tmp_path / "damaged.safetensors",
    )
    data[-2] ^= 1  # of a number, which stays finite
    if damage == "type":  # and no checksum, as in files of other programs
        data = save({key: tensor.to(torch.int8) for key, tensor in load(bytes(data)).items()})
    path.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "sun", "--lora", str(path)])
    with pytest.raises(SystemExit) as stop:
        run_command(sample.main)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: torch.empty(2**60))  # more than any machine can address
    assert (
        stop.value.code == 2 and "train.py: out of memory: lower --batch" in capsys.readouterr().err
    )
    with pytest.raises(RuntimeError):  # a mistake of ours stays one
        run_command(lambda: torch.ones(2) @ torch.ones(3))


def test_interrupted_run_saves_and_exits_130(tmp_path):
    process = start("train.py", *SHORT, "--iterations", 50, "--name", "x", cwd=tmp_path)
    folder, end = tmp_path / "runs" / "x", time.time() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 2:
        assert time.time() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--name x --resume" in out and "Traceback" not in err
    assert state_of(folder)["records"][-1]["iteration"] == metrics(folder)[-1]["iteration"]


def test_a_service_that_goes_down_loses_nothing(tmp_path, monkeypatch, capsys):
    def serve(requests):
        """A service that scores every image with its brightness, for a number of requests, then is broken."""

        class Service(BaseHTTPRequestHandler):
            left = requests

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = [
                    Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]
                ]
                Service.left -= 1
                self.send_response(200 if Service.left >= 0 else 500)
                self.end_headers()
                self.wfile.write(
                    json.dumps([sum(image.histogram()[:128]) for image in images]).encode()
                )

            def log_message(self, *args):
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 8766), Service)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def run():
        with pytest.raises(SystemExit) as stop:
            run_command(train.main)
            sys.exit(0)
        return stop.value.code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo.http.Http.__init__, "__defaults__", (5, 2, 0.01, 10**6))
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--prompts prompts.txt --pairs 2 --steps 2 --iterations 4 --watch brightness --name x"
    command = ["train.py", "--reward", "http://127.0.0.1:8766/score", *small.split()]
    monkeypatch.setattr(sys, "argv", command)
    server = serve(3)  # the base model, two iterations, and no more
    assert run() == 2
    server.shutdown()
    server.server_close()
    err = capsys.readouterr().err.splitlines()[-1]
    assert "http://127.0.0.1:8766/score did not answer, 2 times: 500" in err
    assert state_of(tmp_path / "runs" / "x")["records"][-1]["iteration"] == 2
    server = serve(100)
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "x", "--resume"])
    assert run() == 0
    server.shutdown()
    server.server_close()
    assert [record["iteration"] for record in metrics(tmp_path / "runs" / "x")] == [0, 1, 2, 3, 4]


@pytest.mark.ci
def test_a_hacked_reward_is_called_out(tmp_path):
    args = "--reward brightness --kl 0 --pairs 16 --steps 2 --lr 2e-3 --iterations 8 --eval-every 8"
    code, out, err = command("train.py", *args.split(), cwd=tmp_path)
    assert (
        code == 0
        and "warning: the reward rose" in err
        and "clip -" in err
        and "may be hacked" in err
    )


def test_two_falls_beyond_three_errors_are_signs_of_hacking():
    def record(gain, trained=(), **change):
        errors = dict.fromkeys(change, 1.0)
        terms = dict.fromkeys(trained, 0.0)
        return {"gain": gain, "gain_se": 1.0, "change": change, "change_se": errors, "terms": terms}

    assert signs_of_hacking(record(4, a=-4.0, b=-3.1, c=5.0)) == ["a", "b"]
    assert signs_of_hacking(record(4, a=-4.0, b=-2.9)) == []
    assert signs_of_hacking(record(2, a=-4.0, b=-4.0)) == []  # nothing was gained
    assert signs_of_hacking(record(4, ["a"], a=-4.0, b=-4.0)) == []
    assert signs_of_hacking({"reward": 1.0}) == []  # nothing was measured
    alone = record(4, a=-4.0, b=-4.0)
    alone["change_se"] = {"a": None, "b": None}  # one prompt has no error
    assert signs_of_hacking(alone) == []


def test_errors_are_over_prompts():
    values = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 2.0, torch.nan])
    prompts = torch.tensor([7, 7, 2, 2, 9, 9, 4])
    mean, error = mean_and_error(values, prompts)  # of the prompts' means, 2, 5 and 1
    assert mean == pytest.approx(16 / 6) and error == pytest.approx(
        torch.tensor([2.0, 5, 1]).std() / 3**0.5
    )
    assert mean_and_error(values[:2], prompts[:2]) == (
        2.0,
        None,
    )  # one prompt says nothing of the others
    assert mean_and_error(values[-1:], prompts[-1:]) == (None, None)


def test_sample_compares_a_run_with_its_base(whole, tmp_path):
    code, out, err = command(
        "sample.py", "--prompt", "red apple", "--prompt", "robot", "--n", 3, "--lora", whole[0], "--compare",
        "--out", "both.png", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0 and out == "both.png\n", err
    picture = Image.open(tmp_path / "both.png")
    # three columns of two images of 128 pixels, two rows
    assert picture.width > 3 * 256 and 2 * 128 < picture.height < 3 * 128
    left, right = picture.crop((4, 4, 132, 132)), picture.crop((132, 4, 260, 132))
    assert left.tobytes() != right.tobytes()


@pytest.mark.parametrize(
    "estimator", ["spsa --pairs 8 --directions 4", "central --coordinates 4 --pairs 2"]
)
def test_other_estimators_run_from_the_same_command_line(estimator, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--reward brightness --prompts prompts.txt --steps 2 --iterations 1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--estimator", *estimator.split(), *small.split()]
    )
    train.main()
    last = metrics(tmp_path / "runs" / "brightness")[-1]
    assert last["images"] == 16 and last["drift"] > 0


BAD = {
    "--reward nonsense": "known: aesthetic, clip",
    "--reward human --estimator spsa": "only train.py with --estimator fdfo",
    "--watch nonsense": "known: aesthetic, clip",
    "--reward brightness**2": "column 1",
    "--reward broken.py:f": "broken.py:f raised ValueError: no luck",
    "--reward nan.py:f": "nan.py:f is undefined for all of the held-out prompts",
    "--reward short.py:f": "must return [4] numbers, not [1]",
    "--estimator newton": "known: fdfo, spsa, central, file.py:function",
    "--estimator missing.py:f": "there is no file missing.py",
    "--estimator lazy.py:f --iterations 1": "must add to every .grad",
    "--estimator lazy.py:g --iterations 1": "lazy.py:g raised KeyError",
    "--estimator lazy.py:two": "must take (problem, eps, cond, generator), then its options",
    "--estimator lazy.py:rest": "option more of an estimator must have a number, a text or None as default",
    "--estimator lazy.py:lr": "conflicting option string: --lr of train.py",
    "--h 0.5": "--estimator fdfo takes --branches, --churn",
    "--estimator spsa --churn 0.5": "--estimator spsa takes --h, --directions",
    "--branches 1 --iterations 1": "at least 2 branches",
    "--model nowhere": "none of tiny",
    "--model round": "none of tiny",
    "--model some/where": "cannot reach model some/where",
    "--model empty": "no file named model_index.json",
    "--layers nothing": "nothing",
    "--prompts missing.txt": "missing.txt is not a text file of prompts: [Errno 2] No such file",
    "--prompts empty.txt": "empty.txt is empty",
    "--prompts picture.bin": "picture.bin is not a text file",
    "--prompts /dev/zero": "over 10 million characters",
    "--prompts long.txt": "a prompt of 2999 characters",
    "--reward -jpeg_size": "--reward=-jpeg_size",
    "--iterations 0": "0 is not between 1 and",
    "--iter 5": "unrecognized arguments: --iter 5",
    "--pairs=--": "--pairs=--",
    "--churn -1": "-1 is not between",
    "--churn inf": "invalid float value: 'inf'",
    "--lr fast": "invalid float value: 'fast'",
    "--lr nan": "invalid float value: 'nan'",
    "--seed 99999999999999999999": "is not between 0 and",
    "--pairs ٣": "invalid int value",
    "--size large": "large is not a size as 512 or 768x512",
    "--size 100": "multiples of 8 pixels up to 64",
    "--name taken": "choose another --name",
    "--name ../escape": "--name ../escape",
    f"--name {'a' * 300}": "at most 100 letters",
    "--name two\nlines": "--name two lines: at most 100",
    "--rank 99999999999": "99999999999 is not between 1 and 1000000000",
    "--resume": "--name",
    "--name missing --resume": "missing is not the folder of a run",
    "--name taken --resume --lr 0.1": "--lr 0.0005",
    "--name list --resume": "list is not the folder of a run",
    "--name odd --resume": "nonsense",
    "--name steep --resume": "7.0 is not between 0 and 1",
    "--estimator spsa --pairs 10 --iterations 1": "10 groups cannot be dealt out evenly to 16 directions",
    "--device cuda:99": "--device cuda:99",
    "--device meta": "--device meta",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_arguments_end_in_one_line(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(
        "def f(images, prompts):\n    raise ValueError('no luck')\n"
    )
    (tmp_path / "short.py").write_text("def f(images, prompts):\n    return [1.0]\n")
    (tmp_path / "nan.py").write_text(
        "def f(images, prompts):\n    return [float('nan')] * len(images)\n"
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "two.txt").write_text("sun\nrobot\n")
    (tmp_path / "long.txt").write_text("sun\n" + "very " * 600)
    (tmp_path / "lazy.py").write_text(
        "def f(problem, eps, cond, generator):\n    return 0\n"
        "def g(problem, eps, cond, generator):\n    raise KeyError('no luck')\n"
        "def lr(problem, eps, cond, generator, lr: float = 1.0):\n    return 0\n"
        "def two(problem, eps):\n    return 0\n"
        "def rest(problem, eps, cond, generator, *more):\n    return 0\n"
    )
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "round").symlink_to("round")
    configs = {
        "taken": {"lr": 0.0005, "out": "runs", "name": "taken"},
        "odd": {"nonsense": 3},
        "list": {},
    }
    for name, config in (configs | {"steep": {"lr": 7.0}}).items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_config(tmp_path / "runs" / name, config)
    (tmp_path / "runs" / "list" / "config.json").write_text("[1]")
    before = sorted(tmp_path.rglob("*"))
    # in this process, since a new one takes seconds to import torch; two of them in real processes follow
    monkeypatch.chdir(tmp_path)
    few = [] if "--prompts" in flags or "--resume" in flags else ["--prompts", "two.txt"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(" "), *few])
    with pytest.raises(SystemExit) as stop:
        run_command(train.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    (line,) = [
        line for line in re.split("[\r\n]+", err) if line and "0/1" not in line
    ]  # but for the bar
    assert line.startswith("train.py: ") and BAD[flags] in line, err
    assert [
        path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts
    ] == before


FINALIZER = """
import os, signal, time
from support.errors import UserError, run_command

class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    Thing()
    time.sleep(30)

run_command(main)
"""


def test_an_interrupt_within_a_finalizer_is_neither_lost_nor_a_traceback():
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FINALIZER], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "") and time.time() - start < 28


@pytest.mark.parametrize("flags", ["--reward nonsense", "--model some/where"])
def test_bad_arguments_end_the_process_with_code_2(flags, tmp_path):
    code, out, err = command("train.py", *flags.split(), cwd=tmp_path)
    lines = [
        line for line in re.split("[\r\n]+", err) if line.strip() and "%|" not in line
    ]  # but for bars
    assert code == 2 and out == "" and len(lines) == 1 and BAD[flags] in lines[0], err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("", "give a --prompt"),
        ("--prompt robot --compare", "--compare needs --lora"),
        ("--prompt \udcff", "'\\udcff' is no valid text"),
        ("--prompt robot --lora missing", "no LoRA at missing"),
        ("--prompt robot --out no/such/folder.png", "cannot write no/such/folder.png"),
        ("--prompt robot --out picture", "cannot write picture"),
    ],
)
def test_bad_sample_arguments_end_in_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split(), "--n", "1"])
    with pytest.raises(SystemExit) as stop:
        run_command(sample.main)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_studies_name_what_they_cannot_take(monkeypatch, capsys):
    for study, flags, complaint in [
        (bench, "--smoke --device meta", "--device meta"),
        (bench, "--smoke --estimate --size 128 --steps 1 --churn 0", "needs churn > 0"),
        (toy, "--x 1", "--x 1"),
    ]:
        monkeypatch.setattr(sys, "argv", ["study.py", *flags.split()])
        with pytest.raises(SystemExit) as stop:
            run_command(study.main)
        assert stop.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.ci
def test_tiny_models_can_be_rebuilt(tmp_path):
    # pictures of circles and squares in three colours, a few steps of every stage
    images, names = (
        [],
        [
            f"{colour} {shape}"
            for colour in ("red", "green", "blue")
            for shape in ("circle", "square")
        ],
    )
    for name in names:
        colour, shape = name.split()
        for border in (8, 14):
            picture = Image.new("RGB", (64, 64), "white")
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if shape == "circle" else pen.rectangle)(
                (border, border, 64 - border, 64 - border), colour
            )
            images.append(np.asarray(picture))
    index = {"concept": np.arange(12) // 2, "style": np.arange(12) % 2}
    np.savez(
        tmp_path / "data.npz", images=images, concepts=names, styles=["large", "small"], **index
    )
    for stage in ("tokenizer", "vae", "flow", "clip", "aesthetic"):
        options = ["--out", tmp_path, "--steps", 3, "--batch", 4, "--device", "cpu"]
        code, out, err = command("tiny/build.py", stage, *options, cwd=tmp_path)
        assert code == 0, err
    for name in ("tiny-clip/model.safetensors", "tiny-aesthetic/model.safetensors"):
        built, shipped = (load_file(folder / name) for folder in (tmp_path, ROOT / "tiny"))
        assert {k: w.shape for k, w in built.items()}.keys() == {
            k: w.shape for k, w in shipped.items()
        }.keys()
    args = [
        "--model",
        tmp_path / "tiny-sd3",
        "--size",
        64,
        "--steps",
        2,
        "--prompt",
        "red circle",
        "--n",
        1,
    ]
    code, out, err = command("sample.py", *args, cwd=tmp_path)
    assert code == 0, err
    assert Image.open(tmp_path / "sample.png").size == (136, 152)
