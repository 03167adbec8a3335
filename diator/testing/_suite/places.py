"""Where an error was raised: the line of the scenario, and the line of what it tests."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

_TESTING = Path(__file__).parents[1]
_SUITES = tuple(str(_TESTING / each) for each in ("_suite", "conformance", "outbox/_", "outbox/scenarios"))
_SCENARIOS = tuple(str(_TESTING / each / "scenarios") for each in ("conformance", "outbox"))
_DIATOR = str(_TESTING.parent)
_LIBRARY = tuple({sysconfig.get_path(each) for each in ("stdlib", "platstdlib")})


def place(frames: Sequence[FrameSummary]) -> str:
    """Return the innermost line of a scenario, and that of the transport or store which it has called."""
    called = in_tested(frames)
    own = [frame for frame in frames if frame.filename.startswith(_SCENARIOS)]
    if not own:
        return called or "an unknown place"
    return _line(own[-1]) + (f", there in {called}" if called else "")


def in_scenario(frames: Sequence[FrameSummary]) -> str:
    """Return the innermost line of a scenario, or of another file if there is none."""
    own = [frame for frame in frames if frame.filename.startswith(_SCENARIOS)]
    return _line(own[-1]) if own else in_tested(frames) or "an unknown place"


def in_tested(frames: Sequence[FrameSummary]) -> str | None:
    """
    Return the innermost line of a transport or a store; None if there is none.

    A line of diator counts if there is no other one, because its own ones are tested too. An installed package
    counts if there is nothing else: it is a client library, or what is tested itself.
    """
    beyond = [frame for frame in frames if not frame.filename.startswith(_SUITES)]
    installed = [frame for frame in beyond if "site-packages" in frame.filename]
    own = [frame for frame in beyond if frame not in installed and not frame.filename.startswith(_LIBRARY)]
    foreign = [frame for frame in own if not frame.filename.startswith(_DIATOR)]
    found = foreign or own or installed
    return _line(found[-1]) if found else None


def _line(frame: FrameSummary) -> str:
    file = Path(frame.filename)
    name = file.name if frame.filename.startswith(_SCENARIOS) else file
    return f"{name}:{frame.lineno} `{frame.line}`"
