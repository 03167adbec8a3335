"""A message broker inside the process: for tests, examples and programs that need no service."""

from __future__ import annotations

import asyncio
from typing import Self

from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, encode
from diator.brokers.message import Message
from diator.exceptions import BrokerClosed, MessageRejected


class MemoryMessageBroker:
    """
    A bounded queue of encoded messages. What is sent waits here, in order, until somebody receives it.

    *capacity* is the number of messages that may wait; one more is rejected, never dropped. *max_message_bytes*
    bounds each of them. Closing refuses further messages; those that wait can still be received.
    """

    def __init__(self, *, capacity: int = 10_000, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(capacity)
        self._max_message_bytes = max_message_bytes
        self._closed = False

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`. It never waits, and no handler runs in it."""
        if self._closed:
            raise BrokerClosed("this broker is closed", message_id=message.message_id)
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        try:
            self._waiting.put_nowait(body)
        except asyncio.QueueFull:
            raise MessageRejected(
                f"{self._waiting.maxsize:,} messages wait already and nobody receives them",
                message_id=message.message_id,
            ) from None

    async def receive(self) -> Message:
        """Take the message that has waited longest; wait for one if there is none."""
        return decode(await self._waiting.get(), max_bytes=self._max_message_bytes, headers=None)

    def __len__(self) -> int:
        """How many messages wait."""
        return self._waiting.qsize()

    async def aclose(self) -> None:
        """Refuse further messages. Calling it again does nothing."""
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
