"""
Keeps a subscription alive: reconnects with backoff, detects a dead connection, and reports gaps.

Every transport with a connection that can fail uses it, so that these rules are written once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

from diator._hints import name_of
from diator._log import RepeatedLines
from diator._options import check_counts, check_numbers
from diator._text import explained, listed
from diator.brokers.base import Delivery, Gap, OnGap, Topic
from diator.brokers.client_logs import own_client
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    DiatorError,
    UsageError,
)

# A lossy subscription probes its connection so often, in seconds. The answer comes after all messages that were sent
# before the probe, so it proves that none of them was missed. Silence proves nothing: the link or this process may have
# stood still, and messages that the service had queued are lost with the connection.
_PROVE_EVERY = 1.0
_CLOSED = "this broker is closed"
# How long a task that is cancelled may take to close what it has opened, in seconds.
CLEANING_UP = 2.0
# After so many seconds a task that goes on in spite of its cancellation is cancelled again.
_AGAIN = 0.1

logger: logging.Logger = logging.getLogger(__name__)


class MessagesMissed(Exception):
    """
    Raised by a source if the service has lost messages, or may have, and not only the connection.

    The subscription reconnects and reports a gap, even if a lost connection alone makes no gap (*lossy* is false).
    """


class Source(Protocol):
    """
    One connection of a transport, ready to receive. It is used until it breaks.

    One task calls `receive` again and again. Another task may call `probe` while `receive` waits.
    """

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """
        Wait for deliveries and return at most *limit* of them; an empty list if the service sent anything else.

        Each return counts as a sign of life of the service. The call is cancelled when the subscription ends, and when
        the connection counts as dead. If it has already taken messages from the service by then, the transport must
        requeue them, or return them from the next connection.

        Raises:
            Exception: The connection is lost. Any error of the client library will do.
        """
        ...

    async def probe(self) -> None:
        """
        Ask the service for a sign of life, such as the answer to a ping. `receive` returns when it arrives.

        If the subscription is *lossy*, the service answers in order: after every message that was sent before the
        probe. `receive` returns an empty list for the answer and for nothing else.

        This method may do nothing if `receive` returns by itself more often than `ReconnectPolicy.idle_timeout`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ReconnectPolicy:
    """
    When a subscription closes its connection, and how long it and a sender wait before they reconnect, in seconds.

    Attributes:
        connect_timeout: The time limit for connecting, until the connection is ready to receive.
        idle_timeout: How long the service may send nothing before the subscription probes the connection.
        probe_timeout: The time limit for the answer to that probe. After it, the connection counts as dead.
        first_delay: The longest delay before the first attempt to reconnect. It doubles with each failure (exponential
            backoff).
        max_delay: The limit of the delay.
        reset_after: How long a connection has to live until the backoff starts again at `first_delay`.

    Raises:
        ConfigurationError: One of them is not a number, or negative.
    """

    connect_timeout: float = 10.0
    idle_timeout: float = 10.0
    probe_timeout: float = 5.0
    first_delay: float = 0.1
    max_delay: float = 30.0
    reset_after: float = 60.0

    def __post_init__(self) -> None:
        check_numbers(0, **vars(self))

    def delay(self, failures: int) -> float:
        """
        Return a random delay before the next attempt, in seconds, after so many *failures* in a row.

        The whole delay is random (full jitter), so that clients which lost the same service do not return all at once.
        """
        return random.uniform(0, min(self.max_delay, self.first_delay * 2 ** min(failures, 32)))  # noqa: S311

    def capped(self, max_delay: float) -> Self:
        """Return this policy with a `max_delay` of at most *max_delay*."""
        return replace(self, max_delay=min(self.max_delay, max_delay))


@dataclass(frozen=True, kw_only=True)
class SubscriptionSettings:
    """
    What a broker passes on to its subscription: what the program asked of `subscribe`, and what the broker has.

    Attributes:
        topics: What the subscription reads. Logs name the subscription by *topics* and *group*.
        group: Its consumer group; None for a subscription without a group.
        broker: The name of the class of the broker, for logs.
        prefetch: How many deliveries may be handed out and unsettled. At this number it hands out no further one,
            except those for which the program calls `make_room`.
        on_gap: Called when messages may have been missed.
        reconnect: The time limits and delays.
        registry: The open subscriptions of the same broker, which `close_all` ends. It contains this one while it is
            open.
    """

    topics: Collection[Topic]
    group: str | None
    broker: str
    prefetch: int
    on_gap: OnGap | None
    reconnect: ReconnectPolicy
    registry: set[ResilientSubscription]


class ResilientSubscription(ABC):
    """
    A subscription that reconnects whenever its connection breaks. It has at most one connection at any time.

    Each transport derives its subscription from this class. The subclass writes `connect`, and also `leave` if the end
    of a subscription must send settlements to the service. All state that outlives one connection belongs to the
    subclass. The private attributes of this class begin with `_`; a subclass must not reuse their names.

    Entering the subscription connects. If that fails, entering raises `BrokerUnavailable`, or the error of diator that
    `connect` raised. From then on the subscription is an iterator of deliveries. Iteration ends with an error in two
    cases: `BrokerClosed` when the broker is closed, and a `ConfigurationError` or `UsageError` of `connect`, which
    reconnecting cannot fix. A later `AccessRefused` does not end it: a password may be changed while programs run.

    When the subscription ends, with its context or with its broker, it calls `leave` once, after its last connection.

    Args:
        settings: What its broker passes on.
        lossy: Whether messages are missed while there is no connection. If so, `on_gap` is called after a reconnect.
        buffer_size: How many deliveries it receives before the program asks for them; by default `prefetch`. They
            outlive the connection.

    Attributes:
        settings: See above.
        reconnects: How often the subscription had to reconnect.
        log_fields: The attributes of each log record about it: `broker`, `group` and `message_names`.
        lines: Logs, under the name of the transport's module, what a sender can cause thousands of times.
        unsettled: How many deliveries of this subscription are not settled, handed out or not. The transport counts
            them. After it has lowered the count it calls `notify_settled`. A transport without settlement leaves it at
            0.

    Raises:
        ConfigurationError: `prefetch` is below 1.
    """

    unsettled: int = 0

    def __init__(self, settings: SubscriptionSettings, *, lossy: bool, buffer_size: int | None = None) -> None:
        check_counts(1, prefetch=settings.prefetch)
        self.settings = settings
        self._name = _log_name(settings.topics, settings.group)
        self._lossy = lossy
        self._most_unsettled = settings.prefetch
        self._buffer_size = settings.prefetch if buffer_size is None else buffer_size
        self._refilled_at = self._buffer_size // 2
        self._received: deque[Delivery] = deque()
        self._postponed: set[Delivery] = set()
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._last_received_at = self._complete_until = self._waiting_since = 0.0  # each is set before it is read
        self._probed_at: deque[float] = deque()  # the probes without an answer
        self._has_connection = False
        self.reconnects: int = 0
        self.log_fields: Mapping[str, object] = {
            "broker": settings.broker,
            "group": settings.group,
            "message_names": sorted(topic.message_name for topic in settings.topics),
        }
        self.lines: RepeatedLines = RepeatedLines(logging.getLogger(type(self).__module__), self.log_fields)
        self._end_error: DiatorError | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._opens_or_closes = False  # a connection, which a second cancellation would leave open
        self._ending: asyncio.Task[None] | None = None

    # -- what a transport writes ---------------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> AbstractAsyncContextManager[Source]:
        """
        Return a context manager for one connection. On entry it is ready: it receives every message confirmed later.

        Raises, on entry:
            BrokerClosed: The broker is closed. This ends the subscription.
            ConfigurationError: A setting of the service is wrong, and reconnecting does not fix it. This ends the
                subscription.
            Exception: Connecting failed. The subscription tries again.
        """

    async def leave(self, prefetched: Collection[Delivery], /) -> None:  # noqa: B027  # many have nothing to do
        """
        Send the last settlements to the service and return the unsettled messages to it, within a time limit.

        *prefetched* are the deliveries that were never handed out, or are postponed; they are not charged an attempt.
        Called once, when the subscription ends, even if it never had a connection. By default there is nothing to do.
        """

    async def dead_letter_all(self, reasons: Mapping[Delivery, str], /) -> Collection[Delivery]:
        """
        Dead-letter several deliveries together, each with its reason, where that is faster than one after the other.

        Return those that are dead-lettered, each as `Delivery.dead_letter` promises. The others are then dead-lettered
        by that method; an error concerns all of them. By default there is no faster way.
        """
        return ()

    # -- the program's side --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(_: object) -> None:
            if not ready.done():  # the broker was closed meanwhile
                ready.set_exception(BrokerClosed(_CLOSED))

        with own_client():
            self._receiver = asyncio.create_task(self._keep_receiving(ready), name="diator: receiving")
        self._receiver.add_done_callback(ended)
        self.settings.registry.add(self)
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

    def receive_nowait(self) -> Delivery | None:
        """Return the next delivery if one can be handed out now, otherwise None. A consumer tries it first."""
        received = self._received
        if not received or self.unsettled - len(received) >= self._most_unsettled or self._ending is not None:
            return None
        delivery = received.popleft()
        if len(received) == self._refilled_at:  # not earlier: receiving few costs as much as receiving many
            self._has_room.set()
        return delivery

    async def __anext__(self) -> Delivery:
        while (delivery := self.receive_nowait()) is None:
            if self._end_error is not None:
                raise self._end_error
            if self._ending is not None:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return delivery

    def make_room(self, deliveries: int) -> None:
        """Hand out so many *deliveries* beyond *prefetch*, of those that are received anyway."""
        self._most_unsettled = self.settings.prefetch + deliveries + len(self._postponed)
        self._changed.set()

    def postpone(self, delivery: Delivery) -> None:
        """Count *delivery* as prefetched, not as handed out, until `resume`. See `ReadableBroker.subscribe`."""
        self._postponed.add(delivery)
        self._most_unsettled += 1

    def resume(self, delivery: Delivery) -> bool:
        """Hand out a postponed *delivery*. Return False if the subscription has withdrawn it meanwhile."""
        if delivery not in self._postponed:
            return False
        self._postponed.remove(delivery)
        self._most_unsettled -= 1
        return True

    @property
    def postponed(self) -> int:
        """How many deliveries are postponed."""
        return len(self._postponed)

    @property
    def connected(self) -> bool:
        """Return whether there is a connection now that receives what the subscription is due."""
        return self._has_connection

    @property
    def waiting(self) -> float:
        """For how many seconds there have been deliveries that were not handed out yet; 0 if there are none."""
        if self._receiver is None or not self._received:
            return 0.0
        return self._receiver.get_loop().time() - self._waiting_since

    @property
    def oldest_message(self) -> float | None:
        """
        The age of the oldest message that was received and is not settled, in seconds; 0 if there is none.

        It counts from the time that the service gave the message. None, as here, if the transport does not know it.
        """
        return None

    @property
    def is_ending(self) -> bool:
        """Return whether the subscription is ending, so that it does not reconnect any more."""
        return self._ending is not None

    # -- what the transport calls --------------------------------------------------------------------------------

    def remove_prefetched(self, which: Callable[[Delivery], bool] = lambda _: True) -> list[Delivery]:
        """
        Remove and return the deliveries that are not handed out: received only, or postponed. They never will be.

        *which* selects some of them; by default all are removed.
        """
        taken = [*filter(which, self._postponed), *filter(which, self._received)]
        kept = [delivery for delivery in self._received if not which(delivery)]
        self._most_unsettled -= len(self._postponed)
        self._postponed.difference_update(taken)
        self._most_unsettled += len(self._postponed)
        self._received.clear()
        self._received.extend(kept)
        self._has_room.set()
        self._changed.set()
        return taken

    def notify_settled(self) -> None:
        """Report that a delivery was settled, so that the next one may be handed out."""
        self._changed.set()

    def report_gap(self, since: datetime, reason: str) -> None:
        """Report to the program that messages may have been missed between *since* (aware) and now."""
        if (on_gap := self.settings.on_gap) is not None:
            try:
                on_gap(Gap(since=since, until=datetime.now(UTC), reason=reason))
            except Exception:
                logger.exception("on_gap failed", extra=self.log_fields)

    async def aclose(self) -> None:
        """End the subscription because its broker is closed. Every wait for a delivery raises `BrokerClosed`."""
        self._end_error = BrokerClosed(_CLOSED)
        await self._end()

    async def _end(self) -> None:
        """End the subscription, once. The end continues if this wait is cancelled."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_once(), name="diator: ending a subscription")
            self._changed.set()
        await asyncio.shield(self._ending)

    async def _end_once(self) -> None:
        self.settings.registry.discard(self)
        if self._receiver is not None:
            await self._end_receiver(self._receiver)
        try:
            await self.leave([*self._postponed, *self._received])
        finally:
            self.lines.flush()

    async def _end_receiver(self, receiver: asyncio.Task[None]) -> None:
        """Cancel *receiver* again and again until it has ended, but let it close its connection undisturbed."""
        late = asyncio.get_running_loop().time() + CLEANING_UP
        receiver.cancel()
        while not receiver.done():
            await asyncio.wait([receiver], timeout=_AGAIN)
            if not self._opens_or_closes or asyncio.get_running_loop().time() > late:
                receiver.cancel()

    async def _keep_receiving(self, ready: asyncio.Future[None]) -> None:
        loop, receiver, policy = asyncio.get_running_loop(), asyncio.current_task(), self.settings.reconnect
        assert receiver is not None, "it runs in a task"  # noqa: S101  # asyncio has no other way
        failures = 0
        lost: tuple[datetime, str] | None = None
        missed = self._lossy
        while True:
            ready_at, self._opens_or_closes = math.inf, True
            try:
                async with asyncio.timeout(policy.connect_timeout) as connecting, self.connect() as source:
                    connecting.reschedule(None)
                    ready_at = loop.time()
                    self._has_connection = True
                    if not ready.done():
                        ready.set_result(None)
                    if lost is not None:
                        logger.info("%s is reconnected", self._name, extra=self.log_fields)
                    if lost is not None and missed:
                        self.report_gap(*lost)
                    lost, missed = None, self._lossy
                    await self._receive_from(source)
            except (Exception, asyncio.CancelledError) as error:  # whatever the client library raises
                if isinstance(error, asyncio.CancelledError) and receiver.cancelling():
                    raise  # otherwise the client library cancelled its own work, and nobody cancelled this subscription
                if not ready.done():
                    ready.set_exception(_unavailable(error, self._name))
                    return
                if isinstance(error, (BrokerClosed, ConfigurationError, UsageError)) and not isinstance(
                    error,
                    AccessRefused,  # passwords and permissions are changed while programs run
                ):
                    self._end_error = error
                    self._changed.set()
                    return
                self._has_connection = False
                self.reconnects += 1
                missed = missed or isinstance(error, MessagesMissed)
                reason = explained(error)
                fields = {**self.log_fields, "reason": reason, "error_type": name_of(type(error))}
                logger.warning("%s has no connection (%s); reconnecting", self._name, reason, extra=fields)
                lost = lost or (datetime.now(UTC) - timedelta(seconds=loop.time() - self._complete_until), reason)
            self._opens_or_closes = False
            if loop.time() - ready_at >= policy.reset_after:
                failures = 0
            await asyncio.sleep(policy.delay(failures))
            failures += 1

    async def _receive_from(self, source: Source) -> None:
        """Receive until the connection is lost, or until it counts as dead."""
        self._last_received_at = self._complete_until = asyncio.get_running_loop().time()
        self._probed_at.clear()
        self._has_room.set()
        self._opens_or_closes = False
        async with asyncio.timeout(None) as deadline:
            watching = asyncio.create_task(self._watch(source, deadline), name="diator: watching for silence")
            try:
                while True:
                    while (room := self._buffer_size - len(self._received)) <= 0:
                        self._has_room.clear()
                        await self._has_room.wait()
                        # Nothing was received while the buffer was full, so this does not count as silence.
                        self._last_received_at = asyncio.get_running_loop().time()
                    if deliveries := await source.receive(room):
                        if not self._received:
                            self._waiting_since = asyncio.get_running_loop().time()
                        self._received.extend(deliveries)
                        self._changed.set()
                    elif self._probed_at:
                        self._complete_until = self._probed_at.popleft()
                    del deliveries  # the next wait must not keep them alive when they are settled
                    self._last_received_at = asyncio.get_running_loop().time()
            finally:
                self._opens_or_closes = True
                await end_task(watching)

    async def _watch(self, source: Source, deadline: asyncio.Timeout) -> None:
        """Detect a dead connection. Its packets may disappear without any error, so that only silence shows it."""
        loop, policy = asyncio.get_running_loop(), self.settings.reconnect
        while True:
            quiet = loop.time() - self._last_received_at
            if quiet < policy.idle_timeout or not self._has_room.is_set():  # it sent something, or the buffer is full
                pause = max(policy.idle_timeout - quiet, policy.probe_timeout / 10)
                await asyncio.sleep(min(pause, _PROVE_EVERY))
                if self._lossy and loop.time() - self._complete_until >= _PROVE_EVERY and not self._probed_at:
                    await self._probe(source)
                continue
            asked = loop.time()
            if await self._probe(source):
                await asyncio.sleep(policy.probe_timeout - (loop.time() - asked))
            if self._last_received_at < asked and self._has_room.is_set():
                deadline.reschedule(loop.time())
                return

    async def _probe(self, source: Source) -> bool:
        """Return whether the probe was sent."""
        if self._lossy:
            self._probed_at.append(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(self.settings.reconnect.probe_timeout):
                await source.probe()
        except Exception as error:  # noqa: BLE001  # any error means that there was no sign of life
            logger.debug("probing the connection failed: %r", error)
            return False
        return True


async def close_all(subscriptions: Collection[ResilientSubscription]) -> None:
    """
    End the *subscriptions* of a broker, all at the same time. Return when each of them has ended.

    If one cannot leave, its own context raises the error: it must not keep the broker from closing its connections.
    """
    await asyncio.gather(*(subscription.aclose() for subscription in [*subscriptions]), return_exceptions=True)


async def end_task(task: asyncio.Task[None]) -> None:
    """
    Cancel *task*, again and again, until it has ended.

    One cancellation may not be enough: redis-py writes with `asyncio.wait_for`, which can lose a cancellation in Python
    3.11.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN)


def _log_name(topics: Collection[Topic], group: str | None) -> str:
    of = "" if group is None else f" of {group}"
    return f"the subscription{of} to {listed(sorted({topic.message_name for topic in topics}))}"


def _unavailable(error: BaseException, name: str) -> DiatorError:
    if isinstance(error, DiatorError):
        return error
    unavailable = BrokerUnavailable(f"{name} cannot start ({explained(error)})")
    unavailable.__cause__ = error
    return unavailable
