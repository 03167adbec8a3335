"""What OpenTelemetry takes of a message that is sent and handled: on Redis Streams, beside FastStream's middleware."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Collection
from typing import Any
from uuid import uuid4

from benchmarks import services
from benchmarks.environments import BROKER_LIBRARIES
from benchmarks.reports import marked, show

LIBRARIES = ("diator", "faststream")
MESSAGES = 1_000
"""How many messages are sent and handled in a slice."""
TARGET = 35.0
"""Microseconds of CPU for a message."""
MOST_RATIO = 1.0
"""What diator's instrument may take, in that of FastStream's middleware."""
GROWTH = 2.0
"""MiB by which the process may grow after the first round."""


def measure(libraries: Collection[str] = LIBRARIES, *, rounds: int = 9, messages: int = MESSAGES) -> dict[str, Any]:
    """Measure, print the table, and return the figures of each library."""
    with services.running("redis") as address:
        found = {library: figures(_run(library, address, rounds, messages)) for library in libraries}
    judge(found)
    rows = []
    for library, figure in found.items():
        cells = [f"{figure['extra']['microseconds']:.1f}", f"{figure['memory']['growth_mib']:+.2f}"]
        if library == "diator":
            cells[0] = marked(cells[0], target=f"{TARGET:g}", met=figure["extra"]["met"])
            cells[1] = marked(cells[1], target=f"{GROWTH:g}", met=figure["memory"]["met"])
        ratio = figure.get("ratio")
        cells.insert(1, marked(f"{ratio['ratio']:.2f}", target=f"{MOST_RATIO:g}", met=ratio["met"]) if ratio else "")
        rows.append([library, f"{figure['plain']:.1f}", f"{figure['traced']:.1f}", *cells])
    head = ["library", "without", "with OpenTelemetry", "difference", "to FastStream", "growth in MiB"]
    show(f"µs of CPU for a message sent and handled, {rounds} rounds of {messages:,}", head, rows)
    return found


def judge(found: dict[str, Any]) -> None:
    """Add to the figures of diator whether they meet their targets, and the ratio to FastStream's if there are both."""
    extra, memory = found["diator"]["extra"], found["diator"]["memory"]
    extra["met"] = extra["microseconds"] <= TARGET
    memory["met"] = memory["growth_mib"] <= GROWTH
    if "faststream" in found:
        ratio = extra["microseconds"] / found["faststream"]["extra"]["microseconds"]
        found["diator"]["ratio"] = {"ratio": ratio, "met": ratio <= MOST_RATIO}


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a library: the difference is the median of those within one round."""
    plain, traced, resident = measured["plain"], measured["traced"], measured["resident_mib"]
    return {
        "plain": statistics.median(plain),
        "traced": statistics.median(traced),
        "extra": {"microseconds": statistics.median(b - a for a, b in zip(plain, traced, strict=True))},
        "memory": {"resident_mib": resident, "growth_mib": resident[-1] - resident[0]},
    }


def _run(library: str, address: str, rounds: int, messages: int) -> dict[str, Any]:
    order = {
        "do": "trace",
        "service": "traced",
        "transport": "Traced",
        "url": address,
        "name": f"telemetry-{uuid4().hex[:8]}",
        "options": {"rounds": rounds, "messages": messages},
    }
    done = subprocess.run(
        BROKER_LIBRARIES[library].command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
