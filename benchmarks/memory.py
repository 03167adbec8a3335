"""Resident memory while a million requests are sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.comparison import Worker
from benchmarks.environments import LIBRARIES
from benchmarks.reports import marked, show

SENDS = 1_000_000
SENT = {
    "W1": "command, no events",
    "W4": "command, 1 domain event",
    "notify": "command, 1 notification event to a broker that discards",
}
TARGET = 0.5
"""MiB by which memory may grow after the first tenth; one object for each send would be tens of MiB."""


def measure() -> dict[str, Any]:
    """Measure, print the table, and return the MiB of each kind of send."""
    rows, results = [], {}
    for workload, description in SENT.items():
        resident = resident_while_sending(workload, SENDS)
        growth = resident[-1] - resident[0]
        met = growth <= TARGET
        text = marked(f"{growth:+.2f}", target=f"{TARGET}", met=met)
        rows.append([description, *(f"{each:.2f}" for each in resident), text])
        results[workload] = {"resident_mib": resident, "growth_mib": growth, "met": met}
    show(
        f"resident MiB in {SENDS:,} sends",
        ["sent", "at 10 %", "at 50 %", "at 100 %", "growth"],
        rows,
    )
    return results


def resident_while_sending(workload: str, sends: int) -> list[float]:
    """Return the MiB at 10 %, at 50 % and at the end."""
    with Worker(LIBRARIES["diator"]) as worker:
        if worker.missing:
            raise SystemExit(f"no module {worker.missing!r} here")
        resident = []
        for share in (0.1, 0.4, 0.5):
            worker.repeat(workload, round(share * sends))
            resident.append(resident_mib(worker.pid))
    return resident


def resident_mib(pid: int) -> float:
    statm = Path(f"/proc/{pid}/statm")
    if not statm.exists():
        raise SystemExit("the memory benchmark reads /proc and needs Linux")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
