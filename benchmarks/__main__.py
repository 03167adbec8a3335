"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import brokers, comparison, hostile, imports, memory, outbox, skew, telemetry
from benchmarks.environments import BROKER_LIBRARIES, CACHE, LIBRARIES, OUTBOX_LIBRARIES
from benchmarks.reports import keep
from benchmarks.worker.workloads import WORKLOADS


def main() -> int:
    options = parsed()
    if options.smoke:
        return smoke(options)
    match options.benchmark:
        case "imports":
            results = imports.measure()
        case "memory":
            results = memory.measure()
        case "hostile":
            results = hostile.measure(options.transports or hostile.TRANSPORTS, flood=options.messages)
        case "skew":
            results = skew.measure(options.transports or skew.TRANSPORTS, rounds=options.rounds)
        case "telemetry":
            results = telemetry.measure(rounds=options.rounds) | telemetry.measure_memory()
        case "outbox":
            results = outbox.measure(
                options.libraries or OUTBOX_LIBRARIES, rounds=options.rounds, rows=options.rows, many=options.many
            )
        case "brokers":
            results = brokers.compare(
                options.transports or brokers.TRANSPORTS,
                options.libraries or BROKER_LIBRARIES,
                options.only or brokers.WORKLOADS,
                brokers.QUICK if options.quick else brokers.Effort(rounds=options.rounds, messages=options.messages),
            )
        case _:
            results = comparison.compare(
                options.libraries or LIBRARIES,
                options.only or WORKLOADS,
                rounds=3 if options.quick else options.rounds,
                slices=4 if options.quick else 10,
            )
    benchmark = options.benchmark or "workloads"
    keep(options.json or CACHE / f"{benchmark}.json", {benchmark: results})
    return 1 if options.gate and missed(results) else 0


def smoke(options: argparse.Namespace) -> int:
    """Run each benchmark once, tiny: it works. The run measures nothing and installs nothing."""
    if options.benchmark == "brokers":
        here = [name for name, library in BROKER_LIBRARIES.items() if not library.pins]
        faults = brokers.smoke(
            options.transports or brokers.TRANSPORTS, options.libraries or here, options.only or brokers.WORKLOADS
        )
        print("\n".join(faults) or "every message arrived once, and was acknowledged")
        return 1 if faults else 0
    if options.benchmark == "hostile":
        faults = hostile.smoke(options.transports or hostile.TRANSPORTS)
        print("\n".join(faults) or "every message was settled")
        return 1 if faults else 0
    if options.benchmark == "skew":
        faults = skew.smoke(options.transports or skew.TRANSPORTS)
        print("\n".join(faults) or "every message of another key was handled once, in order")
        return 1 if faults else 0
    if options.benchmark == "telemetry":
        telemetry.measure(["diator", "the SDK alone"], rounds=1, messages=100)
        telemetry.measure_memory(messages=2_000)
        print("every message was handled, with telemetry and without")
        return 0
    if options.benchmark == "outbox":
        outbox.measure(["by hand", "diator"], rounds=1, rows=500, many=0)
        print("every message was stored and relayed")
        return 0
    here = [name for name, library in LIBRARIES.items() if not library.pins]
    ran = comparison.smoke(options.libraries or here, options.only or WORKLOADS)
    for name in here:
        if LIBRARIES[name].module and not imports.cost_of(LIBRARIES[name]):
            raise SystemExit(f"{LIBRARIES[name].module} cannot be imported")
    for workload in memory.SENT:
        memory.resident_while_sending(workload, 100)
    print(f"{ran} workloads, the imports and the memory benchmark ran")
    return 0


def parsed() -> argparse.Namespace:
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--json", type=Path, metavar="FILE", help="where to keep the results")
    kept.add_argument("--gate", action="store_true", help="fail if a target is missed")
    smoking = argparse.ArgumentParser(add_help=False)
    smoking.add_argument("--smoke", action="store_true", help="run everything once, tiny: whether it works")

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Without a subcommand: the workloads of all libraries, in one process each.",
        parents=[kept, smoking],
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", type=chosen_from(WORKLOADS), metavar="W1,W3")
    parser.add_argument(
        "--libraries",
        type=chosen_from(LIBRARIES),
        metavar="'diator,diator with rodi'",
        help=f"of: {', '.join(LIBRARIES)}",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds of fewer slices: a look")

    others = parser.add_subparsers(dest="benchmark", title="other benchmarks")
    others.add_parser("imports", help=imports.__doc__, parents=[kept])
    others.add_parser("memory", help=memory.__doc__, parents=[kept])
    transports = others.add_parser("brokers", help=brokers.__doc__, parents=[kept, smoking])
    transports.add_argument(
        "transports", nargs="*", type=one_of(brokers.TRANSPORTS), metavar="memory redis streams rabbitmq kafka"
    )
    transports.add_argument("--rounds", type=int, default=3)
    transports.add_argument("--messages", type=int, default=20_000, help="how many are drained")
    transports.add_argument("--only", type=chosen_from(brokers.WORKLOADS), metavar="P64,C1")
    transports.add_argument("--libraries", type=chosen_from(BROKER_LIBRARIES), metavar="raw,diator")
    transports.add_argument("--quick", action="store_true", help="one round of little: whether it works")
    foreign = others.add_parser("hostile", help=hostile.__doc__, parents=[kept, smoking])
    foreign.add_argument("transports", nargs="*", type=one_of(hostile.TRANSPORTS), metavar="streams rabbitmq kafka")
    foreign.add_argument("--messages", type=int, default=hostile.FLOOD, help="how many are in a flood")
    skewed = others.add_parser("skew", help=skew.__doc__, parents=[kept, smoking])
    skewed.add_argument("transports", nargs="*", type=one_of(skew.TRANSPORTS), metavar="memory streams rabbitmq kafka")
    skewed.add_argument("--rounds", type=int, default=3)
    traced = others.add_parser("telemetry", help=telemetry.__doc__, parents=[kept, smoking])
    traced.add_argument("--rounds", type=int, default=9)
    stored = others.add_parser("outbox", help=outbox.__doc__, parents=[kept, smoking])
    stored.add_argument("--rounds", type=int, default=3)
    stored.add_argument("--rows", type=int, default=20_000, help="how many are relayed")
    stored.add_argument(
        "--many", type=int, default=1_000_000, help="over how many the memory is watched; 0: not at all"
    )
    stored.add_argument("--libraries", type=chosen_from(OUTBOX_LIBRARIES), metavar="diator,txoutbox")
    return parser.parse_args()


def chosen_from(names: Iterable[str]) -> Callable[[str], list[str]]:
    def choose(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(names)}")
        return chosen

    return choose


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    return lambda text: chosen_from(names)(text)[0]


def missed(results: object) -> bool:
    """Return whether *results* contain a missed target."""
    if isinstance(results, dict):
        return results.get("met") is False or any(missed(value) for value in results.values())
    return False


if __name__ == "__main__":
    sys.exit(main())
