"""Run scenarios, each on its own event loop, and return their results."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, TypeAlias, TypeVar

from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Deviation, EnvironmentMissing, Harness
from diator.testing.conformance._ledger import Nonconformance, NotApplicable
from diator.testing.conformance._places import in_scenario, in_transport, place
from diator.testing.conformance._refusals import verify_refusal
from diator.testing.conformance._rules import rule, rule_of
from diator.testing.conformance._scenario import SCENARIOS, Scenario
from diator.testing.conformance._shape import check_broker
from diator.testing.conformance._watchdog import Watchdog

T = TypeVar("T")

Outcome: TypeAlias = Literal["PASS", "FAIL", "UNSUPPORTED", "NOT_RUN", "DEVIATION", "PROVISIONAL"]

_GRACE = 2.0
"""How many seconds a cancelled scenario has to end."""
_MOST_CANCELLATIONS = 50
NOTHING_REMAINS = "aclose: Nothing remains:"
"""The rule that a task or file breaks which is left behind."""


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
        observed: What was sent, received and handled until the failure.
        capabilities: What the transport promised; None if the scenario failed before it was asked.
        applicable: False if the scenario has nothing to prove for this transport.
    """

    scenario: Scenario
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    seed: int = 0
    error: BaseException | None = field(default=None, repr=False)
    observed: str = ""
    capabilities: Capabilities | None = field(default=None, repr=False)
    applicable: bool = True


def run_suite(harness: Harness, scenarios: Iterable[Scenario], *, seed: int | None = None) -> list[Result]:
    """
    Start *harness*, run *scenarios* against it and stop it. Return one result for each scenario.

    If the environment is missing, every result is NOT_RUN.

    Raises:
        UnknownScenario: A deviation names a scenario that does not exist, or has no reason.
    """
    check_harness(harness)
    try:
        harness.start()
    except EnvironmentMissing as missing:
        return [Result(scenario=each, outcome="NOT_RUN", reason=f"no service: {missing}") for each in scenarios]
    try:
        return [run_scenario(each, harness, seed=seed) for each in scenarios]
    finally:
        harness.stop()


def check_harness(harness: Harness) -> None:
    """Raise `UnknownScenario` if *harness* declares a wrong deviation, or a facility that no scenario knows."""
    check_deviations(harness.deviations)
    known = {facility for each in SCENARIOS.values() for facility in each.facilities}
    if unknown := sorted(harness.facilities - known):
        raise UnknownScenario(
            f"no scenario knows the facility {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )


def check_deviations(deviations: Mapping[str, Deviation]) -> None:
    """Raise `UnknownScenario` if one of *deviations* names no existing scenario or has no reason."""
    if unknown := sorted(deviations.keys() - SCENARIOS.keys()):
        raise UnknownScenario(f"a deviation is declared for {', '.join(unknown)}, but no such scenario exists")
    if silent := sorted(id_ for id_, deviation in deviations.items() if not deviation.reason.strip()):
        raise UnknownScenario(f"the deviation for {', '.join(silent)} has no reason")


def run_scenario(
    scenario: Scenario,
    harness: Harness,
    *,
    seed: int | None = None,
    uncaptured: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
) -> Result:
    """
    Run *scenario* against *harness*, which must be started, and return its result.

    If the transport blocks the event loop in a call that cannot be interrupted, the process ends, with an error that is
    written to standard error inside *uncaptured*.

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
    result = _strictly(_run(scenario, harness, seed, uncaptured), harness.deviations.get(scenario.id))
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


def _run(scenario: Scenario, harness: Harness, seed: int, uncaptured: AbstractContextManager[object]) -> Result:
    outcome: list[tuple[Outcome, str]] = []
    problems: list[str] = []
    contexts: list[Context] = []
    watchdog = Watchdog(scenario.id, harness.limits.standstill, uncaptured)

    async def run(resources: AsyncExitStack) -> None:
        broker = harness.transport()
        check_broker(broker)
        resources.push_async_callback(broker.aclose)
        capabilities = broker.capabilities
        context = Context(harness, capabilities, seed=seed, resources=resources)
        contexts.append(context)
        if lacks := capabilities.missing(scenario.needs):
            try:
                await verify_refusal(context, scenario.needs)
            except Nonconformance as error:
                error.rule = "Capabilities: Each field defaults"
                raise
            outcome.append(("UNSUPPORTED", f"not promised: {'; '.join(lacks)}"))
        else:
            await scenario.run(context)

    async def within_deadline() -> None:
        files, threads = open_files(), threading.active_count()
        watchdog.listen(asyncio.get_running_loop())
        asyncio.get_running_loop().set_default_executor(_Threads())
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(_description(context)))
        await _bounded(run, scenario.timeout * harness.limits.scale)
        contexts.clear()  # so that the garbage collection below finds what the scenario has left
        await _no_task_is_left()
        await _ended(files, threads)

    try:
        with watchdog.watching(), _nothing_left_open(problems), _collecting_only_what_is_new():
            with asyncio.Runner() as runner:
                runner.run(within_deadline())
                gc.collect()  # unretrieved errors and unclosed resources are reported while they are recorded
            gc.collect()
        _raise_problems(problems, watchdog.error)
    except NotApplicable as error:
        return Result(scenario=scenario, outcome="NOT_RUN", reason=f"not applicable: {error}", applicable=False)
    except EnvironmentMissing as error:
        return Result(scenario=scenario, outcome="NOT_RUN", reason=f"not available: {error}")
    except Exception as raised:  # noqa: BLE001  # any error is a failure
        failure = watchdog.error or raised  # the call that was interrupted may raise another one
        observed = contexts[0].summary() if contexts else ""
        return Result(
            scenario=scenario,
            outcome="FAIL",
            reason=_reason(failure),
            error=failure,
            observed=observed,
            capabilities=contexts[0].capabilities if contexts else None,
        )
    result, reason = outcome[0] if outcome else ("PASS", "")
    return Result(scenario=scenario, outcome=result, reason=reason)


class _Threads(ThreadPoolExecutor):
    """Runs each call in a thread of its own, so that a call that never ends stops neither the suite nor its process."""

    def submit(self, call: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        """Call *call* in a new thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = call(*args, **named)
            except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
                future.set_exception(error)
            else:
                future.set_result(result)

        future.set_running_or_notify_cancel()
        threading.Thread(target=run, name="asyncio.to_thread", daemon=True).start()
        return future


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
        where = place(_waiting(task.get_coro()))
        for _ in range(_MOST_CANCELLATIONS):  # each ends one nested wait, such as a close after another close
            task.cancel()
            if (await asyncio.wait({task}, timeout=_GRACE / _MOST_CANCELLATIONS))[0]:
                break
        raise Nonconformance(
            f"not done after {seconds:g} s, and it cannot be cancelled; it waits in {where}",
            rule="MessageBroker: A cancelled call",
        )
    try:
        await task
    except BaseException as error:  # noqa: BLE001  # it was cancelled where it waited
        frames = traceback.extract_tb(error.__traceback__)
        cause = None if isinstance(error, asyncio.CancelledError) else error
        raise Nonconformance(f"not done after {seconds:g} s; it waited in {place(frames)}") from cause


def _waiting(coroutine: Any) -> list[traceback.FrameSummary]:
    """Return the lines in which *coroutine* waits, the innermost one last, as far as Python shows them."""
    frames: list[traceback.FrameSummary] = []
    while inspect.iscoroutine(coroutine) and coroutine.cr_frame is not None:
        frames += traceback.StackSummary.extract([(coroutine.cr_frame, coroutine.cr_frame.f_lineno)])
        coroutine = coroutine.cr_await
    return frames


async def _no_task_is_left() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # a task that is ending may take a moment
        _, left = await asyncio.wait(left, timeout=2)
    if left:
        names = ", ".join(sorted(getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left))
        raise Nonconformance(f"tasks are still running: {names}", rule=NOTHING_REMAINS)


async def _ended(files: set[str], threads: int) -> None:
    """Wait a moment for files and threads that are closing, as after a TLS shutdown or the end of a process."""
    for _ in range(200):
        if open_files() <= files and threading.active_count() <= threads:
            return
        await asyncio.sleep(0.01)


@contextmanager
def _nothing_left_open(problems: list[str]) -> Generator[None, None, None]:
    files, threads = open_files(), {*threading.enumerate()}
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
    if running := {*threading.enumerate()} - threads:
        frames = sys._current_frames()  # noqa: SLF001  # public, in spite of its name
        stacks = [(each.name, traceback.extract_stack(frames[each.ident])) for each in running if each.ident in frames]
        places = sorted(f"{name} in {in_transport(stack) or 'an unknown place'}" for name, stack in stacks)
        problems.append(f"{len(running)} threads are still running: {', '.join(places)}")


@contextmanager
def _collecting_only_what_is_new() -> Generator[None, None, None]:
    """Limit garbage collections to new objects. Two full collections would take most of a scenario's time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raise_problems(problems: list[str], blocked: Nonconformance | None) -> None:
    if blocked is not None:
        raise blocked
    if problems:
        raise Nonconformance("; ".join(dict.fromkeys(problems)), rule=NOTHING_REMAINS)


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
    if (error := context.get("exception")) is None:
        return str(context["message"])
    raised_in = in_transport(traceback.extract_tb(error.__traceback__))
    return f"{context['message']}: {error!r}" + (f" in {raised_in}" if raised_in else "")


def _reason(error: BaseException) -> str:
    if isinstance(error, Nonconformance):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, NotImplementedError) and frames[-1].filename == inspect.getfile(Harness):
        return f"the harness names a facility and does not write its method {frames[-1].name}"
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text} in {place(frames)}"


def explained(result: Result) -> list[str]:
    """
    Return what the author of a transport needs to know about a failure, as lines.

    These are: where the scenario failed; each cause of its error, with its place; what had happened until then; the
    rule of the contract that is broken, and where it stands; and the defects that the scenario catches.
    """
    if (error := result.error) is None:
        return []
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"at {in_scenario(frames)}"] if frames and frames[-1].filename != __file__ else []
    lines += getattr(error, "__notes__", ())
    broken = error.rule if isinstance(error, Nonconformance) else ""
    while (error := error.__cause__) is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines.append(f"because of {error!r} in {in_transport(frames) or in_scenario(frames)}")
    if result.observed:
        lines.append(f"until then: {result.observed}")
    contract = rule(broken) if broken else rule_of(result.scenario.id)
    lines += [f"the contract: {contract.text}", f"    {contract.place}; {contract.guide}"]
    promise = contract.text.partition(":")[0]
    if contract.place.startswith("Capabilities,") and hasattr(result.capabilities, promise):
        lines.append(f"    this transport promises {promise}={getattr(result.capabilities, promise)!r}")
    if contract.place.startswith(("Consumer,", "Health,")):
        lines.append("    the consumer is diator's: look at what it calls, the iterator of `subscribe` and the settler")
    return [*lines, f"the scenario: {' '.join(result.scenario.catches.split())}"]
