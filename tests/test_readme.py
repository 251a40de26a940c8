"""README and docs: what they quote stands in the files, what they show runs.

pytest -q tests/test_readme.py
"""

import importlib
import re
import threading

import pytest
import torch

import sample
import train
from tests.commands import ROOT, exit_code
from zoo.http import Http

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", "\n".join(PAGES.values()), re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()
SMALL = "--prompts prompts.txt --groups 4 --steps 2 --iterations 1 --watch brightness"


def block(words):
    """The Python block that has these words."""
    (text,) = (text for text in PYTHON if words in text)
    return text


@pytest.fixture
def run_train(tmp_path, monkeypatch):
    """A function that runs train.py, with little to do, in an empty folder with two prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("sun\nrobot")

    def run(flags):
        command = ["train.py", *SMALL.split(), *flags.split()]
        assert exit_code(train.main, monkeypatch, *command) == 0

    return run


def test_quoted_lines_stand_in_fdflow():
    quoted = [text for text in PYTHON if text.startswith("    ")]
    code = (ROOT / "fdflow.py").read_text().splitlines()
    assert len(quoted) == 3
    for line in "".join(quoted).splitlines():
        assert line in code, line


def test_the_readme_is_a_landing_page():
    text = PAGES[ROOT / "README.md"]
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1500


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), target


def test_every_flag_is_one(monkeypatch, capsys):
    studies = ["taste", "card", "compare", "evaluate", "noise", "toy"]
    mains = [importlib.import_module(f"studies.{name}").main for name in studies]
    for main in [train.main, sample.main, *mains]:
        assert exit_code(main, monkeypatch, "it", "--help") == 0
    help_text = capsys.readouterr().out

    lines = [line for line in SHELL if re.search("python .*(train|sample|studies)", line)]
    assert len(lines) >= 10
    for line in lines:
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0]):
            assert flag in help_text, f"{flag} in: {line}"


def test_the_example_of_ones_own_project_comes_near_its_target(capsys):
    exec(block("points on a circle"), {})
    assert float(capsys.readouterr().out) < 0.6  # 1.26 before


@pytest.mark.ci
def test_reward_and_estimator_of_ones_own_train(run_train, tmp_path):
    (tmp_path / "mine.py").write_text(block("def purple"))
    (tmp_path / "evolve.py").write_text(block("def evolution"))
    run_train("--reward mine.py:purple")
    run_train("--estimator evolve.py:evolution --sigma 0.05 --rank 1 --layers last")


@pytest.mark.ci
def test_plain_diffusers_draws_with_the_lora(run_train, tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    run_train("--reward aesthetic")
    exec(block("load_lora_weights"), {})
    assert (tmp_path / "apple.png").stat().st_size > 1000


def test_the_service_scores():
    code = block("class Service").replace("8000", "0").replace(".serve_forever()", "")
    names = {}
    exec(code.replace("\nHTTPServer(", "\nserver = HTTPServer("), names)
    threading.Thread(target=names["server"].serve_forever, daemon=True).start()

    reward = Http(f"http://127.0.0.1:{names['server'].server_port}/score")
    red = torch.tensor([0.8, 0.1, 0.1])[:, None, None].expand(3, 8, 8)
    assert reward([red], ["red"]) == [204]
    names["server"].shutdown()


# what commands for cards have after train.py, without what would take long here
SIZED = r"--(model|size|batch|groups|iterations|prompts|reward|steps) (\"[^\"]*\"|\S+)"
FOR_CARDS = re.findall(r"train\.py (.*)# \d+ GB card", "\n".join(SHELL))


@pytest.mark.ci
@pytest.mark.parametrize("flags", sorted({re.sub(SIZED, "", line).strip() for line in FOR_CARDS}))
def test_commands_for_cards_run_on_the_tiny_model(flags, run_train):
    run_train(f"{flags} --reward brightness --device cpu")
