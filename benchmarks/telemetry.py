"""
What OpenTelemetry takes of a message that is sent and handled: on Redis Streams, beside FastStream's middleware.

Then the memory of a process over a million messages, with OpenTelemetry and with Prometheus.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Collection, Sequence
from typing import Any
from uuid import uuid4

from benchmarks import services
from benchmarks.environments import BROKER_LIBRARIES
from benchmarks.reports import marked, show

MEASURED = {
    "diator": ("diator", "Traced"),
    "faststream": ("faststream", "Traced"),
    "the SDK alone": ("diator", "ByHand"),
}
"""Each row, with its library and the class of its transport."""
MESSAGES = 1_000
"""How many messages are sent and handled in a slice."""
TARGET = 35.0
"""Microseconds of CPU for a message."""
MOST_RATIO = 1.0
"""What diator's instrument may take, in that of FastStream's middleware."""

INSTRUMENTS = {"OpenTelemetry": ("traced", "TracedInMemory"), "Prometheus": ("counted", "CountedInMemory")}
FLOOD = 1_000_000
"""How many messages are sent and handled while the memory is measured."""
GROWTH = 2.0
"""MiB by which the process may grow after the first quarter; one object for each message would be tens of MiB."""


def measure(rows: Collection[str] = tuple(MEASURED), *, rounds: int = 9, messages: int = MESSAGES) -> dict[str, Any]:
    """Measure, print the tables, and return the figures of each row, and of each instrument."""
    with services.running("redis") as address:
        found = {row: figures(_traced(row, address, rounds, messages)) for row in rows}
    judge(found)
    table = []
    for row, figure in found.items():
        cells = [f"{figure['extra']['microseconds']:.1f}", ""]
        if row == "diator":
            cells[0] = marked(cells[0], target=f"{TARGET:g}", met=figure["extra"]["met"])
        if ratio := figure.get("ratio"):
            cells[1] = marked(f"{ratio['ratio']:.2f}", target=f"{MOST_RATIO:g}", met=ratio["met"])
        table.append([row, f"{figure['plain']:.1f}", f"{figure['traced']:.1f}", *cells])
    head = ["", "without", "with OpenTelemetry", "difference", "to FastStream"]
    show(f"µs of CPU for a message sent and handled, {rounds} rounds of {messages:,}", head, table)
    return found


def judge(found: dict[str, Any]) -> None:
    """Add to the figures of diator whether they meet their target, and the ratio to FastStream's if there are both."""
    extra = found["diator"]["extra"]
    extra["met"] = extra["microseconds"] <= TARGET
    if "faststream" in found:
        ratio = extra["microseconds"] / found["faststream"]["extra"]["microseconds"]
        found["diator"]["ratio"] = {"ratio": ratio, "met": ratio <= MOST_RATIO}


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a row: the difference is the median of those within one round."""
    plain, traced = measured["plain"], measured["traced"]
    return {
        "plain": statistics.median(plain),
        "traced": statistics.median(traced),
        "extra": {"microseconds": statistics.median(b - a for a, b in zip(plain, traced, strict=True))},
    }


def measure_memory(*, messages: int = FLOOD) -> dict[str, Any]:
    """Measure, print the table, and return the MiB of each instrument."""
    marks, rows, results = [messages * quarter // 4 for quarter in (1, 2, 3, 4)], [], {}
    for name, (service, transport) in INSTRUMENTS.items():
        options = {"messages": messages, "at_once": 100, "marks": marks}
        resident = _run("diator", do="steady", service=service, transport=transport, url="", options=options)
        results[name] = grown(resident["resident_mib"])
        growth = marked(f"{results[name]['growth_mib']:+.2f}", target=f"{GROWTH:g}", met=results[name]["met"])
        rows.append([name, *(f"{each:.2f}" for each in resident["resident_mib"]), growth])
    head = ["instrument", *(f"at {mark:,}" for mark in marks), "growth"]
    show(f"resident MiB while {messages:,} messages are sent and handled in memory", head, rows)
    return results


def grown(resident: Sequence[float]) -> dict[str, Any]:
    """Return by how much the memory grew after the first mark, and whether that meets its target."""
    growth = resident[-1] - resident[0]
    return {"resident_mib": resident, "growth_mib": growth, "met": growth <= GROWTH}


def _traced(row: str, address: str, rounds: int, messages: int) -> dict[str, Any]:
    library, transport = MEASURED[row]
    options = {"rounds": rounds, "messages": messages}
    return _run(library, do="trace", service="traced", transport=transport, url=address, options=options)


def _run(library: str, **order: Any) -> dict[str, Any]:
    order["name"] = f"telemetry-{uuid4().hex[:8]}"
    done = subprocess.run(
        BROKER_LIBRARIES[library].command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
