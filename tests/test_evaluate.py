"""The evaluation of a LoRA: against a run's own record, statistics by hand, interruptions.

pytest -q tests/test_evaluate.py
"""

import json
import statistics
import subprocess
import sys

import pytest
import torch

from studies import evaluate
from support.draws import seeded
from tests import test_judge
from tests.commands import ENVIRONMENT, ROOT, exit_code, last_line, metrics, run

server = test_judge.server  # a fixture
TEST = ROOT / "tiny" / "prompts_test.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run, and a file of its held-out prompts."""
    cwd = tmp_path_factory.mktemp("evaluate")
    flags = "--reward colorfulness --watch brightness,clip --pairs 8 --steps 2 --lr 2e-3"
    flags += f" --iterations 4 --prompts {TEST} --name x"
    code, _, err = run("train.py", *flags.split(), cwd=cwd)
    assert code == 0, err
    held_out = TEST.read_text().splitlines()[::10]
    (cwd / "held_out.txt").write_text("\n".join(held_out))
    return cwd / "runs" / "x", cwd / "held_out.txt"


def command(trained, out, *more):
    folder, prompts = trained
    seed = seeded(0, "held-out").initial_seed()  # that of the run's own evaluation
    flags = ["--lora", folder, "--prompts", prompts, "--images", 2, "--seed", seed, "--out", out]
    return [*flags, "--rewards", "brightness, clip", *more]


def results(out):
    return json.loads((out / "evaluation.json").read_text())["settings"]


def test_an_evaluation_finds_what_the_run_has_found(trained, tmp_path, monkeypatch):
    args = command(trained, tmp_path)
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
    (result,) = results(tmp_path)
    assert (result["steps"], result["guidance"], result["size"]) == (2, 1, "64")

    # the run has its LoRA in its own layers, the evaluation in those of diffusers
    base, last = metrics(trained[0])[0], metrics(trained[0])[-1]
    assert last["gain"] > 3 * last["gain_se"]
    rows = result["rewards"]
    assert list(rows) == ["colorfulness", "brightness", "clip", "diversity"]
    expected = {"difference": last["gain"], "difference_se": last["gain_se"]}
    expected |= {"base": base["held_out"], "base_se": base["held_out_se"]}
    for column, value in expected.items():
        assert rows["colorfulness"][column] == pytest.approx(value, rel=1e-3), column
    for name in ("brightness", "clip", "diversity"):
        assert rows[name]["lora"] == pytest.approx(last["watched"][name], rel=1e-3)
        assert rows[name]["difference"] == pytest.approx(last["change"][name], abs=2e-3)
        assert rows[name]["difference_se"] == pytest.approx(last["change_se"][name], rel=1e-2)

    text = (tmp_path / "evaluation.md").read_text()
    assert "13 prompts, 2 images each" in text and "`colorfulness`, trained |" in text
    assert f"{last['gain']:+.2f} ± {last['gain_se']:.2f}" in text


def test_statistics_are_over_prompts():
    """Three prompts of two images, by hand; one reward is lost, and one pair is a draw."""
    base = [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    lora = [[2.0, 2.0], [3.5, 3.5], [1.0, float("nan")]]
    records = []
    for name, values in (("base", base), ("LoRA", lora)):
        for i, R in enumerate(values):
            records.append({"model": name, "prompt": i, "R": {"r": R, "diversity": [i / 10]}})
    rows = evaluate.summary(records[::-1])

    row = rows["r"]
    assert row["base"] == pytest.approx(10 / 6)
    assert row["base_se"] == pytest.approx(statistics.stdev([1.5, 3.5, 0]) / 3**0.5)
    assert row["difference"] == pytest.approx((1 + 0 + 0.5 - 0.5 + 1) / 5)
    assert row["difference_se"] == pytest.approx(statistics.stdev([0.5, 0, 1]) / 3**0.5)
    assert row["wins"] == pytest.approx((100 + 50 + 100 + 0 + 100) / 5)
    assert row["wins_se"] == pytest.approx(statistics.stdev([75, 50, 100]) / 3**0.5)
    assert rows["diversity"]["base"] == pytest.approx(0.1)
    assert rows["diversity"]["difference"] == 0


def test_diversity_is_the_mean_over_pairs():
    e = torch.nn.functional.normalize(torch.randn(5, 4, 8, dtype=torch.float64), dim=-1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    expected = sum(1 - torch.cosine_similarity(e[:, i], e[:, j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(evaluate.diversity(e), expected)


def test_an_interrupted_evaluation_goes_on(trained, tmp_path, monkeypatch):
    args = command(trained, tmp_path, "--guidance", "1,3", "--batch", 8)
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
    whole = results(tmp_path)
    assert [result["guidance"] for result in whole] == [1, 3]
    assert whole[0]["rewards"]["clip"]["base"] != whole[1]["rewards"]["clip"]["base"]

    # cut off within a line of the second setting
    path = tmp_path / "evaluation-0.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 2 * 13
    path.write_text("\n".join(lines[:33])[:-20])

    drawn = []
    measure = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *a: drawn.extend(a[1]) or measure(*a))
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
    assert len(drawn) == 52 - 32
    for before, after in zip(whole, results(tmp_path)):
        for name, row in before["rewards"].items():
            assert after["rewards"][name] == pytest.approx(row, rel=1e-4, abs=1e-4)

    # those of other prompts are no part of it
    prompts = tmp_path / "other.txt"
    prompts.write_text(trained[1].read_text().replace("\n", " hat\n", 1))
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args, "--prompts", prompts) == 0
    assert len(drawn) == 52 - 32 + 52


def test_a_judge_answers_for_an_evaluation(trained, server, tmp_path, monkeypatch):
    args = command(trained, tmp_path, "--rewards", "judge:fine", "--batch", 8)
    for _ in range(2):
        assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args) == 0
        assert len(server.asked) == 2 * 2 * 13  # and nothing twice
    (result,) = results(tmp_path)
    bright = result["rewards"]["judge:fine"]  # which is how bright an image is
    assert 0 < bright["base"] < 100 and (tmp_path / "judge-0.jsonl").exists()
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *args, "--max-requests", 9) == 0

    args += ["--seed", 5, "--max-requests", 60]  # in all, and 52 are used up
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
    assert len((tmp_path / "two" / "evaluation-1.jsonl").read_text().splitlines()) == 2 * 6
    for name, row in one["rewards"].items():
        assert two["rewards"][name] == pytest.approx(row, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("", "give a --lora"),
        ("--lora nowhere", "no LoRA at nowhere"),
        ("--lora RUN --rewards nonsense", "known: aesthetic"),
        ("--lora RUN --rewards human", "a person can be asked in training only"),
        ("--lora RUN --images 1", "1 is not between 2"),
        ("--lora RUN --guidance 1,x", "invalid float value"),
        ("--lora RUN --size 512,large", "large is not a size"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = flags.replace("RUN", str(trained[0])).split()
    flags += ["--out", "here"] if flags else []
    assert exit_code(evaluate.main, monkeypatch, "evaluate.py", *flags) == 2
    assert complaint in last_line(capsys)
