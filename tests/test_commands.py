"""Tests of the commands, run as a user runs them: a whole run, arguments good and bad, resuming.

pytest -q tests/test_commands.py
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import models.flow
import sample
import studies.card
import studies.compare
import studies.taste
import train
from models.table import find_model
from support.arguments import fill_defaults, parse_training_args
from support.errors import UserError, run_command
from support.evaluation import mean_and_error, signs_of_hacking
from support.pictures import animate, read_grids, save_picture
from support.prompts import read_prompts
from support.run import Run
from tests.commands import ROOT, exit_code, last_line, metrics, run, start, state_of
from zoo.http import Http

SHORT = "--reward colorfulness --groups 8 --steps 2 --lr 2e-3 --eval-every 4".split()
SHORT += ["--prompts", ROOT / "tiny" / "prompts_test.txt"]  # 13 of which are held out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short training run that nothing interrupts: its folder and what it printed."""
    cwd = tmp_path_factory.mktemp("whole")
    code, out, err = run("train.py", *SHORT, "--iterations", 8, cwd=cwd)
    assert code == 0, err
    return cwd / "runs" / "colorfulness", out


@pytest.fixture
def train_small(tmp_path, monkeypatch):
    """A function that trains with a few flags on two prompts, in this process: its exit code.

    The run is runs/x in the working directory.
    """
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    monkeypatch.chdir(tmp_path)
    small = "--watch brightness --prompts prompts.txt --groups 2 --steps 2 --name x".split()

    def call(flags):
        command = ["train.py", *small, "--reward", "brightness", *flags.split()]
        return exit_code(train.main, monkeypatch, *command)

    return call


# ---- a whole run


def test_training_raises_the_reward_and_leaves_a_complete_folder(whole):
    folder, out = whole
    names = "config.json evolution.webp lora.safetensors metrics.jsonl report.png samples"
    names += " state.previous.pt state.pt"
    assert [path.name for path in sorted(folder.iterdir())] == names.split()
    grids = sorted((folder / "samples").glob("*.png"))
    assert [path.stem for path in grids] == ["000000", "000004", "000008"]
    assert Image.open(folder / "report.png").size[0] > 1000
    assert Image.open(folder / "evolution.webp").n_frames == 3

    first, *_, last = records = metrics(folder)
    assert [record["iteration"] for record in records] == list(range(9))
    assert last["images"] == 8 * 16
    # the same noise before and after, so that the gain has a small error; four of them
    assert last["gain"] > 4 * last["gain_se"]
    assert last["held_out"] - first["held_out"] == pytest.approx(last["gain"], abs=1e-3)
    assert first["drift"] == 0 < last["drift"] < 0.2
    watched = {"colorfulness", "aesthetic", "clip", "clip_h", "edge_density", "color_entropy"}
    watched |= {"diversity"}
    assert {*last["watched"]} == {*last["change"]} == watched


def test_a_run_says_what_it_is_made_with_and_what_it_gained(whole):
    folder, out = whole
    settings, lora, gained = out.splitlines()
    # the values of the tiny model, not those of the function's signature
    assert settings.startswith("fdfo: branches 2, churn 0.05, train_steps 2, kl 0.7; lr 0.002, ")
    assert settings.endswith(", 8 groups an iteration")
    assert "rank 32 on 12 layers" in lora
    assert gained.startswith("held-out colorfulness") and "sample.py --lora" in gained

    config = json.loads((folder / "config.json").read_text())
    assert config["train_steps"] == 2 and config["kl"] == 0.7 and config["dtype"] == "float32"
    assert config["made_with"]["torch"] == torch.__version__
    assert "train.py --reward colorfulness" in config["made_with"]["command"]


def test_sample_compares_a_run_with_its_base(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--prompt", "red apple", "--prompt", "robot", "--n", 3, "--lora", whole[0]]
    command = ["sample.py", *args, "--compare", "--out", "both.jpg"]
    assert exit_code(sample.main, monkeypatch, *command) == 0
    assert capsys.readouterr().out == "both.jpg\n"
    picture = Image.open(tmp_path / "both.jpg")
    # three columns of two images of 128 pixels, two rows
    assert picture.width > 3 * 256 and 2 * 128 < picture.height < 3 * 128
    left, right = picture.crop((4, 4, 132, 132)), picture.crop((132, 4, 260, 132))
    assert left.tobytes() != right.tobytes()


def test_each_evaluation_leaves_its_lora_beside_its_sample(whole, tmp_path, monkeypatch):
    loras = [whole[0] / "samples" / f"{i:06}.safetensors" for i in (4, 8)]
    assert loras[1].read_bytes() == (whole[0] / "lora.safetensors").read_bytes()
    assert loras[0].read_bytes() != loras[1].read_bytes()

    # which is drawn with as the run was, in two steps
    monkeypatch.chdir(tmp_path)
    for name, path in (("run", whole[0]), ("last", loras[1]), ("earlier", loras[0])):
        command = ["sample.py", "--prompt", "sun", "--n", 1, "--lora", path, "--out", f"{name}.png"]
        assert exit_code(sample.main, monkeypatch, *command) == 0
    drawn, last, earlier = (Path(f"{name}.png").read_bytes() for name in ("run", "last", "earlier"))
    assert last == drawn != earlier


def test_drawing_otherwise_than_trained_is_said(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sample.py", "--prompt", "sun", "--n", 1, "--lora", whole[0], "--negative", "red"]
    assert exit_code(sample.main, monkeypatch, *command) == 0
    assert "--negative has no effect with --guidance 1" in capsys.readouterr().err
    assert exit_code(sample.main, monkeypatch, *command, "--guidance", 4) == 0
    said = capsys.readouterr().err
    assert "trained with --guidance 1" in said and "no effect" not in said


@pytest.mark.parametrize(
    "flags", ["spsa --groups 8 --directions 4", "central --coordinates 4 --groups 2"]
)
def test_other_estimators_run_from_the_same_command_line(flags, train_small, tmp_path):
    assert train_small(f"--iterations 1 --estimator {flags}") == 0
    last = metrics(tmp_path / "runs" / "x")[-1]
    assert last["images"] == 16 and last["drift"] > 0


def test_an_estimator_of_ones_own_needs_no_flags(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def f(problem, eps, cond, generator, h: float = 1.0): pass")
    command = ["train.py", "--estimator", f"{tmp_path}/own.py:f"]
    monkeypatch.setattr(sys, "argv", command)
    args, _, _ = parse_training_args("", train.find_estimator, find_model, train.SUITS)
    assert args.groups == 32 and args.iterations == 88 and args.h == 1

    may_be_none = {"watch", "prompts", "init_lora", "name", "max_requests", "negative"}
    assert {name for name, value in vars(args).items() if value is None} == may_be_none


# ---- interrupted and resumed


def kill_when(seen, process, timeout=120):
    """SIGKILL the process as soon as `seen()`."""
    end = time.time() + timeout
    while not seen():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.ci
def test_killed_and_resumed_gives_the_same_numbers(whole, tmp_path):
    folder = tmp_path / "runs" / "again"
    args = ["train.py", *SHORT, "--name", "again", "--iterations", 8]
    lines = folder / "metrics.jsonl"

    # while an iteration runs; while the file that will be state.pt grows
    kill_when(
        lambda: lines.exists() and len(lines.read_text().splitlines()) >= 4,
        start(*args, cwd=tmp_path),
    )
    assert not (folder / "report.png").exists()
    kill_when((folder / "state.pt.part").exists, start(*args, "--resume", cwd=tmp_path))

    # one bit of the newest checkpoint is flipped: the one before it counts
    state = folder / "state.pt"
    if not state.exists():  # killed between the two renamings
        state.write_bytes((folder / "state.previous.pt").read_bytes())
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    lines.write_bytes(lines.read_bytes()[:-20])  # as a full disk leaves it
    code, out, err = run(*args, "--resume", "--batch", 6, cwd=tmp_path)
    assert code == 0, err
    assert "state.pt is damaged (its checksum is wrong)" in out + err

    for one, two in zip(metrics(folder), metrics(whole[0]), strict=True):
        assert one == two if one["iteration"] < 3 else one.keys() == two.keys()
        for key in ("reward", "grad_norm", "drift", "gain", "images", "evaluations"):
            if key in one:  # in batches of another size, float32 sums in another order
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(
    whole, tmp_path, monkeypatch, capsys
):
    shutil.copytree(whole[0], tmp_path / "runs" / "colorfulness")
    for name in ("state.pt", "state.previous.pt"):
        (tmp_path / "runs" / "colorfulness" / name).write_bytes(b"0" * 100)
    monkeypatch.chdir(tmp_path)
    command = ["train.py", *SHORT, "--iterations", 8, "--resume"]
    assert exit_code(train.main, monkeypatch, *command) == 2
    assert "its files are damaged: start anew" in last_line(capsys)


def test_a_resumed_run_may_go_on_for_longer_on_a_model_that_moved(whole, tmp_path, monkeypatch):
    """In another folder, with the model at another path."""
    shutil.copytree(whole[0].parent, tmp_path / "elsewhere")
    for name in ("tiny-sd3", "tiny-clip", "tiny-aesthetic"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)
    path = tmp_path / "elsewhere" / "colorfulness" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": "/somewhere/else/tiny-sd3"}))
    monkeypatch.chdir(tmp_path)
    # what the bundled model sets by itself is given
    given = "--churn 0.05 --train-steps 2 --kl 0.7 --layers modulation --guidance 1"
    command = ["train.py", *SHORT, *given.split(), "--model", tmp_path / "tiny-sd3", "--rank", 32]
    command += ["--rollout-steps", 2, "--iterations", 9, "--out", "elsewhere", "--resume"]
    assert exit_code(train.main, monkeypatch, *command) == 0
    assert metrics(tmp_path / "elsewhere" / "colorfulness")[-1]["images"] == 9 * 16


def test_prompts_that_changed_are_noticed(train_small, tmp_path, capsys):
    assert train_small("--iterations 1") == 0
    (tmp_path / "prompts.txt").write_text("moon\nrobot")
    assert train_small("--iterations 2 --resume") == 0
    assert "have the prompts, a reward or the model changed?" in capsys.readouterr().err


def test_gradients_too_large_for_float16_are_scaled_down(
    train_small, tmp_path, monkeypatch, capsys
):
    """A resumed run scales them as the run that was not interrupted."""
    monkeypatch.setattr(models.flow, "LARGER", 2.0**18)
    small = "--size 32 --rank 2 --layers last --lr 0.0004 --dtype float16 --iterations"
    assert train_small(f"{small} 7") == 0
    norms = [record["grad_norm"] for record in metrics(tmp_path / "runs" / "x")[1:]]
    assert norms[0] is None and norms[-1] > 0
    assert "the gradient was not finite" in capsys.readouterr().err

    assert train_small(f"{small} 2 --name again") == 0
    assert train_small(f"{small} 7 --name again --resume") == 0
    resumed = metrics(tmp_path / "runs" / "again")
    assert [record["grad_norm"] for record in resumed[1:]] == norms


CTRL_C = """
import signal
calls = []
def f(images, prompts):
    calls.append(prompts)
    if len(calls) == 3:  # of the base model, of the first iteration, of the second
        signal.raise_signal(signal.SIGINT)
    return images.mean((1, 2, 3))
"""


def test_interrupted_run_saves_and_exits_130(train_small, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(CTRL_C)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert train_small("--reward mine.py:f --iterations 50") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "stopped after iteration 2; the same command with --resume" in capsys.readouterr().out
    folder = tmp_path / "runs" / "x"
    assert state_of(folder)["records"][-1]["iteration"] == metrics(folder)[-1]["iteration"] == 2


def arguments(**given):
    """What `Run` needs of the arguments of train.py."""
    usual = {"reward": "clip", "name": None, "resume": False, "device": "cpu", "model": "tiny"}
    usual["size"] = None
    return argparse.Namespace(**usual | given)


def test_two_runs_at_once_with_one_name(tmp_path):
    """One gets the folder, the other one line; without a name it gets another folder."""
    given = {"out": str(tmp_path / "runs")}
    first = Run(arguments(**given, name="x"))
    with pytest.raises(UserError, match="choose another --name, or add --resume"):
        Run(arguments(**given, name="x"))
    unnamed = [Run(arguments(**given)).folder.name for _ in range(3)]
    assert first.folder.name == "x" and unnamed == ["clip", "clip-2", "clip-3"]


def test_a_run_that_failed_before_its_first_record_frees_its_name(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    failed = Run(arguments(out=str(tmp_path), name="failed"))
    kept = Run(arguments(out=str(tmp_path), name="kept"))
    (kept.folder / "metrics.jsonl").write_text("{}")
    for call in at_exit:
        call()
    assert not failed.folder.exists() and (kept.folder / "config.json").exists()


def test_a_run_that_was_killed_before_its_first_record_begins_anew(
    train_small, tmp_path, monkeypatch
):
    def killed(*args):
        raise KeyError

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train, "load_flow", killed)
        train_small("--iterations 1")
    assert (tmp_path / "runs" / "x" / "config.json").exists()
    assert train_small("--iterations 1 --resume") == 0
    assert len(metrics(tmp_path / "runs" / "x")) == 2


# ---- failures of the machine and of others


def test_a_service_that_goes_down_loses_nothing(train_small, tmp_path, monkeypatch, capsys):
    answers = []

    def post(service, body):
        answers.append(body)
        if 3 < len(answers) < 10:  # the base model, two iterations, and no more
            raise OSError("500 Server Error")
        return json.dumps([1.0] * len(body["images"]))

    monkeypatch.setattr(Http, "post", post)
    monkeypatch.setattr("zoo.http.time.sleep", lambda seconds: None)
    command = "--iterations 4 --reward http://127.0.0.1:9/score"
    assert train_small(command) == 2
    assert "did not answer, 6 times: 500" in last_line(capsys)
    assert state_of(tmp_path / "runs" / "x")["records"][-1]["iteration"] == 2
    assert train_small(f"{command} --resume") == 0
    assert [r["iteration"] for r in metrics(tmp_path / "runs" / "x")] == [0, 1, 2, 3, 4]


def test_a_full_disk_is_one_line_and_loses_nothing(train_small, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def fill_the_disk(state, file):
        calls.append(state)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    assert train_small("--iterations 4") == 2
    assert "No space left on device; what was saved before is whole" in last_line(capsys)
    assert state_of(tmp_path / "runs" / "x")["records"][-1]["iteration"] == 2
    assert train_small("--iterations 4 --resume") == 0
    assert len(metrics(tmp_path / "runs" / "x")) == 5
    assert "have the prompts" not in capsys.readouterr().err


@pytest.mark.parametrize("out", ["prompts.txt/in", "/proc/runs"])
def test_a_folder_that_cannot_be_written_is_noticed_first(out, train_small, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_flow", None)  # which fails if it is called
    assert train_small(f"--out {out}") == 2
    assert f"cannot write to {out}" in last_line(capsys)


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    def too_much():
        torch.empty(2**60)  # more than any machine can address

    assert exit_code(too_much, monkeypatch, "train.py") == 2
    assert "train.py: out of memory: lower --batch" in last_line(capsys)
    with pytest.raises(RuntimeError):  # a mistake of ours stays one
        run_command(lambda: torch.ones(2) @ torch.ones(3))


# ---- evaluation


@pytest.mark.ci
def test_a_hacked_reward_is_called_out(tmp_path):
    args = "--reward brightness --kl 0 --groups 16 --steps 2 --lr 2e-3 --iterations 8"
    args += " --eval-every 8"
    code, out, err = run("train.py", *args.split(), cwd=tmp_path)
    assert code == 0 and "warning: the reward rose" in err
    assert "clip -" in err and "may be hacked" in err


def test_two_falls_that_are_clear_and_matter_are_signs_of_hacking():
    base = {"held_out_se": 1.0, "watched_se": dict.fromkeys("abc", 1.0), "prompts": 100}

    def signs(gain, trained=(), error=1.0, **change):
        errors = dict.fromkeys(change, error)
        record = {"gain": gain, "gain_se": error, "change": change, "change_se": errors}
        return signs_of_hacking(record | {"terms": dict.fromkeys(trained, 0.0)}, base)

    assert signs(4, a=-4.0, b=-3.1, c=5.0) == ["a", "b"]
    assert signs(4, a=-4.0, b=-2.9) == []  # within three standard errors
    assert signs(2, a=-4.0, b=-4.0) == []  # nothing was gained
    assert signs(4, ["a"], a=-4.0, b=-4.0) == []  # a was trained
    assert signs(4, error=None, a=-4.0, b=-4.0) == []  # one prompt has no error
    # as clear, but of no weight: prompts differ by 10, and a tenth of that is 1
    assert signs(4, error=0.1, a=-0.9, b=-0.9) == []
    assert signs(0.9, error=0.1, a=-4.0, b=-4.0) == []
    assert signs(4, error=0.1, a=-1.1, b=-1.1) == ["a", "b"]


def test_errors_are_over_prompts():
    values = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 2.0, torch.nan])
    prompts = torch.tensor([7, 7, 2, 2, 9, 9, 4])
    mean, error = mean_and_error(values, prompts)  # of the prompts' means, 2, 5 and 1
    assert mean == pytest.approx(16 / 6)
    assert error == pytest.approx(torch.tensor([2.0, 5, 1]).std() / 3**0.5)
    # one prompt says nothing of the others
    assert mean_and_error(values[:2], prompts[:2]) == (2.0, None)
    assert mean_and_error(values[-1:], prompts[-1:]) == (None, None)


# ---- prompts


def test_prompts_from_every_editor(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfred apple\r\n\r\n  sun \r\n#1 fan\r\na\xe2\x80\xa8b\r\n")
    assert read_prompts(path) == ["red apple", "sun", "#1 fan", "a\u2028b"]
    for name in ("prompts.csv", "prompts.json"):
        with pytest.raises(UserError, match="prompts are a text file, one a line"):
            read_prompts(tmp_path / name)


def test_pictures_too_large_for_their_kind_are_kept(tmp_path):
    wide = Image.new("RGB", (20_000, 10))
    assert save_picture(wide, tmp_path / "wide.webp") == tmp_path / "wide.png"
    assert Image.open(tmp_path / "wide.png").size == (20_000, 10)

    (tmp_path / "samples").mkdir()
    wide.save(tmp_path / "samples" / "000000.png")
    grids = read_grids(tmp_path)
    animate(tmp_path, grids)
    assert Image.open(tmp_path / "evolution.webp").width == 4096


def test_roll_outs_take_no_more_steps_than_drawing():
    for given, steps, rollout_steps in ((None, 4, 4), (None, 40, 10), (20, 4, 20)):
        args = argparse.Namespace(model="tiny", device="cpu", dtype=None)
        args.steps, args.rollout_steps = steps, given
        fill_defaults(args, {"steps": 28, "rollout_steps": 10})
        assert (args.steps, args.rollout_steps) == (steps, rollout_steps)


@pytest.mark.parametrize("study", [studies.card, studies.compare, studies.taste])
def test_a_study_that_cannot_write_says_so_before_the_work(study, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    flags = ["--smoke"] if study is studies.card else []
    flags += ["--name", "x"] if study is studies.taste else []
    assert exit_code(study.main, monkeypatch, "study.py", *flags, "--out", tmp_path / "file") == 2
    assert f"cannot write to {tmp_path / 'file'}" in last_line(capsys)


# ---- bad arguments

BAD = {
    "--reward nonsense": "known: aesthetic, clip",
    "--reward human --estimator spsa": "use --estimator fdfo",
    "--watch human": "a person can be asked in training only",
    "--reward nan.py:f": "nan.py:f is undefined for all of the held-out prompts",
    "--reward short.py:f": "must return [4] numbers, not [1]",
    "--estimator newton": "known: fdfo, spsa, central, file.py:function",
    "--estimator missing.py:f": "there is no file missing.py",
    "--estimator own.py:two": "takes (problem, eps, cond, generator), then its options",
    "--estimator own.py:rest": "option more of an estimator must have a number or text as default",
    "--estimator own.py:lr": "conflicting option string: --lr",
    "--estimator spsa --churn 0.5": "--estimator spsa takes --h, --directions",
    "--branches 1 --iterations 1": "at least 2 branches",
    "--model nowhere": "none of tiny",
    "--model some/where": "cannot reach model some/where",
    "--model ./empty": "no file named model_index.json",
    "--layers nothing": "no such linear layer",
    "--prompts missing.txt": "missing.txt is not a text file of prompts: [Errno 2] No such file",
    "--prompts empty.txt": "empty.txt is empty",
    "--prompts broken.jsonl": "line 2 of broken.jsonl is not of the form",
    "--reward judge:x:questions": "'sun' has no questions: give --prompts FILE.jsonl",
    "--reward -jpeg_size": "--reward=-jpeg_size",
    "--iterations 0": "0 is not between 1 and",
    "--iter 5": "unrecognized arguments: --iter 5",
    "--churn -1": "-1 is not between",
    "--size large": "large is not a size like 512 or 768x512",
    "--size 100": "divisible by",
    "--negative smudge --size 64x96": "pos_embed_max_size",
    "--name taken": "choose another --name",
    "--name ../escape": "--name ../escape",
    "--name missing --resume": "missing is not the folder of a run",
    "--name taken --resume --lr 0.1": "the run was started with --lr 0.0005",
    "--estimator spsa --groups 10 --iterations 1": "10 groups cannot be dealt out evenly",
    "--device cuda:99": "--device cuda:99",
}


@pytest.fixture
def files_of_a_user(tmp_path, monkeypatch):
    """A folder with files that are right and wrong; the working directory."""
    texts = {
        "short.py": "def f(images, prompts):\n    return [1.0]\n",
        "nan.py": "def f(images, prompts):\n    return [float('nan')] * len(images)\n",
        "broken.py": "def f(*args):\n    raise KeyError('no luck')\n",
        "empty.txt": "\n\n",
        "two.txt": "sun\nrobot\n",
        "broken.jsonl": '{"prompt": "sun"}\n{"prompt": ["robot"]}\n',
        "own.py": "def lr(problem, eps, cond, generator, lr: float = 1.0):\n    return 0\n"
        "def two(problem, eps):\n    return 0\n"
        "def rest(problem, eps, cond, generator, *more):\n    return 0\n"
        "def broken(problem, eps, cond, generator):\n    raise ValueError('no luck')\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.json").write_text('{"lr": 0.0005, "model": "tiny"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("flags", BAD)
def test_bad_arguments_end_in_one_line(flags, files_of_a_user, monkeypatch, capsys):
    few = [] if "--prompts" in flags else ["--prompts", "two.txt"]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    command = ["train.py", *flags.split(" "), *few]
    assert exit_code(train.main, monkeypatch, *command) == 2
    line = last_line(capsys)
    assert line.startswith("train.py: ") and BAD[flags] in line


@pytest.mark.parametrize("flags", ["--reward broken.py:f", "--estimator own.py:broken"])
def test_a_mistake_in_ones_own_code_shows_its_traceback(flags, files_of_a_user, monkeypatch):
    small = "--prompts two.txt --groups 2 --steps 2 --watch brightness --iterations 1".split()
    kind = KeyError if "reward" in flags else ValueError
    with pytest.raises(kind, match="no luck") as error:
        exit_code(train.main, monkeypatch, "train.py", *flags.split(), *small)
    assert error.traceback[-1].path.name in ("broken.py", "own.py")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("", "give a --prompt"),
        ("--prompt robot --compare", "--compare needs --lora"),
        ("--prompt robot --lora missing", "no LoRA at missing"),
        ("--prompt robot --out no/such/folder.png", "cannot write no/such/folder.png"),
        ("--prompt robot --out picture", "end its name in .png, .jpg or .webp"),
    ],
)
def test_bad_sample_arguments_end_in_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(sample.main, monkeypatch, "sample.py", *flags.split(), "--n", "1") == 2
    assert complaint in last_line(capsys)
    assert not list(tmp_path.iterdir())


# ---- how the tiny models were made


@pytest.mark.ci
def test_tiny_models_can_be_rebuilt(tmp_path):
    # pictures of circles and squares in three colours, a few steps of every stage
    images, names = [], []
    for colour in ("red", "green", "blue"):
        for shape in ("circle", "square"):
            names.append(f"{colour} {shape}")
            for border in (8, 14):
                picture = Image.new("RGB", (64, 64), "white")
                pen = ImageDraw.Draw(picture)
                draw = pen.ellipse if shape == "circle" else pen.rectangle
                draw((border, border, 64 - border, 64 - border), colour)
                images.append(np.asarray(picture))
    index = {"concept": np.arange(12) // 2, "style": np.arange(12) % 2}
    styles = ["large", "small"]
    np.savez(tmp_path / "data.npz", images=images, concepts=names, styles=styles, **index)

    for stage in ("tokenizer", "vae", "flow", "clip", "aesthetic", "clip_h"):
        options = ["--out", tmp_path, "--steps", 3, "--batch", 4, "--device", "cpu"]
        code, out, err = run("tiny/build.py", stage, *options, cwd=tmp_path)
        assert code == 0, err
    for name in ("tiny-clip", "tiny-aesthetic", "tiny-clip-h"):
        path = Path(name, "model.safetensors")
        built, shipped = load_file(tmp_path / path), load_file(ROOT / "tiny" / path)
        assert built.keys() == shipped.keys()

    args = ["--model", tmp_path / "tiny-sd3", "--size", 64, "--steps", 2, "--n", 1]
    code, out, err = run("sample.py", *args, "--prompt", "red circle", cwd=tmp_path)
    assert code == 0, err
    assert Image.open(tmp_path / "sample.png").size == (136, 152)
