"""The house: what stands on the top level, how large a room may be, and which way imports point.

pytest -q tests/test_rooms.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = "fdflow.py rewards.py sample.py train.py test_fdflow.py requirements.txt"
TOP += " README.md LICENSE pyproject.toml"
FOLDERS = "models zoo support studies exercises tests tiny docs"
LINES = {  # what a room may hold, docstrings and comments counted
    "fdflow.py": 300, "rewards.py": 300, "train.py": 250, "sample.py": 150, "test_fdflow.py": 350,
    "models": 588, "zoo": 895, "support": 662, "studies": 1192,
}  # fmt: skip
# each imports what stands to its right; what stands together does not import each other
ORDER = [
    {"exercises", "tests", "test_fdflow"},
    {"studies"},
    {"train", "sample"},
    {"rewards", "models"},
]
ORDER += [{"zoo"}, {"support"}, {"fdflow"}]


def sources(room):
    """The Python and HTML files of a room."""
    path = ROOT / room
    return (
        [path]
        if path.is_file()
        else [p for p in sorted(path.rglob("*")) if p.suffix in (".py", ".html")]
    )


def imports(path):
    """The modules that a file imports anywhere, by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module.split(".")[0]


def test_the_top_level_is_what_was_ordered():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert not listed or top <= {
        *TOP.split(),
        *FOLDERS.split(),
    }  # outside a checkout there is no list
    assert all((ROOT / name).exists() for name in TOP.split())


@pytest.mark.parametrize("room", LINES)
def test_rooms_are_small(room):
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(room))
    assert 0 < lines <= LINES[room]


def test_the_four_files_are_the_method_in_950_lines():
    files = ("fdflow.py", "rewards.py", "train.py", "sample.py")
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= 950


def test_imports_point_one_way():
    place = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    for room, i in place.items():
        for path in sources(room if (ROOT / room).is_dir() else f"{room}.py"):
            for module in imports(path) if path.suffix == ".py" else ():
                if module != room and module in place and room not in ORDER[0]:
                    assert place[module] > i, f"{path.relative_to(ROOT)} must not import {module}"


def test_fdflow_needs_torch_alone():
    ours = set(imports(ROOT / "fdflow.py")) - set(sys.stdlib_module_names)
    assert ours == {"torch"}
