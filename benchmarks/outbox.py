"""What an outbox costs and how fast its relay is: on PostgreSQL and RabbitMQ, beside other outboxes and one by hand."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Collection
from typing import Any

from benchmarks import services
from benchmarks.environments import OUTBOX_LIBRARIES
from benchmarks.reports import marked, show

#: How long a transaction may take with diator's outbox, in that of one with an INSERT by hand.
MOST_RATIO = 1.25
#: Messages a second that one relay has to send, with keys and without.
RATES = {100: 3_000, 0: 6_000}
#: What a relay has to send in the time in which the fastest other library sends one message.
LEAST_RATIO = 3.0
#: The median time from a commit to its confirmed send, in seconds, at 200 commits a second.
LATENCY = 0.005
#: Transactions a second of a relay that has nothing to do.
IDLE = 1.0
#: MiB by which the process may grow over the last nine tenths of a run.
GROWTH = 8.0


def measure(
    libraries: Collection[str], *, rounds: int = 3, rows: int = 20_000, many: int = 1_000_000
) -> dict[str, Any]:
    """Measure, print the tables, and return all figures."""
    with services.running("postgres") as database, services.running("rabbitmq") as broker:

        def ask(library: str, do: str, **options: Any) -> Any:
            order = {"do": do, "database": database, "broker": broker, **options}
            command = OUTBOX_LIBRARIES[library].command
            done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        found: dict[str, Any] = {"store": _store(ask, rounds)}
        found["relay"] = {
            library: {
                str(keys): _rate([ask(library, "relay", rows=rows, keys=keys) for _ in range(rounds)], rows)
                for keys in RATES
            }
            for library in libraries
        }
        judge(found["relay"])
        latency = ask("diator", "other", what="latency", rate=200, count=1_000)
        found["latency"] = {**latency, "met": latency["p50"] <= LATENCY}
        idle = ask("diator", "other", what="idle", seconds=20)
        found["idle"] = {**idle, "met": idle["rate"] <= IDLE}
        if many:
            resident = ask("diator", "other", what="memory", rows=many)["resident_mib"]
            found["memory"] = {"resident_mib": resident, "met": resident[-1] - resident[0] <= GROWTH}
    tell(found, rows, many)
    return found


def judge(relays: dict[str, Any]) -> None:
    """Add to the figures of diator whether they meet their targets."""
    others = [name for name in relays if name not in ("diator", "by hand")]
    for keys, target in RATES.items():
        figure = relays["diator"][str(keys)]
        figure["met"] = figure["rate"] >= target
        if others:
            fastest = max(relays[name][str(keys)]["rate"] for name in others)
            figure["ratio"] = {"ratio": figure["rate"] / fastest, "met": figure["rate"] >= LEAST_RATIO * fastest}


def tell(found: dict[str, Any], rows: int, many: int) -> None:
    """Print the tables."""
    relays, stored = found["relay"], found["store"]
    lines = []
    for library, figures in relays.items():
        cells = []
        for keys, target in RATES.items():
            figure = figures[str(keys)]
            text = f"{figure['rate']:,.0f}"
            cells.append(marked(text, target=f"{target:,}", met=figure["met"]) if "met" in figure else text)
            ratio = figure.get("ratio")
            cells.append(marked(f"{ratio['ratio']:.1f}", target=f"{LEAST_RATIO:g}", met=ratio["met"]) if ratio else "")
        lines.append([library, *cells])
    head = ["library", "messages/s with 100 keys", "to the best other", "without keys", "to the best other"]
    show(f"one relay to RabbitMQ with confirms, {rows:,} rows, the best round", head, lines)
    ratio = marked(f"{stored['ratio']:.2f}", target=f"{MOST_RATIO:g}", met=stored["met"])
    milliseconds = [f"{stored[name] * 1e3:.2f}" for name in ("by hand", "diator")]
    lines = [
        ["a transaction with one message, by hand and with diator, in ms", " ".join(milliseconds)],
        ["the one to the other", ratio],
        *_others(found, many),
    ]
    show("diator's outbox", ["what", "figure"], lines)


def _others(found: dict[str, Any], many: int) -> list[list[str]]:
    latency, idle = found["latency"], found["idle"]
    took = f"{latency['p50'] * 1e3:.1f} ms, p99 {latency['p99'] * 1e3:.1f} ms"
    lines = [
        ["from the commit to the confirmed send, 200 a second", marked(took, target="5 ms", met=latency["met"])],
        ["transactions a second of an idle relay", marked(f"{idle['rate']:.2f}", target="1", met=idle["met"])],
    ]
    if memory := found.get("memory"):
        grown = memory["resident_mib"][-1] - memory["resident_mib"][0]
        text = marked(f"{grown:+.1f} MiB", target=f"{GROWTH:g}", met=memory["met"])
        lines.append([f"growth over the last nine tenths of {many:,} messages", text])
    return lines


def _store(ask: Any, rounds: int) -> dict[str, Any]:
    """Measure the two in turns, and compare the medians of their rounds."""
    seconds: dict[str, list[float]] = {"by hand": [], "diator": []}
    for _ in range(rounds):
        for library, measured in seconds.items():
            measured.extend(ask(library, "store", rounds=3, transactions=300)["seconds"])
    medians = {library: statistics.median(measured) for library, measured in seconds.items()}
    ratio = medians["diator"] / medians["by hand"]
    return {**medians, "ratio": ratio, "met": ratio <= MOST_RATIO}


def _rate(measured: Collection[dict[str, float]], rows: int) -> dict[str, Any]:
    rates = [rows / each["seconds"] for each in measured]
    return {"rate": max(rates), "rates": rates}
