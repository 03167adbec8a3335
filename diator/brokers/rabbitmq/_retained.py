"""
Messages that nobody has subscribed to yet: RabbitMQ retains them for the first group that subscribes.

The topic exchange has an alternate exchange. It routes what the topic exchange cannot route to one queue for each
topic. So RabbitMQ decides, for each message, whether it goes to the subscribed queues or to the retained messages:
never to both, never to none. As soon as a group's queue is bound, nothing more is retained for that topic.

The first group to come claims the retained messages. Its consumers consume them first, and the group's own queue only
when all of them are delivered. The claim lasts until all of them are settled. Another group comes too late for them,
even if the first one has crashed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from diator._text import explained
from diator.brokers.base import Topic
from diator.brokers.rabbitmq._channel import (
    CHANNEL_ERRORS,
    NOT_FOUND,
    PRECONDITION_FAILED,
    SAFE_AFTER,
    Refused,
)
from diator.brokers.rabbitmq._client import Address, Frame, commands
from diator.brokers.rabbitmq._content import DELIVERY_LIMIT
from diator.brokers.rabbitmq._frames import Publication
from diator.brokers.rabbitmq._names import retained_exchange_name, retained_queue_name
from diator.brokers.rabbitmq._publisher import Publisher
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerUnavailable, DiatorError, MessageRejected, MessageUnroutable

# The retained messages of a topic have at most so many bytes, so that they cannot fill the disk of the server.
_MOST_BYTES = 1024**3
# How often, in seconds, a consumer looks whether the retained messages are delivered and settled.
_FIRST_LOOK, _LONGEST_PAUSE = 0.02, 1.0


# -- sending -----------------------------------------------------------------------------------------------------


class RetainingPublisher(Publisher):
    """
    A publisher that retains messages which no queue wants, at most *max_retained* for each topic.

    The queue of the retained messages is declared when it is needed: RabbitMQ returns the first message, and the
    publisher declares the queue and publishes the message again. Only the first message of each topic is published
    alone, so that the messages keep their order meanwhile.
    """

    def __init__(
        self,
        address: Address,
        exchange: str,
        *,
        timeout: float,
        max_in_flight: int,
        reconnect: ReconnectPolicy,
        queue_type: str,
        max_retained: int,
    ) -> None:
        super().__init__(address, exchange, timeout=timeout, max_in_flight=max_in_flight, reconnect=reconnect)
        safely = {"x-dead-letter-strategy": "at-least-once", "x-delivery-limit": DELIVERY_LIMIT}
        self._arguments: dict[str, Any] = {
            "x-queue-type": queue_type,
            "x-max-length": max_retained,
            "x-max-length-bytes": _MOST_BYTES,
            "x-overflow": "reject-publish",
            **(safely if queue_type == "quorum" else {}),
        }
        self._routed: set[str] = set()  # the routing keys for which there is a queue
        self._lines: dict[str, _Line] = {}
        self._declaring: dict[Topic, asyncio.Task[bool]] = {}
        self._safe_after = SAFE_AFTER if queue_type == "quorum" else 0.0

    async def send(self, publication: Publication, topic: tuple[str, str]) -> None:
        """Publish a message of a program to the topic exchange, and retain it if nobody has subscribed."""
        deadline = self._bind_to_running_loop().time() + self.timeout
        if publication.routing_key in self._routed:
            try:
                await self.publish(publication, deadline=deadline)
                return
            except MessageUnroutable:  # the queues of its topic were deleted
                self._routed.discard(publication.routing_key)
        await self._send_in_line(publication, Topic(*topic), deadline)

    async def _send_in_line(self, publication: Publication, topic: Topic, deadline: float) -> None:
        """Send the first message of a topic alone, and those that come meanwhile in their order."""
        key, confirmed = publication.routing_key, None
        line = self._lines.setdefault(key, _Line())
        line.length += 1
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await line.lock.acquire()
            except TimeoutError as error:
                raise BrokerUnavailable(
                    f"earlier messages of its topic took all of {self.timeout:g} s",
                    message_id=publication.message_id,
                ) from error
            try:
                if line.is_open:
                    confirmed = await self._publish_in_turn(publication, deadline)
                else:
                    await self._publish_first(publication, topic, deadline)
                    line.is_open = True
            finally:
                line.lock.release()
        finally:
            line.length -= 1
            if not line.length:
                self._lines.pop(key, None)
                if line.is_open:
                    self._routed.add(key)
        if confirmed is not None:
            await confirmed

    async def _publish_first(self, publication: Publication, topic: Topic, deadline: float) -> None:
        """Publish the first message of a topic. If no queue wants it, declare one that does, and publish it again."""
        try:
            await self.publish(publication, deadline=deadline)
        except MessageUnroutable as unroutable:
            message_id = unroutable.message_id
            try:
                retained_queue_name(self._exchange, topic)
            except ValueError as error:
                raise MessageRejected(
                    f"{topic.message_name:.80}: {error}; give it a shorter name", message_id=message_id
                ) from error
            try:
                async with asyncio.timeout_at(deadline):
                    retains = await asyncio.shield(self._declared(topic, publication.routing_key))
            except Refused as error:
                raise MessageUnroutable(
                    f"nobody has subscribed to it yet, and RabbitMQ refuses to retain it ({error}); permit the user to "
                    "configure, write and read the names that start with the prefix, or subscribe first",
                    message_id=message_id,
                ) from error
            except (DiatorError, *CHANNEL_ERRORS) as error:
                raise BrokerUnavailable(
                    f"nobody has subscribed to it yet, and RabbitMQ has not declared the queue that retains it "
                    f"({explained(error, within=self.timeout)})",
                    message_id=message_id,
                ) from error
            if not retains:
                raise MessageUnroutable(
                    f"nobody has subscribed to it yet, and RabbitMQ cannot retain it: another program has declared the "
                    f"exchange {self._exchange!r} without the alternate exchange "
                    f"{retained_exchange_name(self._exchange)!r}; delete the exchange, and each consumer declares it "
                    "again",
                    message_id=message_id,
                ) from unroutable
            await self.publish(publication, deadline=deadline)

    def _declared(self, topic: Topic, routing_key: str) -> asyncio.Task[bool]:
        """Return the task that declares the queue for *topic*. It goes on without its callers, for later ones."""
        declaring = self._declaring.get(topic)
        if declaring is None:
            declaring = asyncio.create_task(self._declare(topic, routing_key), name="diator: declaring a queue")
            self._declaring[topic] = declaring

            def forget(task: asyncio.Task[bool]) -> None:
                self._declaring.pop(topic, None)
                if not task.cancelled():
                    task.exception()  # its callers may have gone

            declaring.add_done_callback(forget)
        return declaring

    async def _declare(self, topic: Topic, routing_key: str) -> bool:
        """
        Declare the queue of the retained messages of *topic*, and bind it to the alternate exchange.

        It is bound, and so retains messages, only when a kill of RabbitMQ no longer loses it. Return False if the topic
        exchange has no alternate exchange.
        """
        link = await self._ready(asyncio.get_running_loop().time() + self.timeout)
        if not link.retains:
            return False
        exchange, queue = retained_exchange_name(self._exchange), retained_queue_name(self._exchange, topic)
        # What its consumer rejects goes to the group that has claimed it, by the exchange of the claim.
        arguments = {**self._arguments, "x-dead-letter-exchange": queue}
        try:
            await link.ask_aside(commands.Queue.Declare(queue=queue, durable=True, arguments=arguments))
        except Refused as error:
            if error.code != PRECONDITION_FAILED:  # it exists; another program has chosen another bound
                raise
        await asyncio.sleep(self._safe_after)
        await link.ask_aside(
            commands.Exchange.Declare(exchange=exchange, exchange_type="direct", durable=True),
            commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=routing_key),
        )
        return True

    async def _close(self) -> None:
        await super()._close()
        if self._declaring:
            await asyncio.wait([*self._declaring.values()])

    def _reset(self) -> None:
        super()._reset()
        self._lines.clear()
        self._declaring.clear()


class _Line:
    """
    The callers that send the first messages of a topic.

    Attributes:
        lock: Held by the caller whose turn it is.
        length: The number of callers.
        is_open: Whether there is a queue for the topic, so that the callers need not wait for confirms.
    """

    __slots__ = ("is_open", "length", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.length = 0
        self.is_open = False


# -- receiving ---------------------------------------------------------------------------------------------------


class Receiver(Protocol):
    """The connection of a group, as far as it hands over the retained messages."""

    async def ask(self, frame: Frame) -> Any: ...

    async def ask_aside(self, *frames: Frame) -> None: ...

    async def is_there(self, declared_passively: Frame) -> bool: ...

    async def consume(self, *queues: str) -> None:
        """Consume *queues* from now on."""
        ...

    async def cancel(self, queue: str) -> None:
        """Consume *queue* no longer."""
        ...

    def has_settled(self, queue: str) -> bool:
        """Return whether no delivery from *queue* is unsettled."""
        ...


async def claim(receiver: Receiver, prefix: str, queues: Mapping[str, Topic]) -> dict[str, str]:
    """
    Claim the retained messages for the group with *queues*, which are bound already.

    Return the queues of the retained messages that belong to this group, with the group's own queue for each. A topic
    is missing if nothing was ever retained for it, or if another group came first.
    """
    if not await receiver.is_there(commands.Exchange.Declare(exchange=retained_exchange_name(prefix), passive=True)):
        return {}

    async def claims(queue: str) -> bool:
        retained = commands.Queue.Declare(queue=retained_queue_name(prefix, queues[queue]), passive=True)
        return await receiver.is_there(retained) and await _claims(receiver, retained.queue, queue)

    are_claimed = zip(queues, await asyncio.gather(*map(claims, queues)), strict=True)
    return {retained_queue_name(prefix, queues[queue]): queue for queue, is_claimed in are_claimed if is_claimed}


async def _claims(receiver: Receiver, retained: str, queue: str) -> bool:
    """
    Return whether the messages in *retained* belong to the group with *queue*.

    A claim is an exchange whose alternate exchange names the group's queue: RabbitMQ refuses to declare it again with
    another name. It is deleted by RabbitMQ itself when its only binding is: by `release`, or with the group's queue.
    """
    while True:
        try:
            await receiver.ask_aside(
                commands.Exchange.Declare(
                    exchange=retained,
                    exchange_type="fanout",
                    durable=True,
                    auto_delete=True,
                    arguments={"alternate-exchange": queue},
                ),
                commands.Queue.Bind(queue=queue, exchange=retained),
            )
        except Refused as error:
            if error.code == PRECONDITION_FAILED:
                return False
            if error.code != NOT_FOUND:  # else another consumer of the group has released it between both frames
                raise
        else:
            return True


async def hand_over(receiver: Receiver, claimed: Mapping[str, str]) -> None:
    """
    Consume each group's own queue as soon as its retained messages are delivered, and release the claims at the end.

    A claim ends when all messages are settled, by this consumer and by the others of the group. *receiver* consumes
    the queues of the retained messages already.
    """
    waiting, pause = {**claimed}, _FIRST_LOOK
    unsettled = {**claimed}
    while unsettled:
        for retained, queue in [*unsettled.items()]:
            found = await receiver.ask(commands.Queue.Declare(queue=retained, passive=True))
            if found.message_count:
                continue
            if waiting.pop(retained, None):
                await receiver.consume(queue)
            if receiver.has_settled(retained):
                del unsettled[retained]
                await receiver.cancel(retained)
                if found.consumer_count == 1:  # this one; the last consumer to be done releases the claim
                    await receiver.ask_aside(commands.Queue.Unbind(queue=queue, exchange=retained))
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
