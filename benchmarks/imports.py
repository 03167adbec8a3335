"""The cost of an import beyond asyncio's own imports."""

from __future__ import annotations

import os
import statistics
import subprocess
from typing import Any

from benchmarks.environments import CACHE, LIBRARIES, Library
from benchmarks.reports import marked, show

TARGET = 15.0
PROCESSES = 9


def measure() -> dict[str, Any]:
    """Measure, print the table, and return milliseconds and modules of each library."""
    libraries = [library for library in LIBRARIES.values() if library.module]
    runs: dict[str, list[tuple[float, int]]] = {library.name: [] for library in libraries}
    for _ in range(PROCESSES):
        for library in libraries:
            if cost := cost_of(library):
                runs[library.name].append(cost)

    rows, results = [], {}
    for library in libraries:
        if not runs[library.name]:
            print(f"without {library.name!r}: {library.module} cannot be imported here")
            continue
        milliseconds = statistics.median(each for each, _ in runs[library.name])
        modules = runs[library.name][-1][1]
        ours = not library.pins
        met = milliseconds <= TARGET if ours else None
        text = f"{milliseconds:.1f}"
        rows.append(
            [
                library.name,
                library.module,
                marked(text, target=f"{TARGET:.0f}", met=met) if ours else text,
                str(modules),
            ]
        )
        results[library.name] = {"milliseconds": milliseconds, "modules": modules, "met": met}
    show(
        f"import beyond asyncio's, median of {PROCESSES}",
        ["library", "module", "ms", "modules"],
        rows,
    )
    return results


def cost_of(library: Library) -> tuple[float, int] | None:
    """Return milliseconds and modules of one import in a new process."""
    isolated = ["-I"] if library.pins else []
    statement = f"import asyncio; import {library.module}"
    command = [library.python, *isolated, "-X", "importtime", "-c", statement]
    # With bytecode, as in any program, even if the environment disables it.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(CACHE / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return None
    # "import time: <self µs> | <cumulative µs> | <module>", after the lines of what it imported
    lines = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    asyncio = next(number for number, line in enumerate(lines) if line[-1].strip() == "asyncio")
    own = [float(line[0].removeprefix("import time:")) for line in lines[asyncio + 1 :]]
    return sum(own) / 1e3, len(own)
