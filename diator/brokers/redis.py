"""Redis Pub/Sub. Needs the extra `redis`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self

from diator.brokers._redis_connection import Client, SharedConnection, check_client, client_from_url
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode
from diator.brokers.message import Message
from diator.exceptions import MessagesNotSent, MessageUnroutable


class RedisMessageBroker:
    """
    Sends each message to the channel `<channel_prefix>:<message_type>:<message_name>` of Redis Pub/Sub.

    At most once: Redis gives a message to those who listen at that moment and keeps nothing. That Redis confirmed a
    message says that it has passed it on, not that anybody heard it.

    *client* stays its owner's: one connection of its pool is held while the broker is in use, and given back by
    `aclose`; the client is never closed. `from_url` makes a broker with a client of its own.

    *timeout* bounds every call, in seconds. *max_message_bytes* bounds the encoded message. *max_in_flight* bounds the
    messages that wait for Redis's answer; further ones wait for room. With *require_receiver* a message that nobody
    received raises `MessageUnroutable`; Redis counts those on the node that it was sent to.
    """

    def __init__(  # one transport, all its options
        self,
        client: Client,
        channel_prefix: str = "python_diator_channel",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        require_receiver: bool = False,
    ) -> None:
        check_client(client)
        self._client = client
        self._owns_client = False
        self._prefix = channel_prefix
        self._max_message_bytes = max_message_bytes
        self._require_receiver = require_receiver
        self._connection = SharedConnection(client, timeout=timeout, max_in_flight=max_in_flight)

    @classmethod
    def from_url(
        cls,
        url: str,
        channel_prefix: str = "python_diator_channel",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        require_receiver: bool = False,
    ) -> Self:
        """Make a broker with a client of its own for `redis://…`, `rediss://…` or `unix://…`; `aclose` closes it."""
        broker = cls(
            client_from_url(url, timeout=timeout),
            channel_prefix,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            require_receiver=require_receiver,
        )
        broker._owns_client = True
        return broker

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`. MessageUnroutable only with *require_receiver*."""
        await self.publish(message)

    async def publish(self, message: Message, /) -> int:
        """Send *message*, with the promises of `send_message`, and give the number of its receivers on Redis's node."""
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        channel = f"{self._prefix}:{message.message_type}:{message.message_name}".encode()
        receivers: int = await self._connection.execute(b"PUBLISH", channel, body, message_id=message.message_id)
        if self._require_receiver and not receivers:
            raise MessageUnroutable("nobody is subscribed to its channel", message_id=message.message_id)
        return receivers

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """See `BatchMessageBroker.send_messages`: in one write, in their order."""
        verdicts = await asyncio.gather(*map(self.publish, messages), return_exceptions=True)
        failed = [
            (message, error)
            for message, error in zip(messages, verdicts, strict=True)
            if isinstance(error, BaseException)
        ]
        if failed:
            raise MessagesNotSent([message.message_id for message, _ in failed]) from failed[0][1]

    async def aclose(self) -> None:
        """Refuse further messages and wait, at most *timeout*, for the answers that are due. Again: does nothing."""
        await self._connection.aclose()
        if self._owns_client:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        await self._connection.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
