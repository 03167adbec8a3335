"""A program's second door: what reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from diator._handling import Handled, Handling, routes
from diator.brokers.base import Delivery, Gap, ReadableBroker
from diator.brokers.capabilities import Capabilities, require
from diator.brokers.message import Message
from diator.container import Container
from diator.container.base import Resolver
from diator.events import EventEmitter, EventMap
from diator.exceptions import BrokerUnavailable, ConfigurationError, DecodingError, UsageError
from diator.middlewares.base import Middleware
from diator.retrying import RetryPolicy

__all__ = ["Consumer", "Handled", "Health"]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_GROUP = "diator"
"""The group of a consumer that names none, on a transport that has groups."""

T = TypeVar("T")
_TURN = 32
_PATIENCE = 5.0
"""How many seconds handlers have to end once they are cancelled."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """How a consumer gets on. A service that answers a ping proves nothing; progress does. Times in seconds."""

    receiving: bool
    connected: bool
    """Whether the subscription has its connection; true where a transport does not tell."""
    since_last_progress: float
    in_flight: int
    oldest_in_flight: float
    gaps: int
    """How often messages may have been missed."""


class Consumer:
    """
    Receives the events that travel, and runs the handlers that *event_map* has for them.

    Each delivery is settled when all of its handlers are done: acknowledged if they succeeded, else handled again as
    *retry* says, and then put aside (dead-lettered) with a reason. What cannot be read is put aside at once. A delivery
    whose handling was cancelled, or died with the process, is not settled, and comes again where the transport can.

    At most *concurrency* deliveries are handled at once; those of one key in their order, one after the other. The
    members of one *group* share the messages; name it after the service that consumes, for two services of one group
    take each other's. *requires* names what else the transport has to promise. Times are in seconds.

    Events that handlers raise are handled or sent by *event_emitter*, before the delivery is acknowledged. *on_handled*
    and *on_gap* are told what happened, for metrics; an error in them is logged.

    Raises:
        UnsupportedCapability: The transport cannot do what these options ask for.
        ResolutionError: A handler can never be built by *container*.
        ConfigurationError: *event_map* has no handler for an event that travels, or an option makes no sense.
    """

    def __init__(
        self,
        broker: ReadableBroker,
        *,
        event_map: EventMap,
        container: Resolver | None = None,
        group: str | None = None,
        concurrency: int = 1,
        middlewares: Iterable[Middleware] = (),
        event_emitter: EventEmitter | None = None,
        retry: RetryPolicy | None = None,
        requires: Capabilities | None = None,
        handler_timeout: float = 300.0,
        drain_timeout: float = 20.0,
        on_handled: Callable[[Handled], None] | None = None,
        on_gap: Callable[[Gap], None] | None = None,
    ) -> None:
        if concurrency < 1 or handler_timeout <= 0 or drain_timeout < 0:
            raise ConfigurationError(
                "concurrency is at least 1, handler_timeout above 0, and drain_timeout not below 0"
            )
        promised = broker.capabilities
        if requires is not None:
            remedy = "use a transport that does, or ask for less"
            require(broker, promised, requires, for_="Consumer(requires=…)", remedy=remedy)
        self._broker = broker
        self._group = _group(broker, promised, group)
        self._concurrency = concurrency
        self._drain_timeout = drain_timeout
        self._on_gap = on_gap

        container = Container() if container is None else container
        emitter = event_emitter or EventEmitter(event_map, container, broker)
        emitter._wire(container)
        self._routes = routes(event_map, container, tuple(middlewares), emitter)
        self._handling = Handling(
            self._routes,
            _retry(broker, promised, retry),
            can_retry=not promised.missing(_GIVING_BACK),
            can_dead_letter=promised.dead_letter,
            max_message_bytes=promised.max_message_bytes,
            timeout=handler_timeout,
            on_handled=on_handled,
        )
        self._gaps = 0
        self._lanes = _Lanes(concurrency)
        self._started = False
        self._receiving = False
        self._deliveries: AsyncIterator[Delivery] | None = None
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._waiting: asyncio.Task[Any] | None = None
        self._interrupted = False

    async def run(self, *, signals: bool = True) -> None:
        """
        Consume until `stop`. With *signals*, SIGTERM and SIGINT stop, and a second one stops at once.

        It connects again by itself whenever the service comes back. Cancelled, it leaves what is being handled
        unsettled. A consumer runs once.

        Raises:
            BrokerUnavailable: The service could not be reached at the start.
        """
        if self._started:
            raise UsageError("a consumer runs once; make another one")
        self._started = True
        subscription = self._broker.subscribe(
            self._routes.keys(), group=self._group, prefetch=self._concurrency, on_gap=self._note_gap
        )
        with _calling_on_signals(self.stop) if signals else contextlib.nullcontext():
            async with contextlib.AsyncExitStack() as stack:
                deliveries = await self._until_stopped(stack.enter_async_context(subscription))
                if deliveries is not None:
                    try:
                        self._deliveries, self._receiving = deliveries, True
                        await self._consume(deliveries)
                    finally:
                        self._receiving = False

    def stop(self) -> None:
        """
        Receive no more, and let `run` return once what is being handled is done, or *drain_timeout* is over.

        What still runs then is cancelled and left unsettled. Called a second time, that happens at once.
        """
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        self._lanes.close()
        if self._waiting is not None:
            self._interrupted = True
            self._waiting.cancel()
            self._waiting = None

    def health(self) -> Health:
        """Tell how this consumer gets on."""
        now, in_flight = monotonic(), self._handling.in_flight.values()
        return Health(
            receiving=self._receiving and not self._stopping.is_set(),
            connected=self._receiving and getattr(self._deliveries, "connected", True),
            since_last_progress=now - self._handling.last_progress,
            in_flight=len(in_flight),
            oldest_in_flight=now - min(in_flight, default=now),
            gaps=self._gaps,
        )

    async def _until_stopped(self, something: Coroutine[Any, Any, T]) -> T | None:
        """Wait for *something*, unless `stop` is called: then give None, and the wait is cancelled."""
        if self._stopping.is_set():
            something.close()
            return None
        task = self._waiting = asyncio.current_task()
        try:
            result = await something
        except asyncio.CancelledError:
            if self._interrupted and task is not None and task.uncancel() == 0:
                return None  # it was `stop` that cancelled
            raise
        finally:
            self._waiting = None
        # Not everything that is cancelled notices. What came all the same is not begun, and goes back to the service.
        return None if self._stopping.is_set() else result

    async def _consume(self, deliveries: AsyncIterator[Delivery]) -> None:  # beginning and end of it all
        handle, read, lanes = self._handling.handle, self._handling.read, self._lanes
        if self._concurrency == 1:
            # The handler is called where deliveries are received: a queue in between would cost a third.
            tasks = {asyncio.create_task(self._receive(deliveries, lambda delivery: handle(delivery, read(delivery))))}
        else:
            tasks = {asyncio.create_task(self._work()) for _ in range(self._concurrency)}
            admit = self._receive(deliveries, lambda delivery: lanes.put(delivery, read(delivery)))
            tasks.add(asyncio.create_task(admit))
        lost: BrokerUnavailable | None = None
        stopping, hurry = (asyncio.create_task(event.wait()) for event in (self._stopping, self._hurry))
        try:
            done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                drained = asyncio.create_task(asyncio.wait(tasks))
                await asyncio.wait({hurry, drained}, timeout=self._drain_timeout, return_when=asyncio.FIRST_COMPLETED)
                drained.cancel()
        finally:
            if left := len(self._handling.in_flight):
                logger.warning("stopped before %d deliveries were handled; they are not settled", left)
            if any(task.cancelled() for task in tasks):
                lost = BrokerUnavailable("the subscription was cancelled, and not by this program")
            self._handling.end()
            for ending in {stopping, hurry, *tasks}:
                ending.cancel()
            _, deaf = await asyncio.wait({stopping, hurry, *tasks}, timeout=_PATIENCE)
            if deaf:
                logger.error("%d handlers run on although they were cancelled", len(deaf))
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
        if lost is not None:
            raise lost

    async def _receive(self, deliveries: AsyncIterator[Delivery], admit: Callable[[Delivery], Awaitable[None]]) -> None:
        await self._until_stopped(self._admit_all(deliveries, admit))

    async def _admit_all(
        self, deliveries: AsyncIterator[Delivery], admit: Callable[[Delivery], Awaitable[None]]
    ) -> None:
        """`stop` cancels no more than the wait for the next one."""
        task, number = self._waiting, 0
        while not self._stopping.is_set():
            self._waiting = task
            delivery = await anext(deliveries)
            self._waiting = None
            if self._stopping.is_set():  # not everything that is cancelled notices; what came goes back to the service
                return
            await admit(delivery)
            number += 1
            if number % _TURN == 0:  # where nothing ever has to wait, the rest of the program is to have its turn
                await asyncio.sleep(0)

    async def _work(self) -> None:
        while job := await self._lanes.take():
            delivery, message = job
            await self._handling.handle(delivery, message)
            self._lanes.done(message)

    def _note_gap(self, gap: Gap) -> None:
        self._gaps += 1
        logger.warning("messages may have been missed between %s and %s: %s", gap.since, gap.until, gap.reason)
        if self._on_gap is not None:
            try:
                self._on_gap(gap)
            except Exception:
                logger.exception("on_gap failed")


# -- what a transport can do decides what an option means --------------------------------------------------------


def _group(broker: object, promised: Capabilities, group: str | None) -> str | None:
    if group is None:
        return DEFAULT_GROUP if "competing" in promised.distribution else None
    needed = Capabilities(distribution=frozenset({"competing"}))
    remedy = "leave the group out, and every consumer gets every message, or use a transport that has groups"
    require(broker, promised, needed, for_=f"Consumer(group={group!r})", remedy=remedy)
    return group


_GIVING_BACK = Capabilities(delayed_retry=True, delivery_count="retries")
"""What a delayed retry needs: without a count of attempts nothing would end giving a message back."""


def _retry(broker: object, promised: Capabilities, retry: RetryPolicy | None) -> RetryPolicy:
    if retry is None:
        return RetryPolicy(delayed_retries=0) if promised.missing(_GIVING_BACK) else RetryPolicy()
    if retry.delayed_retries:
        remedy = (
            "set RetryPolicy(delayed_retries=0), and only the immediate ones remain, or use a transport that gives back"
        )
        require(broker, promised, _GIVING_BACK, for_="RetryPolicy(delayed_retries=…)", remedy=remedy)
    return retry


# -- order -------------------------------------------------------------------------------------------------------

_Job: TypeAlias = tuple[Delivery, Message | DecodingError]


class _Lanes:
    """At most *limit* deliveries that are to be handled; of those with one key one at a time, in their order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._freed = asyncio.Event()
        self._ready: deque[_Job] = deque()
        self._behind: dict[str, deque[_Job]] = {}
        self._idle: deque[asyncio.Future[None]] = deque()
        self._closed = False

    async def put(self, delivery: Delivery, message: Message | DecodingError) -> None:
        """Take in one more, and wait until there is room for another: what waits here could be elsewhere."""
        self._held += 1
        self._put(delivery, message)
        while self._held >= self._limit and not self._closed:
            self._freed.clear()
            await self._freed.wait()

    def _put(self, delivery: Delivery, message: Message | DecodingError) -> None:
        key = _key(message)
        if key is not None and key in self._behind:
            self._behind[key].append((delivery, message))
            return
        if key is not None:
            self._behind[key] = deque()
        self._ready.append((delivery, message))
        self._wake()

    async def take(self) -> _Job | None:
        """Wait for the next one; None once it is closed."""
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            idle = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            await idle
        return None

    def done(self, message: Message | DecodingError) -> None:
        """Let the next one of that key go."""
        self._held -= 1
        self._freed.set()
        key = _key(message)
        if key is None:
            return
        if behind := self._behind[key]:
            self._ready.append(behind.popleft())
            self._wake()
        else:
            del self._behind[key]

    def close(self) -> None:
        """Give out nothing more. What was not given out is not settled, and goes back to the service."""
        self._closed = True
        self._freed.set()
        while self._idle:
            self._wake()

    def _wake(self) -> None:
        """Wake one of those who wait: all at once would look in vain, all but one."""
        while self._idle:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                return


def _key(message: Message | DecodingError) -> str | None:
    return message.key if isinstance(message, Message) else None


# -- signals -----------------------------------------------------------------------------------------------------


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_stops: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
"""What a signal calls, of all consumers of a loop: it has only one handler for each."""
_before: dict[asyncio.AbstractEventLoop, dict[signal.Signals, Any]] = {}
"""What a signal did before there was any. What the program had told the loop itself, it cannot be asked for."""


@contextlib.contextmanager
def _calling_on_signals(stop: Callable[[], None]) -> Generator[None, None, None]:
    """Have SIGTERM and SIGINT call *stop*, where that is possible: in the main thread, on a loop that has signals."""
    loop = asyncio.get_running_loop()
    stops = _stops.setdefault(loop, [])
    if not stops:
        _before[loop] = {number: signal.getsignal(number) for number in _SIGNALS}
    stops.append(stop)

    def stop_all() -> None:
        for each in [*stops]:
            each()

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        for number in _SIGNALS:
            loop.add_signal_handler(number, stop_all)
    try:
        yield
    finally:
        stops.remove(stop)
        if not stops:
            del _stops[loop]
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                for number, handler in _before.pop(loop).items():
                    loop.remove_signal_handler(number)
                    if handler is not None:  # or it was not Python's
                        signal.signal(number, handler)
