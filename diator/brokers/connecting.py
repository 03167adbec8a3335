"""A client connection that many callers use at once, and the base of a broker that sends through one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Any, Generic, Self, TypeVar

from diator.brokers.message import Message
from diator.brokers.sending import send_together
from diator.brokers.supervisor import ResilientSubscription
from diator.exceptions import UsageError


class BackgroundTasks:
    """Tasks in the background, such as the closing of a connection. Only the end of their owner waits for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run *work* in a task named `diator: ` and *name*."""
        task = asyncio.create_task(work, name=f"diator: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait until all tasks have ended. If this wait is cancelled, the tasks continue."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class ClientConnection(ABC):
    """
    A client connection that many callers of one event loop use at once. A transport derives its own from this class.

    It connects at its first use. Callers that find no connection, or no room in it, wait in a queue: waiting callers
    keep their order.

    A subclass writes `open`, `_reset` and `_close`. Each of its calls begins with `_bind_to_running_loop`. A call that
    has to wait counts itself in `_queued` and takes `_lock`. Work that nobody waits for runs in `_background`.

    Attributes:
        subscriptions: The open subscriptions of the same broker. They end with it.
    """

    def __init__(self) -> None:
        self.subscriptions: set[ResilientSubscription] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()  # the queue of waiting callers
        self._queued = 0  # the number of waiting callers
        self._background = BackgroundTasks()
        self._closing: asyncio.Task[None] | None = None

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
        if self._closing is None:
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
            if self._loop is not None:
                if self._loop.is_running():
                    raise UsageError(
                        "this broker is in use in another event loop that is still running; a broker serves one event "
                        "loop at a time, so make one for each thread"
                    )
                self._lock, self._queued, self._background = asyncio.Lock(), 0, BackgroundTasks()
                self._reset()
            self._loop = loop
        return loop

    @abstractmethod
    async def open(self) -> None:
        """
        Connect now.

        Raises:
            BrokerUnavailable: The service cannot be reached.
        """

    @abstractmethod
    def _reset(self) -> None:
        """Drop everything that belonged to the earlier event loop."""

    @abstractmethod
    async def _close(self) -> None:
        """Close as `aclose` describes. Called once."""


S = TypeVar("S", bound=ClientConnection)


class ServiceBroker(ABC, Generic[S]):
    """
    The base of a broker that sends through one `ClientConnection`, and opens and closes together with it.

    Args:
        service: The connection. A subclass finds it in `_service`.
    """

    def __init__(self, service: S) -> None:
        self._service = service

    @abstractmethod
    async def send_message(self, message: Message, /) -> None:
        """Send *message*; see `MessageBroker.send_message`."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """Send *messages* in their order, in as few writes as possible; see `BatchMessageBroker.send_messages`."""
        await send_together(self.send_message, messages)

    async def aclose(self) -> None:
        """Refuse new messages and wait, at most *timeout*, for outstanding answers. A further call does nothing."""
        await self._service.aclose()

    async def __aenter__(self) -> Self:
        await self._service.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
