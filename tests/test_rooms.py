"""The house: what stands on the top level, and which way imports point.

pytest -q tests/test_rooms.py
"""

import ast
import subprocess
import sys

from tests.commands import ROOT

TOP = "fdflow.py rewards.py sample.py train.py test_fdflow.py requirements.txt README.md LICENSE"
TOP += " pyproject.toml models zoo support studies exercises tests tiny docs"
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
PLACE = {room: i for i, rooms in enumerate(ORDER) for room in rooms}


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
    assert top <= set(TOP.split())  # outside a checkout there is no list


def test_imports_point_one_way():
    for room in PLACE.keys() - ORDER[0]:
        for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")):
            for name in PLACE.keys() & set(imports(path)) - {room}:
                assert PLACE[name] > PLACE[room], f"{path} imports {name}"


def test_train_imports_nothing_of_the_zoo():
    assert "zoo" not in imports(ROOT / "train.py")


def test_fdflow_imports_torch_alone():
    assert set(imports(ROOT / "fdflow.py")) - sys.stdlib_module_names == {"torch"}
