"""A client connection that many callers use at once, and the base of a broker that sends through one."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from diator._hints import name_of
from diator._options import check_type
from diator._text import explained
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities, require
from diator.brokers.message import Message
from diator.brokers.sending import check_has_ended, send_together
from diator.brokers.supervisor import (
    CLEANING_UP,
    ReconnectPolicy,
    ResilientSubscription,
    SubscriptionSettings,
    end_task,
)
from diator.exceptions import BrokerClosed

L = TypeVar("L")

logger: logging.Logger = logging.getLogger(__name__)


class BackgroundTasks:
    """Tasks in the background, such as the closing of a connection. Only the end of their owner waits for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str, *, context: Context | None = None) -> None:
        """Run *work* in a task named `diator: ` and *name*, in *context*; by default in a copy of the caller's."""
        task = asyncio.create_task(work, name=f"diator: {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait until all tasks have ended. If this wait is cancelled, the tasks continue."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class Backoff:
    """
    Runs one attempt to connect at a time, with growing random delays between them (exponential backoff, full jitter).

    The first attempt is not delayed, and neither is one that begins later than `ReconnectPolicy.reset_after` after the
    last.
    """

    def __init__(self, policy: ReconnectPolicy) -> None:
        self._policy = policy
        self._one_at_a_time = asyncio.Lock()
        self._attempts = 0
        self._last_ended_at = self._next_begins_at = -math.inf

    @asynccontextmanager
    async def attempt(self) -> AsyncGenerator[None, None]:
        """Wait for the end of other attempts and for the delay. The block is the attempt."""
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time:
            if loop.time() - self._last_ended_at > self._policy.reset_after:
                self.reset()
            await asyncio.sleep(max(0.0, self._next_begins_at - loop.time()))
            try:
                yield
            finally:
                self._last_ended_at = loop.time()
                self._next_begins_at = self._last_ended_at + self._policy.delay(self._attempts)
                self._attempts += 1

    def reset(self) -> None:
        """Let the delays begin at `ReconnectPolicy.first_delay` again: the last connection did not end by a fault."""
        self._attempts = 0


class ClientConnection(ABC, Generic[L]):
    """
    A client connection that many callers of one event loop use at once. A transport derives its own from this class.

    It connects at its first use. Callers that find no connection, or no room in it, wait in a queue: waiting callers
    keep their order.

    One attempt to connect runs at a time, for all callers that wait. It has a task and a deadline of its own,
    `ReconnectPolicy.connect_timeout`: a caller that reaches its own deadline, or is cancelled, leaves the attempt to
    the others. If an attempt fails, everybody who came before it began gets its error. Between two attempts is a delay,
    as *reconnect* says, of half of *timeout* at most: a caller that comes during an attempt that fails, or during the
    delay, waits for the next attempt. So a call never fails because of how the service was before the call.

    A subclass writes `open`, `_connect` and `_close`, and `_reset` if it keeps more than the connection. Each of its
    calls begins with `_bind_to_running_loop` and notes `_attempts`. A call that has to wait counts itself in `_queued`
    and takes `_lock`; then it gets the connection from `_connected`. Work that nobody waits for runs in `_background`.

    It logs once that an attempt has failed, and once that a later one was successful.

    Attributes:
        where: The address of the service, without credentials, for logs.
        broker: The name of the class of its broker, for logs; `ServiceBroker` sets it.
        subscriptions: The open subscriptions of the same broker. They end with it.
        timeout: The time limit for each call, in seconds.
        reconnect: The delays and time limits of the broker. Its own delays are shorter than `timeout` / 2.
    """

    def __init__(self, where: str, *, timeout: float, reconnect: ReconnectPolicy) -> None:
        check_type("reconnect", reconnect, ReconnectPolicy, is_needed=True)
        self.where = where
        self.broker: str | None = None
        self.subscriptions: set[ResilientSubscription] = set()
        self.timeout = timeout
        self.reconnect = reconnect
        self._reconnect = reconnect.capped(timeout / 2)  # so that each call has the time for an attempt
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None
        self._attempts = self._failed = 0  # how many attempts to connect have begun, and which of them failed last
        self._was_connected = False
        self._begin()

    def _begin(self) -> None:
        self._lock = asyncio.Lock()  # the queue of waiting callers
        self._queued = 0  # the number of waiting callers
        self._background = BackgroundTasks()
        self._backoff = Backoff(self._reconnect)
        self._link: L | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._failure: Exception | None = None  # of the last attempt, and where it was raised
        self._failed_at: TracebackType | None = None

    @property
    def log_fields(self) -> Mapping[str, object]:
        """The attributes of each log record about it."""
        return {"broker": self.broker, "where": self.where}

    @property
    def is_closed(self) -> bool:
        """Return whether the connection is closed or is closing."""
        return self._closing is not None

    async def aclose(self) -> None:
        """
        Refuse new calls, wait for the outstanding answers, and close the connection.

        A second call waits for the end of the first. If a caller is cancelled, the closing continues.
        """
        self._bind_to_running_loop()
        if self._closing is None or self._closing.cancelled():  # the event loop ended before
            self._closing = asyncio.create_task(self._close(), name="diator: closing")
        await asyncio.shield(self._closing)

    def _bind_to_running_loop(self) -> asyncio.AbstractEventLoop:
        """
        Return the running event loop. If it is not the loop of the last call, reset the connection first.

        Everything that belonged to the earlier event loop has ended with it.

        Raises:
            UsageError: The earlier event loop is still running.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            check_has_ended(self._loop)
            if self._loop is not None:
                self._begin()
                self._reset()
            self._loop = loop
        return loop

    # -- connecting --------------------------------------------------------------------------------------------------

    async def _connected(self, attempts: int) -> L:
        """
        Return the connection. If there is none, wait for the attempt that is under way, or begin one.

        The caller holds the lock. *attempts* is the value of `_attempts` when the call began: if an attempt that began
        later has failed, this raises its error.
        """
        while self._link is None:
            if self._failed > attempts and self._failure is not None:
                # Without the frames of the callers that raised it before: they would add up.
                raise self._failure.with_traceback(self._failed_at)
            if self._connecting is None or self._connecting.done():
                # A connection outlives what a caller handles: its tasks have none of the context variables of a caller.
                attempt = self._make_attempt()
                self._connecting = asyncio.create_task(attempt, name="diator: connecting", context=Context())
            await asyncio.wait([self._connecting])  # unlike awaiting it, this does not cancel it with the caller
        return self._link

    async def _make_attempt(self) -> None:
        this = asyncio.current_task()
        async with self._backoff.attempt():
            self._attempts += 1
            try:
                async with asyncio.timeout(self._reconnect.connect_timeout):
                    self._link = await self._connect()
                if self._failure is not None and self._was_connected:
                    logger.info("connected to %s again", self.where, extra=self.log_fields)
                self._failure, self._was_connected = None, True
            except (Exception, asyncio.CancelledError) as error:  # whatever the client library raises
                if isinstance(error, asyncio.CancelledError) and this is not None and this.cancelling():
                    raise  # otherwise the client library has cancelled its own work
                if self._failure is None and self._was_connected:  # else nothing is lost: the callers get the error
                    why = explained(error, within=self._reconnect.connect_timeout)
                    fields = {**self.log_fields, "reason": why, "error_type": name_of(type(error))}
                    logger.warning("no connection to %s (%s); the next calls try again", self.where, why, extra=fields)
                self._failed = self._attempts
                self._failure = error if isinstance(error, Exception) else ConnectionError("connecting was cancelled")
                self._failed_at = self._failure.__traceback__

    def _no_connection(self) -> str:
        """Describe for a caller at its deadline that there is no connection, and why."""
        text = f"no connection within {self.timeout:g} s"
        if self._failure is None:
            return text
        return f"{text}; the last attempt failed ({explained(self._failure, within=self._reconnect.connect_timeout)})"

    async def _take_link(self) -> L | None:
        """End the attempt to connect, if there is one, and return the connection that is to be closed."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting], timeout=CLEANING_UP)  # a second cancellation would interrupt it
            await end_task(self._connecting)
        link, self._link = self._link, None
        return link

    @abstractmethod
    async def open(self) -> None:
        """
        Connect now.

        Raises:
            BrokerUnavailable: The service cannot be reached.
        """

    @abstractmethod
    async def _connect(self) -> L:
        """Connect, and return the connection. If this fails or is cancelled, it leaves no connection open."""

    def _reset(self) -> None:  # many have nothing else
        """Drop whatever else belonged to the earlier event loop."""

    @abstractmethod
    async def _close(self) -> None:
        """Close as `aclose` describes. Called again only if it was cancelled. The connection is in `_take_link`."""


S = TypeVar("S", bound=ClientConnection[Any])


class ServiceBroker(ABC, Generic[S]):
    """
    The base of a broker that sends through one `ClientConnection`, and opens and closes together with it.

    Args:
        service: The connection. A subclass finds it in `_service`.
    """

    #: What a program uses instead if it needs a distribution that this broker does not promise.
    _alternative = "another transport"

    def __init__(self, service: S) -> None:
        self._service = service
        service.broker = type(self).__name__

    @property
    def where(self) -> str:
        """The address of the service, without credentials."""
        return self._service.where

    @property
    def timeout(self) -> float:
        """How long a call may take, in seconds."""
        return self._service.timeout

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """See `MessageBroker.capabilities`."""

    @abstractmethod
    async def send_message(self, message: Message, /) -> None:
        """Send *message*; see `MessageBroker.send_message`."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """Send *messages* in their order, in as few writes as possible; see `BatchMessageBroker.send_messages`."""
        await send_together(self.send_message, messages)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """Subscribe to *topics*; see `ReadableBroker.subscribe`."""
        if group is None:
            call, remedy = "subscribe() without a group", "name a group, one for each service"
            needed = Capabilities(distribution=frozenset({"broadcast"}))
        else:
            call, remedy = f"subscribe(group={group!r})", "leave the group out"
            needed = Capabilities(distribution=frozenset({"competing"}))
        require(self, self.capabilities, needed, for_=call, remedy=f"{remedy}, or use {self._alternative}")
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        settings = SubscriptionSettings(
            topics=topics,
            group=group,
            broker=type(self).__name__,
            prefetch=prefetch,
            on_gap=on_gap,
            reconnect=self._service.reconnect,
            registry=self._service.subscriptions,
        )
        async with self._subscription(settings) as deliveries:
            yield deliveries

    @abstractmethod
    def _subscription(self, settings: SubscriptionSettings) -> ResilientSubscription:
        """Make a subscription. It is not entered yet. The broker promises what *settings* need, and is open."""

    async def aclose(self) -> None:
        """Refuse new messages and wait, at most *timeout*, for outstanding answers. A further call does nothing."""
        await self._service.aclose()

    async def __aenter__(self) -> Self:
        await self._service.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
