"""Keeps one subscription alive, for every transport with a link that can fail. Written once, so that none forgets."""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

from diator._text import listed
from diator.brokers.base import Delivery, Gap, OnGap, Topic
from diator.exceptions import BrokerClosed, BrokerUnavailable, ConfigurationError, DiatorError, UsageError

_WAITING = 0.05
"""Whoever waits for longer than this, in seconds, has read everything that was there."""

logger: logging.Logger = logging.getLogger(__name__)


class MessagesMissed(Exception):
    """
    Raised by a source whose service has lost messages, or may have, and not just the connection to it.

    The subscription connects again, and tells the program about the gap even where a lost connection makes none.
    """


class Source(Protocol):
    """
    The transport's half: one connection while it lives, ready to receive.

    `receive` is called again and again by one task; `probe`, if need be, by another one while `receive` waits.
    """

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        """
        Wait for deliveries, and give at most *most* of them; none, where something else was heard.

        Whenever it returns, the service was heard. It is cancelled when the subscription ends, and when the peer counts
        as dead. What it had taken from the service by then and not given is the transport's to give back, or to give
        with the next connection.

        Raises:
            Exception: The connection is lost, whatever the client library calls that.
        """
        ...

    async def probe(self) -> None:
        """
        Ask the service for a sign of life. `receive` returns when it comes.

        It may do nothing where `receive` returns by itself more often than `ReconnectPolicy.idle_timeout`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ReconnectPolicy:
    """How long is waited for what. All times are in seconds."""

    connect_timeout: float = 10.0
    """For a connection, and for it to be ready."""
    idle_timeout: float = 10.0
    """For anything to be heard, before a sign of life is asked for."""
    probe_timeout: float = 5.0
    """For that sign, before the peer counts as dead."""
    first_delay: float = 0.1
    """The longest first pause before connecting again; it doubles with each failure."""
    max_delay: float = 30.0
    reset_after: float = 60.0
    """How long a connection has to live for the pauses to begin anew."""

    def delay(self, failures: int) -> float:
        """Full jitter: everybody who lost the same service must not come back at the same moment."""
        return random.uniform(0, min(self.max_delay, self.first_delay * 2 ** min(failures, 32)))  # noqa: S311


class ResilientSubscription(ABC):
    """
    A subscription that connects again whenever its connection breaks. It has at most one connection at any time.

    Each transport derives its subscription from this class: it writes `connect`, and, where the service must learn how
    deliveries were settled, `leave`. Whatever outlives one connection is an attribute of that subclass.

    Entering the subscription connects. It raises `BrokerUnavailable` if that fails, or whatever error of diator
    `connect` raises. Then the subscription is an iterator of deliveries. It ends with `BrokerClosed` when its broker is
    closed, or with a `ConfigurationError` or `UsageError` of `connect`, which connecting again does not fix.

    When it ends, by its context or with its broker, `leave` is called once, after the last connection.

    Args:
        topics: What it reads. Logs name the subscription by *topics* and *group*.
        group: Its group; None is a subscription without one.
        lossy: Whether messages are missed while there is no connection. If so, *on_gap* is called after reconnecting.
        prefetch: How many deliveries may be unsettled in the program's hands. None is handed out beyond that.
        buffer_size: How many deliveries are received before the program asks for them, by default *prefetch*. They outlive
            the connection.
        reconnect: How long to wait for what.
        on_gap: Called when messages may have been missed.
        registry: The subscriptions of the same broker, which `close_all` ends. This one is in it while it lives.

    Attributes:
        connected: Whether there is a connection now.
        unsettled: How many deliveries the transport has made that are not settled, whether or not the program has them
            yet. The transport counts them, and calls `notify_settled` when it has lowered the count. It stays 0 where
            nothing is settled.

    Raises:
        ConfigurationError: *prefetch* is below 1.
    """

    unsettled: int = 0

    def __init__(
        self,
        topics: Collection[Topic],
        group: str | None = None,
        *,
        lossy: bool,
        prefetch: int,
        buffer_size: int | None = None,
        reconnect: ReconnectPolicy,
        on_gap: OnGap | None,
        registry: set[ResilientSubscription],
    ) -> None:
        if prefetch < 1:
            raise ConfigurationError("prefetch is at least 1")
        self._name = _named(topics, group)
        self._lossy = lossy
        self._prefetch = prefetch
        self._buffer_size = prefetch if buffer_size is None else buffer_size
        self._reconnect = reconnect
        self._on_gap = on_gap
        self._registry = registry
        self._received: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._heard = 0.0
        self._caught_up = 0.0
        self.connected = False
        self._ended: DiatorError | None = None
        self._pump: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    # -- what a transport writes ---------------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> AbstractAsyncContextManager[Source]:
        """
        Make one connection. Entered, it receives what is confirmed from now on; left, it is gone.

        Raises, on entry:
            BrokerClosed: The broker is closed. This ends the subscription.
            ConfigurationError: The service is set up in a way that connecting again does not fix. This ends it, too.
            Exception: Connecting failed; the subscription tries again.
        """

    async def leave(self, not_given_out: Collection[Delivery]) -> None:  # noqa: B027  # many have nothing to do
        """
        Wait until the service knows what was settled, and return to it what was not, within a bound of time.

        *not_given_out* is what was received and never handed out: it counts as no attempt. Called once, at the end,
        also if no connection was ever made. By default there is nothing to do.
        """

    # -- the program's side --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._keep_receiving(ready), name="diator: receiving")
        self._registry.add(self)
        try:
            await ready
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        received = self._received
        while self._ending is not None or not received or self._is_full:
            if self._ended is not None:
                raise self._ended
            if self._ending is not None:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        delivery = received.popleft()
        if len(received) == self._buffer_size // 2:  # not before: receiving a few costs as much as receiving many
            self._room.set()
        return delivery

    @property
    def is_ending(self) -> bool:
        """Whether the next connection to be lost is the last."""
        return self._ending is not None

    @property
    def _is_full(self) -> bool:
        return self.unsettled - len(self._received) >= self._prefetch

    # -- what the transport calls --------------------------------------------------------------------------------

    def remove_prefetched(self, which: Callable[[Delivery], bool] = lambda _: True) -> list[Delivery]:
        """Take *which* of what was received and never asked for, all of it by default: it is given out no more."""
        taken: list[Delivery] = []
        kept: list[Delivery] = []
        for delivery in self._received:
            (taken if which(delivery) else kept).append(delivery)
        self._received.clear()
        self._received.extend(kept)
        self._room.set()
        self._arrived.set()
        return taken

    def notify_settled(self) -> None:
        """Note that a delivery was settled: perhaps the next one can be handed out."""
        self._arrived.set()

    def report_gap(self, since: datetime, reason: str) -> None:
        """Report to the program that messages may have been missed from *since* until now."""
        if self._on_gap is not None:
            try:
                self._on_gap(Gap(since=since, until=datetime.now(UTC), reason=reason))
            except Exception:
                logger.exception("on_gap failed")

    async def aclose(self) -> None:
        """End it with its broker: who waits for a delivery, or asks for one, gets `BrokerClosed`."""
        self._ended = BrokerClosed("this broker is closed")
        await self._end()

    async def _end(self) -> None:
        """Once, and to its end: also if this is cancelled."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_once(), name="diator: ending a subscription")
            self._arrived.set()
        await asyncio.shield(self._ending)

    async def _end_once(self) -> None:
        self._registry.discard(self)
        if self._pump is not None:
            await _end_of(self._pump)
        await self.leave(self._received)

    async def _keep_receiving(self, ready: asyncio.Future[None]) -> None:
        loop, pump = asyncio.get_running_loop(), asyncio.current_task()
        assert pump is not None, "it runs in a task"  # noqa: S101  # asyncio has no other way
        failures = 0
        lost: tuple[datetime, str] | None = None
        missed = self._lossy
        while True:
            since = loop.time()
            connected = False
            try:
                async with asyncio.timeout(self._reconnect.connect_timeout) as connecting, self.connect() as source:
                    connecting.reschedule(None)
                    since, connected = loop.time(), True
                    self.connected = True
                    if not ready.done():
                        ready.set_result(None)
                    if lost is not None:
                        logger.info("%s is connected again", self._name)
                    if lost is not None and missed:
                        self.report_gap(*lost)
                    lost, missed = None, self._lossy
                    await self._receive_from(source)
            except (Exception, asyncio.CancelledError) as error:  # whatever a client library raises, it is gone
                if isinstance(error, asyncio.CancelledError) and pump.cancelling():
                    raise  # else the library has cancelled something of its own, and nobody this subscription
                if not ready.done():
                    ready.set_exception(_unavailable(error))
                    return
                if isinstance(error, (BrokerClosed, ConfigurationError, UsageError)):
                    self._ended = error
                    self._arrived.set()
                    return
                self.connected = False
                missed = missed or isinstance(error, MessagesMissed)
                silent = isinstance(error, TimeoutError) and not str(error)
                reason = "the peer was silent" if silent else f"{type(error).__name__}: {error}".removesuffix(": ")
                logger.warning("%s has no connection (%s); connecting again", self._name, reason)
                behind = loop.time() - max(since, self._complete_until()) if connected else 0.0
                lost = lost or (datetime.now(UTC) - timedelta(seconds=behind), reason)
            if connected and loop.time() - since > self._reconnect.reset_after:
                failures = 0
            await asyncio.sleep(self._reconnect.delay(failures))
            failures += 1

    async def _receive_from(self, source: Source) -> None:
        """Receive until the connection is lost, or its peer is silent for too long."""
        self._heard_now()
        self._room.set()
        async with asyncio.timeout(None) as alive:
            watching = asyncio.create_task(self._watch(source, alive), name="diator: watching for silence")
            try:
                while True:
                    while (room := self._buffer_size - len(self._received)) <= 0:
                        self._room.clear()
                        await self._room.wait()
                        self._heard = asyncio.get_running_loop().time()  # nobody listened meanwhile
                    if deliveries := await source.receive(room):
                        self._received.extend(deliveries)
                        self._arrived.set()
                    self._heard_now()
            finally:
                await _end_of(watching)

    async def _watch(self, source: Source, alive: asyncio.Timeout) -> None:
        """A connection can be dead without a word: its packets go nowhere, and nothing tells so but silence."""
        loop, policy = asyncio.get_running_loop(), self._reconnect
        while True:
            quiet = loop.time() - self._heard
            if quiet < policy.idle_timeout or not self._room.is_set():  # heard, or not listened to
                await asyncio.sleep(max(policy.idle_timeout - quiet, policy.probe_timeout / 10))
                continue
            asked = loop.time()
            try:
                async with asyncio.timeout(policy.probe_timeout):
                    await source.probe()
                await asyncio.sleep(policy.probe_timeout - (loop.time() - asked))
            except Exception as error:  # noqa: BLE001  # whatever it is, there was no sign of life
                logger.debug("asking for a sign of life failed: %r", error)
            if self._heard < asked and self._room.is_set():
                alive.reschedule(loop.time())
                return

    def _heard_now(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._heard > _WAITING:
            self._caught_up = now
        self._heard = now

    def _complete_until(self) -> float:
        """Until when nothing can have been missed. What the service had for a reader that lagged is lost with it."""
        waited = asyncio.get_running_loop().time() - self._heard > _WAITING
        return self._heard if waited else self._caught_up


async def close_all(subscriptions: Collection[ResilientSubscription]) -> None:
    """End the subscriptions of a broker, all at once. Each is over when this returns."""
    await asyncio.gather(*(subscription.aclose() for subscription in [*subscriptions]))


async def _end_of(task: asyncio.Task[None]) -> None:
    """
    Cancel *task* until it has ended.

    Once may not be enough: `asyncio.wait_for` of Python 3.11, which redis-py writes with, can forget a cancellation.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


def _named(topics: Collection[Topic], group: str | None) -> str:
    of = "" if group is None else f" of {group}"
    return f"the subscription{of} to {listed(sorted({topic.message_name for topic in topics}))}"


def _unavailable(error: BaseException) -> DiatorError:
    if isinstance(error, DiatorError):
        return error
    unavailable = BrokerUnavailable(f"{type(error).__name__}: {error}")
    unavailable.__cause__ = error
    return unavailable


class CallbackSubscription(ResilientSubscription):
    """The older form, made of functions. It goes when no transport uses it any more."""

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Source]],
        topics: Collection[Topic],
        group: str | None = None,
        *,
        lossy: bool,
        prefetch: int,
        buffer_size: int | None = None,
        reconnect: ReconnectPolicy,
        on_gap: OnGap | None,
        registry: set[ResilientSubscription],
        unsettled: Callable[[], int] = lambda: 0,
        leave: Callable[[Collection[Delivery]], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            topics,
            group,
            lossy=lossy,
            prefetch=prefetch,
            buffer_size=buffer_size,
            reconnect=reconnect,
            on_gap=on_gap,
            registry=registry,
        )
        self._connect = connect
        self._unsettled = unsettled
        self._leave = leave

    @property
    def unsettled(self) -> int:  # type: ignore[override]
        """See `ResilientSubscription`."""
        return self._unsettled()

    def connect(self) -> AbstractAsyncContextManager[Source]:
        """See `ResilientSubscription.connect`."""
        return self._connect()

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """See `ResilientSubscription.leave`."""
        if self._leave is not None:
            await self._leave(not_given_out)
