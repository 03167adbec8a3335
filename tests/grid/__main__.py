"""
Count what is lost when something dies, and print the table of the guarantees.

``python -m tests.grid`` runs every cell: about half a minute each. ``--services``, ``--ways`` and ``--faults`` choose
some of them. ``--json FILE`` writes the results beside those of other cells, and ``--page FILE`` puts the table into a
page of the documentation. The command fails if a promise was not kept.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from tests.grid.cells import FAULTS, SERVICES, WAYS, Result, Way, run_cell
from tests.services import Services

#: Between these lines of a page is the table.
BEGIN, END = "<!-- grid -->", "<!-- end of the grid -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.grid", description=__doc__)
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=[*SERVICES])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS])
    parser.add_argument("--json", type=Path, help="write the results here; results of other cells stay")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    services = Services()
    results: list[Result] = []
    try:
        database = services.private("postgres")
        for service in options.services:
            broker = services.private(SERVICES[service])
            for fault in options.faults:
                for way in ways_of(fault, options.ways):
                    results.append(asyncio.run(run_cell(service, way, fault, broker, database)))
                    print(line(results[-1]), flush=True)
                    if options.json:
                        keep(options.json, results)
            broker.remove()
    finally:
        services.close()
    if options.page:
        insert(options.page, page(merged(options.json, results) if options.json else results))
    broken = [each for each in results if not each.is_kept]
    print(f"{len(results)} cells, {len(broken)} with a broken promise")
    return 1 if broken else 0


def ways_of(fault: str, ways: Sequence[Way]) -> list[Way]:
    """Return those of *ways* in which the fault can happen."""
    return [way for way in ways if way != "send after commit" or not FAULTS[fault].needs_relay]


def line(result: Result) -> str:
    word = "kept  " if result.is_kept else "BROKEN"
    took = "never" if result.recovered is None else f"{result.recovered} s"
    return (
        f"{word} {result.service:9} {result.way:18} {FAULTS[result.fault].title}: {result.committed} committed, "
        f"{result.effects} effects, {result.lost} lost, {result.repeated} repeated, {result.refused} refused, "
        f"{result.inversions} inversions, {result.phantoms} phantoms, recovered: {took}"
    )


def keep(path: Path, results: Sequence[Result]) -> None:
    path.write_text(json.dumps([asdict(each) for each in merged(path, results)], indent=1) + "\n")


def insert(path: Path, table: str) -> None:
    """Write *table* between the two comments of the page."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")


def merged(path: Path, results: Sequence[Result]) -> list[Result]:
    """Return the results of *path* with those of this run, in the order of the grid."""
    before = [Result(**each) for each in json.loads(path.read_text())] if path.exists() else []
    cells = {(each.service, each.fault, each.way): each for each in (*before, *results)}
    return [
        cells[cell]
        for cell in ((service, fault, way) for service in SERVICES for fault in FAULTS for way in WAYS)
        if cell in cells
    ]


def page(results: Sequence[Result]) -> str:
    """Return the tables of *results*, in Markdown."""
    lines: list[str] = []
    names = {"streams": "Redis Streams", "rabbitmq": "RabbitMQ", "kafka": "Kafka"}
    for service, of_service in groupby(results, key=lambda each: each.service):
        lines += [f"### {names[service]}", ""]
        lines += ["| fault | way | committed | lost | repeated | refused | inversions | recovered |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for each in of_service:
            took = "never" if each.recovered is None else f"{each.recovered} s"
            numbers = (each.committed, each.lost, each.repeated, each.refused, each.inversions)
            lines += [f"| {FAULTS[each.fault].title} | {each.way} | {' | '.join(map(str, numbers))} | {took} |"]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
