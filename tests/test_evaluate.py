"""The evaluation of a LoRA: against a run's own record, statistics by hand, interruptions.

pytest -q tests/test_evaluate.py
"""

import json
import statistics
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

import support.run
import train
from rewards import Reward
from studies import evaluate
from support.prompts import Prompt
from tests import test_judge
from tests.commands import ENVIRONMENT, ROOT, exit_code, last_line, metrics

server = test_judge.server  # a fixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run with seven held-out prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    lines = (ROOT / "tiny" / "prompts_test.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(lines[:70]))

    flags = "--reward colorfulness --watch brightness,clip --groups 8 --steps 2 --lr 2e-3"
    flags = [*flags.split(), "--iterations", 4, "--name", "x", "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support.run, "report", lambda *args: None)  # a slow picture
        prompts = ["--prompts", folder / "prompts.txt"]
        assert exit_code(train.main, patch, "train.py", *flags, *prompts) == 0
    return folder / "x"


def command(trained, out, *more):
    """As the run evaluates itself: two images of each of the prompts it held out."""
    flags = ["--lora", trained, "--images", 2, "--out", out]
    return [*flags, "--rewards", "brightness, clip", *more]


def results(out):
    return json.loads((out / "evaluation.json").read_text())


def test_an_evaluation_finds_what_the_run_has_found(trained, tmp_path, monkeypatch):
    args = command(trained, tmp_path)
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
    (result,) = results(tmp_path)
    assert (result["steps"], result["guidance"], result["size"]) == (2, 1, "64")

    # the run has its LoRA in its own layers, the evaluation in those of diffusers
    base, last = metrics(trained)[0], metrics(trained)[-1]
    assert last["gain"] > 1
    rows = result["rewards"]
    assert list(rows) == ["colorfulness", "brightness", "clip", "diversity"]
    assert result["prompts"] == 7
    expected = {"difference": last["gain"], "difference_se": last["gain_se"]}
    expected |= {"base": base["held_out"], "base_se": base["held_out_se"]}
    for column, value in expected.items():
        assert rows["colorfulness"][column] == pytest.approx(value, rel=1e-3), column
    for name in ("brightness", "clip", "diversity"):
        assert rows[name]["lora"] == pytest.approx(last["watched"][name], rel=1e-3)
        assert rows[name]["difference"] == pytest.approx(last["change"][name], abs=2e-3)
        assert rows[name]["difference_se"] == pytest.approx(last["change_se"][name], rel=1e-2)

    text = (tmp_path / "evaluation.md").read_text()
    assert "7 prompts of" in text and "`colorfulness`, trained |" in text
    assert f"{last['gain']:+.2f} ± {last['gain_se']:.2f}" in text


def test_statistics_are_over_prompts():
    """Three prompts of two images, by hand; one reward is lost, and one pair is a draw."""
    base = [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    lora = [[2.0, 2.0], [3.5, 3.5], [1.0, float("nan")]]
    records = []
    for i in range(3):
        of_models = {"base": {"r": base[i], "d": [i / 10]}, "lora": {"r": lora[i], "d": [i / 10]}}
        records.append({"prompt": i, **of_models})
    rows = evaluate.statistics(records)

    row = rows["r"]
    assert row["base"] == pytest.approx(10 / 6)
    assert row["base_se"] == pytest.approx(statistics.stdev([1.5, 3.5, 0]) / 3**0.5)
    assert row["difference"] == pytest.approx((1 + 0 + 0.5 - 0.5 + 1) / 5)
    assert row["difference_se"] == pytest.approx(statistics.stdev([0.5, 0, 1]) / 3**0.5)
    assert row["wins"] == pytest.approx((100 + 50 + 100 + 0 + 100) / 5)
    assert row["wins_se"] == pytest.approx(statistics.stdev([75, 50, 100]) / 3**0.5)
    assert rows["d"]["base"] == pytest.approx(0.1)
    assert rows["d"]["difference"] == 0 and rows["d"]["wins"] == 50


def test_diversity_is_the_mean_over_pairs():
    e = torch.nn.functional.normalize(torch.randn(5, 4, 8, dtype=torch.float64), dim=-1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    expected = sum(1 - torch.cosine_similarity(e[:, i], e[:, j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(evaluate.diversity(e), expected)


def test_an_interrupted_evaluation_goes_on(trained, tmp_path, monkeypatch):
    args = command(trained, tmp_path, "--guidance", "1,3", "--batch", 8)
    drawn, measure = [], evaluate.measure

    def interrupted(flow, cond, *more):
        if len(drawn) > 7:  # in the second setting
            raise KeyboardInterrupt
        drawn.extend(cond)
        return measure(flow, cond, *more)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 130
    path = tmp_path / "evaluation" / "records-0.jsonl"
    path.write_text(path.read_text()[:-30])  # as a crash would leave the last line

    monkeypatch.setattr(evaluate, "measure", lambda *a: drawn.extend(a[1]) or measure(*a))
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
    assert len(drawn) == 2 * 7 + 1  # the prompt whose line was cut is measured anew
    assert not path.parent.exists()

    one, three = results(tmp_path)
    assert (one["guidance"], three["guidance"]) == (1, 3)
    assert one["rewards"]["clip"]["base"] != three["rewards"]["clip"]["base"]

    # a later result of the same setting takes the place of the earlier one
    evaluate.add_result(tmp_path, one)
    assert results(tmp_path) == [three, one]


def test_lines_of_other_settings_are_left_out(trained, tmp_path, monkeypatch):
    """Flags, the LoRA, or the questions of a prompt may have changed since an interruption."""
    keys = []
    monkeypatch.setattr(evaluate, "read_records", lambda folder, key: keys.append(key) or {})
    for name in ("load_flow", "load_lora"):
        monkeypatch.setattr(evaluate, name, lambda *a: None)
    monkeypatch.setattr(evaluate, "measure", lambda *a: [])
    prompts = [Prompt("sun"), "robot"]
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another LoRA")
    for change in ({}, {"seed": 3}, {"images": 4}, {"lora": other}, {"prompts": 1}):
        prompts[0].questions = ["Is there a sun?"] * change.pop("prompts", 0)
        args = Namespace(lora=trained, batch=8, images=2, seed=0, size="64")
        vars(args).update(model="tiny", dtype="float32", steps=2, guidance=1, negative=None)
        vars(args).update(change)
        with pytest.raises(KeyError):  # nothing was measured
            evaluate.measure_setting(args, tmp_path, None, prompts, [Reward("clip")], None)
    assert len(set(keys)) == 5 and keys[0::2] == keys[1::2]


@pytest.mark.ci
def test_a_judge_answers_for_an_evaluation(trained, server, tmp_path, monkeypatch):
    args = command(trained, tmp_path, "--rewards", "judge:fine", "--batch", 8)
    for _ in range(2):
        assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
        assert len(server.asked) == 2 * 2 * 7  # and nothing twice
    (result,) = results(tmp_path)
    bright = result["rewards"]["judge:fine"]  # which is how bright an image is
    assert 0 < bright["base"] < 100

    args += ["--seed", 5, "--max-requests", 30]  # in all, and 28 are used up
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 2


@pytest.mark.ci
def test_two_processes_share_the_prompts(trained, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    for name, more in (("one", []), ("two", launcher)):
        words = [*more, "-m", "studies.evaluate", *command(trained, tmp_path / name)]
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| `clip` |") == 1
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["prompts"] == two["prompts"] == 7
    for name, row in one["rewards"].items():
        assert two["rewards"][name] == pytest.approx(row, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("", "give a --lora"),
        ("--lora nowhere", "no LoRA at nowhere"),
        ("--lora RUN --rewards human", "a person can be asked in training only"),
        ("--lora RUN --rewards judge:x:questions", "has no questions: give --prompts FILE.jsonl"),
        ("--lora RUN --guidance 1,x", "invalid float value"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    flags = flags.replace("RUN", str(trained)).split()
    flags += ["--out", "here"] if flags else []
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *flags) == 2
    assert complaint in last_line(capsys)
