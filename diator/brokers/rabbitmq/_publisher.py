"""Publishing to RabbitMQ: one channel with confirms, which concurrent callers use at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from diator._text import explained
from diator.brokers.audit import Finding
from diator.brokers.pipelining import Pipeline, PipelinedConnection
from diator.brokers.rabbitmq._channel import (
    NOT_FOUND,
    PRECONDITION_FAILED,
    Channel,
    Content,
    Lost,
    Refused,
)
from diator.brokers.rabbitmq._client import Address, commands, is_blocked
from diator.brokers.rabbitmq._content import Properties
from diator.brokers.rabbitmq._frames import Publication
from diator.brokers.rabbitmq._names import retained_exchange_name
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import (
    BrokerError,
    BrokerUnavailable,
    DiatorError,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
)

logger: logging.Logger = logging.getLogger(__name__)

_BLOCKED = "RabbitMQ has stopped reading from publishers: a resource alarm, memory or disk"


def topic_exchange(name: str, arguments: Mapping[str, Any] | None = None) -> commands.Exchange.Declare:
    """Return the declaration of the durable topic exchange of that name."""
    return commands.Exchange.Declare(
        exchange=name, exchange_type="topic", durable=True, arguments={**(arguments or {})}
    )


def retaining_exchange(name: str) -> commands.Exchange.Declare:
    """Return the same declaration, with the exchange that routes what this one cannot route."""
    return topic_exchange(name, {"alternate-exchange": retained_exchange_name(name)})


async def ensure_exchange(channel: Channel, name: str) -> bool:
    """Declare the topic exchange. Return False if another program has done that without its alternate exchange."""
    try:
        await channel.ask_aside(retaining_exchange(name))
    except Refused as error:
        if error.code != PRECONDITION_FAILED:
            raise
        await channel.ask(topic_exchange(name))
        return False
    return True


class Publisher(PipelinedConnection["_Connection"]):
    """
    Publishes with confirms, on a connection of its own: a resource alarm of RabbitMQ blocks all that is on it.

    At most *max_in_flight* messages, and about 4 MiB, wait for their confirms; further ones queue for room, in their
    order. Every call ends within *timeout* seconds. An overdue message raises `OutcomeUnknown`, and stays in flight
    until RabbitMQ answers. If RabbitMQ has confirmed nothing for half of that time, the connection is closed. Nothing
    is sent twice.
    """

    service = "RabbitMQ"

    def __init__(
        self, address: Address, exchange: str, *, timeout: float, max_in_flight: int, reconnect: ReconnectPolicy
    ) -> None:
        super().__init__(address.where, timeout=timeout, reconnect=reconnect)
        self._address = address
        self._exchange = exchange
        self._max_in_flight = max_in_flight

    async def send(self, publication: Publication, topic: tuple[str, str]) -> None:  # for those who retain
        """Publish a message of a program to the topic exchange. The errors are those of `publish`."""
        await self.publish(publication)

    def publish(self, publication: Publication, *, deadline: float | None = None) -> Awaitable[None]:
        """
        Publish, until *deadline* if it is given. What this returns ends when RabbitMQ has confirmed.

        It raises:
            BrokerUnavailable: It was not sent.
            MessageRejected: RabbitMQ refused it.
            MessageUnroutable: No queue wants it, and it is mandatory.
            OutcomeUnknown: It was sent and not confirmed.
            BrokerClosed: `aclose` was called before.
        """
        if deadline is None:
            deadline = self._bind_to_running_loop().time() + self.timeout
        link = self._link
        if link is not None and not self._queued and link.has_room and publication.key not in link.in_flight:
            return link.publish(publication, deadline)
        return self._publish_later(publication, deadline)

    def blocked(self) -> Sequence[Finding]:
        """Return a finding if a resource alarm blocks publishers."""
        if self._link is None or not is_blocked(self._link.connection):
            return ()
        return (
            Finding(
                capability="receipt", problem=_BLOCKED, remedy="free memory or disk: see rabbitmq-diagnostics alarms"
            ),
        )

    async def _publish_later(self, publication: Publication, deadline: float) -> None:
        await (await self._publish_in_turn(publication, deadline))

    async def _publish_in_turn(self, publication: Publication, deadline: float) -> asyncio.Future[None]:
        """Wait for a connection with room, and until no other message of this key is in flight."""
        while publication.key in (link := await self._ready(deadline, publication.message_id)).in_flight:
            try:
                async with asyncio.timeout_at(deadline):
                    await link.room()
            except TimeoutError as error:
                raise self._not_sent(error, publication.message_id) from error
        return link.publish(publication, deadline)

    def _not_sent(self, error: Exception, message_id: UUID | None) -> DiatorError:
        if isinstance(error, Refused):
            return MessageRejected(
                f"RabbitMQ refuses the exchange {self._exchange!r} ({error}); it must be a durable topic exchange that "
                "the user may declare; else choose another prefix",
                message_id=message_id,
            )
        if self._link is not None and is_blocked(self._link.connection):
            return BrokerUnavailable(_BLOCKED, message_id=message_id)
        return super()._not_sent(error, message_id)

    async def _connect(self) -> _Connection:
        await self._background.wait()  # until the connection before is closed
        link = _Connection(self.retire, self.timeout, self._max_in_flight, self.log_fields)
        try:
            await link.open(*await self._address.dial("publishing"))
            await link.ask(commands.Confirm.Select())
            link.retains = await ensure_exchange(link, self._exchange)
        except BaseException:
            self._background.start(link.close(), "closing a connection to RabbitMQ")
            raise
        return link

    def retire(self, link: _Connection) -> None:
        """See `PipelinedConnection.retire`."""
        if link is self._link and isinstance(link.error, Refused):
            self._backoff.reset()
        super().retire(link)


class _Connection(Channel, Pipeline[str]):
    """
    One connection: the messages in flight, by the key in the header. No two of one key are in flight at once.

    RabbitMQ answers each message as long as the connection lives, but an alarm may delay that. So an overdue message
    keeps its place.

    Attributes:
        retains: Whether the exchange has its alternate exchange.
    """

    def __init__(
        self,
        retire: Callable[[_Connection], None],
        timeout: float,
        max_in_flight: int,
        log_fields: Mapping[str, object],
    ) -> None:
        Channel.__init__(self)
        Pipeline.__init__(self, retire, silence=timeout / 2, max_in_flight=max_in_flight)
        self._tag = 0
        self._keys: dict[int, str] = {}  # of the messages in flight, by the number in their confirms
        self.retains = True
        self._log_fields = log_fields
        self._blocked = False

    def publish(self, publication: Publication, deadline: float) -> asyncio.Future[None]:
        """Write a message: at once if no confirm is due, else together with the others of this turn of the loop."""
        try:
            frames = publication.frames(self.frame_max)
        except ValueError as error:
            refused = MessageRejected(str(error), message_id=publication.message_id)
            refused.__cause__ = error
            confirmed = self._loop.create_future()
            confirmed.set_exception(refused)
            return confirmed
        self.write(frames)
        if not self.in_flight:
            self.flush()
        self._tag += 1
        self._keys[self._tag] = publication.key
        return self.expect(publication.key, publication.message_id, len(frames), deadline)

    # -- confirms and returned messages --------------------------------------------------------------------------

    def take(self, frame: Any) -> bool:
        if not isinstance(frame, (commands.Basic.Ack, commands.Basic.Nack)):
            return False
        tag, error = frame.delivery_tag or 0, None
        if isinstance(frame, commands.Basic.Nack):
            error = MessageRejected(
                "RabbitMQ refused it (nack); a queue is full, such as the one that retains max_retained messages until "
                "a group subscribes"
            )
        for each in [each for each in self._keys if each <= tag] if frame.multiple else [tag]:
            if (key := self._keys.pop(each, None)) is not None:
                self.answered(key, error=error)
        if self._blocked and not is_blocked(self.connection):
            self._blocked = False
            logger.warning("RabbitMQ reads from publishers again", extra=self._log_fields)
        return True

    def take_content(self, method: Content, header: bytes, body: bytes) -> None:
        """Fail a message that RabbitMQ returns because no queue wants it. Its confirm follows."""
        if isinstance(method, commands.Basic.Return) and (message := self.in_flight.get(Properties(header).key)):
            message.fail(
                MessageUnroutable(
                    f"no queue is bound to the routing key {method.routing_key!r}; nobody has subscribed yet, or the "
                    "queues were deleted"
                )
            )

    def overdue(self, key: str, *, silent: bool) -> None:
        """See `Pipeline.overdue`."""
        blocked = is_blocked(self.connection)
        if blocked and not self._blocked:
            self._blocked = True
            logger.warning(_BLOCKED, extra=self._log_fields)
        if silent and not blocked:
            self.abort(Lost("RabbitMQ was silent"))
        else:
            why = _BLOCKED if blocked else "RabbitMQ has not confirmed it in time"
            self.in_flight[key].fail(OutcomeUnknown(f"{why}; it may still arrive"))

    def lost(self, error: Exception) -> None:
        """Fail every message in flight. If there is only one, RabbitMQ's reason to close the channel is about it."""
        self.lose(_send_error(error, alone=len(self.in_flight) == 1))


def _send_error(error: Exception, *, alone: bool) -> BrokerError:
    if not isinstance(error, Refused) or not alone:
        send_error: BrokerError = OutcomeUnknown(f"{explained(error)}; it may have arrived")
    elif error.code == NOT_FOUND:
        send_error = BrokerUnavailable(f"{error}; the next message declares it again")
    else:
        send_error = MessageRejected(f"RabbitMQ refused it ({error})")
    send_error.__cause__ = error
    return send_error


def is_refused_for_good(error: MessageRejected) -> bool:
    """Return whether RabbitMQ refuses the message itself. A nack, which has no cause, means that a queue is full."""
    return error.__cause__ is not None
