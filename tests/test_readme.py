"""The README: what it quotes stands in the files, what it shows runs.

pytest -q tests/test_readme.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()


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
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.ci
def test_every_flag_is_one():
    commands = ("train.py", "train.py --estimator spsa", "sample.py", "-m studies.bench")
    help_text = "".join(run(ROOT, *command.split(), "--help") for command in commands)
    for line in SHELL:
        if re.match(r"(python|torchrun)\b.*(train|sample|bench)", line):
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0]):
                known = flag in help_text or "torchrun" in line or "estimator" in line
                assert known, f"{flag} in: {line}"


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
    small = "--prompts prompts.txt --pairs 4 --steps 2 --iterations 2 --watch brightness"
    run(tmp_path, ROOT / "train.py", "--reward", "mine.py:purple", *small.split())
    options = [
        "--estimator",
        "evolve.py:evolution",
        "--sigma",
        "0.05",
        "--rank",
        "1",
        "--layers",
        "last",
    ]
    said = run(tmp_path, ROOT / "train.py", "--reward", "colorfulness", *options, *small.split())
    assert "16 images" in said


def test_plain_diffusers_draws_with_the_lora(tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    (tmp_path / "prompts.txt").write_text("sun\nrobot")
    small = "--prompts prompts.txt --pairs 4 --steps 2 --iterations 1 --watch brightness --name aesthetic"
    run(tmp_path, ROOT / "train.py", *small.split())
    (tmp_path / "draw.py").write_text(block("load_lora_weights"))
    run(tmp_path, "draw.py")
    assert (tmp_path / "apple.png").stat().st_size > 1000


def test_the_service_scores(tmp_path):
    import base64
    import json
    import threading
    import urllib.request

    code = block("class Service").replace("8000", "0").replace(".serve_forever()", "")
    names = {}
    exec(re.sub(r"^HTTPServer", "server = HTTPServer", code, flags=re.MULTILINE), names)  # noqa: S102
    threading.Thread(target=names["server"].serve_forever, daemon=True).start()
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "red.png")
    body = {
        "images": [base64.b64encode((tmp_path / "red.png").read_bytes()).decode()],
        "prompts": ["red"],
    }
    url = f"http://127.0.0.1:{names['server'].server_port}/score"
    answer = urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()))
    assert json.loads(answer.read()) == [200]
    names["server"].shutdown()


ON_GPUS = [line for line in SHELL if line.startswith("python train.py") and "GiB" in line]


@pytest.mark.ci
@pytest.mark.parametrize("line", ON_GPUS)
def test_commands_for_gpus_run_on_the_tiny_model(line, tmp_path):
    sized = r"--(model|size|batch|pairs|iterations|prompts|reward|steps) (\"[^\"]*\"|\S+)"
    line = re.sub(sized, "", line.split("#")[0])
    small = "--pairs 2 --steps 2 --iterations 1 --reward brightness --watch brightness --device cpu"
    run(tmp_path, ROOT / "train.py", *line.split()[2:], *small.split())
