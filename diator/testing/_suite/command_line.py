"""The command line of a suite."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diator.testing._suite.environment import EnvironmentMissing
from diator.testing._suite.report import BaseReport, Result
from diator.testing._suite.runner import Suite, UnknownScenario
from diator.testing._suite.scenario import Scenario

PASSED, FAILED, USAGE = 0, 1, 2


def run(suite: Suite[Any], arguments: Sequence[str] | None = None) -> int:
    """Run *suite*. Return 0 if nothing failed, 1 if something failed, 2 if the arguments are wrong."""
    options = _parser(suite).parse_args(arguments)
    try:
        harness = _harness(suite, options.harness)
        suite.check_harness(harness)
        if unknown := {*options.levels} - suite.levels.keys():
            raise UnknownScenario(f"there are the levels {', '.join(suite.levels)}, not {', '.join(sorted(unknown))}")
        scenarios = suite.catalogue.select(options.pattern, options.levels)
        if not scenarios:
            raise UnknownScenario(f"no scenario of these levels has a word of {options.pattern!r} in its id or title")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    report = _run(suite, harness, scenarios, options.seed)
    if options.report:
        options.report.write_text(report.as_json(), encoding="utf-8")
    _write(", ".join(f"{count} {outcome}" for outcome, count in report.totals().items() if count))
    missing = options.require and not report.is_available
    _write(report.result())
    return FAILED if report.totals()["FAIL"] or missing else PASSED


def _run(suite: Suite[Any], harness: Any, scenarios: Sequence[Scenario], seed: int | None) -> BaseReport:
    try:
        harness.start()
    except EnvironmentMissing as error:
        _write(f"{harness.name}: no service: {error}")
        absent = [Result(scenario=each, outcome="NOT_RUN", reason=f"no service: {error}") for each in scenarios]
        return suite.report(harness, absent, available=False)
    try:
        results: list[Result] = []
        for scenario in scenarios:
            results.append(suite.run_scenario(scenario, harness, seed=seed))
            _write(_line(suite, results[-1]))
        return suite.report(harness, results, available=True)
    finally:
        harness.stop()


def _line(suite: Suite[Any], result: Result) -> str:
    reason = f"  ({result.reason})" if result.reason else ""
    id_ = f"{result.scenario.level} {result.scenario.id:<7}"
    line = f"{result.outcome:<11} {id_} {result.seconds:6.2f} s  {result.scenario.title}{reason}"
    return "\n    ".join([line, *(each.replace("\n", "\n    ") for each in suite.explained(result))])


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _harness(suite: Suite[Any], name: str) -> object:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    harness = getattr(importlib.import_module(module), attribute)()
    if not isinstance(harness, suite.harness):
        raise TypeError(f"{name} is not a {suite.harness.__name__}")
    return harness


def _parser(suite: Suite[Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {suite.module}",
        description=suite.proves,
        epilog="The exit code is 0 if nothing failed, 1 if something failed, 2 if the arguments are wrong.",
    )
    parser.add_argument(
        "harness", metavar="MODULE:HARNESS", help=f"the module and the name of a {suite.harness.__name__} subclass"
    )
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
        help=f"run only the scenarios of these levels: {'; '.join(map(' '.join, suite.levels.items()))}",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="use the seed of an earlier run")
    return parser
