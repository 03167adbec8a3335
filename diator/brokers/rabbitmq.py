"""
RabbitMQ. Needs the extra `rabbitmq`.

One durable topic exchange, named by the prefix, to which messages go by `<message_type>.<message_name>`. A group has a
queue for each topic, `<prefix>:<message_type>:<message_name>:<group>`, and beside it `…:dead` for what was put aside,
and `…:retry:<ms>` while something waits there to be handled again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast
from uuid import uuid4

from diator.brokers._rabbitmq_channel import (
    CLIENT_ERRORS,
    Address,
    Channel,
    Content,
    ContentHeader,
    Frame,
    Refused,
    commands,
    explained,
)
from diator.brokers._rabbitmq_publisher import Publication, Publisher, again, header_of, topic_exchange
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.message import Message
from diator.brokers.sending import send_together
from diator.brokers.settling import Acknowledgements, provenance
from diator.brokers.supervisor import MessagesMissed, Patience, Source, Supervised
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    EncodingError,
    WiringError,
)

logger: logging.Logger = logging.getLogger(__name__)

QueueType: TypeAlias = Literal["quorum", "classic"]

_ATTEMPT = "diator-attempt"
"""The header that counts, on a message which was given back, the deliveries before."""
_OF_THE_SERVICE = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", _ATTEMPT)
"""How those headers begin that are no program's."""
_ROUTING = frozenset({"CC", "BCC"})
"""Headers that RabbitMQ routes by."""
_ALONE = "/"
"""How the names of queues without a group begin, in the place of the group."""


class RabbitMQMessageBroker:
    """
    Publishes to a topic exchange of RabbitMQ, and reads queues.

    At least once: a send has returned when RabbitMQ has stored the message in every queue that wants it, and a message
    is its group's until a member has acknowledged it. A group begins when it first subscribes, and collects from then
    on. Without a group, a subscription has a queue of its own, that is gone two minutes after its subscriber.

    A message that no queue wants raises `MessageUnroutable`, unless *mandatory* is switched off; then it is dropped.

    *url* is `amqp://user:password@host:port/vhost`, or `amqps://…` for TLS, with *ssl_context* if yours is not the
    system's. *queue_type* `classic` is for services without quorum queues; they do not count deliveries, so that a
    message which kills its consumers is not found out. *timeout* is in seconds, for each send and for connecting; at
    most *max_in_flight* messages wait for their confirms. *read_ahead* is the number of messages that are held beyond
    those that are being handled; where a message may kill its process, 0 keeps its neighbours out of it.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "diator",
        *,
        ssl_context: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        mandatory: bool = True,
        queue_type: QueueType = "quorum",
        read_ahead: int = 100,
        patience: Patience | None = None,
    ) -> None:
        if read_ahead < 0 or max_in_flight < 1 or timeout <= 0:
            raise WiringError("read_ahead is at least 0, max_in_flight at least 1, and timeout above 0")
        if queue_type not in {"quorum", "classic"}:
            raise WiringError(f"queue_type is quorum or classic, not {queue_type!r:.80}")
        if not prefix or prefix.startswith("amq.") or _UNUSUAL.search(prefix):
            raise WiringError(
                "the prefix names an exchange: letters, digits and _./@,+- and not 'amq.' at its beginning"
            )
        self._address = Address(url, ssl_context)
        self._prefix = prefix
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._mandatory = mandatory
        self._queue_type: QueueType = queue_type
        self._read_ahead = read_ahead
        self._patience = patience or Patience(connect=timeout)
        self._publisher = Publisher(self._address, prefix, timeout=timeout, max_in_flight=max_in_flight)
        self._subscriptions: set[Supervised] = set()

    @property
    def capabilities(self) -> Capabilities:
        """What RabbitMQ promises, on one node or with quorum queues on several."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=2.0 * self._address.heartbeat,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact" if self._queue_type == "quorum" else "retries",
            ordering="destination",
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            durability="crash",
            unroutable="reported" if self._mandatory else "dropped",
            headers="native",
            backpressure="prefetch",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        body = encode(message, max_bytes=self._max_message_bytes)
        headers = headers_with_key(message)
        if headers:
            _check_headers(message, headers)
        message_id = str(message.message_id)
        header = header_of(message.message_name, message_id, headers, len(body))
        routing_key = _routing_key(message.message_type, message.message_name)
        await self._publisher.publish(Publication(self._prefix, routing_key, header, body, message_id, self._mandatory))

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """See `BatchMessageBroker.send_messages`: in one write, in their order."""
        await send_together(self.send_message, messages)

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """
        See `ReadableBroker.subscribe`. Each subscription has a connection of its own.

        Raises:
            WiringError: A queue is there with other settings.
            AccessRefused: The user may not declare or read it.
        """
        if prefetch < 1:
            raise WiringError("prefetch is at least 1")
        member = _Member(self._publisher, self._prefix, topics, group, self._queue_type)
        supervised = Supervised(
            lambda: self._reading(member, prefetch),
            lossy=False,
            ahead=prefetch + self._read_ahead,
            patience=self._patience,
            on_gap=on_gap,
            is_full=lambda waiting: member.holds - waiting >= prefetch,
        )
        member.supervised = supervised
        self._subscriptions.add(supervised)
        try:
            async with supervised as deliveries:
                member.stays = True
                try:
                    yield deliveries
                finally:
                    member.stays = False
        finally:
            self._subscriptions.discard(supervised)
            await member.leave()

    @asynccontextmanager
    async def _reading(self, member: _Member, prefetch: int) -> AsyncGenerator[Source, None]:
        if self._publisher.is_closed:
            raise BrokerClosed("this broker is closed")
        reading = _Reading(member, min(prefetch + self._read_ahead // len(member.queues), 65_535))
        try:
            await reading.open(*await self._address.dial("consuming"))
            await reading.begin()
            yield reading
        finally:
            member.part_with(reading)

    async def aclose(self) -> None:
        """Refuse further messages and wait, at most *timeout*, for the confirms that are due. Again: does nothing."""
        self._publisher.is_closed = True
        for subscription in self._subscriptions:
            subscription.close(BrokerClosed("this broker is closed"))
        await self._publisher.aclose()

    async def __aenter__(self) -> Self:
        await self._publisher.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


# -- names -------------------------------------------------------------------------------------------------------

_LONGEST = 255
_LONGEST_SUFFIX = len(":retry:4294967295")


@lru_cache(maxsize=1024)
def _routing_key(message_type: str, message_name: str) -> str:
    """Keep what has a meaning in a binding from having one, and the kind to one word. Raises `EncodingError`."""
    key = f"{_quoted(message_type, '%*#.')}.{_quoted(message_name, '%*#')}"
    if len(key.encode()) > _LONGEST:
        raise EncodingError(f"{message_name:.80}…", f"RabbitMQ takes routing keys of {_LONGEST} bytes")
    return key


def _queue(prefix: str, topic: Topic, group: str) -> str:
    """Name a queue so that no two of different parts have one name. Raises `EncodingError`."""
    queue = ":".join(_UNUSUAL.sub(_escaped, part) for part in (prefix, *topic, group))
    if len(queue.encode()) > _LONGEST - _LONGEST_SUFFIX:
        raise EncodingError(
            f"{topic.message_name:.80}…", f"with its group it makes a name of more than {_LONGEST} bytes"
        )
    return queue


_UNUSUAL = re.compile("[^a-zA-Z0-9_./@,+ -]")
"""What aiormq allows in the name of a queue has `#` and `:` beside these, which have a meaning here."""


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"#{byte:02X}" for byte in found[0].encode())


def _quoted(text: str, characters: str) -> str:
    for character in characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


# -- reading -----------------------------------------------------------------------------------------------------

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


class _Member:
    """One member of a group, or a subscription without one: its queues. It outlives its connections."""

    def __init__(
        self, publisher: Publisher, prefix: str, topics: Collection[Topic], group: str | None, queue_type: QueueType
    ) -> None:
        self.publisher = publisher
        self.prefix = prefix
        self.group = group
        alone = f"{_ALONE}{uuid4().hex}"
        self.queues = {_queue(prefix, topic, alone if group is None else group): topic for topic in topics}
        self.queue_type: QueueType = "classic" if group is None else queue_type
        self.holds = 0
        """How many deliveries are not settled, given out or not."""
        self.supervised: Supervised | None = None
        self.stays = False
        self.declared = False
        self.waiting: dict[str, float] = {}
        """Queues for retries, and when each was declared."""
        self._farewells: set[asyncio.Task[None]] = set()

    def dead(self, queue: str) -> str:
        """Name where what is put aside goes: without a group, all of a topic to one place."""
        return f"{queue if self.group is not None else _queue(self.prefix, self.queues[queue], '')}:dead"

    def arguments(self, queue: str) -> dict[str, Any]:
        """With what a queue is declared. RabbitMQ compares them with what is there."""
        if self.group is None:
            return {"x-queue-type": "classic", "x-expires": int(_ALONE_EXPIRES * 1000)}
        limit = {"x-delivery-limit": _DELIVERY_LIMIT} if self.queue_type == "quorum" else {}
        return {**limit, **self.passing_on(self.dead(queue))}

    def passing_on(self, queue: str) -> dict[str, Any]:
        """What has RabbitMQ itself pass messages on to *queue*: with quorum queues, without losing one."""
        safely = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return {
            "x-queue-type": self.queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            **(safely if self.queue_type == "quorum" else {}),
        }

    def part_with(self, reading: _Reading) -> None:
        """Have what was acknowledged told, and what nobody has seen given back, and close the connection."""
        unseen = [*(self.supervised.take_back() if self.supervised else ()), *reading.take_back()]
        self.holds -= len(unseen)
        farewell = asyncio.create_task(reading.end(unseen), name="diator: ending a subscription")
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def leave(self) -> None:
        """Wait until the service knows."""
        if self._farewells:
            await asyncio.wait(self._farewells)


class _Reading(Channel):
    """One connection that receives, and how its deliveries are settled."""

    def __init__(self, member: _Member, prefetch: int) -> None:
        super().__init__()
        self._member = member
        self._prefetch = prefetch
        self._arrived: deque[Delivery] = deque()
        self._something = asyncio.Event()
        self._open: dict[int, None] = {}
        """What is not settled. In the order of its tags, which is that of arrival."""
        self._acked: set[int] = set()
        self._acknowledgements = Acknowledgements[int](self._tell)
        self._beside = 0

    async def begin(self) -> None:
        """
        Declare what is to be there, and consume.

        Raises:
            WiringError: It is there with other settings, or may not be declared or read.
            MessagesMissed: It was there before, and is not any more.
        """
        member = self._member
        try:
            there = [not member.declared or await self._is_there(_passively(queue)) for queue in member.queues]
            await self.ask(topic_exchange(member.prefix))
            await self.ask(commands.Basic.Qos(prefetch_count=self._prefetch))
            for queue, topic in member.queues.items():
                if member.group is not None:
                    await self.ask(_durable(member.dead(queue), {"x-queue-type": member.queue_type}))
                await self.ask(_durable(queue, member.arguments(queue)))
                await self.ask(
                    commands.Queue.Bind(queue=queue, exchange=member.prefix, routing_key=_routing_key(*topic))
                )
            member.declared = True
            if not all(there):
                raise MessagesMissed("RabbitMQ had lost a queue of this subscription; it is declared anew")
            for queue in member.queues:
                await self.ask(commands.Basic.Consume(queue=queue, consumer_tag=queue))
        except Refused as error:
            if error.code == _NOT_ALLOWED:
                raise AccessRefused(
                    f"RabbitMQ refuses a subscription ({error}); let its user configure, write and read what begins "
                    f"with {member.prefix!r}, and write to the default exchange"
                ) from error
            if error.code in {_LOCKED, _OTHERWISE}:
                raise WiringError(
                    f"RabbitMQ refuses a subscription ({error}); delete what is there with other settings once it is "
                    "empty, or use another group or prefix, or the queue_type that it has"
                ) from error
            raise

    async def _is_there(self, declared_passively: Frame) -> bool:
        try:
            await self._ask_beside(declared_passively)
        except Refused as error:
            if error.code == _NOT_FOUND:
                return False
            raise
        return True

    async def _ask_beside(self, frame: Frame) -> None:
        """Ask what RabbitMQ may answer by closing the channel, on another one."""
        self._beside = self._beside % _MOST_CHANNELS + 1
        beside = Channel(self.number + self._beside)
        await beside.open(self.connection, cast("asyncio.StreamWriter", self._writer))
        try:
            await beside.ask(frame)
        finally:
            beside.part()

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while not self._something.is_set():
            await self._something.wait()
        if self.error is not None:
            raise self.error
        given = [self._arrived.popleft() for _ in range(min(most, len(self._arrived)))]
        if not self._arrived:
            self._something.clear()
        return given

    async def probe(self) -> None:
        """See whether the exchange is there: RabbitMQ does not tell those whose queues have lost it."""
        exchange = self._member.prefix
        if await self._is_there(commands.Exchange.Declare(exchange=exchange, passive=True)):
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
            topic=self._member.queues[queue],
            body=body,
            headers={name: _text(value) for name, value in headers.items() if not name.startswith(_OF_THE_SERVICE)},
            attempt=1 + _count(headers.get(_ATTEMPT)) + _count(headers.get("x-delivery-count")),
            settler=self,
            token=_Token(tag, queue, header),
        )
        self._open[tag] = None
        self._member.holds += 1
        self._arrived.append(delivery)
        self._something.set()

    def lost(self, error: Exception) -> None:
        self._something.set()

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Noted here, and told together with others. On a connection that is gone there is nobody to tell."""
        self._settled(cast("_Token", delivery.token))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """Published to the group's queue again, by way of one that keeps it for so long, and then acknowledged."""
        token = cast("_Token", delivery.token)
        with self._giving_back_on_failure(delivery):
            queue = token.queue
            if after > 0:
                queue = await self._waiting_room(queue, after)
            headers = {**_of_program(token.header), _ATTEMPT: delivery.attempt}
            await self._hand_on(again(token.header, headers, delivery.body, queue))
        self._settled(token)

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        token = cast("_Token", delivery.token)
        why = provenance(delivery, reason[:_LONGEST_REASON], source=token.queue, group=self._member.group or "")
        headers = _of_program(token.header) | why
        with self._giving_back_on_failure(delivery):
            await self._hand_on(again(token.header, headers, delivery.body, self._member.dead(token.queue)))
        self._settled(token)

    async def _hand_on(self, publication: Publication) -> None:
        if self.error is not None:
            raise BrokerUnavailable("the connection that it came by is gone; it comes again")
        await self._member.publisher.publish(publication)

    async def _waiting_room(self, queue: str, after: float) -> str:
        """Declare where messages for *queue* wait. Unused, it goes; it must not while something waits in it."""
        milliseconds = _rung(after)
        name = f"{queue}:retry:{milliseconds}"
        declared = self._member.waiting.get(name)
        if declared is None or self._loop.time() - declared > _UNUSED / 2:
            expires = {"x-message-ttl": milliseconds, "x-expires": milliseconds + int(_UNUSED * 1000)}
            await self._ask_beside(_durable(name, {**self._member.passing_on(queue), **expires}))
            self._member.waiting[name] = self._loop.time()
        return name

    @contextmanager
    def _giving_back_on_failure(self, delivery: Delivery) -> Generator[None, None, None]:
        """What could not be published comes again: after a moment, so that a failing service is not stormed."""
        try:
            yield
        except (BrokerError, *CLIENT_ERRORS) as error:
            self._member.waiting.clear()
            self._loop.call_later(_GIVEN_BACK_AFTER, self._give_back, delivery)
            if isinstance(error, BrokerError):
                raise
            raise BrokerUnavailable(f"RabbitMQ did not take it, and it comes again ({explained(error)})") from error

    def _give_back(self, delivery: Delivery) -> None:
        token = cast("_Token", delivery.token)
        if delivery.outcome is None and token.tag in self._open and self.error is None:
            self._forget(token.tag)
            self.say(commands.Basic.Nack(token.tag, requeue=True))

    def _settled(self, token: _Token) -> None:
        if token.tag in self._open:
            self._forget(token.tag)
            self._acked.add(token.tag)
            self._acknowledgements.add(token.tag)

    def _forget(self, tag: int) -> None:
        del self._open[tag]
        self._member.holds -= 1
        if self._member.supervised is not None:
            self._member.supervised.look_again()

    async def _tell(self, _: Sequence[int]) -> None:
        """
        Acknowledge all up to the oldest that is not settled at once, and each behind it by itself.

        All that there are by now: RabbitMQ closes a channel on which one is acknowledged that it knows no more.
        """
        oldest = next(iter(self._open), None)
        run = [tag for tag in self._acked if oldest is None or tag < oldest]
        if self.error is None:
            if run:
                self.say(commands.Basic.Ack(max(run), multiple=True))
            for tag in sorted(self._acked.difference(run)):
                self.say(commands.Basic.Ack(tag))
        self._acked.clear()

    # -- the end -------------------------------------------------------------------------------------------------

    def take_back(self) -> list[Delivery]:
        """Give what has arrived and was not received."""
        unseen = [*self._arrived]
        self._arrived.clear()
        return unseen

    async def end(self, unseen: Collection[Delivery]) -> None:
        """Stop, give back what nobody has seen, have what was acknowledged told, and close."""
        member = self._member
        try:
            if self.error is None and self._writer is not None:
                async with asyncio.timeout(_PATIENCE):
                    for queue in member.queues:
                        await self.ask(commands.Basic.Cancel(queue))
                    late = self.take_back()
                    member.holds -= len(late)
                    for delivery in (*unseen, *late):
                        tag = cast("_Token", delivery.token).tag
                        if self._open.pop(tag, self) is None:
                            self.say(commands.Basic.Nack(tag, requeue=True))
                    await self._acknowledgements.flush()
                    if member.group is None and not member.stays:
                        for queue in member.queues:
                            await self.ask(commands.Queue.Delete(queue=queue))
        except CLIENT_ERRORS as error:
            logger.debug("ending a subscription: %s", explained(error))
        await self.hang_up()


_NOT_ALLOWED, _NOT_FOUND, _LOCKED, _OTHERWISE = 403, 404, 405, 406
_MOST_CHANNELS = 1_000


def _passively(queue: str) -> commands.Queue.Declare:
    return commands.Queue.Declare(queue=queue, passive=True)


def _durable(queue: str, arguments: dict[str, Any]) -> commands.Queue.Declare:
    return commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)


def _check_headers(message: Message, headers: Mapping[str, str]) -> None:
    for name in headers:
        if name in _ROUTING or name.startswith(_OF_THE_SERVICE):
            raise EncodingError(f"{message.message_name}.headers", f"{name!r} means something to RabbitMQ or to diator")


def _of_program(header: ContentHeader) -> dict[str, Any]:
    headers = header.properties.headers or {}
    return {name: value for name, value in headers.items() if not name.startswith(_OF_THE_SERVICE)}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)


def _count(value: object) -> int:
    """A header of that name can be anybody's."""
    return value if isinstance(value, int) and 0 < value < _MOST_ATTEMPTS else 0


_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)


def _rung(seconds: float) -> int:
    """Round up, by a quarter at most, to milliseconds that many retries have in common: each takes a queue."""
    milliseconds = math.ceil(seconds * 1000)
    magnitude = int(10 ** (len(str(milliseconds)) - 1))
    rungs = (-(-step * magnitude // 10) for step in _STEPS)
    return next(rung for rung in rungs if rung >= milliseconds)
