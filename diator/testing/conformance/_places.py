"""Where an error was raised: the line of the scenario, and the line of the transport."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

_SUITE = str(Path(__file__).parent)
_SCENARIOS = str(Path(__file__).parent / "scenarios")
_DIATOR = str(Path(__file__).parents[2])
_LIBRARY = tuple({sysconfig.get_path(each) for each in ("stdlib", "platstdlib")})


def place(frames: Sequence[FrameSummary]) -> str:
    """Return the innermost line of a scenario, and that of the transport which it has called."""
    called = in_transport(frames)
    own = [frame for frame in frames if frame.filename.startswith(_SCENARIOS)]
    if not own:
        return called or "an unknown place"
    return _line(own[-1]) + (f", there in {called}" if called else "")


def in_scenario(frames: Sequence[FrameSummary]) -> str:
    """Return the innermost line of a scenario, or of another file if there is none."""
    own = [frame for frame in frames if frame.filename.startswith(_SCENARIOS)]
    return _line(own[-1]) if own else in_transport(frames) or "an unknown place"


def in_transport(frames: Sequence[FrameSummary]) -> str | None:
    """
    Return the innermost line of a transport; None if there is none.

    A line of diator counts if there is no other one, because its own transports are tested too. An installed package
    counts if there is nothing else: it is a client library, or the transport itself.
    """
    beyond = [frame for frame in frames if not frame.filename.startswith(_SUITE)]
    installed = [frame for frame in beyond if "site-packages" in frame.filename]
    own = [frame for frame in beyond if frame not in installed and not frame.filename.startswith(_LIBRARY)]
    foreign = [frame for frame in own if not frame.filename.startswith(_DIATOR)]
    found = foreign or own or installed
    return _line(found[-1]) if found else None


def _line(frame: FrameSummary) -> str:
    file = Path(frame.filename)
    name = file.name if file.is_relative_to(_SCENARIOS) else file
    return f"{name}:{frame.lineno} `{frame.line}`"
