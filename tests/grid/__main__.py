"""
Count what is lost when something dies, and print the table of the guarantees.

``python -m tests.grid`` runs every cell: about half a minute each. ``--services``, ``--ways`` and ``--faults`` choose
some of them. ``--json FILE`` writes the results beside those of other cells, and ``--page FILE`` puts the table into a
page of the documentation. The command fails if a promise was not kept.

``--peers`` runs the cells of other libraries instead. Their table is another one, and their promises are not judged.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path

from tests.grid import peers
from tests.grid.cells import FAULTS, OWN, SERVICES, WAYS, Result, Way, run_cell
from tests.grid.peers import PEERS
from tests.services import Services

#: Between these lines of a page is the table, and that of other libraries.
BEGIN, END = "<!-- grid -->", "<!-- end of the grid -->"
BEGIN_PEERS, END_PEERS = "<!-- grid of other libraries -->", "<!-- end of the grid of other libraries -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.grid", description=__doc__)
    parser.add_argument("--services", nargs="+", choices=SERVICES, help="all, or RabbitMQ alone for other libraries")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--faults", nargs="+", choices=FAULTS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="other libraries, with their defaults: all, or these")
    parser.add_argument("--json", type=Path, help="write the results here; results of other cells stay")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    has_peers = options.peers is not None
    libraries = (options.peers or [*PEERS]) if has_peers else ["diator"]
    services = Services()
    results: list[Result] = []
    try:
        database = services.private("postgres")
        for service in ["rabbitmq"] if has_peers else options.services or SERVICES:
            broker = services.private(SERVICES[service])
            for fault in options.faults or (peers.FAULTS if has_peers else FAULTS):
                for library, way in cells_of(fault, libraries, options.ways):
                    program = PEERS[library].program if has_peers else OWN
                    cell = run_cell(service, way, fault, broker, database, library=library, program=program)
                    results.append(asyncio.run(cell))
                    print(line(results[-1]), flush=True)
                    if options.json:
                        keep(options.json, results)
            broker.remove()
    finally:
        services.close()
    if options.page:
        table = page(merged(options.json, results) if options.json else results)
        insert(options.page, table, *((BEGIN_PEERS, END_PEERS) if has_peers else (BEGIN, END)))
    broken = [each for each in results if not each.is_kept]
    print(f"{len(results)} cells, {len(broken)} with a broken promise")
    return 1 if broken else 0


def cells_of(fault: str, libraries: Sequence[str], ways: Sequence[Way]) -> list[tuple[str, Way]]:
    """Return which of *libraries* can be struck, and in which way. Another library sends in its own."""
    return [
        (library, way)
        for library in libraries
        for way in ways_of(fault, [PEERS[library].way] if library in PEERS else ways)
    ]


def ways_of(fault: str, ways: Sequence[Way]) -> list[Way]:
    """Return those of *ways* in which the fault can happen."""
    return [way for way in ways if way != "send after commit" or not FAULTS[fault].needs_relay]


def line(result: Result) -> str:
    word = "counted" if result.library in PEERS else "kept   " if result.is_kept else "BROKEN "
    took = "never" if result.recovered is None else f"{result.recovered} s"
    return (
        f"{word} {result.library} {result.service:9} {result.way:18} {FAULTS[result.fault].title}: "
        f"{result.committed} committed, "
        f"{result.effects} effects, {result.lost} lost, {result.repeated} repeated, {result.refused} refused, "
        f"{result.inversions} inversions, {result.phantoms} phantoms, recovered: {took}"
    )


def keep(path: Path, results: Sequence[Result]) -> None:
    path.write_text(json.dumps([asdict(each) for each in merged(path, results)], indent=1) + "\n")


def insert(path: Path, table: str, begin: str = BEGIN, end: str = END) -> None:
    """Write *table* between the two comments of the page."""
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{table}\n{end}{after}")


def merged(path: Path, results: Sequence[Result]) -> list[Result]:
    """Return the results of *path* with those of this run, in the order of the grid."""
    before = [Result(**each) for each in json.loads(path.read_text())] if path.exists() else []
    cells = {(each.library, each.service, each.fault, each.way): each for each in (*before, *results)}
    order = product(("diator", *PEERS), SERVICES, FAULTS, WAYS)
    return [cells[cell] for cell in order if cell in cells]


def page(results: Sequence[Result]) -> str:
    """Return the tables of *results*, in Markdown."""
    lines: list[str] = []
    names = {"streams": "Redis Streams", "rabbitmq": "RabbitMQ", "kafka": "Kafka"}
    for (library, service), of_service in groupby(results, key=lambda each: (each.library, each.service)):
        peer = PEERS.get(library)
        if peer:
            lines += [f"### {library}, {names[service]}", "", f"{peer.settings} Installed: {peer.installed}.", ""]
        else:
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
