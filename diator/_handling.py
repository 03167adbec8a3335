"""Handle one delivery: decode the message, call its handlers, settle the delivery."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeAlias
from uuid import UUID

from diator._deadlines import Deadline, Deadlines
from diator._handlers import PreparedHandler
from diator._hints import name_of
from diator._log import RepeatedLines
from diator._text import printable
from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import Envelope, decode_envelope, event_decoder
from diator.container.base import Build, Resolver, Shared, scopes
from diator.events import EventEmitter, EventMap
from diator.events._emitter import OUTGOING, Outgoing
from diator.events._event import is_integration_event, message_name_of
from diator.exceptions import ConfigurationError, DecodingError, DiatorError, EventHandlersFailed
from diator.middlewares.base import Middleware, chain
from diator.retrying import RetryPolicy

logger: logging.Logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["acked", "retried", "dead_lettered", "given_up", "unsettled"]


@dataclass(frozen=True, kw_only=True)
class Handled:
    """
    The outcome of one delivery. It contains nothing of the message except its id, so it may be logged.

    Attributes:
        topic: The topic that the delivery came from.
        message_id: The id of the message; None if the body could not be decoded.
        attempt: 1 for the first delivery to this consumer group, 2 for the second; always 1 on a transport that does
            not count deliveries.
        outcome: `acked`: every handler succeeded. `retried`: the message was requeued, with a delay. `dead_lettered`:
            the message is in the dead-letter queue. `given_up`: the message could not be handled and is lost, because
            the transport has no dead-letter queue. `unsettled`: the handling was cancelled, or the delivery could
            not be settled; the transport redelivers the message if it can.
        reason: Why the message was not acknowledged; None if it was. It begins with a fixed word and a colon:
            `retries-exhausted` (with `retried`, the immediate retries), `retry-refused`, `permanent`, `undecodable`,
            `mismatch` or `poison-message`; or it is `cancelled`, `ended by …` or `not settled: …`.
        error: The error of the last attempt; None if there was none.
        seconds: How long the handling took, with its immediate retries.
    """

    topic: Topic
    message_id: UUID | None
    attempt: int
    outcome: Outcome
    reason: str | None
    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class Route:
    """
    How the messages of one topic are decoded and handled.

    Attributes:
        read: Decodes the event of a message.
        handle: Calls the handlers, and then sends the integration events that they raised.
    """

    read: Callable[[Envelope], Any]
    handle: Callable[[Any], Awaitable[None]]


def routes(
    event_map: EventMap, container: Resolver, middlewares: Sequence[Middleware], emitter: EventEmitter
) -> dict[Topic, Route]:
    """
    Return the route of each integration event in *event_map*.

    Raises:
        EncodingError: An event cannot be decoded from JSON by the annotations of its class.
        ResolutionError: *container* can never build a handler.
        ConfigurationError: No integration event has a handler.
    """
    found: dict[Topic, Route] = {}
    for event_type in event_map:
        if is_integration_event(event_type):
            topic = Topic(getattr(event_type, "message_type"), message_name_of(event_type))  # noqa: B009  # not an attribute of `type`
            handlers = [PreparedHandler(handler, container) for handler in event_map.get(event_type)]
            if len(handlers) == 1 and handlers[0].build is not None and not middlewares:
                handle = _handle_alone(handlers[0], handlers[0].build, emitter)
            else:
                handle = _handle_and_send(chain(middlewares, _unit_of_work(handlers, emitter)), emitter)
            found[topic] = Route(event_decoder(event_type), handle)
    if not found:
        raise ConfigurationError(
            "nothing to consume: the event map has no handler for an integration event; bind one before the consumer "
            "is made"
        )
    return found


def _handle_alone(
    handler: PreparedHandler, build: Build[Any], emitter: EventEmitter
) -> Callable[[Any], Awaitable[None]]:
    """
    Return what `_handle_and_send` would, for one handler class that needs neither scope nor middlewares.

    This is the common case, written out in one coroutine. Four of them would be a tenth of a consumer's time.
    """
    pending_events, take_events = handler.pending_events, handler.take_events

    async def handle(event: Any) -> None:
        shared: Shared = {}
        try:
            built = build(shared)
            try:
                await built.handle(event)
            except BaseException:
                take_events(built, ())
                raise
            raised = take_events(built, events) if (events := pending_events(built)) else None
        except Exception as error:
            handler.note(error, event)
            raise
        if raised and (outgoing := await emitter._handle(raised, shared)):
            await emitter._send(outgoing)

    return handle


def _handle_and_send(
    dispatch: Callable[[Any, Shared], Awaitable[Any]], emitter: EventEmitter
) -> Callable[[Any], Awaitable[None]]:
    """Return a function that sends the raised integration events when *dispatch*, with its middlewares, has ended."""

    async def handle(event: Any) -> None:
        shared: Shared = {}
        await dispatch(event, shared)
        if outgoing := shared.get(OUTGOING):
            await emitter._send(outgoing)

    return handle


def _unit_of_work(
    handlers: Sequence[PreparedHandler], emitter: EventEmitter
) -> Callable[[Any, Shared], Awaitable[None]]:
    """
    Return a function that calls every handler of an event, and then those of the domain events which they raise.

    It leaves the integration events in *shared*, under `OUTGOING`.
    """

    async def run(event: Any, shared: Shared) -> Outgoing:
        raised: list[Any] = []
        failures: list[Exception] = []
        alone = len(handlers) == 1  # then `Handling` judges a cancellation: the check here would cost time
        before = 0 if alone else _current_task().cancelling()
        for handler in handlers:
            try:
                await handler.call(event, shared, raised)
            except asyncio.CancelledError as error:
                if alone or _current_task().cancelling() > before:
                    raise
                cancelled = RuntimeError(f"{handler.name} was cancelled by its own code")
                cancelled.__cause__ = error
                failures.append(cancelled)
            except Exception as error:  # noqa: BLE001  # all handlers run, then all errors are raised
                handler.note(error, event)
                failures.append(error)
        if failures:
            raise failures[0] if alone else EventHandlersFailed(f"handlers of {name_of(type(event))} failed", failures)
        return await emitter._handle(raised, shared) if raised else []

    # Each call clears *shared*: a middleware that calls it again gets a new scope, and none of the earlier events.

    async def handle(event: Any, shared: Shared) -> None:
        shared.clear()
        shared[OUTGOING] = await run(event, shared)

    async def handle_in_scope(event: Any, shared: Shared) -> None:
        shared.clear()
        async with scopes(shared):
            outgoing = await run(event, shared)
        shared[OUTGOING] = outgoing  # only after the scope was closed: that may fail, as a commit can

    return handle_in_scope if any(handler.needs_scope for handler in handlers) else handle


#: How long to wait before each further attempt to settle, in seconds.
_SETTLE_PAUSES = (0.05, 0.1)
#: How long a call that requeues or dead-letters may take, in seconds. Each transport has a shorter limit of its own.
_SETTLE_TIMEOUT = 120.0
#: Errors after which the service may still accept the same: it is away, or too slow.
_TEMPORARY = (ConnectionError, TimeoutError)


def _current_task() -> asyncio.Task[Any]:
    """Return the running task. Its `cancelling()` shows whether a `CancelledError` came from outside of a handler."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine of diator runs in a task"  # noqa: S101  # asyncio has no other way
    return task


#: How many deliveries are dead-lettered at once, beside those that are being handled: in a flood of poison messages, a
#: round trip for each would take nearly all of a consumer's time.
DEAD_LETTERS_AT_ONCE = 64


def _ended_by(ending: BaseException) -> str:
    return "cancelled" if isinstance(ending, asyncio.CancelledError) else f"ended by {name_of(type(ending))}"


class Worker:
    """
    One task that handles deliveries, one after the other.

    Attributes:
        deadline: The time limit of its handlers.
        settling: The time limit of a call that requeues or dead-letters.
        since: When it began to handle its delivery, by `time.monotonic`; None while it has none.
    """

    __slots__ = ("deadline", "settling", "since")

    def __init__(self, deadline: Deadline, settling: Deadline) -> None:
        self.deadline = deadline
        self.settling = settling
        self.since: float | None = None


class Handling:
    """
    Handles deliveries: calls the handlers, settles each delivery, and reports its outcome to the program.

    Attributes:
        unsettled: How many deliveries could not be settled.
        dead_lettering: The tasks that dead-letter deliveries, each one of them.
        make_room: Called with the number of these tasks when it changes.
    """

    def __init__(
        self,
        by_topic: Mapping[Topic, Route],
        retry: RetryPolicy,
        *,
        can_retry: bool,
        can_dead_letter: bool,
        max_message_bytes: int,
        timeout: float,
        on_handled: Callable[[Handled], None] | None,
    ) -> None:
        self._routes = dict(by_topic)
        self._retry = retry
        self._max_deliveries = retry.max_attempts + retry.max_crashes
        self._can_retry = can_retry
        self._can_dead_letter = can_dead_letter
        self._max_message_bytes = max_message_bytes
        self._deadlines = Deadlines(timeout)
        self._settling = Deadlines(_SETTLE_TIMEOUT)
        self._on_handled = on_handled
        self._lines = RepeatedLines(logger)
        self._workers: list[Worker] = []
        self.dead_lettering: set[asyncio.Task[None]] = set()
        self.make_room: Callable[[int], None] = lambda _: None
        self.unsettled = 0
        self._last_settled = monotonic()
        # When the first and the last delivery after the last settled one could not be settled.
        self._not_settled_since = self._not_settled_until = 0.0
        self._is_ending = False

    def end(self) -> None:
        """Expect the consumer to cancel its tasks. A cancellation before this call came from a handler itself."""
        self._is_ending = True
        self._deadlines.close()
        self._settling.close()

    @property
    def in_flight(self) -> list[float]:
        """When each delivery that is being handled began, by `time.monotonic`."""
        return [worker.since for worker in self._workers if worker.since is not None]

    def seconds_without_progress(self, now: float, waiting: float) -> float:
        """
        Return for how long deliveries have been there and none of them was settled; 0 if there are none.

        While deliveries that cannot be settled wait for their redelivery, it stays as it is: another consumer may get
        them.

        *now* is by `time.monotonic`. *waiting* is for how long some have been waiting to be handled.
        """
        since = self.in_flight
        if waiting > 0:
            since.append(now - waiting)
        until = now if since else self._not_settled_until
        if self._not_settled_since > self._last_settled:
            since.append(self._not_settled_since)
        return until - max(self._last_settled, min(since)) if since else 0.0

    def read(self, delivery: Delivery) -> Envelope | DecodingError:
        """Return the decoded message of *delivery*, or the error: `handle` dead-letters a message that has one."""
        if delivery.unreadable is not None:
            return DecodingError(delivery.unreadable)
        try:
            return decode_envelope(delivery.body, max_bytes=self._max_message_bytes, headers=delivery.headers)
        except DecodingError as error:
            return error

    def worker(self) -> Worker:
        """Return the running task as a worker, which `handle` needs for each delivery of this task."""
        task = _current_task()
        worker = Worker(self._deadlines.limit(task), self._settling.limit(task))
        self._workers.append(worker)
        return worker

    async def handle(self, delivery: Delivery, message: Envelope | DecodingError, worker: Worker) -> None:
        """
        Handle *delivery* and settle it, in the task of *worker*; a task of its own may dead-letter it.

        It raises no error of a handler. Cancelling the task leaves the delivery unsettled.
        """
        started = worker.since = monotonic()
        deadline = worker.deadline
        outcome: Outcome = "unsettled"
        reason: str | None = None
        error: BaseException | None = None
        try:
            # The way to success is written out here: each further coroutine would cost a fiftieth of it.
            if (
                isinstance(message, DecodingError)
                or delivery.attempt > self._max_deliveries
                or (route := self._routes.get(topic := delivery.topic)) is None
                or topic[1] != message.message_name
                or topic[0] != message.message_type
            ):
                reason, error = self._why_unhandled(delivery, message)
            else:
                try:
                    event = route.read(message)
                except DecodingError as undecodable:
                    reason, error = printable(f"undecodable: {undecodable}"), undecodable
                else:
                    try:
                        with deadline:
                            await route.handle(event)
                    except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001  # it decides how to settle
                        error = failed
                    if error is not None or self._is_ending or deadline.task.cancelling():
                        reason, error = await self._run_again(route, message, deadline, error)
            if reason is not None and self._is_dead_lettered_aside(delivery, reason):
                dead_lettering = self._dead_letter(delivery, message, reason, error, started)
                task = asyncio.create_task(dead_lettering, name="diator: dead-lettering")
                self.dead_lettering.add(task)
                self.make_room(len(self.dead_lettering))
                task.add_done_callback(self._dead_lettered)
                worker.since = None
                return
            outcome, reason = await self._settle(delivery, reason, worker.settling)
        except BaseException as ending:
            error, reason = ending, _ended_by(ending)
            raise
        finally:
            if worker.since is not None:
                worker.since = None
                self._finish(delivery, message, outcome, reason, error, started)

    def _is_dead_lettered_aside(self, delivery: Delivery, reason: str) -> bool:
        has_room = self._can_dead_letter and len(self.dead_lettering) < DEAD_LETTERS_AT_ONCE
        return has_room and not self._may_retry(delivery, reason)

    async def _dead_letter(
        self,
        delivery: Delivery,
        message: Envelope | DecodingError,
        reason: str | None,
        error: BaseException | None,
        started: float,
    ) -> None:
        """Dead-letter *delivery* in a task of its own. Cancelling the task leaves the delivery unsettled."""
        worker = self.worker()
        worker.since = started
        outcome: Outcome = "unsettled"
        try:
            outcome, reason = await self._settle(delivery, reason, worker.settling)
        except BaseException as ending:
            error, reason = ending, _ended_by(ending)
            raise
        finally:
            self._workers.remove(worker)
            self._deadlines.forget(worker.deadline)
            self._settling.forget(worker.settling)
            self._finish(delivery, message, outcome, reason, error, started)

    def _dead_lettered(self, task: asyncio.Task[None]) -> None:
        self.dead_lettering.discard(task)
        self.make_room(len(self.dead_lettering))

    def _finish(  # noqa: PLR0917  # it is called for each message, and names would cost time
        self,
        delivery: Delivery,
        message: Envelope | DecodingError,
        outcome: Outcome,
        reason: str | None,
        error: BaseException | None,
        started: float,
    ) -> None:
        """Note the progress, and report the outcome."""
        ended = monotonic()
        if outcome != "unsettled":
            self._last_settled = ended
        else:
            self._not_settled_until = ended
            if self._not_settled_since <= self._last_settled:
                self._not_settled_since = ended
        if reason is not None or self._on_handled is not None:
            handled = Handled(
                topic=delivery.topic,
                message_id=None if isinstance(message, DecodingError) else message.message_id,
                attempt=delivery.attempt,
                outcome=outcome,
                reason=reason,
                error=error,
                seconds=ended - started,
            )
            self._report(handled)

    def _why_unhandled(self, delivery: Delivery, message: Envelope | DecodingError) -> tuple[str, BaseException | None]:
        """Return the reason why *delivery* is not handled, and its error."""
        if delivery.attempt > self._max_deliveries:
            ended = f"{delivery.attempt - 1} deliveries ended without success, more than the retry policy allows"
            return f"poison-message: {ended}", None
        if isinstance(message, DecodingError):
            return printable(f"undecodable: {message}"), message
        # Whoever may write to one topic must not choose the handler of another one.
        topic = " ".join(delivery.topic)
        return printable(f"mismatch: the body names another type or name than its topic, {topic}"), None

    async def _run_again(
        self, route: Route, message: Envelope, deadline: Deadline, failed: BaseException | None
    ) -> tuple[str | None, BaseException | None]:
        """
        Check the result of the first run, and retry as the retry policy specifies.

        Return the reason of the last failure and its error; None and None after success.
        """
        task = deadline.task
        for runs_left in range(self._retry.immediate_retries, -1, -1):
            # A cancellation from outside is neither success nor failure, even if the handler swallowed it.
            if self._is_ending or (isinstance(failed, asyncio.CancelledError) and task.cancelling()):
                raise asyncio.CancelledError
            while task.cancelling():
                task.uncancel()  # the handler cancelled its own task and left that behind
            if failed is None:
                return None, None
            if self._retry.is_permanent(failed):
                return f"permanent: {name_of(type(failed))}", failed
            if runs_left:
                await asyncio.sleep(self._retry.pause())
                failed = None
                try:
                    event = route.read(message)  # a handler may have changed the first event
                    with deadline:
                        await route.handle(event)
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # as above
                    failed = error
        return f"retries-exhausted: {name_of(type(failed))}", failed

    async def _settle(self, delivery: Delivery, reason: str | None, deadline: Deadline) -> tuple[Outcome, str | None]:
        """Settle *delivery* according to *reason*, or another way. Return the outcome and its reason."""
        failures = 0
        while True:
            try:
                if reason is None:
                    await delivery.ack()
                    return "acked", None
                with deadline:
                    return await self._settle_failed(delivery, reason), reason
            except Exception as failed:  # noqa: BLE001  # a transport may raise anything
                error = failed
            is_refused = isinstance(error, DiatorError) and not isinstance(error, _TEMPORARY)
            if is_refused or deadline.is_over or failures == len(_SETTLE_PAUSES):
                break
            await asyncio.sleep(_SETTLE_PAUSES[failures])
            failures += 1
        why = name_of(type(error))
        if reason is not None and self._may_retry(delivery, reason) and not isinstance(error, _TEMPORARY):
            return await self._settle(delivery, printable(f"retry-refused: {why} ({reason})"), deadline)
        self.unsettled += 1
        # The text of an error that is not diator's may quote the message.
        name, text = delivery.topic.message_name, repr(error) if isinstance(error, DiatorError) else why
        kind = printable(f"a delivery of {name} could not be settled: {why}")
        line = printable(f"a delivery of {name} could not be settled: {text}")
        self._lines.log(logging.ERROR, kind, "%s; it is redelivered", line)
        return "unsettled", printable(f"not settled: {why}" if reason is None else f"not settled: {why} ({reason})")

    def _may_retry(self, delivery: Delivery, reason: str) -> bool:
        may_retry = reason.startswith("retries-exhausted") and delivery.attempt < self._retry.max_attempts
        return may_retry and self._can_retry

    async def _settle_failed(self, delivery: Delivery, reason: str) -> Outcome:
        if self._may_retry(delivery, reason):
            await delivery.retry(after=self._retry.delay(delivery.attempt))
            return "retried"
        if self._can_dead_letter:
            await delivery.dead_letter(reason)
            return "dead_lettered"
        await delivery.ack()
        return "given_up"

    def _report(self, handled: Handled) -> None:
        if handled.outcome != "acked":
            self._log_failure(handled)
        if self._on_handled is not None:
            try:
                self._on_handled(handled)
            except Exception:  # noqa: BLE001  # it is logged
                self._lines.log(logging.ERROR, "on_handled failed", "on_handled failed", exc_info=True)

    def _log_failure(self, handled: Handled) -> None:
        name, reason = printable(handled.topic.message_name), handled.reason or ""
        if handled.outcome == "retried":
            failure = printable(name_of(type(handled.error)))
            self._lines.log(
                logging.WARNING,
                f"{name} failed ({failure}) and was requeued",
                "%s %s failed (%s); requeued for attempt %d",
                *(name, handled.message_id, failure, handled.attempt + 1),
            )
        if handled.outcome in ("dead_lettered", "given_up"):
            kept = handled.outcome == "dead_lettered"
            end = "is dead-lettered" if kept else "is lost: this transport cannot dead-letter it"
            self._lines.log(
                logging.ERROR,
                f"{name} was not handled and {end} ({reason.partition(':')[0]})",
                "%s %s was not handled and %s (%s)",
                *(name, handled.message_id or "with an unreadable id", end, reason),
            )

    def finish_log(self) -> None:
        """Log how many lines were left out. Call it when the consumer has stopped."""
        self._lines.flush()
