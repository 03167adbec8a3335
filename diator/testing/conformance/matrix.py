"""
Makes tables for people of the reports of conformance runs: `python -m diator.testing.conformance.matrix REPORT…`.

The tables are written to the output, or with `--into PAGE` between the marks `<!-- name -->` and `<!-- /name -->` of a
page in Markdown; the names are `totals`, `capabilities`, `scenarios` and `reasons`. A report is what
`python -m diator.testing.conformance … --report` writes, by whomever.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from diator.testing.conformance import SCENARIOS

PlainReport: TypeAlias = Mapping[str, Any]
"""A report as JSON has it."""

SIGNS: dict[str, str] = {
    "PASS": "✓",
    "FAIL": "✗",
    "PROVISIONAL": "◇",
    "DEVIATION": "△",
    "UNSUPPORTED": "○",
    "NOT_RUN": "·",
}
"""How each outcome is shown."""

_YES_NO: dict[str, str] = {"True": "yes", "False": "no"}

WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "guarantee": (
        "a message is delivered",
        {"at_most_once": "at most once: it may be lost", "at_least_once": "at least once: it may come again"},
    ),
    "receipt": (
        "a send that returned proves that the service",
        {"none": "nothing", "accepted": "has the message", "durable": "has stored the message"},
    ),
    "settlement": (
        "what is acknowledged",
        {"none": "nothing", "cumulative": "all up to a message", "individual": "each message by itself"},
    ),
    "redelivery": (
        "what is not acknowledged comes again",
        {
            "": "never",
            "retry": "when it is given back",
            "close": "when its consumer stops",
            "crash": "when its consumer dies",
            "deadline": "when its consumer hangs",
        },
    ),
    "redelivery_bound": ("after a death, at the latest after (as set in this run)", {"None": ""}),
    "delayed_retry": ("what failed can wait before it comes again", _YES_NO),
    "dead_letter": ("what cannot be handled can be put aside", _YES_NO),
    "delivery_count": (
        "attempts are counted",
        {"none": "no", "retries": "when it is given back", "exact": "each, also when a consumer dies"},
    ),
    "ordering": ("messages keep their order", {"none": "no", "key": "of one key", "destination": "of one event class"}),
    "ordered_retry": ("what is given back holds up those behind it, and keeps its place", _YES_NO),
    "distribution": (
        "a message goes to",
        {"": "nobody", "broadcast": "every subscription", "competing": "one member of each group"},
    ),
    "subscription": (
        "what is sent while nobody is there",
        {"ephemeral": "is missed", "durable": "waits for the group"},
    ),
    "replay": (
        "a new group begins",
        {"none": "with what comes", "earliest": "at the oldest message", "position": "anywhere"},
    ),
    "durability": (
        "what confirmed messages survive",
        {
            "none": "nothing is promised",
            "restart": "a restart of the service",
            "crash": "the death of the service's process",
        },
    ),
    "unroutable": (
        "a message that has nobody to go to",
        {"dropped": "is dropped", "retained": "is kept", "reported": "raises `MessageUnroutable`"},
    ),
    "headers": ("headers travel", {"envelope": "in the body", "native": "as the service's own"}),
    "backpressure": (
        "a consumer that is slow",
        {"none": "loses what it cannot take", "prefetch": "is given a few at a time", "pull": "takes what it can"},
    ),
    "max_message_bytes": ("the largest message (as set in this run), in bytes", {}),
    "multi_process": ("between processes", _YES_NO),
    "network": ("over a network", _YES_NO),
}
"""Each capability in words for users, and each of its levels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables; give 0, or 2 if a page lacks a mark."""
    parser = argparse.ArgumentParser(
        prog="python -m diator.testing.conformance.matrix",
        description="Make tables of the reports of conformance runs.",
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="what --report of a run has written")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write between the marks of this page")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
    if options.into is None:
        sys.stdout.write("\n".join(table(reports) for table in TABLES.values()))
        return 0
    try:
        page = filled(options.into.read_text(encoding="utf-8"), reports)
    except ValueError as error:
        sys.stderr.write(f"{options.into}: {error}\n")
        return 2
    options.into.write_text(page, encoding="utf-8")
    return 0


def filled(page: str, reports: Sequence[PlainReport]) -> str:
    """
    Give *page* with the tables of *reports* between its marks.

    Raises:
        ValueError: A mark is missing.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"it has no <!-- {name} --> and <!-- /{name} --> after it")
        page = f"{before}{begin}\n{table(reports)}\n{end}{after}"
    return page


# -- the tables --------------------------------------------------------------------------------------------------


def totals(reports: Sequence[PlainReport]) -> str:
    """Say what was run against what, and how it ended."""
    rows = [
        [
            report["transport"],
            ", by ".join(filter(None, [report["broker"], report.get("driver")])),
            report["suite_version"],
            report.get("result", ""),
            *(str(report["totals"].get(outcome, 0)) for outcome in SIGNS),
        ]
        for report in reports
    ]
    return _table(
        ["transport", "service", "suite", "result", *(f"{sign} {name}" for name, sign in SIGNS.items())], rows
    )


def capabilities(reports: Sequence[PlainReport]) -> str:
    """Say what each transport promises, in words for users."""
    known = [report for report in reports if report["capabilities"]]
    rows = [
        [question, *(_in_words(report["capabilities"].get(name), levels) for report in known)]
        for name, (question, levels) in WORDS.items()
    ]
    return _table(["", *(report["transport"] for report in known)], rows)


def scenarios(reports: Sequence[PlainReport]) -> str:
    """Say what became of each scenario, a table for each part of the catalogue."""
    titles: dict[str, str] = {}
    outcomes: dict[str, dict[int, str]] = defaultdict(dict)
    for number, report in enumerate(reports):
        for each in report["scenarios"]:
            titles.setdefault(each["id"], each["title"])
            outcomes[each["id"]][number] = SIGNS[each["outcome"]]
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for id_ in sorted(titles):
        cells = (outcomes[id_].get(number, "") for number in range(len(reports)))
        groups[id_.partition("-")[0]].append([id_, titles[id_], *cells])
    heads = ["", "", *map(_column, reports)]
    return "\n".join(f"### {_about(name)}\n\n{_table(heads, rows)}" for name, rows in groups.items())


def reasons(reports: Sequence[PlainReport]) -> str:
    """Say why something is not proved: what failed, deviates, or was not run."""
    lines: list[str] = []
    for report in reports:
        because: dict[tuple[str, str], list[str]] = defaultdict(list)
        for each in report["scenarios"]:
            if each["outcome"] not in ("PASS", "UNSUPPORTED"):
                because[SIGNS[each["outcome"]], each["reason"]].append(each["id"])
        lines += [
            f"- {report['transport']}, {sign} {', '.join(ids)}: {_cell(reason)}"
            for (sign, reason), ids in sorted(because.items())
        ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[Sequence[PlainReport]], str]] = {
    "totals": totals,
    "capabilities": capabilities,
    "scenarios": scenarios,
    "reasons": reasons,
}
"""What can stand on a page, by its mark."""


def _column(report: PlainReport) -> str:
    return (
        report["transport"]
        if report["broker"] in (None, "in process")
        else f"{report['transport']}, {report['broker']}"
    )


def _about(group: str) -> str:
    """Name a part of the catalogue as the module does that has its first scenario."""
    first = min((id_ for id_ in SCENARIOS if id_.startswith(f"{group}-")), default=None)
    said = inspect.getdoc(inspect.getmodule(SCENARIOS[first].run)) if first else None
    return f"{group}: {said.partition(': ')[2].partition('.')[0]}" if said else group


def _in_words(value: Any, levels: Mapping[str, str]) -> str:
    if isinstance(value, list):
        return "; ".join(levels.get(each, each) for each in [level for level in levels if level in value]) or levels[""]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:g} s"
    return levels.get(str(value), str(value))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
