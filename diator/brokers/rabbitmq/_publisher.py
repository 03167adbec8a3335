"""Publishing to RabbitMQ: one channel with confirms, which concurrent callers use at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from diator._text import explained
from diator.brokers.audit import Finding
from diator.brokers.connecting import ClientConnection
from diator.brokers.rabbitmq._channel import (
    CHANNEL_ERRORS,
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
from diator.brokers.supervisor import ReconnectPolicy, close_all
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
)

logger: logging.Logger = logging.getLogger(__name__)

_BLOCKED = "RabbitMQ has stopped reading from publishers: a resource alarm, memory or disk"
_MOST_BYTES = 4 * 1024 * 1024
# How often, in seconds, the oldest message in flight is checked.
_SWEEP_EVERY = 1.0


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


class Publisher(ClientConnection["_Connection"]):
    """
    Publishes with confirms, on a connection of its own: a resource alarm of RabbitMQ blocks all that is on it.

    At most *max_in_flight* messages, and about 4 MiB, wait for their confirms; further ones queue for room, in their
    order. Every call ends within *timeout* seconds. An overdue message raises `OutcomeUnknown`, and stays in flight
    until RabbitMQ answers. If no frame at all has arrived meanwhile, the connection is closed. Nothing is sent twice.
    """

    def __init__(
        self, address: Address, exchange: str, *, timeout: float, max_in_flight: int, reconnect: ReconnectPolicy
    ) -> None:
        super().__init__(address.where, timeout=timeout, reconnect=reconnect)
        self._address = address
        self._exchange = exchange
        self._max_in_flight = max_in_flight

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        deadline = self._bind_to_running_loop().time() + self.timeout
        attempts = self._attempts
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                await self._open_link(attempts, None)
        except TimeoutError as error:
            raise BrokerUnavailable(f"RabbitMQ is not available ({self._no_connection()})") from error

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
        if link is not None and not self._queued and link.has_room and publication.message_id not in link.ids:
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

    async def _close(self) -> None:
        reading = asyncio.create_task(close_all(self.subscriptions))
        async with self._lock:  # after the callers that were waiting already
            link = await self._take_link()
        if link is not None:
            await link.finish()
            await link.close()
        await self._background.wait()
        await reading

    async def _publish_later(self, publication: Publication, deadline: float) -> None:
        await (await self._publish_in_turn(publication, deadline))

    async def _publish_in_turn(self, publication: Publication, deadline: float) -> asyncio.Future[None]:
        """Wait for a connection with room, and until no other message of this id is in flight."""
        message_id = publication.message_id
        concerned = uuid_of(message_id)
        attempts = self._attempts
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    async with self._lock:
                        while not (link := await self._open_link(attempts, concerned)).has_room:
                            await link.room()
                        if message_id not in link.ids:
                            return link.publish(publication, deadline)
                    await link.room()
        except TimeoutError as error:
            why = f"RabbitMQ accepted no message within {self.timeout:g} s"
            if self._link is None:
                why = f"RabbitMQ is not available ({self._no_connection()})"
            elif is_blocked(self._link.connection):
                why = _BLOCKED
            raise BrokerUnavailable(why, message_id=concerned) from error
        finally:
            self._queued -= 1

    async def _open_link(self, attempts: int, message_id: UUID | None) -> _Connection:
        """Return the connection; see `_connected`. BrokerClosed if it is closed."""
        try:
            link = None if self.is_closed else await self._connected(attempts)
        except Refused as error:
            raise MessageRejected(
                f"RabbitMQ refuses the exchange {self._exchange!r} ({error}); it must be a durable topic exchange that "
                "the user may declare; else choose another prefix",
                message_id=message_id,
            ) from error
        except AccessRefused as error:
            raise AccessRefused(str(error), message_id=message_id) from error
        except CHANNEL_ERRORS as error:
            if isinstance(error, TimeoutError) and error is not self._failure:
                raise  # the caller's own deadline
            why = explained(error, within=self._reconnect.connect_timeout)
            raise BrokerUnavailable(
                f"no connection to RabbitMQ at {self._address.where} ({why})", message_id=message_id
            ) from error
        if link is None or self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        return link

    async def _connect(self) -> _Connection:
        await self._background.wait()  # until the connection before is closed
        link = _Connection(self._max_in_flight, self._gone)
        try:
            await link.open(*await self._address.dial("publishing"))
            await link.ask(commands.Confirm.Select())
            link.retains = await ensure_exchange(link, self._exchange)
        except BaseException:
            self._close_soon(link)
            raise
        return link

    def _gone(self, link: _Connection) -> None:
        if self._link is link:
            self._link = None
            if isinstance(link.error, Refused):
                self._backoff.reset()
            self._close_soon(link)

    def _close_soon(self, link: Channel) -> None:
        self._background.start(link.close(), "closing a connection to RabbitMQ")


class _Call:
    """A message in flight. Its caller may have been cancelled."""

    __slots__ = ("confirmed", "deadline", "key", "size", "written")

    def __init__(
        self, confirmed: asyncio.Future[None], publication: Publication, written: float, deadline: float
    ) -> None:
        self.confirmed = confirmed
        self.key = publication.message_id
        self.size = len(publication.header) + len(publication.body)
        self.written = written
        self.deadline = deadline

    @property
    def message_id(self) -> UUID | None:
        return uuid_of(self.key)

    def fail(self, error: BrokerError) -> None:
        if not self.confirmed.done():
            self.confirmed.set_exception(error)


class _Connection(Channel):
    """
    One connection: the messages in flight, and the callers that wait for their confirms.

    Attributes:
        ids: The messages in flight, by the id in the header. No two of one id are in flight at once.
        retains: Whether the exchange has its alternate exchange.
    """

    def __init__(self, max_in_flight: int, on_lost: Callable[[_Connection], None]) -> None:
        super().__init__()
        self._max_in_flight = max_in_flight
        self._on_lost = on_lost
        self._tag = 0
        self._waiting: dict[int, _Call] = {}
        self.ids: dict[str, _Call] = {}
        self.retains = True
        self._bytes = 0
        self._answered = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._blocked = False

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < self._max_in_flight and self._bytes < _MOST_BYTES

    async def room(self) -> None:
        """Wait until a confirm or a returned message has arrived, or the connection is lost."""
        if self.error is None:
            self._answered.clear()
            await self._answered.wait()

    def publish(self, publication: Publication, deadline: float) -> asyncio.Future[None]:
        """Write a message: at once if no confirm is due, else together with the others of this turn of the loop."""
        confirmed: asyncio.Future[None] = self._loop.create_future()
        try:
            frames = publication.frames(self.frame_max)
        except ValueError as error:
            refused = MessageRejected(str(error), message_id=uuid_of(publication.message_id))
            refused.__cause__ = error
            confirmed.set_exception(refused)
            return confirmed
        self.write(frames)
        if not self._waiting:
            self.flush()
        self._tag += 1
        now = self._loop.time()
        self._waiting[self._tag] = call = _Call(confirmed, publication, now, deadline)
        self._bytes += call.size
        self.ids[call.key] = call
        if self._sweeper is None:
            self._sweeper = self._loop.call_at(min(deadline, now + _SWEEP_EVERY), self._sweep)
        return confirmed

    async def finish(self) -> None:
        """Wait for the confirms that are due."""
        while any(not call.confirmed.done() for call in self._waiting.values()):
            await self.room()

    # -- confirms and returned messages --------------------------------------------------------------------------

    def take(self, frame: Any) -> bool:
        if not isinstance(frame, (commands.Basic.Ack, commands.Basic.Nack)):
            return False
        tag, nacked = frame.delivery_tag or 0, isinstance(frame, commands.Basic.Nack)
        tags = [each for each in self._waiting if each <= tag] if frame.multiple else [tag]
        for each in tags:
            call = self._waiting.pop(each, None)
            if call is None:
                continue
            self._bytes -= call.size
            del self.ids[call.key]
            if nacked:
                call.fail(
                    MessageRejected(
                        "RabbitMQ refused it (nack); a queue is full, such as the one that retains max_retained "
                        "messages until a group subscribes",
                        message_id=call.message_id,
                    )
                )
            elif not call.confirmed.done():
                call.confirmed.set_result(None)
        self._answered.set()
        return True

    def take_content(self, method: Content, header: bytes, body: bytes) -> None:
        """Fail a message that RabbitMQ returns because no queue wants it. Its confirm follows."""
        if isinstance(method, commands.Basic.Return) and (call := self.ids.get(Properties(header).key)):
            call.fail(
                MessageUnroutable(
                    f"no queue is bound to the routing key {method.routing_key!r}; nobody has subscribed yet, or the "
                    "queues were deleted",
                    message_id=call.message_id,
                )
            )
            self._answered.set()

    def _sweep(self) -> None:
        """Look at the oldest messages. One timer for all messages costs less than one for each."""
        self._sweeper = None
        now = self._loop.time()
        blocked = is_blocked(self.connection)
        if blocked != self._blocked:
            self._blocked = blocked
            logger.warning(_BLOCKED if blocked else "RabbitMQ reads from publishers again")
        soonest = now + _SWEEP_EVERY
        for call in self._waiting.values():
            if call.confirmed.done():
                continue  # it has failed, or its caller was cancelled
            if call.deadline > now:
                soonest = min(soonest, call.deadline)
                break
            if self.last_frame_at <= call.written and not blocked:
                self.abort(Lost(f"RabbitMQ was silent for {now - call.written:.3g} s"))
                return
            why = _BLOCKED if blocked else "RabbitMQ has not confirmed it in time"
            call.fail(OutcomeUnknown(f"{why}; it may still arrive", message_id=call.message_id))
            self._answered.set()
        if self._waiting:
            self._sweeper = self._loop.call_at(soonest, self._sweep)

    def lost(self, error: Exception) -> None:
        """Fail every message in flight. If there is only one, RabbitMQ's reason to close the channel is about it."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        alone = len(self._waiting) == 1
        for call in self._waiting.values():
            call.fail(_send_error(error, call.message_id, alone=alone))
        self._waiting.clear()
        self.ids.clear()
        self._answered.set()
        self._on_lost(self)


def _send_error(error: Exception, message_id: UUID | None, *, alone: bool) -> BrokerError:
    if isinstance(error, Refused) and alone:
        if error.code == NOT_FOUND:
            return BrokerUnavailable(f"{error}; the next message declares it again", message_id=message_id)
        refused = MessageRejected(f"RabbitMQ refused it ({error})", message_id=message_id)
        refused.__cause__ = error
        return refused
    return OutcomeUnknown(f"{explained(error)}; it may have arrived", message_id=message_id)


def is_refused_for_good(error: MessageRejected) -> bool:
    """Return whether RabbitMQ refuses the message itself. A nack, which has no cause, means that a queue is full."""
    return error.__cause__ is not None


def uuid_of(text: str) -> UUID | None:
    """Return the UUID in *text*; None if it is another text."""
    try:
        return UUID(text)
    except ValueError:
        return None
