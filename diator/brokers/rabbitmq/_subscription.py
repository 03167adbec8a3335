"""Reading from RabbitMQ: the queues of a subscription, and the connection that consumes them while it lives."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias, cast
from uuid import uuid4

from diator.brokers.base import Delivery, Topic
from diator.brokers.connecting import BackgroundTasks
from diator.brokers.rabbitmq._channel import (
    CLIENT_ERRORS,
    LOCKED,
    NOT_ALLOWED,
    OTHERWISE,
    Channel,
    Content,
    ContentHeader,
    Refused,
    commands,
    explained,
)
from diator.brokers.rabbitmq._frames import Publication, again
from diator.brokers.rabbitmq._names import delay_bucket, queue_name, routing_key
from diator.brokers.rabbitmq._publisher import Publisher, topic_exchange
from diator.brokers.settling import Acknowledgements, dead_letter_headers
from diator.brokers.supervisor import MessagesMissed, ResilientSubscription
from diator.exceptions import AccessRefused, BrokerError, BrokerUnavailable, ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

QueueType: TypeAlias = Literal["quorum", "classic"]

ATTEMPT = "diator-attempt"
"""The header that counts, on a message which was given back, the deliveries before."""
OF_THE_SERVICE = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", ATTEMPT)
"""How those headers begin that are no program's."""
_ALONE = "/"
"""How the names of queues without a group begin, in the place of the group."""

_DELIVERY_LIMIT = 1_000
"""After so many deliveries that nobody settled RabbitMQ puts a message aside by itself: far above any retry policy."""
_ALONE_EXPIRES = 120.0
_UNUSED = 600.0
_GIVEN_BACK_AFTER = 5.0
_PATIENCE = 2.0
_LONGEST_REASON = 1024
_MOST_ATTEMPTS = 1_000_000


class _Token(NamedTuple):
    """By what a delivery is known."""

    tag: int
    queue: str
    header: ContentHeader


class Subscription:
    """One member of a group, or a subscription without one: its queues. It outlives its connections."""

    def __init__(
        self, publisher: Publisher, prefix: str, topics: Collection[Topic], group: str | None, queue_type: QueueType
    ) -> None:
        self.publisher = publisher
        self.prefix = prefix
        self.group = group
        alone = f"{_ALONE}{uuid4().hex}"
        self.queues = {queue_name(prefix, topic, alone if group is None else group): topic for topic in topics}
        self.queue_type: QueueType = "classic" if group is None else queue_type
        self.holds = 0
        """How many deliveries its subscription has received that are not settled, given out or not."""
        self.supervised: ResilientSubscription | None = None
        self.declared = False
        self.waiting: dict[str, float] = {}
        """Queues for retries, and when each was declared."""
        self._background = BackgroundTasks()

    def dead(self, queue: str) -> str:
        """Name where what is put aside goes: without a group, all of a topic to one place."""
        return f"{queue if self.group is not None else queue_name(self.prefix, self.queues[queue], _ALONE)}:dead"

    def declarations(self, queue: str) -> list[commands.Queue.Declare]:
        """What has to be there. RabbitMQ compares it with what is."""
        if self.group is None:
            return [_durable(queue, {"x-queue-type": "classic", "x-expires": int(_ALONE_EXPIRES * 1000)})]
        limit = {"x-delivery-limit": _DELIVERY_LIMIT} if self.queue_type == "quorum" else {}
        return [self.declaration_of_dead(queue), _durable(queue, {**limit, **self.passing_on(self.dead(queue))})]

    def declaration_of_dead(self, queue: str) -> commands.Queue.Declare:
        """Without a group, it is declared when there is something to put aside."""
        return _durable(self.dead(queue), {"x-queue-type": self.queue_type})

    def passing_on(self, queue: str) -> dict[str, Any]:
        """What has RabbitMQ itself pass messages on to *queue*: with quorum queues, without losing one."""
        safely = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return {
            "x-queue-type": self.queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            **(safely if self.queue_type == "quorum" else {}),
        }

    def release(self, reading: Connection) -> None:
        """Have what was acknowledged told, and what nobody has seen given back, and close the connection."""
        unseen = self.supervised.remove_prefetched() if self.supervised else []
        self.holds -= len(unseen)
        tags = {cast("_Token", delivery.token).tag for delivery in unseen}
        self._background.start(reading.end(tags), "ending a subscription")

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """Wait until the service knows. What nobody has seen was given back with the connection that it came by."""
        await self._background.wait()


class Connection(Channel):
    """One connection that receives, and how its deliveries are settled."""

    def __init__(self, subscription: Subscription, prefetch: int) -> None:
        super().__init__()
        self._subscription = subscription
        self._prefetch = prefetch
        self._arrived: deque[Delivery] = deque()
        self._something = asyncio.Event()
        self._open: dict[int, None] = {}
        """What is not settled. In the order of its tags, which is that of arrival."""
        self._acked: set[int] = set()
        self._begun = self._ended = False
        self._acknowledgements = Acknowledgements[int](self._tell)

    async def begin(self) -> None:
        """
        Declare what is to be there, and consume.

        Raises:
            ConfigurationError: It is there with other settings, or may not be declared or read.
            MessagesMissed: It was there before, and is not any more.
        """
        subscription = self._subscription
        try:
            there = [
                not subscription.declared or await self.is_there(passively(queue)) for queue in subscription.queues
            ]
            await self.ask(topic_exchange(subscription.prefix))
            await self.ask(commands.Basic.Qos(prefetch_count=self._prefetch))
            for queue, topic in subscription.queues.items():
                for declaration in subscription.declarations(queue):
                    await self.ask(declaration)
                await self.ask(
                    commands.Queue.Bind(queue=queue, exchange=subscription.prefix, routing_key=routing_key(*topic))
                )
            subscription.declared = True
            if not all(there):
                raise MessagesMissed("RabbitMQ had lost a queue of this subscription; it is declared anew")
            self._begun = True  # before: cancelled meanwhile, this consumes, and has messages that nobody has seen
            for queue in subscription.queues:
                await self.ask(commands.Basic.Consume(queue=queue, consumer_tag=queue))
        except Refused as error:
            if error.code == NOT_ALLOWED:
                raise AccessRefused(
                    f"RabbitMQ refuses a subscription ({error}); let its user configure, write and read what begins "
                    f"with {subscription.prefix!r}, and write to the default exchange"
                ) from error
            if error.code in {LOCKED, OTHERWISE}:
                raise ConfigurationError(
                    f"RabbitMQ refuses a subscription ({error}); delete what is there with other settings once it is "
                    "empty, or use another group or prefix, or the queue_type that it has"
                ) from error
            raise

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while not self._something.is_set():
            await self._something.wait()
        if self.error is not None:
            raise self.error
        given = [self._arrived.popleft() for _ in range(min(most, len(self._arrived)))]
        self._subscription.holds += len(given)
        if not self._arrived:
            self._something.clear()
        return given

    async def probe(self) -> None:
        """See whether the exchange is there: RabbitMQ does not tell those whose queues have lost it."""
        exchange = self._subscription.prefix
        if await self.is_there(commands.Exchange.Declare(exchange=exchange, passive=True)):
            self._something.set()
        else:
            self.give_up(MessagesMissed(f"RabbitMQ has no exchange {exchange!r} any more; it is declared anew"))

    def take(self, frame: Any) -> bool:
        if isinstance(frame, commands.Basic.Cancel):
            self.give_up(
                MessagesMissed(f"RabbitMQ has ended the consumer of {frame.consumer_tag!r}: its queue is gone")
            )
            return True
        return False

    def take_content(self, method: Content, header: ContentHeader, body: bytes) -> None:
        if not isinstance(method, commands.Basic.Deliver):
            return
        queue, tag = method.consumer_tag or "", method.delivery_tag or 0
        headers = header.properties.headers or {}
        delivery = Delivery(
            topic=self._subscription.queues[queue],
            body=body,
            headers={name: _text(value) for name, value in headers.items() if not name.startswith(OF_THE_SERVICE)},
            attempt=1 + _count(headers.get(ATTEMPT)) + _count(headers.get("x-delivery-count")),
            settler=self,
            token=_Token(tag, queue, header),
        )
        self._open[tag] = None
        self._arrived.append(delivery)
        self._something.set()

    def lost(self, error: Exception) -> None:
        """Have none of it begun: all that is not settled comes again, some of it elsewhere already."""
        self._something.set()
        if self._subscription.supervised is not None:
            self._subscription.holds -= len(
                self._subscription.supervised.remove_prefetched(lambda delivery: delivery.settler is self)
            )

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Noted here, and told together with others. On a connection that is gone there is nobody to tell."""
        self._settled(cast("_Token", delivery.token))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """Published to the group's queue again, by way of one that keeps it for so long, and then acknowledged."""
        token = cast("_Token", delivery.token)
        with self._giving_back_on_failure(delivery):
            async with asyncio.timeout(self._subscription.publisher.timeout):
                queue = token.queue
                if after > 0:
                    queue = await self._waiting_room(queue, after)
                headers = {**_of_program(token.header), ATTEMPT: delivery.attempt}
                await self._hand_on(again(token.header, headers, delivery.body, queue))
        self._settled(token)

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        token = cast("_Token", delivery.token)
        why = dead_letter_headers(
            delivery, reason[:_LONGEST_REASON], source=token.queue, group=self._subscription.group or ""
        )
        headers = _of_program(token.header) | why
        with self._giving_back_on_failure(delivery):
            async with asyncio.timeout(self._subscription.publisher.timeout):
                dead = self._subscription.dead(token.queue)
                if self._subscription.group is None and self.error is None:
                    await self.ask_beside(self._subscription.declaration_of_dead(token.queue))
                await self._hand_on(again(token.header, headers, delivery.body, dead))
        self._settled(token)

    async def _hand_on(self, publication: Publication) -> None:
        if self.error is not None:
            raise BrokerUnavailable("the connection that it came by is gone; it comes again")
        await self._subscription.publisher.publish(publication)

    async def _waiting_room(self, queue: str, after: float) -> str:
        """Declare where messages for *queue* wait. Unused, it goes; it must not while something waits in it."""
        milliseconds = delay_bucket(after)
        name = f"{queue}:retry:{milliseconds}"
        declared = self._subscription.waiting.get(name)
        if declared is None or self._loop.time() - declared > _UNUSED / 2:
            expires = {"x-message-ttl": milliseconds, "x-expires": milliseconds + int(_UNUSED * 1000)}
            await self.ask_beside(_durable(name, {**self._subscription.passing_on(queue), **expires}))
            self._subscription.waiting[name] = self._loop.time()
        return name

    @contextmanager
    def _giving_back_on_failure(self, delivery: Delivery) -> Generator[None, None, None]:
        """What could not be published comes again: after a moment, so that a failing service is not stormed."""
        try:
            yield
        except (BrokerError, *CLIENT_ERRORS) as error:
            self._subscription.waiting.clear()
            self._loop.call_later(_GIVEN_BACK_AFTER, self._give_back, delivery)
            if isinstance(error, BrokerError):
                raise
            raise BrokerUnavailable(f"RabbitMQ did not take it, and it comes again ({explained(error)})") from error

    def _give_back(self, delivery: Delivery) -> None:
        tag = cast("_Token", delivery.token).tag
        if delivery.outcome is None and tag in self._open:
            self._forget(tag)  # also where the connection is gone, or nobody would be given anything in its place
            if self.error is None and not self._ended:
                self.say(commands.Basic.Nack(tag, requeue=True))

    def _settled(self, token: _Token) -> None:
        if token.tag in self._open:
            self._forget(token.tag)
            self._acked.add(token.tag)
            self._acknowledgements.add(token.tag)

    def _forget(self, tag: int) -> None:
        del self._open[tag]
        self._subscription.holds -= 1
        if self._subscription.supervised is not None:
            self._subscription.supervised.notify_settled()

    async def _tell(self, _: Sequence[int]) -> None:
        """
        Acknowledge all up to the oldest that is not settled at once, and each behind it by itself.

        All that there are by now: RabbitMQ closes a channel on which one is acknowledged that it knows no more.
        """
        oldest = next(iter(self._open), None)
        run = [tag for tag in self._acked if oldest is None or tag < oldest]
        if self.error is None and not self._ended:
            if run:
                self.say(commands.Basic.Ack(max(run), multiple=True))
            for tag in sorted(self._acked.difference(run)):
                self.say(commands.Basic.Ack(tag))
        self._acked.clear()

    # -- the end -------------------------------------------------------------------------------------------------

    async def end(self, unseen: Collection[int]) -> None:
        """Stop, have what was acknowledged told, give back what nobody has seen, and close."""
        subscription = self._subscription
        try:
            if self.error is None and self._begun:
                async with asyncio.timeout(_PATIENCE):
                    for queue in subscription.queues:
                        await self.ask(commands.Basic.Cancel(queue))
                    self._settle_all({*unseen, *(cast("_Token", delivery.token).tag for delivery in self._arrived)})
                    if subscription.group is None and subscription.supervised and subscription.supervised.is_ending:
                        for queue in subscription.queues:
                            await self.ask(commands.Queue.Delete(queue=queue))
        except CLIENT_ERRORS as error:
            logger.debug("ending a subscription: %s", explained(error))
        await self.hang_up()

    def _settle_all(self, unseen: Collection[int]) -> None:
        """
        Settle all that there are, in as few frames as can be.

        Of more than 32 settlements at once, a quorum queue has the channel keep the rest for later, and a channel that
        is closed forgets them. What was begun and not settled is rejected, which counts it as a delivery; to give back
        otherwise does not, since RabbitMQ 4.3.
        """
        self._ended = True
        for what, tags in groupby(
            sorted(self._acked.union(self._open)),
            lambda tag: "acked" if tag in self._acked else "unseen" if tag in unseen else "begun",
        ):
            if what == "begun":
                for tag in tags:
                    self.say(commands.Basic.Reject(tag, requeue=True))
            else:
                last = max(tags)
                ack, nack = commands.Basic.Ack(last, multiple=True), commands.Basic.Nack(last, multiple=True)
                self.say(ack if what == "acked" else nack)


def passively(queue: str) -> commands.Queue.Declare:
    return commands.Queue.Declare(queue=queue, passive=True)


def _durable(queue: str, arguments: dict[str, Any]) -> commands.Queue.Declare:
    return commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)


def _of_program(header: ContentHeader) -> dict[str, Any]:
    headers = header.properties.headers or {}
    return {name: value for name, value in headers.items() if not name.startswith(OF_THE_SERVICE)}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)


def _count(value: object) -> int:
    """A header of that name can be anybody's."""
    return value if isinstance(value, int) and 0 < value < _MOST_ATTEMPTS else 0
