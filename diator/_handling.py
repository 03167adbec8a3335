"""What is done with one delivery: read it, run its handlers, settle it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeAlias
from uuid import UUID

from diator._deadlines import Deadlines
from diator._handlers import Prepared
from diator._hints import name_of
from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import decode, payload_decoder
from diator.brokers.message import Message
from diator.container.base import Resolver, Shared, scopes
from diator.events import EventEmitter, EventMap
from diator.events._emitter import Outgoing
from diator.events._event import message_name_of, travels
from diator.exceptions import ConfigurationError, DecodingError, EventHandlersFailed
from diator.middlewares.base import Middleware, chain
from diator.retrying import RetryPolicy

logger: logging.Logger = logging.getLogger(__name__)

OUTGOING = object()
"""Where the events that travel wait in what a delivery shares, until the middlewares have finished."""

Outcome: TypeAlias = Literal["acked", "retried", "dead_lettered", "given_up", "unsettled"]


@dataclass(frozen=True, kw_only=True)
class Handled:
    """What became of one delivery. It holds no part of the message but its id."""

    topic: Topic
    message_id: UUID | None
    """None if the body was no message."""
    attempt: int
    outcome: Outcome
    """`given_up`: it could not be handled, and the transport has no way to put it aside. It is lost."""
    reason: str | None
    """Why it was not acknowledged."""
    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class Route:
    """What the messages of one topic become; what handles them, through the middlewares; what then sends."""

    read: Callable[[bytes], Any]
    dispatch: Callable[[Any, Shared], Awaitable[Any]]
    emitter: EventEmitter

    async def handle(self, event: Any) -> None:
        """Handle *event*, and send what its handlers raised, when the middlewares have finished."""
        shared: Shared = {}
        await self.dispatch(event, shared)
        if outgoing := shared.get(OUTGOING):
            await self.emitter._send(outgoing)


def routes(
    event_map: EventMap, container: Resolver, middlewares: Sequence[Middleware], emitter: EventEmitter
) -> dict[Topic, Route]:
    """
    Find out, for each event of *event_map* that travels, how it is read and handled.

    Raises:
        EncodingError: A class cannot be read back from JSON.
        ResolutionError: A handler can never be built.
        ConfigurationError: There is no such event.
    """
    found: dict[Topic, Route] = {}
    for event_type in event_map:
        if travels(event_type):
            topic = Topic(getattr(event_type, "message_type"), message_name_of(event_type))  # noqa: B009  # it has one: it travels
            handlers = [Prepared(handler, container) for handler in event_map.get(event_type)]
            dispatch = chain(middlewares, _unit_of_work(handlers, emitter))
            found[topic] = Route(payload_decoder(event_type), dispatch, emitter)
    if not found:
        raise ConfigurationError("nothing to consume: the event map has no handler for an event that travels")
    return found


def _unit_of_work(handlers: Sequence[Prepared], emitter: EventEmitter) -> Callable[[Any, Shared], Awaitable[None]]:
    """Every handler runs, then those of the domain events they raised. What travels is left under `OUTGOING`."""

    async def run(event: Any, shared: Shared) -> Outgoing:
        raised: list[Any] = []
        failures: list[Exception] = []
        alone = len(handlers) == 1  # then its cancellation is judged where the task is known
        wanted = 0 if alone else _running_task().cancelling()
        for handler in handlers:
            try:
                await handler.call(event, shared, raised)
            except asyncio.CancelledError as error:
                if alone or _running_task().cancelling() > wanted:
                    raise
                cancelled = RuntimeError(f"{handler.name} was cancelled by something in it")
                cancelled.__cause__ = error
                failures.append(cancelled)
            except Exception as error:  # noqa: BLE001  # all handlers run, then all errors are raised
                error.add_note(f"raised by {handler.name}, which handles {name_of(type(event))}")
                failures.append(error)
        if failures:
            raise failures[0] if alone else EventHandlersFailed("handlers of an event failed", failures)
        return await emitter._handle(raised, shared) if raised else []

    # Each starts with nothing shared: a middleware that calls again gets another scope, and other events.

    async def handle(event: Any, shared: Shared) -> None:
        shared.clear()
        shared[OUTGOING] = await run(event, shared)

    async def handle_in_scope(event: Any, shared: Shared) -> None:
        shared.clear()
        async with scopes(shared):
            outgoing = await run(event, shared)
        shared[OUTGOING] = outgoing  # not before the scope is closed: that may fail, as a commit can

    return handle_in_scope if any(handler.needs_scope for handler in handlers) else handle


_SETTLE_PAUSES = (0.05, 0.1, 0.0)
"""Seconds to wait after each failure to settle; after the last one the delivery is left to come again."""


def _running_task() -> asyncio.Task[Any]:
    """Give it for its `cancelling()`: a `CancelledError` alone can be of a handler's own making."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine of diator runs in a task"  # noqa: S101  # asyncio has no other way
    return task


class Handling:
    """Handles deliveries: decides what becomes of each, and tells the service and the program."""

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
        self._routes: dict[tuple[str, str], Route] = dict(by_topic.items())
        self._retry = retry
        self._can_retry = can_retry
        self._can_dead_letter = can_dead_letter
        self._max_message_bytes = max_message_bytes
        self._deadlines = Deadlines(timeout)
        self._on_handled = on_handled
        self.in_flight: dict[Delivery, float] = {}
        """What is being handled, and since when, on the clock of `time.monotonic`."""
        self.last_progress = monotonic()
        self._is_ending = False

    def end(self) -> None:
        """From now on handling is cancelled from outside. Any cancellation before is of a handler's own making."""
        self._is_ending = True
        self._deadlines.close()

    def read(self, delivery: Delivery) -> Message | DecodingError:
        """Decode the envelope of *delivery*. What is wrong with it is a result here: it decides what becomes of it."""
        try:
            return decode(delivery.body, max_bytes=self._max_message_bytes, headers=delivery.headers)
        except DecodingError as error:
            return error

    async def handle(self, delivery: Delivery, message: Message | DecodingError) -> None:
        """
        Handle *delivery*, and settle it.

        Raises nothing but what ends the task: a cancellation from outside leaves it unsettled.
        """
        started = self.in_flight[delivery] = monotonic()
        outcome: Outcome = "unsettled"
        reason: str | None = None
        error: BaseException | None = None
        try:
            reason, error = await self._run(delivery, message)
            outcome, reason = await self._settle(delivery, reason)
        except BaseException as ending:
            cancelled = isinstance(ending, asyncio.CancelledError)
            error, reason = ending, "cancelled" if cancelled else f"ended by {name_of(type(ending))}"
            raise
        finally:
            self.last_progress = monotonic()
            del self.in_flight[delivery]
            if reason is not None or self._on_handled is not None:
                handled = Handled(
                    topic=delivery.topic,
                    message_id=message.message_id if isinstance(message, Message) else None,
                    attempt=delivery.attempt,
                    outcome=outcome,
                    reason=reason,
                    error=error,
                    seconds=self.last_progress - started,
                )
                self._tell(handled)

    async def _run(
        self, delivery: Delivery, message: Message | DecodingError
    ) -> tuple[str | None, BaseException | None]:
        """Give the reason why it failed, and the error; None and None if it did not."""
        if delivery.attempt > self._retry.max_attempts + self._retry.max_crashes:
            return f"crash-loop: delivered {delivery.attempt - 1} times before, more often than it is given back", None
        if isinstance(message, DecodingError):
            return f"undecodable: {message}", message
        route = self._routes.get((message.message_type, message.message_name))
        if route is None:
            # The sender's text, so neither whole nor as it is: it ends in logs.
            return f"unknown-type: no handler for {message.message_type[:80]!r} {message.message_name[:80]!r}", None
        try:
            event = route.read(message.payload_json)
        except DecodingError as error:
            return f"undecodable: {error}", error
        return await self._run_handlers(route, event, message)

    async def _run_handlers(
        self, route: Route, event: Any, message: Message
    ) -> tuple[str | None, BaseException | None]:
        task = _running_task()
        failed: BaseException | None = None
        for run in range(self._retry.immediate_retries + 1):
            if run:
                await asyncio.sleep(self._retry.pause())
                event = route.read(message.payload_json)  # a handler may have changed the other one
            failed = None
            try:
                with self._deadlines.of(task):
                    await route.handle(event)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # it decides what becomes of the delivery
                failed = error
            # Cancelled from outside is neither success nor failure, whatever the handler made of it.
            if self._is_ending or (isinstance(failed, asyncio.CancelledError) and task.cancelling()):
                raise asyncio.CancelledError
            while task.cancelling():
                task.uncancel()  # of the handler's own making, and left behind
            if failed is None:
                return None, None
            if self._retry.is_permanent(failed):
                return f"permanent: {name_of(type(failed))}", failed
        return f"retries-exhausted: {name_of(type(failed))}", failed

    async def _settle(self, delivery: Delivery, reason: str | None) -> tuple[Outcome, str | None]:
        """Settle as *reason* asks for, and give the outcome and why it is that one."""
        failed = "not settled"
        for pause in _SETTLE_PAUSES:
            try:
                return await self._settle_once(delivery, reason), reason
            except Exception as error:  # noqa: BLE001  # whatever it is, the loop goes on
                logger.warning("a delivery of %s could not be settled: %r", delivery.topic.message_name, error)
                failed = f"not settled: {name_of(type(error))}"
            await asyncio.sleep(pause)
        return "unsettled", failed if reason is None else f"{failed} ({reason})"

    async def _settle_once(self, delivery: Delivery, reason: str | None) -> Outcome:
        if reason is None:
            await delivery.ack()
            return "acked"
        worth_it = reason.startswith("retries-exhausted") and delivery.attempt < self._retry.max_attempts
        if worth_it and self._can_retry:
            await delivery.retry(after=self._retry.delay(delivery.attempt))
            return "retried"
        if self._can_dead_letter:
            await delivery.dead_letter(reason)
            return "dead_lettered"
        await delivery.ack()
        return "given_up"

    def _tell(self, handled: Handled) -> None:
        if handled.outcome == "retried":
            name, message_id, attempt = handled.topic.message_name, handled.message_id, handled.attempt
            logger.warning("%s %s failed (%s); attempt %d comes later", name, message_id, handled.reason, attempt + 1)
        if handled.outcome in ("dead_lettered", "given_up"):
            lost = " and is lost: this transport cannot put it aside" if handled.outcome == "given_up" else ""
            name, message_id = handled.topic.message_name, handled.message_id
            logger.error("%s %s was not handled%s (%s)", name, message_id, lost, handled.reason)
        if self._on_handled is not None:
            try:
                self._on_handled(handled)
            except Exception:
                logger.exception("on_handled failed")
