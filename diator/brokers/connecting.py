"""A connection that many callers use at once, whatever its service; and what a broker has of it."""

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
    """Work that goes on beside everything else, such as the end of a connection. Only an end waits for it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do *work*, in a task of this *name*."""
        task = asyncio.create_task(work, name=f"diator: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait for all of it. It goes on if whoever waits is cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class ClientConnection(ABC):
    """
    A connection that many callers of one event loop use at once. Each transport makes its own of this.

    It connects when it is first used. Whoever finds no connection, or no room, waits for its turn; nobody passes
    those who do.
    """

    def __init__(self) -> None:
        self.subscriptions: set[ResilientSubscription] = set()
        """What reads with the same broker, and ends with it."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._queued = 0
        """How many wait for their turn."""
        self._background = BackgroundTasks()
        self._closing: asyncio.Task[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether it is, or is about to be."""
        return self._closing is not None

    async def aclose(self) -> None:
        """
        Refuse further calls, wait for the answers that are due, and part with the connection.

        That goes on if a caller is cancelled; calling it again waits for it.
        """
        self._bind_to_running_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="diator: closing")
        await asyncio.shield(self._closing)

    def _bind_to_running_loop(self) -> asyncio.AbstractEventLoop:
        """Begin anew on another event loop. What belonged to one that is over died with it."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                if self._loop.is_running():
                    raise UsageError("a broker belongs to one event loop at a time; make another one for each thread")
                self._lock, self._queued, self._background = asyncio.Lock(), 0, BackgroundTasks()
                self._reset()
            self._loop = loop
        return loop

    @abstractmethod
    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""

    @abstractmethod
    def _reset(self) -> None:
        """Forget what belonged to the event loop before."""

    @abstractmethod
    async def _close(self) -> None:
        """Do what `aclose` says. Called once."""


S = TypeVar("S", bound=ClientConnection)


class ServiceBroker(ABC, Generic[S]):
    """A broker that sends through one `ClientConnection`, and opens and ends with it."""

    def __init__(self, service: S) -> None:
        self._service = service

    @abstractmethod
    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """See `BatchMessageBroker.send_messages`: in as few exchanges as they fit in, in their order."""
        await send_together(self.send_message, messages)

    async def aclose(self) -> None:
        """Refuse further messages and wait, at most *timeout*, for the answers that are due. Again: does nothing."""
        await self._service.aclose()

    async def __aenter__(self) -> Self:
        await self._service.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
