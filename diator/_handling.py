"""Handle one delivery: decode the message, call its handlers, settle the delivery."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from diator._deadlines import Deadline, Deadlines
from diator._handlers import PreparedHandler
from diator._hints import name_of
from diator._log import RepeatedLines
from diator._text import counted, listed, printable
from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import KEY, Envelope, decode_envelope, decode_with, event_decoder, headers_of
from diator.brokers.message import Codec
from diator.brokers.sending import Deduplicating
from diator.container.base import BuildLater, Resolver, Shared, scopes
from diator.context import CONTEXT_OF, CORRELATED, DELIVERY, MessageContext, log_fields, needed_message
from diator.events import EventEmitter, EventMap
from diator.events._emitter import OUTGOING, Outgoing, session_builder
from diator.events._event import is_integration_event, message_name_of
from diator.exceptions import ConfigurationError, DecodingError, DiatorError, EventHandlersFailed, NotCommitted
from diator.instruments import Handled, Observer, Outcome
from diator.middlewares.base import Middleware, chain, middlewares_for
from diator.retrying import CommittedTooEarly, RetryPolicy

#: The logger that the documentation names for all lines about deliveries; this module is private.
logger: logging.Logger = logging.getLogger("diator.consumer")


class Bound(NamedTuple):
    """
    One handler of an event. It is a unit of work of its own: with its own scope, middlewares and raised events.

    Attributes:
        name: The name of the handler.
        handle: Calls the handler, and then sends the integration events that it raised. Returns True if it called
            nothing, because the handler had handled this message before.
    """

    name: str
    handle: Callable[[Any], Awaitable[bool | None]]


@dataclass(frozen=True)
class Route:
    """
    How the messages of one topic are decoded and handled.

    Attributes:
        read: Decodes the event of a message.
        handle: Calls the first handler.
        handlers: All handlers.
        has_others: Whether there are several handlers.
    """

    read: Callable[[Envelope], Any]
    handle: Callable[[Any], Awaitable[bool | None]]
    handlers: Sequence[Bound]
    has_others: bool


class _Result(NamedTuple):
    """
    What the handlers of a delivery came to, unless each of them succeeded at once.

    Attributes:
        reason: As `Handled.reason`.
        error: As `Handled.error`.
        is_requeued: Whether to requeue the message, not to dead-letter it.
        retries: As `Handled.retries`.
        errors: As `Handled.errors`.
        is_duplicate: Whether every handler had handled the message before.
    """

    reason: str | None
    error: BaseException | None = None
    is_requeued: bool = False
    retries: int = 0
    errors: tuple[BaseException, ...] = ()
    is_duplicate: bool = False


class BoundInbox(NamedTuple):
    """
    An inbox as a consumer uses it.

    Attributes:
        first_time: As `Deduplicating.first_time`.
        group: The group under which it notes messages.
        session: Returns the session of the open scope.
        watch: As `Deduplicating.watch`.
        session_type: The class of the session.
    """

    first_time: Callable[[UUID, str, str, Any], Awaitable[bool]]
    group: str
    session: BuildLater[Any]
    watch: Callable[[Any], Callable[[], bool | None] | None]
    session_type: type


def inbox_of(
    inbox: Deduplicating[Any] | None, group: str | None, container: Resolver, emitter: EventEmitter
) -> BoundInbox | None:
    """
    Return *inbox* as the consumer of *group* uses it; None if there is none.

    Raises:
        ResolutionError: *container* cannot build the session.
        ConfigurationError: There is no group, or the emitter stores in other sessions.
    """
    if inbox is None:
        return None
    group = inbox.group or group
    if group is None:
        raise ConfigurationError(
            "an inbox notes which group has handled a message, and this transport has no groups; name the program in "
            "Inbox(…, group=…)"
        )
    session_type = emitter._session_type
    if session_type is not None and session_type is not inbox.session_type:
        raise ConfigurationError(
            f"the inbox uses the transaction of a {name_of(inbox.session_type)} and the outbox that of a "
            f"{name_of(session_type)}; an event would be lost between the two, so make both of one store"
        )
    build_session = session_builder(container, inbox.session_type, inbox)
    return BoundInbox(inbox.first_time, group, build_session, inbox.watch, inbox.session_type)


def routes(
    event_map: EventMap,
    container: Resolver,
    middlewares: Sequence[Middleware],
    emitter: EventEmitter,
    inbox: BoundInbox | None = None,
) -> dict[Topic, Route]:
    """
    Return the route of each integration event in *event_map*.

    Raises:
        ResolutionError: *container* can never build a handler.
        ConfigurationError: An event cannot travel (its class could write what it cannot read), no integration event has
            a handler, or the inbox would lose events that a handler raises.
    """
    found: dict[Topic, Route] = {}
    for event_type in event_map:
        if is_integration_event(event_type):
            topic = Topic(getattr(event_type, "message_type"), message_name_of(event_type))  # noqa: B009  # not an attribute of `type`
            prepared = [PreparedHandler(handler, container) for handler in event_map.get(event_type)]
            if inbox is not None:
                _check_inbox(event_type, prepared, emitter)
            around = middlewares_for(middlewares, event_type)
            handlers = [Bound(handler.name, _handle(handler, around, emitter, inbox)) for handler in prepared]
            found[topic] = Route(event_decoder(event_type), handlers[0].handle, handlers, len(handlers) > 1)
    if not found:
        raise ConfigurationError(
            "nothing to consume: the event map has no handler for an integration event; bind one before the consumer "
            "is made"
        )
    return found


def _check_inbox(event_type: type, handlers: Sequence[PreparedHandler], emitter: EventEmitter) -> None:
    """Check that an inbox can tell the handlers of an event apart, and loses nothing that they raise."""
    for handler in handlers:
        if handler.may_raise_events and emitter._sends_later:
            raise ConfigurationError(_NEEDS_OUTBOX.format(handler.name, "can raise"))
    names = [handler.name for handler in handlers]
    if len({*names}) < len(names):
        raise ConfigurationError(
            f"two handlers of {name_of(event_type)} have the same name, and an inbox would take them for one; rename "
            f"one of {listed(sorted(names))}"
        )


_NEEDS_OUTBOX = (
    "{} {} events, and a process that dies before they are sent would lose them: the inbox lets no handler run again; "
    "pass the outbox as well, as in Consumer(…, outbox=…)"
)


def _handle(
    handler: PreparedHandler, middlewares: Sequence[Middleware], emitter: EventEmitter, inbox: BoundInbox | None
) -> Callable[[Any], Awaitable[bool | None]]:
    """Return a function that calls *handler*, and sends the events that it raised when its middlewares have ended."""
    if handler.build is not None and not middlewares and inbox is None:
        return _handle_directly(handler, handler.build, emitter)
    dispatch = chain(middlewares, _unit_of_work(handler, emitter, inbox))

    async def handle(event: Any) -> bool:
        shared: Shared = {}
        await dispatch(event, shared)
        if outgoing := shared.get(OUTGOING):
            await emitter._send(outgoing)
        if inbox is not None and (was_committed := shared.get(_NOTED)) is not None and was_committed() is False:
            raise NotCommitted([type(event)], inbox.session_type, did="handled")
        return _DUPLICATE in shared

    return handle


#: The key under which the state of a send notes that the handler had handled the message before.
_DUPLICATE = object()
#: The key of the function that says whether the transaction with the note was committed, after a handler's success.
_NOTED = object()


def _handle_directly(
    handler: PreparedHandler, build: Callable[..., Any], emitter: EventEmitter
) -> Callable[[Any], Awaitable[None]]:
    """
    Return what `_handle` would, for a handler class that needs neither scope nor middlewares.

    This is the common case, written out in one coroutine. Four of them would be a tenth of a consumer's time.
    """
    arguments, pending_events, take_events = handler.arguments, handler.pending_events, handler.take_events

    async def handle(event: Any) -> None:
        shared: Shared = {}
        try:
            built = build(shared) if arguments is None else build(*arguments)
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


def _check_is_open(
    was_committed: Callable[[], bool | None] | None, handler: PreparedHandler, error: Exception | None = None
) -> None:
    """Check that the transaction with the note of the inbox is still open, at the end of a handler."""
    if was_committed is not None and was_committed():
        raise CommittedTooEarly(
            f"{handler.name} has committed its transaction by itself, before its unit of work was over: the rest "
            "of its work and its events are not stored, and a retry would be taken for a duplicate; leave the "
            "commit to what gives the session"
        ) from error


def _unit_of_work(
    handler: PreparedHandler, emitter: EventEmitter, inbox: BoundInbox | None
) -> Callable[[Any, Shared], Awaitable[None]]:
    """
    Return a function that calls *handler*, and then the handlers of the domain events which it raises.

    It leaves the integration events in *shared*, under `OUTGOING`. With an *inbox* it calls nothing if the handler had
    handled the message before: the inbox comes first in the transaction of the handler.
    """

    async def run(event: Any, shared: Shared) -> Outgoing:
        was_committed: Callable[[], bool | None] | None = None
        if inbox is not None:
            session = await inbox.session(shared)
            if not await inbox.first_time(needed_message().message_id, inbox.group, handler.name, session):
                shared[_DUPLICATE] = True
                return []
            was_committed = inbox.watch(session)
        raised: list[Any] = []
        try:
            try:
                await handler.call(event, shared, raised)
            except Exception as error:
                handler.note(error, event)
                raise
            outgoing = await emitter._handle(raised, shared) if raised else []
        except Exception as error:
            _check_is_open(was_committed, handler, error)
            raise
        if outgoing:  # they would be stored in another transaction
            _check_is_open(was_committed, handler)
        if outgoing and inbox is not None and emitter._sends_later:  # no attribute of the class has told this
            raise ConfigurationError(_NEEDS_OUTBOX.format(handler.name, "raised"))
        shared[_NOTED] = was_committed
        return outgoing

    # Each call clears *shared*: a middleware that calls it again gets a new scope, and none of the earlier events.

    async def handle(event: Any, shared: Shared) -> None:
        shared.clear()
        shared[OUTGOING] = await run(event, shared)

    async def handle_in_scope(event: Any, shared: Shared) -> None:
        shared.clear()
        async with scopes(shared):
            outgoing = await run(event, shared)
        shared[OUTGOING] = outgoing  # only after the scope was closed: that may fail, as a commit can

    return handle_in_scope if handler.needs_scope or inbox is not None else handle


#: How long to wait before each further attempt to settle, in seconds.
_SETTLE_PAUSES = (0.05, 0.1)
#: How long a call that requeues or dead-letters may take, in seconds. Each transport has a shorter limit of its own.
_SETTLE_TIMEOUT = 120.0
#: Errors after which the service may still accept the same: it is away, or too slow.
_TEMPORARY = (ConnectionError, TimeoutError)


def current_task() -> asyncio.Task[Any]:
    """Return the running task. Its `cancelling()` shows whether a `CancelledError` came from outside of a handler."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine of diator runs in a task"  # noqa: S101  # asyncio has no other way
    return task


def _unless_cancelled(error: BaseException) -> BaseException:
    """Return the error of a transport. Raise it if the running task is cancelled, not only a client's own work."""
    if isinstance(error, asyncio.CancelledError) and current_task().cancelling():
        raise error
    return error


#: How many deliveries are dead-lettered at once, beside those that are being handled: in a flood of poison messages, a
#: round trip for each would take nearly all of a consumer's time.
DEAD_LETTERS_AT_ONCE = 256
#: Bodies that are longer, in bytes, are dead-lettered one by one: together they could be too much for the service.
_LONGEST_TOGETHER = 16 * 1024


_SUCCESS = _Result(None)
_ONLY_DUPLICATES = _Result(None, is_duplicate=True)


def _both(observer: Observer | None, on_handled: Callable[[Handled], None] | None) -> Callable[[Handled], None] | None:
    """Return a function that passes an outcome to the instrument and to the program; None if neither wants it."""
    if observer is None or on_handled is None:
        return on_handled if observer is None else observer.settled

    def note(handled: Handled) -> None:
        observer.settled(handled)
        on_handled(handled)

    return note


#: Say which delivery is handled here, or its context, for `current_message`; None: none.
set_delivery: Callable[[Delivery | MessageContext | None], object] = DELIVERY.set


#: The error of a handler, and whether it had handled the message before.
_CameTo: TypeAlias = tuple[BaseException | None, bool | None]


async def _attempt(handler: Bound, read: Callable[[Envelope], Any], message: Envelope, deadline: Deadline) -> _CameTo:
    """Call *handler* with the event of *message*. Return its error, and whether it had handled the message before."""
    is_duplicate: bool | None = None
    try:
        event = read(message)
        with deadline:
            is_duplicate = await handler.handle(event)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # it decides how to settle
        return error, None
    return None, is_duplicate


def _described(failures: Mapping[Bound, BaseException]) -> str:
    """Return the type of each error, and which handler raised it."""
    return ", ".join(f"{_named(error)} in {handler.name}" for handler, error in failures.items())


def _named(error: BaseException) -> str:
    """Return the type of *error*; for a group, also the types of its errors."""
    name = name_of(type(error))
    if not isinstance(error, BaseExceptionGroup):
        return name
    return f"{name} ({listed([*dict.fromkeys(_named(each) for each in error.exceptions)])})"


def _together(failures: Mapping[Bound, BaseException], event: object) -> EventHandlersFailed:
    errors: list[Exception] = []
    for handler, error in failures.items():
        if isinstance(error, Exception):
            errors.append(error)
        else:
            cancelled = RuntimeError(f"{handler.name} was cancelled by its own code")
            cancelled.__cause__ = error
            errors.append(cancelled)
    return EventHandlersFailed(f"handlers of {name_of(type(event))} failed", errors)


def _ended_by(ending: BaseException) -> str:
    return "cancelled" if isinstance(ending, asyncio.CancelledError) else f"ended by {name_of(type(ending))}"


class _Failure(NamedTuple):
    """A delivery that is dead-lettered beside the next ones: its message, why, and when its handling began."""

    delivery: Delivery
    message: Envelope | DecodingError
    result: _Result
    started: float


def _sent_at(delivery: Delivery) -> datetime | None:
    ask: Callable[[Delivery], float | None] = getattr(delivery.settler, "sent_at", lambda _: None)
    try:
        seconds = ask(delivery)
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # another program may have written any time
        return None


async def _dead_letter_none(_: Mapping[Delivery, str]) -> Collection[Delivery]:
    return ()


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
        dead_lettering: The tasks that dead-letter deliveries beside the next ones.
        make_room: Called with the number of these deliveries when it changes.
        dead_letter_all: Dead-letters several deliveries together, as `ResilientSubscription.dead_letter_all` does.
    """

    def __init__(
        self,
        by_topic: Mapping[Topic, Route],
        retry: RetryPolicy,
        *,
        group: str | None,
        can_retry: bool,
        can_dead_letter: bool,
        max_message_bytes: int,
        timeout: float,
        log_errors: bool,
        on_handled: Callable[[Handled], None] | None,
        observer: Observer | None,
        codec: Codec | None,
    ) -> None:
        self._codec = codec
        self._routes = dict(by_topic)
        self._group = group
        self._retry = retry
        self._max_deliveries = retry.max_attempts + retry.max_crashes
        self._can_retry = can_retry
        self._can_dead_letter = can_dead_letter
        self._max_message_bytes = max_message_bytes
        self._deadlines = Deadlines(timeout)
        self._settling = Deadlines(_SETTLE_TIMEOUT)
        self._log_errors = log_errors
        self._observer = observer
        self._on_handled = _both(observer, on_handled)
        self._lines = RepeatedLines(logger, {"group": group})
        self._workers: list[Worker] = []
        self.dead_lettering: set[asyncio.Task[None]] = set()
        self.make_room: Callable[[int], None] = lambda _: None
        self.dead_letter_all: Callable[[Mapping[Delivery, str]], Awaitable[Collection[Delivery]]] = _dead_letter_none
        self._aside: dict[Delivery, _Failure] = {}  # what is dead-lettered beside the next deliveries
        self._failures: list[_Failure] = []  # those of them that wait until the last ones are stored
        self._is_storing = False  # whether a task dead-letters those
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
        handled = [since for worker in self._workers if (since := worker.since) is not None]
        return [*handled, *(failure.started for failure in [*self._aside.values()])]  # metrics have another thread

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
        body, headers, most = delivery.body, delivery.headers, self._max_message_bytes
        try:
            if self._codec is not None:
                return decode_with(self._codec, body, max_bytes=most, headers=headers, topic=delivery.topic)
            return decode_envelope(body, max_bytes=most, headers=headers)
        except DecodingError as error:
            return error.with_traceback(None)  # its frames hold the message, and this error is handed out

    def _read_whole(self, delivery: Delivery) -> Envelope:
        """Return the decoded message of *delivery*, however large it is."""
        body, headers, most = delivery.body, delivery.headers, len(delivery.body)
        if self._codec is not None:
            return decode_with(self._codec, body, max_bytes=most, headers=headers, topic=delivery.topic)
        return decode_envelope(body, max_bytes=most, headers=headers)

    def context_of(self, delivery: Delivery, message: Envelope | None = None) -> MessageContext | None:
        """Return the context of *delivery*, whose message is *message*; None if it cannot be decoded."""
        try:
            found = message or self._read_whole(delivery)
        except DecodingError:  # the consumer reports it
            return None
        headers = headers_of(found.headers, delivery.headers if self._codec is None else {})
        if self._codec is None:
            headers.pop(KEY, None)
        return MessageContext(
            message_id=found.message_id,
            message_type=found.message_type,
            message_name=found.message_name,
            group=self._group,
            key=found.key,
            headers=MappingProxyType(headers),
            attempt=delivery.attempt,
            redelivered=delivery.redelivered or delivery.attempt > 1,
            sent_at=_sent_at(delivery),
        )

    def worker(self) -> Worker:
        """Return the running task as a worker, which `handle` needs for each delivery of this task."""
        task = current_task()
        CONTEXT_OF.set(self.context_of)
        CORRELATED.set(None)
        worker = Worker(self._deadlines.limit(task), self._settling.limit(task))
        self._workers.append(worker)
        return worker

    async def handle_observed(
        self, worker: Worker, delivery: Delivery, message: Envelope | DecodingError | None = None
    ) -> None:
        """Handle *delivery* as `handle` does, and let the instrument observe it."""
        set_delivery(delivery)
        message = self.read(delivery) if message is None else message
        context = None if isinstance(message, DecodingError) else self.context_of(delivery, message)
        if self._observer is None or context is None:  # what is too large may have a context, which is not observed
            await self.handle(worker, delivery, message)
            return
        set_delivery(context)
        observed = self._observer.processing(context)
        observed.__enter__()
        error: BaseException | None = None
        try:
            result = await self.handle(worker, delivery, message, context)
            error = None if result is None or result.reason is None else result.error
        except BaseException as ending:
            error = ending
            raise
        finally:
            observed.end(error)

    async def handle(  # noqa: C901, PLR0912, PLR0915  # the way to success is written out: a coroutine costs a fiftieth
        self,
        worker: Worker,
        delivery: Delivery,
        message: Envelope | DecodingError | None = None,
        context: MessageContext | None = None,
    ) -> _Result | None:
        """
        Handle *delivery* and settle it, in the task of *worker*; a task of its own may dead-letter it.

        *message* is what `read` has returned, if it was called, and *context* is its context, if that was made.

        It raises no error of a handler, but returns what the handlers came to. Cancelling the task leaves the delivery
        unsettled.
        """
        started = worker.since = monotonic()
        set_delivery(context or delivery)
        if message is None:
            message = self.read(delivery)
        deadline = worker.deadline
        outcome: Outcome = "unsettled"
        result: _Result | None = None
        try:
            if (
                isinstance(message, DecodingError)
                or delivery.attempt > self._max_deliveries
                or (route := self._routes.get(topic := delivery.topic)) is None
                or message.message_name != topic[1]
                or message.message_type != topic[0]
            ):
                result = self._unhandled(delivery, message)
            else:
                try:
                    event = route.read(message)
                except DecodingError as undecodable:
                    result = self._undecodable(delivery, message, undecodable)
                else:
                    error: BaseException | None = None
                    # As `deadline.begin`, written out: nobody cancels the task of a worker between two deliveries.
                    deadline.is_over = False
                    deadline.began = started
                    if self._deadlines.timer is None:
                        self._deadlines.start_timer(self._deadlines.seconds)
                    is_duplicate: bool | None = None
                    try:
                        is_duplicate = await route.handle(event)
                    except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001  # it decides how to settle
                        error = failed
                    deadline.began = None
                    is_late = deadline.is_over or deadline.task.cancelling()
                    if error is not None or is_late or route.has_others or self._is_ending:
                        came_to = deadline.end(error), is_duplicate
                        result = await self._call_others(delivery, message, event, deadline, came_to)
                    elif is_duplicate:
                        result = _ONLY_DUPLICATES
            refused: BaseException | None = None
            if result is None:
                try:
                    await delivery.ack()
                except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001  # a transport may raise anything
                    refused = _unless_cancelled(failed)
                else:
                    outcome = "acked"
                    if self._on_handled is None:
                        worker.since = None
                        self._last_settled = monotonic()
                    return None
            elif self._is_dead_lettered_aside(result):
                worker.since = None
                self._dead_letter_aside(_Failure(delivery, message, result, started))
                return result
            outcome, result = await self._settle(delivery, result, worker.settling, refused)
            return result
        except BaseException as ending:
            result = _Result(_ended_by(ending), ending)
            raise
        finally:
            if worker.since is not None:
                worker.since = None
                self._finish(delivery, message, outcome, result, started)

    def _undecodable(self, delivery: Delivery, message: Envelope, error: DecodingError) -> _Result:
        # Another version of the program may have a class that fits an object, and none fits anything else.
        may_fit = self._retry.retry_undecodable and message.payload_json[:1] == b"{"
        is_requeued = may_fit and self._has_retries_left(delivery)
        error.with_traceback(None)  # as in `read`
        return _Result(printable(f"undecodable: {error}"), error, is_requeued)

    def _is_dead_lettered_aside(self, result: _Result) -> bool:
        is_dead_lettered = result.reason is not None and not result.is_requeued and self._can_dead_letter
        return is_dead_lettered and len(self._aside) < DEAD_LETTERS_AT_ONCE

    def _dead_letter_aside(self, failure: _Failure) -> None:
        """Dead-letter a delivery in another task: with those that come meanwhile, once the last ones are stored."""
        self._aside[failure.delivery] = failure
        self.make_room(len(self._aside))
        self._failures.append(failure)
        if not self._is_storing:
            self._is_storing = True
            self._begin(self._dead_letter_together())

    def _begin(self, dead_lettering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(dead_lettering, name="diator: dead-lettering")
        self.dead_lettering.add(task)
        task.add_done_callback(self.dead_lettering.discard)

    async def _dead_letter_together(self) -> None:
        """Dead-letter what has come by now in one request, until nothing has come; and the rest one by one."""
        try:
            while self._failures:
                failures, self._failures = self._failures, []
                small = {
                    each.delivery: printable(each.result.reason or "")
                    for each in failures
                    if len(each.delivery.body) <= _LONGEST_TOGETHER
                }
                stored: Collection[Delivery] = ()
                try:
                    async with asyncio.timeout(_SETTLE_TIMEOUT):
                        stored = await self.dead_letter_all(small)
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # a transport may raise anything
                    # Each is tried once more by itself, which decides how it is settled, and reports the error.
                    error_type = type(_unless_cancelled(error))
                    logger.debug("dead letters were not stored together: %s", name_of(error_type))
                for failure in failures:
                    if failure.delivery in stored:
                        failure.delivery.outcome = "dead_letter"
                        self._finish_aside(failure, "dead_lettered", failure.result)
                    else:
                        self._begin(self._dead_letter(failure))
                self.make_room(len(self._aside))
        finally:
            self._is_storing = False

    async def _dead_letter(self, failure: _Failure) -> None:
        """Dead-letter a delivery in a task of its own. Cancelling the task leaves the delivery unsettled."""
        worker = self.worker()
        set_delivery(failure.delivery)  # the task was begun by that of another delivery
        outcome: Outcome = "unsettled"
        result: _Result | None = failure.result
        try:
            outcome, result = await self._settle(failure.delivery, result, worker.settling)
        except BaseException as ending:
            result = _Result(_ended_by(ending), ending)
            raise
        finally:
            self._workers.remove(worker)
            self._deadlines.forget(worker.deadline)
            self._settling.forget(worker.settling)
            self._finish_aside(failure, outcome, result)
            self.make_room(len(self._aside))

    def _finish_aside(self, failure: _Failure, outcome: Outcome, result: _Result | None) -> None:
        if self._aside.pop(failure.delivery, None) is not None:
            set_delivery(failure.delivery)
            self._finish(failure.delivery, failure.message, outcome, result, failure.started)

    def _finish(
        self,
        delivery: Delivery,
        message: Envelope | DecodingError,
        outcome: Outcome,
        result: _Result | None,
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
        if result is not None or self._on_handled is not None:
            reason, error, _, retries, errors, _ = result or _SUCCESS
            handled = Handled(
                topic=delivery.topic,
                group=self._group,
                message_id=None if isinstance(message, DecodingError) else message.message_id,
                attempt=delivery.attempt,
                outcome=outcome,
                reason=reason,
                error=error,
                seconds=ended - started,
                retries=retries,
                errors=errors,
            )
            self._report(handled)

    def _unhandled(self, delivery: Delivery, message: Envelope | DecodingError) -> _Result:
        """Return why *delivery* is not handled."""
        if delivery.attempt > self._max_deliveries:
            ended = counted(delivery.attempt - 1, "delivery", "deliveries")
            return _Result(f"poison-message: {ended} ended without success, more than the retry policy allows")
        if isinstance(message, DecodingError):
            return _Result(printable(f"undecodable: {message}"), message)
        # Whoever may write to one topic must not choose the handler of another one.
        topic = " ".join(delivery.topic)
        return _Result(printable(f"mismatch: the body names another type or name than its topic, {topic}"))

    async def _call_others(
        self,
        delivery: Delivery,
        message: Envelope,
        event: Any,
        deadline: Deadline,
        first_came_to: _CameTo,
    ) -> _Result | None:
        """
        Check what the first handler came to, call the others, and retry those that failed, as the policy specifies.

        A handler that succeeded is not called again: its work is done, and its events are sent.
        """
        route = self._routes[delivery.topic]
        first, waiting = route.handlers[0], route.handlers
        failures: dict[Bound, BaseException] = {}
        healed: dict[Bound, BaseException] = {}
        errors: list[BaseException] = []
        retries = 0
        only_duplicates = True
        failed, is_duplicate = first_came_to
        while True:
            for handler in waiting:
                if handler is not first or retries:
                    # A handler that failed may have changed its event.
                    read: Callable[[Envelope], Any] = route.read if retries else lambda _: event
                    failed, is_duplicate = await _attempt(handler, read, message, deadline)
                self._raise_cancellation(deadline.task, failed)
                only_duplicates &= bool(is_duplicate)
                if failed is not None:
                    failures[handler] = failed
                    errors.append(failed)
                elif handler in failures:
                    healed[handler] = failures.pop(handler)
            waiting = [handler for handler, error in failures.items() if not self._retry.is_permanent(error)]
            if not waiting or retries == self._retry.immediate_retries:
                break
            retries += 1
            await asyncio.sleep(self._retry.pause())
        if not failures:
            if not healed:
                return _ONLY_DUPLICATES if only_duplicates else None
            self._log_healed(message, healed, retries)
            return _Result(None, retries=retries, errors=tuple(errors))
        is_requeued = bool(waiting) and self._has_retries_left(delivery)
        word = "failed" if is_requeued else "retries-exhausted" if waiting else "permanent"
        error = _together(failures, event) if route.has_others else failures[first]
        return _Result(printable(f"{word}: {_described(failures)}"), error, is_requeued, retries, tuple(errors))

    def _raise_cancellation(self, task: asyncio.Task[Any], failed: BaseException | None) -> None:
        """Raise a cancellation from outside. It is neither success nor failure, even if the handler swallowed it."""
        if self._is_ending or (isinstance(failed, asyncio.CancelledError) and task.cancelling()):
            raise asyncio.CancelledError
        while task.cancelling():
            task.uncancel()  # the handler cancelled its own task and left that behind

    def _has_retries_left(self, delivery: Delivery) -> bool:
        return self._can_retry and delivery.attempt < self._retry.max_attempts

    async def _settle(
        self, delivery: Delivery, result: _Result | None, deadline: Deadline, error: BaseException | None = None
    ) -> tuple[Outcome, _Result | None]:
        """
        Settle *delivery* according to *result*, or another way. Return the outcome and its reason.

        *error* is that of a first try.
        """
        failures = 0
        deadline.is_over = False  # it was perhaps over for an earlier delivery, and `ack` does not begin it
        reason = None if result is None else result.reason
        while True:
            if error is None:
                try:
                    if result is None or reason is None:
                        await delivery.ack()
                        return "acked" if result is None or not result.is_duplicate else "duplicate", result
                    with deadline:
                        return await self._settle_failed(delivery, reason, is_requeued=result.is_requeued), result
                except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001  # a transport may raise anything
                    error = _unless_cancelled(failed)
            is_refused = isinstance(error, DiatorError) and not isinstance(error, _TEMPORARY)
            if is_refused or deadline.is_over or failures == len(_SETTLE_PAUSES):
                break
            await asyncio.sleep(_SETTLE_PAUSES[failures])
            failures, error = failures + 1, None
        why = name_of(type(error))
        result = result or _SUCCESS
        if result.is_requeued and not isinstance(error, _TEMPORARY):
            refused = result._replace(reason=printable(f"retry-refused: {why} ({reason})"), is_requeued=False)
            return await self._settle(delivery, refused, deadline)
        self.unsettled += 1
        # The text of an error that is not diator's may quote the message.
        name, text = delivery.topic.message_name, repr(error) if isinstance(error, DiatorError) else why
        kind = printable(f"a delivery of {name} could not be settled: {why}")
        line = printable(f"a delivery of {name} could not be settled: {text}")
        reason = printable(f"not settled: {why}" if reason is None else f"not settled: {why} ({reason})")
        fields = {**_topic_fields(delivery.topic), "outcome": "unsettled", "reason": reason, "error_type": why}
        self._lines.log(logging.ERROR, kind, "%s; it is redelivered", line, fields=lambda: {**log_fields(), **fields})
        return "unsettled", result._replace(reason=reason)

    async def _settle_failed(self, delivery: Delivery, reason: str, *, is_requeued: bool) -> Outcome:
        if is_requeued:
            await delivery.retry(after=self._retry.delay(delivery.attempt))
            return "retried"
        if self._can_dead_letter:
            await delivery.dead_letter(reason)
            return "dead_lettered"
        await delivery.ack()
        return "given_up"

    def _report(self, handled: Handled) -> None:
        if handled.outcome not in ("acked", "duplicate"):
            self._log_failure(handled)
        if self._on_handled is not None:
            try:
                self._on_handled(handled)
            except Exception:  # noqa: BLE001  # it is logged
                line = "on_handled failed"
                self._lines.log(logging.ERROR, line, line, exc_info=True, fields=lambda: _fields(handled))

    def _log_failure(self, handled: Handled) -> None:
        name, reason = printable(handled.topic.message_name), handled.reason or ""
        word, _, what = reason.partition(": ")
        if handled.outcome == "retried":
            failure = what if word == "failed" else reason
            self._lines.log(
                logging.WARNING,
                f"{name} failed ({what if word == 'failed' else word}) and was requeued",
                "%s %s failed (%s); requeued for attempt %d of %d",
                *(name, handled.message_id, failure, handled.attempt + 1, self._retry.max_attempts),
                exc_info=self._traceback(handled.error),
                fields=lambda: _fields(handled),
            )
        if handled.outcome in ("dead_lettered", "given_up"):
            kept = handled.outcome == "dead_lettered"
            end = "is dead-lettered" if kept else "is lost: this transport cannot dead-letter it"
            self._lines.log(
                logging.ERROR,
                f"{name} was not handled and {end} ({word})",
                "%s %s was not handled and %s (%s)",
                *(name, handled.message_id or "with an unreadable id", end, reason),
                exc_info=self._traceback(handled.error),
                fields=lambda: _fields(handled),
            )

    def _log_healed(self, message: Envelope, healed: Mapping[Bound, BaseException], retries: int) -> None:
        name, failure = printable(message.message_name), printable(_described(healed))
        self._lines.log(
            logging.INFO,
            f"{name} succeeded after immediate retries ({failure})",
            "%s %s succeeded after %s (%s)",
            *(name, message.message_id, counted(retries, "immediate retry", "immediate retries"), failure),
            exc_info=self._traceback(next(iter(healed.values()))),
            fields=lambda: {**log_fields(), **_topic_fields(message), "retries": retries},
        )

    def _traceback(self, error: BaseException | None) -> BaseException | None:
        """Return *error* if its traceback is to be logged. Its text may quote the message."""
        return error if self._log_errors else None

    def finish(self) -> None:
        """Report what was not dead-lettered, and log how many lines were left out. The consumer has stopped."""
        CONTEXT_OF.set(self.context_of)  # this is the task of no worker
        for failure in [*self._aside.values()]:  # the tasks were cancelled, perhaps before their first step
            self._finish_aside(failure, "unsettled", _Result("cancelled", asyncio.CancelledError()))
        set_delivery(None)
        self._lines.flush()


def _fields(handled: Handled) -> dict[str, object]:
    """Return the attributes of a log record about a delivery. None of them has content of the message."""
    return {
        **log_fields(),
        **_topic_fields(handled.topic),
        "message_id": None if handled.message_id is None else str(handled.message_id),
        "group": handled.group,
        "attempt": handled.attempt,
        "outcome": handled.outcome,
        "reason": handled.reason,
        "error_type": None if handled.error is None else name_of(type(handled.error)),
        "retries": handled.retries,
        "seconds": handled.seconds,
    }


def _topic_fields(named: Topic | Envelope) -> dict[str, object]:
    return {"message_type": printable(named.message_type), "message_name": printable(named.message_name)}
