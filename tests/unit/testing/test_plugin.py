"""Tests of the pytest plugin: two fixtures, and nothing else."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

FIRST = """
import sys
seen = sorted(name for name in sys.modules if name.split('.')[0] == 'diator')
def test_nothing_of_diator_is_loaded():
    assert seen == []
"""
UNUSED = """
from diator.testing.faults import lost
def test_passes(diator_broker):
    diator_broker.on_send(lost)
"""
FAILS = """
from diator.testing.faults import lost
def test_fails(diator_broker):
    diator_broker.on_send(lost)
    assert False
"""
USED = """
import asyncio
from diator.brokers import Message
from diator.testing import FaultyMessageBroker, Recorder
from diator.testing.faults import lost
def test_uses_both(diator_broker, diator_recorder):
    assert type(diator_broker) is FaultyMessageBroker and type(diator_recorder) is Recorder
    diator_broker.on_send(lost)
    asyncio.run(diator_broker.send_message(Message.create(message_name="a", payload={})))
"""


def outcome_of(folder, program, *plugins):
    (folder / "test_it.py").write_text(program)
    installed = any(each.value == "diator_pytest" for each in entry_points(group="pytest11"))
    ours = [] if installed else ["-p", "diator_pytest"]
    command = [sys.executable, "-m", "pytest", *ours, "-p", "no:cacheprovider", "-q", *plugins, "test_it.py"]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    return run.stdout.splitlines()[-1].rsplit(" in ", 1)[0].strip("= "), run.stdout + run.stderr


@pytest.mark.parametrize(
    ("program", "outcome"),
    [(FIRST, "1 passed"), (USED, "1 passed"), (UNUSED, "1 passed, 1 error"), (FAILS, "1 failed")],
    ids=["inert", "used", "a fault that did not happen", "failed already"],
)
def test_the_fixtures(tmp_path, program, outcome):
    summary, output = outcome_of(tmp_path, program)

    assert summary == outcome, output
    assert ("scripted faults have not happened: lost of on_send(lost)" in output) == (program is UNUSED)


def test_the_page_about_testing_is_a_file_of_tests(tmp_path):
    page = (ROOT / "docs" / "testing.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))

    summary, output = outcome_of(tmp_path, program, "-o", "asyncio_mode=auto")

    assert summary == f"{program.count('async def test_')} passed", output


def test_pytest_finds_it_by_its_entry_point():
    assert '[project.entry-points.pytest11]\ndiator = "diator_pytest"\n' in (ROOT / "pyproject.toml").read_text()
