"""
The programs of this folder are checked by mypy and pyright, as strictly as each can.

A wrong line names the error of each checker. Both checkers report an error that is not named, and a named one that is
missing. The configuration of pyright makes it ignore the comments for mypy.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.timeout(600)  # without a cache, on a busy machine
PROGRAMS = sorted(str(path) for path in HERE.glob("*.py") if path != Path(__file__))


def check(*command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_mypy_finds_the_wrong_lines_and_no_other(python: str) -> None:
    pytest.importorskip("mypy")
    check("mypy", "--strict", "--python-version", python, *PROGRAMS)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pyright_finds_the_wrong_lines_and_no_other(python: str) -> None:
    pytest.importorskip("pyright")
    check("pyright", "--pythonversion", python, "--pythonpath", sys.executable, "--project", str(HERE))


def test_programs_need_no_cast() -> None:
    assert PROGRAMS
    assert not [path for path in PROGRAMS if "cast(" in Path(path).read_text(encoding="utf-8")]
