"""Reading from RabbitMQ: a subscription and its queues, and one connection that consumes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias, cast
from uuid import uuid4

import msgspec

from diator._hints import name_of
from diator._text import counted, explained, listed, printable
from diator.brokers.arrivals import Arrivals
from diator.brokers.base import Delivery
from diator.brokers.connecting import BackgroundTasks
from diator.brokers.rabbitmq._channel import (
    ACCESS_REFUSED,
    CHANNEL_ERRORS,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    SAFE_AFTER,
    Channel,
    Content,
    Lost,
    Refused,
)
from diator.brokers.rabbitmq._client import Address, commands
from diator.brokers.rabbitmq._content import ATTEMPT, DELIVERY_COUNT, DELIVERY_LIMIT, Deliver, Properties
from diator.brokers.rabbitmq._frames import Publication, again
from diator.brokers.rabbitmq._names import delay_bucket, own_queue_name, queue_name, routing_key
from diator.brokers.rabbitmq._publisher import Publisher, ensure_exchange, is_refused_for_good
from diator.brokers.rabbitmq._retained import claim, hand_over
from diator.brokers.settling import OMITTED, Acknowledgements, confirmed, dead_letter_headers
from diator.brokers.supervisor import MessagesMissed, ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    DiatorError,
    MessageRejected,
    MessageUnroutable,
)

logger: logging.Logger = logging.getLogger(__name__)

QueueType: TypeAlias = Literal["quorum", "classic"]


_FIRST_WITH_A_LIMIT = 4
_NO_GROUP_EXPIRES = 120.0
_UNUSED_EXPIRES = 600.0
# How many seconds RabbitMQ may take for the queues of each topic.
_EACH_TOPIC = 0.2
_REQUEUE_DELAY = 5.0
_END_TIMEOUT = 2.0
# How long a new connection waits until the consumers of the lost one are gone, and how often it looks, in seconds.
_LOST_CONSUMERS_GO = 2.0
_LOOK_EVERY = 0.02
# How often a consumer asks whether the exchange was deleted, in seconds.
_CHECK_EVERY = 2.0
_MAX_ATTEMPT = 1_000_000
# Values of the content-encoding that mean a compression.
_COMPRESSED = frozenset({"br", "bzip2", "compress", "deflate", "gzip", "lz4", "snappy", "x-gzip", "zstd"})
# For these reasons RabbitMQ itself dead-letters a message. If somebody moves it back, its attempts start again.
_DEAD_LETTERED = ("rejected", "delivery_limit")
_MAX_PREFETCH = 65_535


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """
    How the subscriptions of a broker read.

    Attributes:
        prefix: The name of the exchange, which starts the names of queues.
        queue_type: The type of a group's queues.
        extra_prefetch: Messages that are received beyond those that the program may hold.
    """

    prefix: str
    queue_type: QueueType
    extra_prefetch: int


class _Token(NamedTuple):
    """The token of a delivery: its delivery tag, its queue, its properties, and whether it came by an exchange."""

    tag: int
    queue: str
    properties: Properties
    by_exchange: bool


class _Consumer(msgspec.Struct, eq=False):
    """
    A consumer of AMQP.

    Attributes:
        tag: Its consumer tag.
        queue: The queue that it consumes.
        prefetch_count: How many messages RabbitMQ sends to it without their settlement.
        unsettled: How many of its deliveries are not settled.
    """

    tag: str
    queue: str
    prefetch_count: int
    unsettled: int = 0


class Subscription(ResilientSubscription):
    """
    The queues of one consumer, of a group or without one, on one connection after another.

    Attributes:
        publisher: Publishes messages again that are retried or dead-lettered.
        group: The group; None if the subscription has queues of its own.
        prefix: The name of the exchange.
        queues: The queues that it consumes, with their topics.
        declared: Whether the queues were declared before, so that a missing one is a gap.
        counts_deliveries: Whether its queues count deliveries.
        first_prefetch_count: The prefetch count after a lost connection, until a message arrives that was not delivered
            before.
        safe_after: Seconds after which a new queue survives a kill of RabbitMQ.
        witness: An exchange that is deleted together with the topic exchange; empty if there is none.
        delay_queues: The queues of delayed retries, and when each was declared, by the clock of the event loop.
    """

    def __init__(
        self,
        settings: SubscriptionSettings,
        publisher: Publisher,
        address: Address,
        options: ReadOptions,
    ) -> None:
        topics, group, prefetch = settings.topics, settings.group, settings.prefetch
        self._queue_type: QueueType = "classic" if group is None else options.queue_type
        self.counts_deliveries = self._queue_type == "quorum"
        self.safe_after = SAFE_AFTER if self._queue_type == "quorum" else 0.0
        limits = settings.reconnect.connect_timeout, self.safe_after + _EACH_TOPIC * len(topics)
        self._connect_timeout, self._time_for_queues = limits
        reconnect = replace(settings.reconnect, connect_timeout=sum(limits) + _END_TIMEOUT)
        super().__init__(
            replace(settings, reconnect=reconnect), lossy=False, buffer_size=prefetch + options.extra_prefetch
        )
        self.publisher = publisher
        self._address = address
        self.group = group
        self.prefix = options.prefix
        own = uuid4().hex
        try:
            self.queues = {
                own_queue_name(self.prefix, topic, own)
                if group is None
                else queue_name(self.prefix, topic, group): topic
                for topic in topics
                if routing_key(*topic)
            }
        except ValueError as error:
            names = listed([f"{topic.message_name:.80}" for topic in topics])
            raise ConfigurationError(
                printable(
                    f"RabbitMQ has no names for the queues of {names} and the group {group!r:.80} ({error}); choose "
                    "shorter ones, of valid Unicode"
                )
            ) from error
        self._prefetch_count = min(prefetch + options.extra_prefetch // max(1, len(self.queues)), _MAX_PREFETCH)
        self.first_prefetch_count = min(prefetch, _MAX_PREFETCH) if self.counts_deliveries else self._prefetch_count
        self._connection: Connection | None = None
        self.declared = False
        self.delay_queues: dict[str, float] = {}
        self.witness = ""
        self._background = BackgroundTasks()

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Source, None]:
        """
        Connect, declare the queues, and consume them.

        Raises:
            ConfigurationError: A queue exists with other settings.
            AccessRefused: The user may not declare or read it.
            MessagesMissed: A queue existed before, and RabbitMQ had lost it.
        """
        for tries_left in (2, 1, 0):
            await self._background.wait()  # until the connection before is closed
            connection = self._connection = Connection(self, self._prefetch_count)
            began, limit = asyncio.get_running_loop().time(), self._connect_timeout
            is_ready = False
            try:
                try:
                    async with asyncio.timeout_at(began + limit) as deadline:
                        await connection.open(*await self._dial())
                        limit += self._time_for_queues  # it has answered, and many queues, or new ones, take their time
                        deadline.reschedule(began + limit)
                        await connection.start()
                except TimeoutError as error:
                    connection.abort(Lost("RabbitMQ does not answer"))  # so it takes no part in an orderly end
                    where = self._address.where
                    raise BrokerUnavailable(
                        f"RabbitMQ at {where} has not {connection.step} within {limit:g} s"
                    ) from error
                except Lost:
                    # If several clients create a quorum queue at once, RabbitMQ can fail one with an INTERNAL_ERROR.
                    if self.declared or not tries_left:
                        raise
                else:
                    is_ready = True
                    yield connection
                    return
            except (TimeoutError, asyncio.CancelledError) as error:
                if isinstance(error, TimeoutError) or not (is_ready or self.is_ending):
                    connection.abort(Lost("RabbitMQ does not answer"))
                raise
            finally:
                self._end_soon(connection)
            await asyncio.sleep(self.settings.reconnect.delay(0))

    async def _dial(self) -> Any:
        try:
            return await self._address.dial("consuming")
        except TimeoutError:
            raise
        except CHANNEL_ERRORS as error:
            raise BrokerUnavailable(
                f"no connection to RabbitMQ at {self._address.where} ({explained(error)})"
            ) from error

    def postpone(self, delivery: Delivery) -> None:
        """See `ResilientSubscription.postpone`. RabbitMQ counts it as unsettled, and may have to send more."""
        super().postpone(delivery)
        if self._connection is not None and delivery.settler is self._connection:
            self._connection.adjust_prefetch(delivery)

    def _end_soon(self, connection: Connection) -> None:
        """Requeue what the program has not seen, settle the rest, and close the connection, in the background."""
        unseen = self.remove_prefetched()
        self.unsettled -= len(unseen)
        tags = {cast("_Token", delivery.token).tag for delivery in unseen}
        self._background.start(connection.end(tags), "ending a subscription")

    async def leave(self, prefetched: Collection[Delivery], /) -> None:
        """Wait until RabbitMQ has every settlement. The end of each connection has requeued what was prefetched."""
        await self._background.wait()

    async def dead_letter_all(self, reasons: Mapping[Delivery, str], /) -> Collection[Delivery]:
        publishing: dict[Delivery, Awaitable[None]] = {}
        for delivery, reason in reasons.items() if self.group is not None else ():  # else its queue may be missing
            connection = cast("Connection", delivery.settler)
            if connection.error is None and not cast("_Token", delivery.token).properties.unreadable:
                publishing[delivery] = self.publisher.publish(connection.dead_letter_of(delivery, reason))
        stored = await confirmed(publishing)
        for delivery in stored:
            cast("Connection", delivery.settler).note_stored(delivery)
        return stored

    # -- the queues ----------------------------------------------------------------------------------------------

    def declarations(self, queue: str, version: int) -> list[commands.Queue.Declare]:
        """Return the declarations of *queue* and of its dead-letter queue. RabbitMQ compares them with what exists."""
        own = self.declaration(queue)
        return [own] if self.group is None else [self.dead_letter_declaration(queue, version), own]

    def declaration(self, queue: str) -> commands.Queue.Declare:
        """Return the declaration of *queue*."""
        if self.group is None:
            return _durable(queue, {"x-queue-type": "classic", "x-expires": int(_NO_GROUP_EXPIRES * 1000)})
        limit = {"x-delivery-limit": DELIVERY_LIMIT} if self._queue_type == "quorum" else {}
        return _durable(queue, {**limit, **self.dead_letter_to(self.dead_letter_queue(queue))})

    def dead_letter_queue(self, queue: str) -> str:
        """Return the dead-letter queue of *queue*. Subscriptions without a group share that of their topic."""
        return f"{queue if self.group is not None else own_queue_name(self.prefix, self.queues[queue], '')}:dead"

    def dead_letter_declaration(self, queue: str, version: int) -> commands.Queue.Declare:
        """Return the declaration of that. Without a group it is declared with the first dead letter."""
        # Since version 4, RabbitMQ deletes a message at the 20th look, unless a quorum queue has no limit.
        no_limit = {"x-delivery-limit": -1} if self._queue_type == "quorum" and version >= _FIRST_WITH_A_LIMIT else {}
        return _durable(self.dead_letter_queue(queue), {"x-queue-type": self._queue_type, **no_limit})

    def dead_letter_to(self, queue: str) -> dict[str, Any]:
        """Return the arguments that make RabbitMQ dead-letter to *queue*; a quorum queue loses no message then."""
        safely = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return {
            "x-queue-type": self._queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            **(safely if self._queue_type == "quorum" else {}),
        }

    def delay_declaration(self, queue: str, milliseconds: int) -> commands.Queue.Declare:
        """Return the declaration of a queue whose messages wait for so long, and then return to *queue*."""
        # It goes when it is unused, and never while a message waits in it.
        expires = {"x-message-ttl": milliseconds, "x-expires": milliseconds + int(_UNUSED_EXPIRES * 1000)}
        return _durable(f"{queue}:retry:{milliseconds}", {**self.dead_letter_to(queue), **expires})


class Connection(Channel):
    """One connection that receives, and the settler of its deliveries."""

    def __init__(self, subscription: Subscription, prefetch_count: int) -> None:
        super().__init__()
        self._subscription = subscription
        self._least_prefetch_count = prefetch_count
        self._arrivals = Arrivals()
        self._consumers: dict[str, _Consumer] = {}  # by tag
        self._consumer_number = 0
        # The delivery tags that are not settled, in the order of their arrival.
        self._open: dict[int, _Consumer] = {}
        self._without_place: set[int] = set()  # those of them whose places other deliveries have taken
        self._acked: set[int] = set()
        self._is_consuming = self._has_ended = False
        self._requeued: list[int] | None = None  # what it requeues when it has started after a lost connection, or ends
        self._acknowledgements = Acknowledgements[int](self._send_acks, subscription.log_fields)
        self._retained: dict[str, str] = {}  # the queues of retained messages, with the group's own queues
        self._handing_over: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._dead_letter_queues_safe_at = 0.0
        self.step = "accepted the connection"  # what RabbitMQ has to do next
        self._settled_at = 0.0  # when the last delivery is settled that waits for a new queue

    async def start(self) -> None:
        """Declare the exchange and the queues, and consume. See `Subscription.connect` for its errors."""
        subscription = self._subscription
        starts_again = subscription.declared
        try:
            self.step = f"declared the queues of {counted(len(subscription.queues), 'topic')}"
            are_lost = starts_again and not await self._are_there(subscription.queues)
            await ensure_exchange(self, subscription.prefix)
            await self._declare_queues()
            await self._bind()
            await self._declare_witness()
            subscription.declared = True
            if are_lost:
                raise MessagesMissed("RabbitMQ had lost a queue of this subscription; it is declared again")
            if subscription.group is not None:
                self._retained = await claim(self, subscription.prefix, subscription.queues)
            self.step = f"started the consumers of {counted(len(subscription.queues), 'queue')}"
            self._is_consuming = True  # already: if this is cancelled now, messages may have arrived nevertheless
            later = {*self._retained.values()}
            first = [*self._retained, *(queue for queue in subscription.queues if queue not in later)]
            await (self._consume_again if starts_again else self.consume)(*first)
            self._handing_over = asyncio.create_task(self._hand_over(), name="diator: handing over retained messages")
            self._checking = asyncio.create_task(self._keep_checking(), name="diator: checking an exchange")
        except Refused as error:
            if error.code == ACCESS_REFUSED:
                raise AccessRefused(
                    f"RabbitMQ refuses a subscription ({error}); permit its user to configure, write and read the "
                    f"names that start with {subscription.prefix!r}, and to write to the default exchange"
                ) from error
            if error.code in {RESOURCE_LOCKED, PRECONDITION_FAILED}:
                raise ConfigurationError(
                    f"RabbitMQ refuses a subscription ({error}); delete the queue with other settings when it is "
                    "empty, use another group or prefix, or the queue_type that the queue has"
                ) from error
            raise

    async def _declare_queues(self) -> None:
        """
        Declare the queues, and wait until a kill of RabbitMQ no longer loses new ones. Only then are they bound.

        The dead-letter queues come last: where one exists, another consumer of the group has waited.
        """
        subscription = self._subscription
        dead = [subscription.dead_letter_queue(queue) for queue in subscription.queues]
        are_old = subscription.group is None or await self._are_there(dead)
        await self.ask_all(map(subscription.declaration, subscription.queues))
        if not are_old:
            await asyncio.sleep(subscription.safe_after)
            self._dead_letter_queues_safe_at = self._loop.time() + subscription.safe_after
        if subscription.group is not None:
            await asyncio.gather(*map(self._declare_dead_letter_queue, subscription.queues))

    async def _are_there(self, queues: Iterable[str]) -> bool:
        return all(await asyncio.gather(*map(self.is_there, map(passively, queues))))

    async def _declare_dead_letter_queue(self, queue: str) -> None:
        """Declare the dead-letter queue of *queue*, or use the one that is there: it may have dead letters."""
        declaration = self._subscription.dead_letter_declaration(queue, self.version)
        try:
            await self.ask_aside(declaration)
        except Refused as error:
            if error.code != PRECONDITION_FAILED:
                raise
            logger.warning(
                "%s; the dead-letter queue is used as it is, and audit() has the remedy",
                error,
                extra={**self._subscription.log_fields, "source": queue, "error_type": name_of(type(error))},
            )

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        taken = await self._arrivals.receive(most)
        self._subscription.unsettled += len(taken)
        return taken

    async def _hand_over(self) -> None:
        try:
            await hand_over(self, self._retained)
        except CHANNEL_ERRORS as error:
            if self.error is None:  # RabbitMQ refuses it: nobody would consume the group's own queues
                self.abort(error)

    async def consume(self, *queues: str) -> None:
        """See `Receiver.consume`."""
        starting = [self._consume(queue, self._least_prefetch_count) for queue in queues]
        await asyncio.gather(*map(asyncio.shield, starting))  # if this is cancelled, `end` still waits for the replies

    async def _consume_again(self, *queues: str) -> None:
        """
        Consume *queues* after a lost connection, without overtaking what its consumers held.

        RabbitMQ may take that back only now, after it has delivered later messages to this connection. A queue that was
        restarted does not even tell of those consumers before it has started new ones. So each consumer receives one
        message only, until it is the last one of its queue, or two seconds are over: the others may belong to other
        members of the group. If this message was not delivered before, it is requeued, behind what was taken back.

        Then it begins without `extra_prefetch`, until a message arrives that was not delivered before: a link that is
        lost again and again would else use up the attempts of messages that no handler has seen.
        """
        self._requeued = requeued = list[int]()
        await asyncio.gather(*map(asyncio.shield, [self._consume(queue, 1) for queue in queues]))
        consumers, shared, until = [*self._consumers.values()], queues, self._loop.time() + _LOST_CONSUMERS_GO
        while shared and self._loop.time() < until:
            found = await asyncio.gather(*map(self.ask, map(passively, shared)))
            shared = tuple(each.queue for each in found if each.consumer_count != 1)  # 0: it is starting
            await asyncio.sleep(_LOOK_EVERY if shared else 0)
        self._requeued = None
        full = [each for each in consumers if each.unsettled == each.prefetch_count]
        for consumer in full:
            self._cancel(consumer)
        for tag in requeued:
            self._open.pop(tag)
            self.send(commands.Basic.Nack(tag, requeue=True))
        for consumer in full:
            _ = self._consume(consumer.queue, self._subscription.first_prefetch_count)

    def _consume(self, queue: str, prefetch_count: int) -> asyncio.Future[Any]:
        self._consumer_number += 1
        tag = f"diator-{self._consumer_number}"
        self._consumers[tag] = _Consumer(tag, queue, prefetch_count)
        _ = self.ask_now(commands.Basic.Qos(prefetch_count=prefetch_count))  # for the next consumer, and for no other
        return self.ask_now(commands.Basic.Consume(queue=queue, consumer_tag=tag))

    async def cancel(self, queue: str) -> None:
        """See `Receiver.cancel`."""
        tags = [each.tag for each in self._consumers.values() if each.queue == queue]
        await self.ask_all(map(commands.Basic.Cancel, tags))

    def has_settled(self, queue: str) -> bool:
        """See `Receiver.has_settled`."""
        return not self._acked and all(each.queue != queue for each in self._open.values())

    def adjust_prefetch(self, delivery: Delivery) -> None:
        """Adjust the prefetch count of the consumer that *delivery* came to."""
        if consumer := self._open.get(cast("_Token", delivery.token).tag):
            self._adjust_prefetch(consumer)

    def _adjust_prefetch(self, consumer: _Consumer, *, redelivered: bool = False) -> None:
        """
        Replace *consumer* by one with twice its prefetch count if at least half as many deliveries are postponed.

        If none is postponed any more, the new one has the least prefetch count: the messages of a queue are for all
        consumers of the group. *consumer* is replaced only while RabbitMQ may send it nothing: RabbitMQ would return
        what is on its way to a cancelled consumer, and deliver it after later messages.

        If its latest message is *redelivered*, and it has not begun to prefetch, it does not begin now.
        """
        now, postponed, least = consumer.prefetch_count, self._subscription.postponed, self._least_prefetch_count
        if redelivered and now < least:
            least = self._subscription.first_prefetch_count
        more = min(2 * now, _MAX_PREFETCH) if 2 * postponed >= now else now
        wanted = max(least, more) if postponed else least  # after a lost connection, a consumer begins below the least
        may_be_sent_more = consumer.unsettled < now or consumer.tag not in self._consumers or self._requeued is not None
        if now != wanted and not may_be_sent_more and self._is_consuming and self.error is None:
            self._cancel(consumer)
            _ = self._consume(consumer.queue, wanted)

    def _cancel(self, consumer: _Consumer) -> None:
        del self._consumers[consumer.tag]
        _ = self.ask_now(commands.Basic.Cancel(consumer.tag))

    async def probe(self) -> None:
        """Ask whether the exchange is still the same, and bind the queues again: somebody may have unbound one."""
        if await self._check_exchange():
            await self._bind()
            self._arrivals.note_answer()

    async def _keep_checking(self) -> None:
        """Check the exchange often: without it the group misses messages, while other groups receive them."""
        with suppress(*CHANNEL_ERRORS):  # reading reports a lost connection
            while await self._check_exchange():  # noqa: ASYNC110  # RabbitMQ has no notification
                await asyncio.sleep(_CHECK_EVERY)

    async def _check_exchange(self) -> bool:
        """
        Return whether the exchange is still the same; if not, the connection ends.

        RabbitMQ does not notify a consumer whose queue has lost its binding.
        """
        exchange = self._subscription.witness or self._subscription.prefix
        if await self.is_there(commands.Exchange.Declare(exchange=exchange, passive=True)):
            return True
        self.abort(MessagesMissed(f"RabbitMQ has lost the exchange {self._subscription.prefix!r} and its bindings"))
        return False

    async def _declare_witness(self) -> None:
        """
        Declare an exchange that RabbitMQ deletes together with the topic exchange, also if that is declared again.

        It is bound to the topic exchange, and lives as long as this binding. No message ever goes through it.
        """
        prefix = self._subscription.prefix
        witness = f"{next(iter(self._subscription.queues))}:bound"
        self._subscription.witness = witness  # already: if this is cancelled, it may exist nevertheless
        try:
            await self.ask_aside(
                commands.Exchange.Declare(exchange=witness, exchange_type="fanout", auto_delete=True),
                commands.Exchange.Bind(destination=prefix, source=witness),
            )
        except Refused:  # a user who may not send may not bind it
            self._subscription.witness = ""

    async def _bind(self) -> None:
        """Bind the queues to the exchange. A queue that is bound stays as it is."""
        prefix = self._subscription.prefix
        await self.ask_all(
            commands.Queue.Bind(queue=queue, exchange=prefix, routing_key=routing_key(*topic))
            for queue, topic in self._subscription.queues.items()
        )

    def take(self, frame: Any) -> bool:
        if isinstance(frame, commands.Basic.Cancel):
            consumer = self._consumers.get(frame.consumer_tag or "")
            what = "a consumer" if consumer is None else f"the consumer of {consumer.queue!r}"
            self.abort(MessagesMissed(f"RabbitMQ has cancelled {what}: its queue is gone"))
            return True
        return False

    def take_content(self, method: Content, header: bytes, body: bytes) -> None:
        if not isinstance(method, Deliver):
            return
        properties, consumer = Properties(header), self._consumers[method.consumer_tag]
        queue = self._retained.get(consumer.queue, consumer.queue)
        delivery = Delivery(
            topic=self._subscription.queues[queue],
            body=body,
            headers=properties.headers(),
            attempt=1 + self._deliveries_before(method, properties),
            settler=self,
            token=_Token(method.delivery_tag, queue, properties, method.exchange != b""),
            redelivered=method.redelivered,
            unreadable=_why_unreadable(properties, body),
        )
        self._open[method.delivery_tag] = consumer
        consumer.unsettled += 1
        if self._requeued is not None and not method.redelivered:
            self._requeued.append(method.delivery_tag)
            return
        self._arrivals.put(delivery)
        if consumer.unsettled == consumer.prefetch_count:
            self._adjust_prefetch(consumer, redelivered=method.redelivered)

    def _deliveries_before(self, method: Deliver, properties: Properties) -> int:
        """
        Return how often the message was delivered before.

        Only what diator or RabbitMQ has written counts: a retry comes by the default exchange, and a quorum queue
        counts the deliveries of a message that it redelivers.
        """
        is_retried = method.exchange == b"" and properties.header("x-last-death-reason") not in _DEAD_LETTERED
        retried = properties.count(ATTEMPT) if is_retried else 0
        is_counted = method.redelivered and self._subscription.counts_deliveries
        redelivered = properties.count(DELIVERY_COUNT) if is_counted else 0
        return min(retried, _MAX_ATTEMPT) + min(redelivered, DELIVERY_LIMIT)

    def lost(self, error: Exception) -> None:
        """Drop what was prefetched: RabbitMQ redelivers it, and may have done so already."""
        self._arrivals.fail(error)
        unseen = self._subscription.remove_prefetched(lambda delivery: delivery.settler is self)
        self._subscription.unsettled -= len(unseen)

    def sent_at(self, delivery: Delivery) -> int | None:
        """See `Settler`: the timestamp that the sender gave to the message."""
        return cast("_Token", delivery.token).properties.timestamp

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Send the acknowledgement soon, together with others. On a lost connection it has no effect."""
        self._settled(cast("_Token", delivery.token))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """Publish to the group's queue again, by way of a queue that holds it for *after* seconds; then acknowledge."""
        token = cast("_Token", delivery.token)
        with self._requeue_on_failure(delivery):
            async with asyncio.timeout(self._subscription.publisher.timeout):
                try:
                    safe_at = await self._publish_again(delivery, after)
                except MessageUnroutable:  # somebody has deleted the queue that holds it
                    self._subscription.delay_queues.clear()
                    safe_at = await self._publish_again(delivery, after)
        self._settle_at(safe_at, token)

    async def _publish_again(self, delivery: Delivery, after: float) -> float:
        """Publish a delivery that is requeued. Return from when on a kill of RabbitMQ does not lose it."""
        token = cast("_Token", delivery.token)
        queue, safe_at = token.queue, 0.0
        if after > 0:
            queue, safe_at = await self._delay_queue(queue, after)
        headers = {ATTEMPT: delivery.attempt}
        await self._publish(again(token.properties, headers, delivery.body, queue, deaths=token.by_exchange))
        return safe_at

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        """Publish to the dead-letter queue, and then acknowledge; or let RabbitMQ dead-letter what it does not take."""
        token = cast("_Token", delivery.token)
        with self._requeue_on_failure(delivery):
            async with asyncio.timeout(self._subscription.publisher.timeout):
                if self._subscription.group is None and self.error is None:
                    await self._declare_dead_letter_queue(token.queue)
                try:
                    stored = await self._store_dead_letter(delivery, reason)
                except MessageUnroutable:  # somebody has deleted the dead-letter queue
                    await self._declare_dead_letter_queue(token.queue)
                    self._dead_letter_queues_safe_at = self._loop.time() + self._subscription.safe_after
                    stored = await self._store_dead_letter(delivery, reason)
        if stored:
            self.note_stored(delivery)
        elif token.tag in self._open:
            what = f"RabbitMQ itself dead-letters a message of {printable(delivery.topic.message_name)}"
            self._subscription.lines.log(
                logging.WARNING,
                what,
                "%s, without the reason (%s)",
                *(what, reason),
                fields=lambda: {
                    "message_type": printable(delivery.topic.message_type),
                    "message_name": printable(delivery.topic.message_name),
                    "attempt": delivery.attempt,
                    "reason": reason,
                },
            )
            self._forget(token.tag)
            self.send(commands.Basic.Reject(token.tag, requeue=False))

    async def _store_dead_letter(self, delivery: Delivery, reason: str) -> bool:
        """
        Publish a dead letter: as it came, or else without its headers. Return False if RabbitMQ refuses both.

        Without a group that is an error, and the message is redelivered: its queue has no dead-letter exchange, which
        only a user who may publish can declare.
        """
        for with_headers in (True, False):
            try:
                await self._publish(self.dead_letter_of(delivery, reason, with_headers=with_headers))
            except MessageRejected as error:
                is_last = not with_headers and self._subscription.group is None
                if is_last or not is_refused_for_good(error):
                    raise
            else:
                return True
        return False

    def dead_letter_of(self, delivery: Delivery, reason: str, *, with_headers: bool = True) -> Publication:
        """Return the dead letter of a delivery, with what can be decoded of its properties."""
        token = cast("_Token", delivery.token)
        headers = dead_letter_headers(delivery, reason, source=token.queue, group=self._subscription.group or "")
        if omitted := {*token.properties.unreadable, *(() if with_headers else ("headers",))}:
            headers[OMITTED] = ",".join(sorted(omitted))
        return again(
            token.properties,
            headers,
            delivery.body,
            self._subscription.dead_letter_queue(token.queue),
            deaths=token.by_exchange,
            only_readable=True,
            with_headers=with_headers,
        )

    def note_stored(self, delivery: Delivery) -> None:
        """Acknowledge a delivery whose dead letter is stored."""
        self._settle_at(self._dead_letter_queues_safe_at, cast("_Token", delivery.token))

    async def _publish(self, publication: Publication) -> None:
        if self.error is not None:
            raise BrokerUnavailable("the connection of the delivery is lost; the message is redelivered")
        await self._subscription.publisher.publish(publication)

    async def _delay_queue(self, queue: str, after: float) -> tuple[str, float]:
        """
        Return the queue in which messages for *queue* wait, and from when on a kill of RabbitMQ does not lose it.

        Declare it, unless that was done a short time ago.
        """
        declaration = self._subscription.delay_declaration(queue, delay_bucket(after))
        name, delay_queues = declaration.queue, self._subscription.delay_queues
        declared = delay_queues.get(name)
        if declared is None or self._loop.time() - declared > _UNUSED_EXPIRES / 2:
            await self.ask_aside(declaration)
            delay_queues[name] = declared = self._loop.time()
        return name, declared + self._subscription.safe_after

    @contextmanager
    def _requeue_on_failure(self, delivery: Delivery) -> Generator[None, None, None]:
        """
        Requeue a message that could not be published: after a moment, to spare a service that fails.

        Its place goes to another delivery at once, whatever the error is.
        """
        try:
            yield
        except Exception as error:
            self._subscription.delay_queues.clear()
            self._give_place(cast("_Token", delivery.token).tag)
            self._loop.call_later(_REQUEUE_DELAY, self._requeue, delivery)
            may_pass = isinstance(error, MessageRejected) and not is_refused_for_good(error)
            if isinstance(error, DiatorError) and not may_pass:
                raise
            raise BrokerUnavailable(
                f"RabbitMQ did not accept the message, which is redelivered "
                f"({explained(error, within=self._subscription.publisher.timeout)})"
            ) from error

    def _requeue(self, delivery: Delivery) -> None:
        tag = cast("_Token", delivery.token).tag
        if delivery.outcome is None and tag in self._open:
            self._forget(tag)
            if self.error is None and not self._has_ended:
                self.send(commands.Basic.Nack(tag, requeue=True))

    def _settle_at(self, safe_at: float, token: _Token) -> None:
        """Acknowledge a message that was stored again, once its new queue is safe. Give its place away now."""
        if safe_at > self._loop.time():
            self._settled_at = max(self._settled_at, safe_at)
            self._give_place(token.tag)
            self._loop.call_at(safe_at, self._settled, token)
        else:
            self._settled(token)

    def _settled(self, token: _Token) -> None:
        if token.tag in self._open:
            self._forget(token.tag)
            self._acked.add(token.tag)
            self._acknowledgements.add(token.tag)

    def _forget(self, tag: int) -> None:
        self._give_place(tag)
        self._without_place.discard(tag)
        self._open.pop(tag).unsettled -= 1

    def _give_place(self, tag: int) -> None:
        """Let another delivery be handed out for this one."""
        if tag in self._open and tag not in self._without_place:
            self._without_place.add(tag)
            self._subscription.unsettled -= 1
            self._subscription.notify_settled()

    async def _send_acks(self, _: Sequence[int]) -> None:
        """
        Acknowledge everything up to the oldest unsettled delivery in one frame, and each later one in its own.

        It sends all that have come together by now, and each once: RabbitMQ closes the channel on an unknown tag.
        """
        oldest = next(iter(self._open), None)
        run = [tag for tag in self._acked if oldest is None or tag < oldest]
        if self.error is None and not self._has_ended:
            if run:
                self.send(commands.Basic.Ack(max(run), multiple=True))
            for tag in sorted(self._acked.difference(run)):
                self.send(commands.Basic.Ack(tag))
        self._acked.clear()

    # -- the end -------------------------------------------------------------------------------------------------

    async def end(self, unseen: Collection[int]) -> None:
        """Stop consuming, settle what is due, requeue *unseen* deliveries, and close, each within 2 seconds."""
        subscription = self._subscription
        for task in (self._handing_over, self._checking):
            if task is not None:
                task.cancel()
        try:
            if self.error is None and self._is_consuming:
                self._is_consuming = False
                async with asyncio.timeout(_END_TIMEOUT):
                    if self._asked:
                        # A channel of RabbitMQ crashes when a consumer is cancelled before it has started, and loses
                        # the latest settlements.
                        await asyncio.wait(self._asked)
                    await self.ask_all(map(commands.Basic.Cancel, [*self._consumers]))
                if (wait := self._settled_at - self._loop.time()) > 0:
                    await asyncio.sleep(wait)
                waiting = {cast("_Token", delivery.token).tag for delivery in self._arrivals.take_all()}
                self._settle_all(waiting.union(unseen, self._requeued or ()))
            if self._writer is not None and subscription.group is None and subscription.is_ending:
                async with asyncio.timeout(_END_TIMEOUT):
                    await self.ask_all(commands.Queue.Delete(queue=queue) for queue in subscription.queues)
                    if subscription.witness:
                        await self.ask(commands.Exchange.Delete(exchange=subscription.witness))
        except CHANNEL_ERRORS as error:
            logger.debug("ending a subscription: %s", explained(error))
        await self.close()

    def _settle_all(self, unseen: Collection[int]) -> None:
        """
        Settle every delivery, in as few frames as possible.

        If a quorum queue gets more than 32 settlements at once, the channel keeps the rest for later, and loses them
        when it is closed. Deliveries that the program has seen and not settled are rejected, which counts as
        a delivery; since RabbitMQ 4.3 a nack does not.
        """
        self._has_ended = True
        for what, tags in groupby(
            sorted(self._acked.union(self._open)),
            lambda tag: "acked" if tag in self._acked else "unseen" if tag in unseen else "seen",
        ):
            if what == "seen":
                for tag in tags:
                    self.send(commands.Basic.Reject(tag, requeue=True))
            else:
                last = max(tags)
                ack, nack = commands.Basic.Ack(last, multiple=True), commands.Basic.Nack(last, multiple=True)
                self.send(ack if what == "acked" else nack)


def passively(queue: str) -> commands.Queue.Declare:
    """Return the declaration that asks whether *queue* exists."""
    return commands.Queue.Declare(queue=queue, passive=True)


def _durable(queue: str, arguments: dict[str, Any]) -> commands.Queue.Declare:
    return commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)


def _why_unreadable(properties: Properties, body: bytes) -> str | None:
    if properties.unreadable:
        return f"these properties of RabbitMQ cannot be decoded: {', '.join(properties.unreadable)}"
    encoding = properties.text("content-encoding").lower()
    if encoding in _COMPRESSED and not body.startswith(b"{"):
        return f"the body is compressed ({encoding}), and diator does not decompress it"
    return None
