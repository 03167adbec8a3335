"""Defects of sending."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self
from uuid import UUID, uuid4

from diator.brokers.base import Delivery
from diator.brokers.codec import decode, encode
from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, MessageRejected, MessageTooLarge
from diator.testing.saboteurs._base import FOREVER, Saboteur, caught_by, topic_of


@caught_by("PUB-01")
class LosesEveryTenth(Saboteur):
    """Confirms every tenth message and drops it."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10:
            await super().send_message(message)


@caught_by("PUB-01")
class DuplicatesEveryTenth(Saboteur):
    """Sends every tenth message twice."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        await super().send_message(message)
        if self._count % 10 == 0:
            await super().send_message(message)


@caught_by("PUB-01")
class InventsMessages(Saboteur):
    """Sends a message of its own now and then."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10 == 0:
            await super().send_message(replace(message, message_id=uuid4()))
        await super().send_message(message)


@caught_by("PUB-14")
class DropsDuplicates(Saboteur):
    """Drops a message that was sent before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: set[UUID] = set()

    async def send_message(self, message: Message, /) -> None:
        if message.message_id not in self._seen:
            self._seen.add(message.message_id)
            await super().send_message(message)


@caught_by("PUB-01")
class MakesUpIds(Saboteur):
    """Sends each message with another id."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(replace(message, message_id=uuid4()))


@caught_by("PUB-15")
class WritesIntoTheMessage(Saboteur):
    """Adds a header to the program's own message."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        if isinstance(message.headers, dict):
            message.headers["sent-by"] = "saboteur"


@caught_by("PUB-09")
class EncodesLate(Saboteur):
    """Keeps the program's own message and encodes it only when it is delivered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._messages: dict[UUID, Message] = {}

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._messages[message.message_id] = message

    async def deliver(self, delivery: Delivery) -> Delivery:
        with suppress(ValueError):
            message = self._messages[decode(delivery.body).message_id]
            delivery.body = encode(message, headers_in_body=True)
        return delivery


@caught_by("PUB-05", "SIZ-03", "PUB-18")
class SwallowsErrors(Saboteur):
    """Confirms messages that it could not send."""

    async def send_message(self, message: Message, /) -> None:
        with suppress(BrokerError):
            await super().send_message(message)


@caught_by("PUB-20")
class RefusesForSome(Saboteur):
    """Refuses a message after it has reached the groups that have room."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except MessageRejected:
            full = [queue for queue in self._queues if len(queue) >= self._capacity]
            for queue in full:
                self._queues.remove(queue)
            if any(topic_of(message) in queue.topics for queue in self._queues):
                await super().send_message(message)
            self._queues.extend(full)
            raise


@caught_by("PUB-05", "FLW-05")
class DropsTheOldest(Saboteur):
    """Makes room by dropping the oldest message."""

    async def send_message(self, message: Message, /) -> None:
        for queue in self._queues:
            while len(queue) >= self._capacity:
                queue.waiting.popleft()
        await super().send_message(message)


@caught_by("API-01", "PUB-10", "SIZ-03")
class RaisesForeignErrors(Saboteur):
    """Raises the errors of its client library."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except BrokerError as error:
            raise OSError(str(error)) from error


@caught_by("PUB-10")
class ForgetsWhichMessage(Saboteur):
    """Raises the right error without the id of the message."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except BrokerError as error:
            error.message_id = None
            raise


@caught_by("PUB-13")
class SendsBeforeChecking(Saboteur):
    """Sends a part of a message that cannot be encoded."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except ValueError as error:
            with suppress(ValueError):
                await super().send_message(replace(message, headers={}, key=None))
            raise error from None


@caught_by("PUB-18", "PUB-07")
class FailsTogether(Saboteur):
    """Fails every waiting caller when one of them is refused, or when many wait."""

    _waiting = 0
    _failed = False

    async def send_message(self, message: Message, /) -> None:
        self._waiting += 1
        try:
            await asyncio.sleep(0)
            if self._failed or self._waiting > 45:  # noqa: PLR2004
                raise BrokerUnavailable("somebody else's error", message_id=message.message_id)
            await super().send_message(message)
        except MessageTooLarge:
            self._failed = True
            raise
        finally:
            self._waiting -= 1
            self._failed = self._failed and self._waiting > 0


@caught_by("PUB-08")
class SwallowsCancellation(Saboteur):
    """Continues a send that was cancelled."""

    async def send_message(self, message: Message, /) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)
        await super().send_message(message)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER if asyncio.current_task().cancelling() else 0)  # type: ignore[union-attr]


@caught_by("API-06")
class IgnoresCancellation(Saboteur):
    """Returns from a cancelled call as if it had not been cancelled."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)


@caught_by("PUB-16", "GRP-11")
class WaitsForReaders(Saboteur):
    """Returns from a send only when a reader has received the message."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        while any(len(queue) > 1 for queue in self._queues):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@caught_by("PUB-17")
class WorksOnlyInItsBlock(Saboteur):
    """Sends only after `async with` was entered."""

    _entered = False

    async def send_message(self, message: Message, /) -> None:
        if not self._entered:
            raise BrokerUnavailable("not connected", message_id=message.message_id)
        await super().send_message(message)

    async def __aenter__(self) -> Self:
        self._entered = True
        return self
