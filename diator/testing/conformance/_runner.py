"""Run scenarios, each on its own event loop, and return their results."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, TypeAlias

from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Deviation, EnvironmentMissing, Harness
from diator.testing.conformance._ledger import Nonconformance, NotApplicable
from diator.testing.conformance._refusals import verify_refusal
from diator.testing.conformance._scenario import SCENARIOS, Scenario

Outcome: TypeAlias = Literal["PASS", "FAIL", "UNSUPPORTED", "NOT_RUN", "DEVIATION", "PROVISIONAL"]

_GRACE = 2.0
"""How many seconds a cancelled scenario has to end."""
_MOST_CANCELLATIONS = 50


class UnknownScenario(ValueError):
    """A deviation names a scenario that does not exist."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    The result of one scenario.

    Attributes:
        scenario: The scenario.
        outcome: How the scenario ended.
        reason: Why the outcome is not a pass; empty for a pass.
        seconds: How long the scenario took.
        seed: The seed of the run.
        error: The error of a failure.
        applicable: False if the scenario has nothing to prove for this transport.
    """

    scenario: Scenario
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    seed: int = 0
    error: BaseException | None = field(default=None, repr=False)
    applicable: bool = True


def run_suite(harness: Harness, scenarios: Iterable[Scenario], *, seed: int | None = None) -> list[Result]:
    """
    Start *harness*, run *scenarios* against it and stop it. Return one result for each scenario.

    If the environment is missing, every result is NOT_RUN.

    Raises:
        UnknownScenario: A deviation names a scenario that does not exist, or has no reason.
    """
    check_deviations(harness.deviations)
    try:
        harness.start()
    except EnvironmentMissing as missing:
        return [Result(scenario=each, outcome="NOT_RUN", reason=f"no service: {missing}") for each in scenarios]
    try:
        return [run_scenario(each, harness, seed=seed) for each in scenarios]
    finally:
        harness.stop()


def check_deviations(deviations: Mapping[str, Deviation]) -> None:
    """Raise `UnknownScenario` if one of *deviations* names no existing scenario or has no reason."""
    if unknown := sorted(deviations.keys() - SCENARIOS.keys()):
        raise UnknownScenario(f"a deviation is declared for {', '.join(unknown)}, but no such scenario exists")
    if silent := sorted(id_ for id_, deviation in deviations.items() if not deviation.reason.strip()):
        raise UnknownScenario(f"the deviation for {', '.join(silent)} has no reason")


def run_scenario(scenario: Scenario, harness: Harness, *, seed: int | None = None) -> Result:
    """
    Run *scenario* against *harness*, which must be started, and return its result.

    Every scenario also has to leave nothing behind: no task, thread, open file or unclosed resource, and no unretrieved
    error. A provisional scenario that fails is PROVISIONAL instead of FAIL, unless DIATOR_CONFORMANCE_STRICT is set in
    the environment, as it is in the tests of diator.
    """
    seed = random.randrange(2**32) if seed is None else seed  # noqa: S311
    started = perf_counter()
    if missing := sorted(scenario.facilities - harness.facilities):
        return Result(
            scenario=scenario, outcome="NOT_RUN", reason=f"the harness has no facility {', '.join(missing)}", seed=seed
        )
    for facility in sorted(scenario.facilities):
        try:
            harness.prepare(facility)
        except EnvironmentMissing as error:
            return Result(
                scenario=scenario, outcome="NOT_RUN", reason=f"facility {facility} is not available: {error}", seed=seed
            )
    result = _strictly(_run(scenario, harness, seed), harness.deviations.get(scenario.id))
    if result.outcome == "FAIL" and scenario.provisional and not os.environ.get("DIATOR_CONFORMANCE_STRICT"):
        result = replace(
            result,
            outcome="PROVISIONAL",
            reason=f"new in {scenario.since}, and a failure from the next minor release on: {result.reason}",
        )
    return replace(result, seconds=perf_counter() - started, seed=seed)


def _strictly(result: Result, deviation: Deviation | None) -> Result:
    """Apply *deviation*. A deviation that is not needed, or that fails in another way than declared, is a failure."""
    if deviation is None or result.outcome == "NOT_RUN" or (deviation.sometimes and result.outcome == "PASS"):
        return result
    if result.outcome != "FAIL":
        reason = (
            f"a deviation is declared ({deviation.reason}), but the outcome is {result.outcome}; remove the deviation"
        )
        return replace(result, outcome="FAIL", reason=reason, error=Nonconformance(reason))
    if isinstance(result.error, deviation.raises):
        issue = f", {deviation.issue}" if deviation.issue else ""
        return replace(result, outcome="DEVIATION", reason=f"{deviation.reason}{issue} [{result.reason}]", error=None)
    return replace(
        result,
        reason=f"a deviation with {deviation.raises.__name__} is declared, but it fails otherwise: {result.reason}",
    )


def _run(scenario: Scenario, harness: Harness, seed: int) -> Result:
    outcome: list[tuple[Outcome, str]] = []
    problems: list[str] = []

    async def run(resources: AsyncExitStack) -> None:
        broker = harness.transport()
        resources.push_async_callback(broker.aclose)
        capabilities = broker.capabilities
        context = Context(harness, capabilities, seed=seed, resources=resources)
        if lacks := capabilities.missing(scenario.needs):
            await verify_refusal(context, scenario.needs)
            outcome.append(("UNSUPPORTED", f"not promised: {'; '.join(lacks)}"))
        else:
            await scenario.run(context)

    async def within_deadline() -> None:
        files, threads = open_files(), threading.active_count()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(_description(context)))
        await _bounded(run, scenario.timeout * harness.limits.scale)
        await _no_task_is_left()
        await _ended(files, threads)

    try:
        with _nothing_left_open(problems), _collecting_only_what_is_new():
            with asyncio.Runner() as runner:
                runner.run(within_deadline())
                gc.collect()  # unretrieved errors and unclosed resources are reported while they are recorded
            gc.collect()
        _raise_problems(problems)
    except NotApplicable as error:
        return Result(scenario=scenario, outcome="NOT_RUN", reason=f"not applicable: {error}", applicable=False)
    except EnvironmentMissing as error:
        return Result(scenario=scenario, outcome="NOT_RUN", reason=f"not available: {error}")
    except Exception as error:  # noqa: BLE001  # any error is a failure
        return Result(scenario=scenario, outcome="FAIL", reason=_reason(error), error=error)
    result, reason = outcome[0] if outcome else ("PASS", "")
    return Result(scenario=scenario, outcome=result, reason=reason)


async def _bounded(run: Any, seconds: float) -> None:
    """Run *run* and close its resources, all within *seconds*. Cancel it when the time is over."""

    async def scenario() -> None:
        async with AsyncExitStack() as resources:
            await run(resources)

    task = asyncio.create_task(scenario(), name="scenario")
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if done:
        return task.result()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=min(_GRACE, seconds))
    if not done:
        for _ in range(_MOST_CANCELLATIONS):  # each ends one nested wait, such as a close after another close
            task.cancel()
            if (await asyncio.wait({task}, timeout=_GRACE / _MOST_CANCELLATIONS))[0]:
                break
        raise Nonconformance(f"not done after {seconds:g} s, and it cannot be cancelled")
    try:
        await task
    except BaseException as error:  # it was cancelled where it waited
        raise Nonconformance(f"not done after {seconds:g} s; it waited in {_place(error)}") from error


async def _no_task_is_left() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # a task that is ending may take a moment
        _, left = await asyncio.wait(left, timeout=2)
    if left:
        names = ", ".join(sorted(getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left))
        raise Nonconformance(f"tasks are still running: {names}")


async def _ended(files: set[str], threads: int) -> None:
    """Wait a moment for files and threads that are closing, as after a TLS shutdown or the end of a process."""
    for _ in range(200):
        if open_files() <= files and threading.active_count() <= threads:
            return
        await asyncio.sleep(0.01)


@contextmanager
def _nothing_left_open(problems: list[str]) -> Generator[None, None, None]:
    files, threads = open_files(), threading.active_count()
    hook = sys.unraisablehook
    sys.unraisablehook = lambda raised: problems.append(f"an unraisable error: {raised.exc_value!r}")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ResourceWarning)
            warnings.filterwarnings("always", message="coroutine .* was never awaited")
            yield
    finally:
        sys.unraisablehook = hook
    problems.extend(f"{each.category.__name__}: {each.message}" for each in warned)
    if left := open_files() - files:
        problems.append(f"{len(left)} files are still open: {', '.join(sorted(left))}")
    if threading.active_count() > threads:
        problems.append(f"{threading.active_count() - threads} threads are still running")


@contextmanager
def _collecting_only_what_is_new() -> Generator[None, None, None]:
    """Limit garbage collections to new objects. Two full collections would take most of a scenario's time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise Nonconformance("; ".join(dict.fromkeys(problems)))


def open_files() -> set[str]:
    """Return the open sockets, pipes and so on of this process; empty on systems without /proc."""
    found: set[str] = set()
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115
                if not target.startswith("/"):
                    found.add(f"{number} {target}")
    return found


def _description(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context['message']}: {error!r}" if error else str(context["message"])


def _reason(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, Nonconformance) else f"{type(error).__name__}: {text} in {_place(error)}"


def explained(error: BaseException) -> list[str]:
    """Return where a scenario failed, and each cause of its error with its place, as lines for a person."""
    lines = [f"at {_place(error)}"] if error.__traceback__ else []
    while (error := error.__cause__) is not None:  # type: ignore[assignment]
        lines.append(f"because of {error!r} in {_place(error)}")
    return lines


def _place(error: BaseException) -> str:
    """Return the line of the scenario that raised *error*, rather than the line of a function that it called."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "scenarios" in frame.filename] or [*frames]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} `{own[-1].line}`" if own else "an unknown place"  # noqa: PTH119
