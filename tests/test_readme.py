"""README and docs: what they quote stands in the files, what they show runs.

pytest -q tests/test_readme.py
"""

import base64
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
ALL = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", ALL, re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()


STUDIES = ("taste", "card", "compare", "evaluate", "noise", "toy")


def block(words):
    """The Python block that has these words."""
    (text,) = (text for text in PYTHON if words in text)
    return text


def run(cwd, *command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quoted_lines_stand_in_fdflow():
    quoted = [text for text in PYTHON if text.startswith("    ")]
    code = (ROOT / "fdflow.py").read_text().splitlines()
    assert len(quoted) == 3
    for line in "".join(quoted).splitlines():
        assert line in code, line


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_is_a_landing_page():
    text = PAGES[ROOT / "README.md"]
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1500


@pytest.mark.ci
def test_every_flag_is_one():
    commands = ["train.py", "train.py --estimator spsa", "sample.py"]
    commands += [f"-m studies.{name}" for name in STUDIES]
    help_text = "".join(run(ROOT, *command.split(), "--help") for command in commands)
    lines = [line for line in SHELL if re.search("python .*(train|sample|studies)", line)]
    assert len(lines) >= 10
    for line in lines:
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0]):
            assert flag in help_text or "estimator" in line, f"{flag} in: {line}"


def test_copying_works_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "fdflow.py", tmp_path)
    (tmp_path / "mine.py").write_text(block("points on a circle"))
    said = run(tmp_path, "mine.py")
    assert float(said) < 0.6  # 1.26 before


@pytest.mark.ci
def test_reward_and_estimator_of_ones_own_train(tmp_path):
    (tmp_path / "mine.py").write_text(block("def purple"))
    (tmp_path / "evolve.py").write_text(block("def evolution"))
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--prompts prompts.txt --groups 4 --steps 2 --iterations 2 --watch brightness"
    run(tmp_path, ROOT / "train.py", "--reward", "mine.py:purple", *small.split())
    small += " --reward colorfulness --estimator evolve.py:evolution --sigma 0.05 --rank 1"
    said = run(tmp_path, ROOT / "train.py", *small.split(), "--layers", "last")
    assert "16 images" in said


@pytest.mark.ci
def test_plain_diffusers_draws_with_the_lora(tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--prompts prompts.txt --groups 4 --steps 2 --iterations 1 --watch brightness"
    run(tmp_path, ROOT / "train.py", *small.split())
    (tmp_path / "draw.py").write_text(block("load_lora_weights"))
    run(tmp_path, "draw.py")
    assert (tmp_path / "apple.png").stat().st_size > 1000


def test_the_service_scores(tmp_path):
    code = block("class Service").replace("8000", "0").replace(".serve_forever()", "")
    names = {}
    exec(re.sub(r"^HTTPServer", "server = HTTPServer", code, flags=re.MULTILINE), names)  # noqa: S102
    threading.Thread(target=names["server"].serve_forever, daemon=True).start()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "red.png")
    body = {
        "images": [base64.b64encode((tmp_path / "red.png").read_bytes()).decode()],
        "prompts": ["red"],
    }
    url = f"http://127.0.0.1:{names['server'].server_port}/score"
    assert requests.post(url, json=body).json() == [200]
    names["server"].shutdown()


# commands for cards, without what would take long here
SIZED = r"--(model|size|batch|groups|iterations|prompts|reward|steps) (\"[^\"]*\"|\S+)"
ON_GPUS = [re.sub(SIZED, "", line.split("#")[0]) for line in SHELL if "GB card" in line]


@pytest.mark.ci
@pytest.mark.parametrize("line", sorted({" ".join(line.split()) for line in ON_GPUS}))
def test_commands_for_gpus_run_on_the_tiny_model(line, tmp_path):
    small = "--groups 2 --steps 2 --iterations 1 --reward brightness --watch brightness"
    small += " --device cpu"
    run(tmp_path, ROOT / "train.py", *line.split()[2:], *small.split())
