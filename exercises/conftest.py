"""Choose whose functions are checked: those in the exercise, or those in a folder of answers.

pytest exercises/03_common_noise.py                                  # what you filled in
pytest exercises/03_common_noise.py --answers exercises/solutions    # the solution
pytest exercises/[01]*.py --answers handed_in/anna                   # all that a student handed in

A folder of answers has files of the same names as the exercises.
"""

import importlib.util
import inspect
from pathlib import Path

import pytest

EXERCISES = Path(__file__).resolve().parent
SOLUTIONS = EXERCISES / "solutions"


def load(path):
    """Load the module in a file, even if `import` cannot take its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_in(module):
    """Return {name: function} of the functions that a module itself defines."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: function for name, function in found if function.__module__ == module.__name__}


def pytest_addoption(parser):
    parser.addoption(
        "--answers", type=Path, help="folder whose files fill in the exercises of the same name"
    )


def pytest_configure(config):
    if config.option.tbstyle == "auto":  # the message helps, the code of the check does not
        config.option.tbstyle = "short"


@pytest.fixture(autouse=True)
def answers(request, monkeypatch):
    """With --answers, replace only the functions that the solution has, so the checks stay."""
    folder, name = request.config.getoption("--answers"), request.path.name
    if folder is None or not (SOLUTIONS / name).exists():
        return
    if not (folder / name).exists():
        pytest.fail(f"there is no {folder / name}", pytrace=False)

    found = functions_in(load(folder / name))
    for function in functions_in(load(SOLUTIONS / name)):
        if function not in found:
            pytest.fail(f"{folder / name} has no function {function}", pytrace=False)
        monkeypatch.setattr(request.module, function, found[function])
