"""The workloads of all libraries; each slice runs beside a slice of hand-written code."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

from benchmarks.environments import LIBRARIES, Library
from benchmarks.reports import marked, show
from benchmarks.worker.workloads import WORKLOADS

SLICE_SECONDS = 0.002
NEWER_PYTHON = 1.2
"""Since Python 3.12 hand-written code has gained most, so the targets are wider by this factor."""


class Pair(NamedTuple):
    """The microseconds of one call in two neighbouring slices."""

    library: float
    by_hand: float


class Worker:
    """One library in its own process."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._process = subprocess.Popen(
            library.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        greeting = self._reply()
        self.pid = self._process.pid
        self.workloads: list[str] = greeting.get("workloads", [])
        self.missing: str | None = greeting.get("missing")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def measure(self, workload: str) -> Pair:
        return Pair(**self._ask(workload=workload, seconds=SLICE_SECONDS))

    def repeat(self, workload: str, times: int) -> None:
        self._ask(workload=workload, times=times)

    def _ask(self, **order: Any) -> Any:
        print(json.dumps(order), file=self._process.stdin)
        return self._reply()

    def _reply(self) -> Any:
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"the worker of {self.library.name!r} stopped; what it said is above")


def smoke(names: Iterable[str], workloads: Iterable[str]) -> int:
    """Run each workload, which its worker verifies, and return their number."""
    ran = 0
    for name in names:
        with Worker(LIBRARIES[name]) as worker:
            if worker.missing:
                raise SystemExit(f"no module {worker.missing!r} here, which {name!r} needs")
            for workload in set(workloads) & {*worker.workloads}:
                worker.measure(workload)
                ran += 1
    return ran


def compare(
    names: Iterable[str], workloads: Iterable[str], *, rounds: int, slices: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure, print the table, and return the figures by library and workload."""
    libraries = [LIBRARIES[name] for name in names]
    pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(library)) for library in libraries]
        for worker in workers:
            if worker.missing:
                print(
                    f"without {worker.library.name!r}: no module {worker.missing!r} here",
                    file=sys.stderr,
                )
        cells = [(worker, name) for worker in workers for name in workloads if name in worker.workloads]
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
            for worker, name in random.sample(cells * slices, k=len(cells) * slices):
                pairs[worker.library.name, name].append(worker.measure(name))
        print(end="\r\033[K", file=sys.stderr)
        measured = [worker.library for worker in workers if not worker.missing]

    results = {
        library.name: {
            name: figures(pairs[library.name, name], library.targets.get(name))
            for name in workloads
            if (library.name, name) in pairs
        }
        for library in measured
    }
    python = ".".join(map(str, sys.version_info[:3]))
    show(
        f"times the hand-written code ± half the interquartile range, Python {python}",
        ["library", *workloads],
        [[library, *(cell(row.get(name)) for name in workloads)] for library, row in results.items()],
    )
    print("\n".join(f"{name:3}  {WORKLOADS[name]}" for name in workloads))
    return results


def figures(pairs: list[Pair], target: float | None) -> dict[str, Any]:
    ratios = [pair.library / pair.by_hand for pair in pairs]
    lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    if target and sys.version_info >= (3, 12):
        target *= NEWER_PYTHON
    return {
        "ratio": ratio,
        "half_interquartile_range": (upper - lower) / 2,
        "microseconds": statistics.median(pair.library for pair in pairs),
        "microseconds_by_hand": statistics.median(pair.by_hand for pair in pairs),
        "pairs": len(pairs),
        "target": target,
        "met": round(ratio, 2) <= round(target, 2) if target else None,
    }


def cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "-"
    ratio = measured["ratio"]
    digits = max(0, 2 - int(math.log10(max(ratio, 1))))
    text = f"{ratio:.{digits}f} ±{measured['half_interquartile_range'] / ratio:.0%}"
    if measured["target"] is None:
        return text
    return marked(text, target=f"{measured['target']:.2f}", met=measured["met"])
