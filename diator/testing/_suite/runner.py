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
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from diator._text import counted
from diator.testing._suite.environment import Deviation, Environment, EnvironmentMissing
from diator.testing._suite.errors import Nonconformance, NotApplicable
from diator.testing._suite.places import in_scenario, in_tested, place
from diator.testing._suite.report import BaseReport, Outcome, Result
from diator.testing._suite.rules import Contract
from diator.testing._suite.scenario import Catalogue, Level, Scenario
from diator.testing._suite.watchdog import Watchdog

T = TypeVar("T")
H = TypeVar("H", bound=Environment)

_GRACE = 2.0
"""How many seconds a cancelled scenario has to end."""
_MOST_CANCELLATIONS = 50


class UnknownScenario(ValueError):
    """A deviation names a scenario that does not exist."""


class Observed(Protocol):
    """The context of a scenario, as far as the runner uses it."""

    def summary(self) -> str:
        """Say what has happened in the scenario so far."""
        ...


H_contra = TypeVar("H_contra", bound=Environment, contravariant=True)


class RunScenario(Protocol[H_contra]):
    """As `Suite.run_scenario`."""

    def __call__(
        self,
        scenario: Scenario,
        harness: H_contra,
        *,
        seed: int | None = None,
        uncaptured: AbstractContextManager[object] = ...,
    ) -> Result: ...


class RunSuite(Protocol[H_contra]):
    """As `Suite.run_suite`."""

    def __call__(
        self, harness: H_contra, scenarios: Iterable[Scenario], *, seed: int | None = None
    ) -> list[Result]: ...


class Suite(ABC, Generic[H]):
    """
    A conformance suite: its catalogue of scenarios, the contract that they prove, and how they reach what they test.

    Attributes:
        module: The module that is its command line.
        version: The version of the catalogue. It changes whenever a scenario requires something new.
        proves: What the suite proves, for the command line.
        levels: The kinds of scenarios.
        catalogue: The scenarios.
        contract: The rules that they prove.
        harness: The class that a harness is derived from.
        never_blocks, cancelled, nothing_remains: The rules that anything may break: by a call that blocks the event
            loop, by one that cannot be cancelled, and by a task or file that is left behind.
    """

    module: ClassVar[str]
    version: ClassVar[str]
    proves: ClassVar[str]
    levels: ClassVar[Mapping[Level, str]]
    catalogue: ClassVar[Catalogue]
    contract: ClassVar[Contract]
    harness: ClassVar[type[Environment]]
    never_blocks: ClassVar[str]
    cancelled: ClassVar[str]
    nothing_remains: ClassVar[str]

    @abstractmethod
    async def open(self, harness: H, seed: int, resources: AsyncExitStack) -> Observed:
        """Return the context of a scenario, whose resources are closed with *resources*."""

    async def lacks(self, context: Any, scenario: Scenario) -> Sequence[str]:
        """Return what is not promised and *scenario* needs. Raise `Nonconformance` if that is not refused."""
        return ()

    @abstractmethod
    def report(self, harness: H, results: Sequence[Result], *, available: bool) -> BaseReport:
        """Return the report on *results*. *available* is whether the service was available."""

    def run_suite(self, harness: H, scenarios: Iterable[Scenario], *, seed: int | None = None) -> list[Result]:
        """
        Start *harness*, run *scenarios* against it and stop it. Return one result for each scenario.

        If the environment is missing, every result is NOT_RUN.

        Raises:
            UnknownScenario: A deviation names a scenario that does not exist, or has no reason.
        """
        self.check_harness(harness)
        try:
            harness.start()
        except EnvironmentMissing as missing:
            return [Result(scenario=each, outcome="NOT_RUN", reason=f"no service: {missing}") for each in scenarios]
        try:
            return [self.run_scenario(each, harness, seed=seed) for each in scenarios]
        finally:
            harness.stop()

    def check_harness(self, harness: H) -> None:
        """
        Check what *harness* declares, before anything runs.

        Raises:
            TypeError: It has no name.
            UnknownScenario: A deviation is wrong, or no scenario knows a facility.
        """
        if not getattr(harness, "name", ""):
            raise TypeError(f"{type(harness).__name__} has no name: set its class attribute `name`, for the report")
        self.check_deviations(harness.deviations)
        known = {facility for each in self.catalogue.values() for facility in each.facilities}
        if unknown := sorted(harness.facilities - known):
            raise UnknownScenario(
                f"no scenario knows the facility {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )

    def check_deviations(self, deviations: Mapping[str, Deviation]) -> None:
        """Raise `UnknownScenario` if one of *deviations* names no existing scenario or has no reason."""
        if unknown := sorted(deviations.keys() - self.catalogue.keys()):
            raise UnknownScenario(f"a deviation is declared for {', '.join(unknown)}, but no such scenario exists")
        if silent := sorted(id_ for id_, deviation in deviations.items() if not deviation.reason.strip()):
            raise UnknownScenario(f"the deviation for {', '.join(silent)} has no reason")

    def run_scenario(
        self,
        scenario: Scenario,
        harness: H,
        *,
        seed: int | None = None,
        uncaptured: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> Result:
        """
        Run *scenario* against *harness*, which must be started, and return its result.

        If what is tested blocks the event loop in a call that cannot be interrupted, the process ends, with an error
        that is written to standard error inside *uncaptured*.

        Every scenario also has to leave nothing behind: no task, thread, open file or unclosed resource, and no
        unretrieved error. A provisional scenario that fails is PROVISIONAL instead of FAIL, unless
        DIATOR_CONFORMANCE_STRICT is set in the environment, as it is in the tests of diator.
        """
        seed = random.randrange(2**32) if seed is None else seed  # noqa: S311
        started = perf_counter()
        if missing := sorted(scenario.facilities - harness.facilities):
            reason = f"the harness has no facility {', '.join(missing)}"
            return Result(scenario=scenario, outcome="NOT_RUN", reason=reason, seed=seed)
        for facility in sorted(scenario.facilities):
            try:
                harness.prepare(facility)
            except EnvironmentMissing as error:
                reason = f"facility {facility} is not available: {error}"
                return Result(scenario=scenario, outcome="NOT_RUN", reason=reason, seed=seed)
        result = _strictly(self._run(scenario, harness, seed, uncaptured), harness.deviations.get(scenario.id))
        if result.outcome == "FAIL" and scenario.provisional and not os.environ.get("DIATOR_CONFORMANCE_STRICT"):
            result = replace(
                result,
                outcome="PROVISIONAL",
                reason=f"new in {scenario.since}, and a failure from the next minor release on: {result.reason}",
            )
        return replace(result, seconds=perf_counter() - started, seed=seed)

    def _run(self, scenario: Scenario, harness: H, seed: int, uncaptured: AbstractContextManager[object]) -> Result:
        outcome: list[tuple[Outcome, str]] = []
        problems: list[str] = []
        contexts: list[Observed] = []
        watchdog = Watchdog(scenario.id, harness.limits.standstill, uncaptured, rule=self.never_blocks)

        async def run(resources: AsyncExitStack) -> None:
            context = await self.open(harness, seed, resources)
            contexts.append(context)
            if lacks := await self.lacks(context, scenario):
                outcome.append(("UNSUPPORTED", f"not promised: {'; '.join(lacks)}"))
            else:
                await scenario.run(context)

        async def within_deadline() -> None:
            files, threads = open_files(), threading.active_count()
            watchdog.listen(asyncio.get_running_loop())
            asyncio.get_running_loop().set_default_executor(_Threads())
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(_description(context)))
            await _bounded(run, scenario.timeout * harness.limits.scale, self.cancelled)
            contexts.clear()  # so that the garbage collection below finds what the scenario has left
            await _no_task_is_left(self.nothing_remains)
            await _ended(files, threads)

        try:
            with watchdog.watching(), _nothing_left_open(problems), _collecting_only_what_is_new():
                with asyncio.Runner() as runner:
                    runner.run(within_deadline())
                    gc.collect()  # unretrieved errors and unclosed resources are reported while they are recorded
                gc.collect()
            _raise_problems(problems, watchdog.error, self.nothing_remains)
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
                reason=_reason(failure, type(self).harness),
                error=failure,
                observed=observed,
                capabilities=getattr(contexts[0], "capabilities", None) if contexts else None,
            )
        result, reason = outcome[0] if outcome else ("PASS", "")
        return Result(scenario=scenario, outcome=result, reason=reason)

    def explained(self, result: Result) -> list[str]:
        """
        Return what the author of a transport or store needs to know about a failure, as lines.

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
            lines.append(f"because of {error!r} in {in_tested(frames) or in_scenario(frames)}")
        if result.observed:
            lines.append(f"until then: {result.observed}")
        contract = self.contract.rule(broken) if broken else self.contract.rule_of(result.scenario.id)
        lines += [f"the contract: {contract.text}", f"    {contract.place}; {contract.guide}"]
        promise = contract.text.partition(":")[0]
        if contract.place.startswith("Capabilities,") and hasattr(result.capabilities, promise):
            promised = getattr(result.capabilities, promise)
            levels = f"{{{', '.join(sorted(promised))}}}" if isinstance(promised, AbstractSet) else repr(promised)
            lines.append(f"    this transport promises {promise}={levels}")
        if contract.place.startswith(("Consumer,", "Health,")):
            lines.append(
                "    the consumer is diator's: look at what it calls, the iterator of `subscribe` and the settler"
            )
        return [*lines, f"the scenario: {' '.join(result.scenario.catches.split())}"]


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


async def _bounded(run: Any, seconds: float, cancelled: str) -> None:
    """Run *run* and close its resources within *seconds*. Cancel it when the time is over: *cancelled* is a rule."""

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
            rule=cancelled,
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


async def _no_task_is_left(rule: str) -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # a task that is ending may take a moment
        _, left = await asyncio.wait(left, timeout=2)
    if left:
        names = ", ".join(sorted(getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left))
        raise Nonconformance(f"tasks are still running: {names}", rule=rule)


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
        problems.append(f"{counted(len(left), 'file is', 'files are')} still open: {', '.join(sorted(left))}")
    if running := {*threading.enumerate()} - threads:
        frames = sys._current_frames()  # noqa: SLF001  # public, in spite of its name
        stacks = [(each.name, traceback.extract_stack(frames[each.ident])) for each in running if each.ident in frames]
        places = sorted(f"{name} in {in_tested(stack) or 'an unknown place'}" for name, stack in stacks)
        problems.append(f"{counted(len(running), 'thread is', 'threads are')} still running: {', '.join(places)}")


@contextmanager
def _collecting_only_what_is_new() -> Generator[None, None, None]:
    """Limit garbage collections to new objects. Two full collections would take most of a scenario's time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raise_problems(problems: list[str], blocked: Nonconformance | None, rule: str) -> None:
    if blocked is not None:
        raise blocked
    if problems:
        raise Nonconformance("; ".join(dict.fromkeys(problems)), rule=rule)


def open_files() -> set[str]:
    """Return the open sockets, files and so on of this process; empty on systems without /proc."""
    found: set[str] = set()
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115
                if not target.startswith(("/dev/", "/proc/")):  # libraries keep those, such as /dev/urandom
                    found.add(f"{number} {target}")
    return found


def _description(context: dict[str, Any]) -> str:
    if (error := context.get("exception")) is None:
        return str(context["message"])
    raised_in = in_tested(traceback.extract_tb(error.__traceback__))
    return f"{context['message']}: {error!r}" + (f" in {raised_in}" if raised_in else "")


def _reason(error: BaseException, harness: type[Environment]) -> str:
    if isinstance(error, Nonconformance):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, NotImplementedError) and frames[-1].filename == inspect.getfile(harness):
        return f"the harness names a facility and does not write its method {frames[-1].name}"
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text} in {place(frames)}"
