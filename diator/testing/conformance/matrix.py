"""
Make readable tables of the reports of conformance runs: `python -m diator.testing.conformance.matrix REPORT…`.

The program writes the tables to standard output. With `--into PAGE` it writes them into a Markdown page, between the
marks `<!-- name -->` and `<!-- /name -->`; the names are `totals`, `capabilities`, `scenarios` and `reasons`. A report
is a file that `python -m diator.testing.conformance … --report` has written.
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
"""A report, as decoded from its JSON file."""

SIGNS: dict[str, str] = {
    "PASS": "✓",
    "FAIL": "✗",
    "PROVISIONAL": "◇",
    "DEVIATION": "△",
    "UNSUPPORTED": "○",
    "NOT_RUN": "·",
}
"""The sign of each outcome in the tables."""

_YES_NO: dict[str, str] = {"True": "yes", "False": "no"}

WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "guarantee": (
        "a message is delivered",
        {"at_most_once": "at most once: it may be lost", "at_least_once": "at least once: it may be redelivered"},
    ),
    "receipt": (
        "after a send, the service",
        {"none": "may not have the message", "accepted": "has the message", "durable": "has stored the message"},
    ),
    "settlement": (
        "an acknowledgement covers",
        {"none": "nothing", "cumulative": "all messages up to one", "individual": "one message"},
    ),
    "redelivery": (
        "an unacknowledged message is redelivered",
        {
            "": "never",
            "retry": "when it is requeued",
            "close": "when its consumer closes",
            "crash": "when its consumer crashes",
            "deadline": "when its consumer hangs",
        },
    ),
    "redelivery_bound": ("redelivery after a crash takes at most (as configured in this run)", {"None": ""}),
    "delayed_retry": ("a retry can be delayed", _YES_NO),
    "dead_letter": ("dead letters", _YES_NO),
    "delivery_count": (
        "attempts are counted",
        {
            "none": "no",
            "retries": "at each requeue",
            "deliveries": "at each delivery, also after a crash, as the service counts",
            "exact": "at each delivery, also after a crash",
        },
    ),
    "ordering": (
        "messages keep their order",
        {"none": "no", "key": "within a key", "destination": "within an event class"},
    ),
    "ordered_retry": ("a requeued message keeps its place and holds up later ones", _YES_NO),
    "distribution": (
        "a message is delivered to",
        {"": "nobody", "broadcast": "every subscription", "competing": "one consumer of each group"},
    ),
    "subscription": (
        "a message sent while a group has no consumer",
        {"ephemeral": "is missed", "durable": "waits for the next consumer"},
    ),
    "replay": (
        "a new group starts",
        {"none": "with new messages", "earliest": "at the oldest message", "position": "at any message"},
    ),
    "durability": (
        "confirmed messages survive",
        {
            "none": "no restart of the service",
            "restart": "a restart of the service",
            "crash": "a crash of the service",
        },
    ),
    "unroutable": (
        "a message without a receiver",
        {"dropped": "is dropped", "retained": "is kept", "reported": "raises `MessageUnroutable`"},
    ),
    "headers": ("headers are sent", {"envelope": "in the body", "native": "as headers of the service"}),
    "backpressure": (
        "a slow consumer",
        {"none": "loses messages", "prefetch": "receives at most its prefetch", "pull": "asks for what it can take"},
    ),
    "max_message_bytes": ("the largest message, in bytes (as configured in this run)", {}),
    "multi_process": ("works between processes", _YES_NO),
    "network": ("works over a network", _YES_NO),
}
"""Each capability and each of its levels, in words for users."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables. Return 0, or 2 if the page lacks a mark."""
    parser = argparse.ArgumentParser(
        prog="python -m diator.testing.conformance.matrix",
        description="Make readable tables of the reports of conformance runs.",
    )
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="a file that --report of a run has written"
    )
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the tables between the marks of this page")
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
    Return *page* with the tables of *reports* between its marks.

    Raises:
        ValueError: A mark is missing in *page*.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no <!-- {name} --> followed by <!-- /{name} -->")
        page = f"{before}{begin}\n{table(reports)}\n{end}{after}"
    return page


# -- the tables --------------------------------------------------------------------------------------------------


def totals(reports: Sequence[PlainReport]) -> str:
    """Return the table of the runs: against which service, and how many scenarios had each outcome."""
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
    """Return the table of the capabilities of each transport, in words for users."""
    known = [report for report in reports if report["capabilities"]]
    rows = [
        [question, *(_in_words(report["capabilities"].get(name), levels) for report in known)]
        for name, (question, levels) in WORDS.items()
    ]
    return _table(["", *(report["transport"] for report in known)], rows)


def scenarios(reports: Sequence[PlainReport]) -> str:
    """Return the outcomes of the scenarios, one table for each part of the catalogue."""
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
    """Return the list of reasons for the scenarios that failed, deviate or were not run."""
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
"""The function that makes each table, by the name of its mark."""


def _column(report: PlainReport) -> str:
    return (
        report["transport"]
        if report["broker"] in (None, "in process")
        else f"{report['transport']}, {report['broker']}"
    )


def _about(group: str) -> str:
    """Return the heading of a part of the catalogue, from the docstring of the module with its first scenario."""
    first = min((id_ for id_ in SCENARIOS if id_.startswith(f"{group}-")), default=None)
    doc = inspect.getdoc(inspect.getmodule(SCENARIOS[first].run)) if first else None
    return f"{group}: {doc.partition(': ')[2].partition('.')[0]}" if doc else group


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
