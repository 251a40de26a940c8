"""The house: what stands on the top level, and which way imports point.

pytest -q tests/test_rooms.py
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = "fdflow.py rewards.py sample.py train.py test_fdflow.py requirements.txt"
TOP += " README.md LICENSE pyproject.toml"
FOLDERS = "models zoo support studies exercises tests tiny docs"
# each imports what stands below it; what stands together does not import each other
ORDER = [
    {"exercises", "tests", "test_fdflow"},
    {"studies"},
    {"train", "sample"},
    {"rewards", "models"},
    {"zoo"},
    {"support"},
    {"fdflow"},
]


def sources(room):
    """The Python files of a room."""
    path = ROOT / f"{room}.py"
    return [path] if path.exists() else sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """The modules that a file imports anywhere, by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module.split(".")[0]


def test_the_top_level_is_what_was_ordered():
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    # outside a checkout there is no list
    assert not listed or top <= {*TOP.split(), *FOLDERS.split()}
    assert all((ROOT / name).exists() for name in TOP.split())


def test_imports_point_one_way():
    place = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    for room in place:
        for path in sources(room):
            for name in imports(path):
                if name in place and name != room and room not in ORDER[0]:
                    assert place[name] > place[room], f"{path} imports {name}"


def test_train_imports_nothing_of_the_zoo():
    assert "zoo" not in {*imports(ROOT / "train.py")}


def test_fdflow_imports_torch_alone():
    named = set(imports(ROOT / "fdflow.py"))
    assert named - sys.stdlib_module_names == {"torch"}
