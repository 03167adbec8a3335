"""
The command line of the suite.

`python -m diator.testing.conformance MODULE:HARNESS [--report FILE] [--require] [-k PATTERN] [--levels CXFS]`
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._harness import EnvironmentMissing, Harness
from diator.testing.conformance._report import Report
from diator.testing.conformance._runner import Result, UnknownScenario, check_harness, explained, run_scenario
from diator.testing.conformance._scenario import LEVELS, Scenario, select

PASSED, FAILED, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite. Return 0 if nothing failed, 1 if something failed, 2 if the arguments are wrong."""
    options = _parser().parse_args(arguments)
    try:
        harness = _harness(options.harness)
        check_harness(harness)
        if unknown := {*options.levels} - LEVELS.keys():
            raise UnknownScenario(f"there are the levels {', '.join(LEVELS)}, not {', '.join(sorted(unknown))}")
        scenarios = select(options.pattern, options.levels)
        if not scenarios:
            raise UnknownScenario(f"no scenario of these levels has a word of {options.pattern!r} in its id or title")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    report = _run(harness, scenarios, options.seed)
    if options.report:
        options.report.write_text(report.as_json(), encoding="utf-8")
    _write(", ".join(f"{count} {outcome}" for outcome, count in report.totals().items() if count))
    missing = options.require and report.broker is None
    _write(report.result())
    return FAILED if report.totals()["FAIL"] or missing else PASSED


def _run(harness: Harness, scenarios: Sequence[Scenario], seed: int | None) -> Report:
    try:
        harness.start()
    except EnvironmentMissing as error:
        _write(f"{harness.name}: no service: {error}")
        absent = [Result(scenario=each, outcome="NOT_RUN", reason=f"no service: {error}") for each in scenarios]
        return Report.of(harness, absent, available=False, capabilities=None)
    try:
        results: list[Result] = []
        for scenario in scenarios:
            results.append(run_scenario(scenario, harness, seed=seed))
            _write(_line(results[-1]))
        return Report.of(harness, results, available=True, capabilities=asyncio.run(_capabilities(harness)))
    finally:
        harness.stop()


async def _capabilities(harness: Harness) -> Capabilities:
    broker = harness.transport()
    try:
        return broker.capabilities
    finally:
        await broker.aclose()


def _line(result: Result) -> str:
    reason = f"  ({result.reason})" if result.reason else ""
    id_ = f"{result.scenario.level} {result.scenario.id:<7}"
    line = f"{result.outcome:<11} {id_} {result.seconds:6.2f} s  {result.scenario.title}{reason}"
    return "\n    ".join([line, *(each.replace("\n", "\n    ") for each in explained(result))])


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _harness(name: str) -> Harness:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    harness = getattr(importlib.import_module(module), attribute)()
    if not isinstance(harness, Harness):
        raise TypeError(f"{name} is not a Harness")
    return harness


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diator.testing.conformance",
        description="Prove that a transport keeps the contract of diator.",
        epilog="The exit code is 0 if nothing failed, 1 if something failed, 2 if the arguments are wrong.",
    )
    parser.add_argument("harness", metavar="MODULE:HARNESS", help="the module and the name of a Harness subclass")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--require", action="store_true", help="fail if the service is not available")
    parser.add_argument(
        "-k",
        dest="pattern",
        default="",
        metavar="PATTERN",
        help="run only the scenarios whose id or title contains one of these words",
    )
    parser.add_argument(
        "--levels",
        default="",
        metavar="CXFS",
        help=f"run only the scenarios of these levels: {'; '.join(map(' '.join, LEVELS.items()))}",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="use the seed of an earlier run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
