"""Consume integration events from a transport, and call their handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from diator._handling import Handling, current_task, inbox_of, routes, set_delivery
from diator._hints import described, name_of
from diator._options import check_counts, check_functions, check_numbers, check_texts, check_times, check_type
from diator._running import CANCEL_TIMEOUT, Running
from diator._text import counted, listed
from diator.brokers.base import Delivery, Gap, ReadableBroker
from diator.brokers.capabilities import Capabilities, require
from diator.brokers.codec import Envelope
from diator.brokers.message import Codec
from diator.brokers.sending import Deduplicating, TransactionalBroker, session_type_of
from diator.container import Container
from diator.container.base import Resolver
from diator.events import EventEmitter, EventMap
from diator.events._emitter import check_codec, check_parts
from diator.events._headers import HeaderSource
from diator.exceptions import BrokerUnavailable, ConfigurationError, DecodingError
from diator.instruments import Handled, Instrument, observer_of
from diator.middlewares.base import Middleware, checked_middlewares
from diator.retrying import RetryPolicy

__all__ = ["Consumer", "Handled", "Health"]

logger: logging.Logger = logging.getLogger(__name__)

#: The consumer group of a consumer that names none, on a transport with groups.
DEFAULT_GROUP = "diator"

T = TypeVar("T")
#: After so many deliveries in a row, the consumer yields to the other tasks of the event loop.
_YIELD_EVERY = 32


@dataclass(frozen=True, kw_only=True)
class Health:
    """
    The state of a consumer, for a health check. Check its progress: a service that answers a ping may still be stuck.

    Attributes:
        receiving: Whether `Consumer.run` receives deliveries: it has subscribed, and `stop` was not called.
        connected: Whether the subscription is connected; true on a transport that cannot report this.
        reconnects: How often the subscription had to reconnect.
        since_last_progress: For how many seconds deliveries have been there, handled or waiting, and none of them was
            settled; 0 while there are none. It does not grow while all of them wait for their redelivery.
        in_flight: How many deliveries are being handled or dead-lettered.
        oldest_in_flight: For how many seconds the oldest of these deliveries has been handled; 0 if there are none.
        unsettled: How many deliveries could not be settled, so that they are redelivered.
        oldest_message: The age in seconds of the oldest message that this consumer has received and not settled, by the
            time that the service gave it; 0 if there is none, None if the transport does not know.
        gaps: How often messages may have been missed.
    """

    receiving: bool
    connected: bool
    reconnects: int
    since_last_progress: float
    in_flight: int
    oldest_in_flight: float
    unsettled: int
    oldest_message: float | None
    gaps: int


class Consumer(Running):
    """
    Receives integration events from a transport, and calls the handlers that *event_map* binds to them.

    The consumer settles a delivery after its last handler. It acknowledges the message if every handler succeeded.
    Otherwise it retries the message as *retry* specifies, and then dead-letters it with a reason. It dead-letters at
    once a body that is not a message, and a message that names another event than its topic. Where the transport has no
    dead-letter queue, the message is lost, and the consumer logs an error.

    A delivery stays unsettled if its handling was cancelled or the process died. The transport then redelivers the
    message if it can. So a handler may be called twice for one message and should be idempotent.

    A program that only consumes calls `run`. A program with other work, such as a web server, uses the consumer as a
    context manager: `async with consumer:` subscribes, consumes during the block, and shuts down gracefully at its end.
    It handles no signals. If the consumer fails during the block, the block is cancelled and the error is raised.

    Use a consumer in one event loop; another thread calls `loop.call_soon_threadsafe(consumer.stop)`.

    Args:
        broker: The transport to read from. The consumer does not close it.
        event_map: The handlers. The consumer subscribes to every integration event that has one.
        container: Builds the handlers. Default: diator's own `Container`.
        group: The consumer group. The consumers of one group share the messages, so name it after the program: two
            programs in one group would take messages from each other. Default: `diator`; on a transport without groups
            there is no group, and every consumer receives every message.
        concurrency: How many deliveries are handled at once. Messages with the same key are handled one after the
            other, in the order in which they were delivered.
        prefetch: How many deliveries may wait for an earlier one with their key, beyond those that are handled. They
            occupy no handler, so that a slow key does not delay the other keys. While so many wait, or 16 MiB, the
            consumer receives nothing more. Nothing waits with a *concurrency* of 1.
        middlewares: Surround each handler; the first is the outermost. An event with two handlers passes through them
            twice.
        event_emitter: Handles or sends the events that handlers raise, before the delivery is acknowledged. Default:
            an emitter with *event_map*, *container*, *broker* or *outbox*, *headers*, *codec* and *instrument*.
        outbox: Stores the events that handlers raise in the transaction of the handler, instead of sending them with
            *broker*; not with *event_emitter*.
        inbox: Notes each handled message in the transaction of its handler, so that a duplicate is acknowledged
            without a call. The effects that a handler has in that transaction then happen once. It needs an *outbox* if
            a handler can raise events, and handlers of one event need different names.
        headers: Header sources of the events that handlers raise, as for an `EventEmitter`; not with *event_emitter*.
        codec: Reads the messages. Default: diator's own envelope.
        instrument: Observes the handling of messages, for telemetry. An *event_emitter* has an instrument of its own.
        retry: How often a failing message is retried. Default: `RetryPolicy()`, with `delayed_retries=0` where the
            transport has no delayed retries.
        requires: Further capabilities that the transport has to promise.
        handler_timeout: How long a handler may take, in seconds, in each attempt. After that the consumer cancels it,
            and it fails with `TimeoutError`, even if it swallows the cancellation. A handler that blocks the event loop
            cannot be cancelled; if it then succeeds, it counts as handled.
        drain_timeout: How long `run` waits for deliveries in flight after `stop`, in seconds.
        log_errors: Whether log lines of failed handlers have tracebacks. The text of an error may quote the message.
        on_handled: Called with the outcome of each delivery, for metrics. The consumer logs an error of this function.
        on_gap: Called when messages may have been missed. The consumer logs an error of this function.

    Raises:
        UnsupportedCapability: The transport does not promise a capability that an option needs.
        ResolutionError: *container* can never build a handler.
        ConfigurationError: The class of an event cannot travel, *event_map* has no handler for an integration event, or
            an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        broker: ReadableBroker,
        *,
        event_map: EventMap,
        container: Resolver | None = None,
        group: str | None = None,
        concurrency: int = 1,
        prefetch: int = 1_000,
        middlewares: Iterable[Middleware] | None = None,
        event_emitter: EventEmitter | None = None,
        outbox: TransactionalBroker[Any] | None = None,
        inbox: Deduplicating[Any] | None = None,
        headers: Sequence[HeaderSource] = (),
        codec: Codec | None = None,
        instrument: Instrument | None = None,
        retry: RetryPolicy | None = None,
        requires: Capabilities | None = None,
        handler_timeout: float = 300.0,
        drain_timeout: float = 20.0,
        log_errors: bool = False,
        on_handled: Callable[[Handled], None] | None = None,
        on_gap: Callable[[Gap], None] | None = None,
    ) -> None:
        check_counts(1, concurrency=concurrency, prefetch=prefetch)
        check_times(handler_timeout=handler_timeout)
        check_numbers(0, drain_timeout=drain_timeout)
        check_functions(on_handled=on_handled, on_gap=on_gap)
        super().__init__("consumer", "had subscribed", drain_timeout)
        _check_broker(broker)
        check_type("event_map", event_map, EventMap, is_needed=True)
        check_parts(event_map=event_map, container=container, message_broker=None)
        check_type("event_emitter", event_emitter, EventEmitter)
        check_codec(codec)
        check_type("retry", retry, RetryPolicy)
        check_type("requires", requires, Capabilities)
        promised = broker.capabilities
        if requires is not None:
            remedy = "use a transport that does, or ask for less"
            require(broker, promised, requires, for_="Consumer(requires=…)", remedy=remedy)
        self._broker = broker
        self._group = _group(broker, promised, group)
        self._concurrency = concurrency
        self._on_gap = on_gap

        container = Container() if container is None else container
        observer = observer_of(instrument, broker)
        emitter = event_emitter
        _check_stores(outbox, inbox)
        if emitter is None:
            emitter = EventEmitter(
                event_map,
                message_broker=broker if outbox is None else outbox,
                headers=headers,
                codec=codec if outbox is None else None,
                instrument=instrument,
            )
        elif headers or outbox is not None:
            raise ConfigurationError(
                "headers or outbox was passed together with event_emitter; pass it to the EventEmitter"
            )
        emitter._wire(container)
        self._inbox = inbox
        bound_inbox = inbox_of(inbox, self._group, container, emitter)
        self._routes = routes(event_map, container, checked_middlewares(middlewares), emitter, bound_inbox)
        self._handling = Handling(
            self._routes,
            _retry(broker, promised, retry),
            group=self._group,
            can_retry=not promised.missing(_DELAYED_RETRIES),
            can_dead_letter=promised.dead_letter,
            max_message_bytes=promised.max_message_bytes,
            timeout=handler_timeout,
            log_errors=log_errors,
            on_handled=on_handled,
            observer=observer,
            codec=codec,
        )
        self._handle = self._handling.handle if observer is None else self._handling.handle_observed
        self._gaps = 0
        self._lanes = _Lanes(concurrency, prefetch)
        self._receiving = False
        self._deliveries: AsyncIterator[Delivery] | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._interrupted = False

    async def run(self, *, signals: bool = True) -> None:
        """
        Consume until `stop` is called. A consumer runs once.

        With *signals*, SIGTERM and SIGINT stop the consumer: the first signal starts a graceful shutdown, a second one
        ends it at once. A handler that was there before, such as that of a web server, is called too. `run` reconnects
        by itself whenever the service is back. If `run` is cancelled, it leaves the deliveries in flight unsettled.

        Raises:
            UsageError: This consumer was run before.
            BrokerUnavailable: The service cannot be reached at the start.
            AccessRefused: The service does not allow this user to subscribe.
            ConfigurationError: The settings of the service do not fit those of the broker.
            BrokerClosed: The broker was closed.
        """
        await super().run(signals=signals)

    async def _run(self) -> None:
        subscription = self._broker.subscribe(  # a broker may raise here already
            self._routes.keys(), group=self._group, prefetch=self._concurrency, on_gap=self._note_gap
        )
        async with contextlib.AsyncExitStack() as stack:
            if self._inbox is not None:
                await stack.enter_async_context(self._inbox)
            deliveries = await self._until_stopped(stack.enter_async_context(subscription))
            if deliveries is not None:
                logger.info("consuming %s", self._about(), extra=self._fields())
                failed: str | None = None
                try:
                    self._deliveries, self._receiving = deliveries, True
                    handling = self._handling
                    handling.make_room = getattr(deliveries, "make_room", handling.make_room)
                    handling.dead_letter_all = getattr(deliveries, "dead_letter_all", handling.dead_letter_all)
                    self._set_ready()
                    await self._consume(deliveries)
                except BaseException as error:
                    failed = name_of(type(error))
                    raise
                finally:
                    self._receiving = False
                    self._handling.finish()
                    end = f"{self._about()} ({failed})" if failed else self._about()
                    logger.info("stopped consuming %s", end, extra={**self._fields(), "error_type": failed})

    async def ready(self) -> None:
        """
        Wait until the consumer has subscribed: it receives every message that is confirmed from then on.

        Another task calls `run`; it need not have begun.

        Raises:
            Exception: The error of `run`, if it ended before the consumer had subscribed.
            UsageError: The consumer was stopped, or `run` was cancelled, before that.
        """
        await super().ready()

    def _about(self) -> str:
        broker, where = type(self._broker).__name__, getattr(self._broker, "where", "")
        return (
            f"{listed(sorted(topic.message_name for topic in self._routes))} from {broker}"
            f"{f' at {where}' if where else ''}, {f'group {self._group}' if self._group else 'without a group'}, "
            f"concurrency {self._concurrency}"
        )

    def _fields(self) -> dict[str, object]:
        """Return the attributes of a log record about this consumer."""
        return {
            "broker": type(self._broker).__name__,
            "group": self._group,
            "concurrency": self._concurrency,
            "message_names": sorted(topic.message_name for topic in self._routes),
        }

    def stop(self) -> None:
        """
        Start a graceful shutdown: receive nothing more, finish the deliveries in flight, and let `run` return.

        After *drain_timeout* seconds, `run` cancels the handlers that still run and leaves their deliveries unsettled.
        A second call of `stop` does so at once, and so does a second signal; one signal and one call do not. `stop`
        itself returns immediately.
        """
        super().stop()

    def _shut_down(self) -> None:
        super()._shut_down()
        self._lanes.close()
        if self._waiting is not None:
            self._interrupted = True
            self._waiting.cancel()
            self._waiting = None

    def health(self) -> Health:
        """Return the state of this consumer. Cheap, and callable at any time, also in another thread."""
        now, in_flight, deliveries = monotonic(), self._handling.in_flight, self._deliveries
        return Health(
            receiving=self._receiving and not self._stopping.is_set(),
            connected=self._receiving and getattr(deliveries, "connected", True),
            reconnects=getattr(deliveries, "reconnects", 0),
            since_last_progress=self._handling.seconds_without_progress(now, getattr(deliveries, "waiting", 0.0)),
            in_flight=len(in_flight),
            oldest_in_flight=now - min(in_flight, default=now),
            unsettled=self._handling.unsettled,
            oldest_message=getattr(deliveries, "oldest_message", None),
            gaps=self._gaps,
        )

    async def _until_stopped(self, something: Coroutine[Any, Any, T]) -> T | None:
        """Return the result of *something*. Return None, and cancel *something*, if `stop` is called before."""
        if self._stopping.is_set():
            something.close()
            return None
        task = self._waiting = current_task()
        try:
            result = await something
        except asyncio.CancelledError:
            if self._interrupted and task.uncancel() == 0:
                return None  # `stop` cancelled it
            raise
        finally:
            self._waiting = None
        if not self._stopping.is_set():
            return result
        # Code may ignore its cancellation. A delivery that arrives anyway is not handled, but returned to the service.
        if self._interrupted:
            task.uncancel()
        return None

    async def _consume(self, deliveries: AsyncIterator[Delivery]) -> None:
        if self._concurrency == 1:
            tasks = {asyncio.create_task(self._receive_and_handle(deliveries))}
        else:
            tasks = {asyncio.create_task(self._work()) for _ in range(self._concurrency)}
            read, lanes = self._handling.read, self._lanes
            lanes.postpone = getattr(deliveries, "postpone", lanes.postpone)
            lanes.resume = getattr(deliveries, "resume", lanes.resume)
            admit = self._receive(deliveries, lambda delivery: lanes.put(delivery, read(delivery)))
            tasks.add(asyncio.create_task(admit))
        lost: BrokerUnavailable | None = None
        try:
            await self._until_drained(tasks, lambda: self._drain(tasks))
        finally:
            self._lanes.close()
            if left := len(self._handling.in_flight):
                handled = counted(left, "delivery was", "deliveries were")
                end = "it stays" if left == 1 else "they stay"
                extra = {**self._fields(), "messages": left}
                logger.warning("stopped before %s handled; %s unsettled", handled, end, extra=extra)
            if any(task.cancelled() for task in tasks):
                lost = BrokerUnavailable(
                    "the subscription was cancelled, perhaps by the client library; create another Consumer"
                )
            self._handling.end()
            ending = {*tasks, *self._handling.dead_lettering}
            for each in ending:
                each.cancel()
            _, running = await asyncio.wait(ending, timeout=CANCEL_TIMEOUT)
            if running:
                ignored = counted(len(running), "handler ignored its", "handlers ignored their")
                are = "is" if len(running) == 1 else "are"
                logger.error("%s cancellation and %s still running", ignored, are, extra=self._fields())
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
        if lost is not None:
            raise lost

    async def _drain(self, tasks: Collection[asyncio.Task[None]]) -> None:
        await asyncio.wait(tasks)
        while dead_lettering := self._handling.dead_lettering:
            await asyncio.wait(dead_lettering)

    async def _receive_and_handle(self, deliveries: AsyncIterator[Delivery]) -> None:
        """Receive and handle in one task, one delivery at a time: a queue between two tasks would cost a third."""
        await self._receive(deliveries, partial(self._handle, self._handling.worker()))

    async def _receive(
        self, deliveries: AsyncIterator[Delivery], admit: Callable[[Delivery], Awaitable[object]]
    ) -> None:
        await self._until_stopped(self._admit_all(deliveries, admit))

    async def _admit_all(
        self, deliveries: AsyncIterator[Delivery], admit: Callable[[Delivery], Awaitable[object]]
    ) -> None:
        """Pass each delivery to *admit*. `stop` cancels only the wait for the next delivery, never *admit*."""
        task, self._waiting, number = self._waiting, None, 0
        # Where nothing has to be waited for, a coroutine and a cancellable wait would cost a thirtieth.
        receive_nowait: Callable[[], Delivery | None] = getattr(deliveries, "receive_nowait", lambda: None)
        while not self._stopping.is_set():
            delivery = receive_nowait()
            if delivery is None:
                self._waiting = task
                set_delivery(None)  # what the transport does meanwhile belongs to no message
                delivery = await anext(deliveries)
                self._waiting = None
                if self._stopping.is_set():  # the iterator ignored its cancellation, see `_until_stopped`
                    return
            await admit(delivery)
            number += 1
            if number % _YIELD_EVERY == 0:  # handlers that never wait would starve the other tasks
                await asyncio.sleep(0)

    async def _work(self) -> None:
        worker = self._handling.worker()
        while job := await self._lanes.take():
            delivery, message = job
            await self._handle(worker, delivery, message)
            self._lanes.done(message)
            del job, delivery, message  # a worker that waits keeps nothing alive

    def _note_gap(self, gap: Gap) -> None:
        self._gaps += 1
        line = "messages may have been missed between %s and %s: %s"
        logger.warning(line, gap.since, gap.until, gap.reason, extra={**self._fields(), "reason": gap.reason})
        if self._on_gap is not None:
            try:
                self._on_gap(gap)
            except Exception:
                logger.exception("on_gap failed", extra=self._fields())


def _check_stores(outbox: object, inbox: object) -> None:
    if outbox is not None and (isinstance(outbox, type) or session_type_of(outbox) is None):
        raise ConfigurationError(
            f"outbox must be an Outbox, or another broker that stores in a transaction, and it is {described(outbox)}"
        )
    is_inbox = callable(getattr(inbox, "first_time", None)) and hasattr(inbox, "group")  # a store has no group
    if inbox is not None and (isinstance(inbox, type) or not is_inbox):
        raise ConfigurationError(f"inbox must be an Inbox, and it is {described(inbox)}")


def _check_broker(broker: object) -> None:
    """Check that it is a transport, so that a mistake is not an AttributeError somewhere inside."""
    can_receive = callable(getattr(broker, "subscribe", None)) and hasattr(broker, "capabilities")
    if isinstance(broker, type) or not can_receive:
        problem = f"broker must be a transport with `subscribe` and `capabilities`, and it is {described(broker)}"
        raise ConfigurationError(problem)


# -- options that depend on the capabilities of the transport ----------------------------------------------------


def _group(broker: object, promised: Capabilities, group: str | None) -> str | None:
    if group is None:
        return DEFAULT_GROUP if "competing" in promised.distribution else None
    check_texts(group=group)
    if not group:  # perhaps of a variable of the environment
        raise ConfigurationError("group is empty; name it after the program, or leave it out")
    needed = Capabilities(distribution=frozenset({"competing"}))
    remedy = "leave the group out, then every consumer receives every message, or use a transport with consumer groups"
    require(broker, promised, needed, for_=f"Consumer(group={group!r})", remedy=remedy)
    return group


#: What a delayed retry needs: without a count of the deliveries, a failing message would be requeued for ever.
_DELAYED_RETRIES = Capabilities(delayed_retry=True, delivery_count="retries")


def _retry(broker: object, promised: Capabilities, retry: RetryPolicy | None) -> RetryPolicy:
    if retry is None:
        return RetryPolicy(delayed_retries=0) if promised.missing(_DELAYED_RETRIES) else RetryPolicy()
    if retry.delayed_retries:
        remedy = "set RetryPolicy(delayed_retries=0), or use a transport that can requeue a message with a delay"
        require(broker, promised, _DELAYED_RETRIES, for_="RetryPolicy(delayed_retries=…)", remedy=remedy)
    return retry


# -- order by key ------------------------------------------------------------------------------------------------

_Job: TypeAlias = tuple[Delivery, Envelope | DecodingError]


#: How many bytes the deliveries take that wait for an earlier one of their key, before the consumer receives no more.
_MAX_WAITING_BYTES = 16 * 1024 * 1024


class _Lanes:
    """
    Hands out deliveries to at most *slots* workers: those with the same key one at a time, in their order.

    A delivery that waits for an earlier one of its key has no worker. So a slow key delays no other key, until
    *prefetch* deliveries wait, or `_MAX_WAITING_BYTES`.

    Attributes:
        postpone: Called with a delivery that has to wait; see `ReadableBroker.subscribe`.
        resume: Called with it when its turn has come. It returns False if the delivery was withdrawn meanwhile.
    """

    def __init__(self, slots: int, prefetch: int) -> None:
        self._slots = slots
        self._prefetch = prefetch
        self._begun = self._waiting = self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._ready: deque[_Job] = deque()
        self._lanes: dict[str, deque[_Job]] = {}  # each key that is being handled, with what waits behind it
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self.postpone: Callable[[Delivery], None] = lambda _: None
        self.resume: Callable[[Delivery], bool] = lambda _: True

    async def put(self, delivery: Delivery, message: Envelope | DecodingError) -> None:
        """Add a delivery, then wait until another one may be received: other consumers could handle it meanwhile."""
        key = _key(message)
        if key is None or key not in self._lanes:
            if key is not None:
                self._lanes[key] = deque()
            self._begin((delivery, message))
        else:
            self._lanes[key].append((delivery, message))
            self._waiting += 1
            self._waiting_bytes += _size(delivery)
            self.postpone(delivery)
        while not self._closed and (
            self._begun >= self._slots or self._waiting >= self._prefetch or self._waiting_bytes >= _MAX_WAITING_BYTES
        ):
            self._has_room.clear()
            await self._has_room.wait()

    def _begin(self, job: _Job) -> None:
        """Give *job* to a worker; there is a free one."""
        self._begun += 1
        self._ready.append(job)
        self._wake()

    async def take(self) -> _Job | None:
        """Wait for the next delivery. Return None once the lanes are closed."""
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            set_delivery(None)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return None

    def done(self, message: Envelope | DecodingError) -> None:
        """Mark *message* as handled, and hand out the next delivery with its key."""
        self._begun -= 1
        self._has_room.set()
        key = _key(message)
        if key is None or self._closed:
            return
        lane = self._lanes[key]
        while lane:
            job = lane.popleft()
            self._waiting -= 1
            self._waiting_bytes -= _size(job[0])
            if self.resume(job[0]):
                self._begin(job)
                return
        del self._lanes[key]

    def close(self) -> None:
        """Hand out nothing more. Deliveries that no worker has taken return to the service, as prefetched ones do."""
        self._closed = True
        for delivery, _ in self._ready:
            self.postpone(delivery)
        self._ready.clear()
        self._has_room.set()
        while self._waiters:
            self._wake()

    def _wake(self) -> None:
        """Wake one waiting worker. Waking all would be wasted: only one of them gets the delivery."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def _size(delivery: Delivery) -> int:
    return len(delivery.body) + sum(len(name) + len(value) for name, value in delivery.headers.items())


def _key(message: Envelope | DecodingError) -> str | None:
    return None if isinstance(message, DecodingError) else message.key
