"""Test doubles of the unit tests: a few messages, brokers that record, and a mediator in one line."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diator.brokers import Message
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, payload_encoder
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import DEFAULT_GROUP, Consumer
from diator.events import DomainEvent, ECSTEvent, EventEmitter, EventMap, NotificationEvent
from diator.exceptions import BrokerUnavailable, DecodingError, MessagesNotSent
from diator.mediator import Mediator
from diator.requests import Request, RequestMap


@dataclass(frozen=True, kw_only=True)
class Join(Request[str]):
    user_id: int = 1


@dataclass(frozen=True, kw_only=True)
class Noticed(DomainEvent):
    user_id: int = 1


@dataclass(frozen=True, kw_only=True)
class Greeted(DomainEvent):
    user_id: int = 1


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int = 1


@dataclass(frozen=True, kw_only=True)
class MeetingChanged(ECSTEvent):
    title: str = "Standup"


@dataclass(frozen=True, kw_only=True)
class Moved(NotificationEvent):
    """An event whose messages have a key."""

    message_key: ClassVar[str] = "room"
    room: str = "A"
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Unencodable(NotificationEvent):
    """An event that cannot be written as JSON."""

    thing: object = object()


class Api:
    """A dependency of handlers."""


class Recorder:
    """A broker that records its messages, and is unavailable for messages of the names in *down_for*."""

    def __init__(self, down_for: Collection[str] = ()) -> None:
        self.down_for = down_for
        self.sent: list[Message] = []

    async def send_message(self, message: Message, /) -> None:
        await asyncio.sleep(0)
        if message.message_name in self.down_for:
            raise BrokerUnavailable("it is down", message_id=message.message_id)
        self.sent.append(message)

    @property
    def names(self) -> list[str]:
        return [message.message_name for message in self.sent]


class BatchRecorder(Recorder):
    """The same for batches: a message that fails does not stop the later ones."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        errors = await asyncio.gather(*map(self.send_message, messages), return_exceptions=True)
        failed = [(message, error) for message, error in zip(messages, errors, strict=True) if error]
        if failed:
            raise MessagesNotSent([message.message_id for message, _ in failed]) from failed[0][1]


class Outbox(Recorder):
    """A transactional broker: part of the unit of work."""

    transactional = True


class Witness:
    """A middleware that records how the handling ended, and which messages the broker had by then."""

    def __init__(self, broker: Recorder | None = None) -> None:
        self.broker = broker
        self.outcome: object = "not called"
        self.sent_by_then: list[str] = []

    async def __call__(self, message: Any, handle: Callable[[Any], Awaitable[Any]], /) -> Any:
        try:
            self.outcome = await handle(message)
        except BaseException as error:
            self.outcome = error
            raise
        finally:
            self.sent_by_then = self.broker.names if self.broker else []
        return self.outcome


def requests_of(*handlers: Any) -> RequestMap:
    """Bind each of *handlers* to the request that its annotation names."""
    requests = RequestMap()
    for handler in handlers:
        requests.handler(handler)
    return requests


def events_of(*handlers: Any) -> EventMap:
    """Bind each of *handlers* to the event that its annotation names."""
    events = EventMap()
    for handler in handlers:
        events.handler(handler)
    return events


def mediator_of(*handlers: Any, on_events: Sequence[Any] = (), **options: Any) -> Mediator:
    """Wire a mediator of request *handlers* and of handlers *on_events*."""
    return Mediator(requests_of(*handlers), event_map=events_of(*on_events), **options)


# -- consuming -------------------------------------------------------------------------------------------------------

FULL = MemoryMessageBroker().capabilities
WEAK = Capabilities(distribution=frozenset({"broadcast"}), max_message_bytes=MAX_MESSAGE_BYTES)
"""About the capabilities of Redis Pub/Sub: no redelivery, no dead-letter queue."""


class Scripted:
    """
    A broker that delivers *script*, bodies or whole deliveries, and records the calls that it receives in *log*.

    A call that *failing* names raises the error there. The broker ignores *prefetch*: it delivers without waiting.
    """

    def __init__(
        self,
        *script: bytes | Delivery,
        capabilities: Capabilities = FULL,
        failing: dict[str, Exception] | None = None,
    ) -> None:
        self.script = deque(script)
        self.capabilities = capabilities
        self.failing = failing or {}
        self.log: list[tuple[Any, ...]] = []
        self.given = 0
        self.on_gap: OnGap | None = None

    def note(self, what: str, *details: object) -> None:
        if what in self.failing:
            raise self.failing[what]
        self.log.append((what, *details))

    async def send_message(self, message: Message, /) -> None:
        self.note("send", message.message_name)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        self.topics, self.group, self.prefetch, self.on_gap = {*topics}, group, prefetch, on_gap
        yield self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        if not self.script:
            await asyncio.Event().wait()
        self.given += 1
        given = self.script.popleft()
        return given if isinstance(given, Delivery) else self.delivery(given)

    def delivery(self, body: bytes, **options: Any) -> Delivery:
        """Make a delivery from the topic that *body* names; of `UserJoined` if it cannot be decoded."""
        try:
            message = decode(body)
            topic = Topic(message.message_type, message.message_name)
        except DecodingError:
            topic = Topic("notification_event", "UserJoined")
        return Delivery(**{"topic": topic, "body": body, "headers": {}, "attempt": 1, "settler": self, **options})

    async def ack(self, delivery: Delivery, /) -> None:
        self.note("ack")

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        self.note("retry")

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        self.note("dead_letter", reason)


def body_of(event: Any, **envelope: Any) -> bytes:
    """Return the body of the message of *event*, with fields of *envelope* instead of its own."""
    own = {
        "message_type": event.message_type,
        "message_name": type(event).__name__,
        "message_id": str(event.event_id),
        "payload": json.loads(payload_encoder(type(event))(event)),
    }
    return json.dumps(own | envelope, ensure_ascii=False).encode()


async def holding(*events: Any, group: str = DEFAULT_GROUP) -> MemoryMessageBroker:
    """Make a broker in which *events* wait for the consumers of *group*."""
    broker = MemoryMessageBroker()
    async with broker.subscribe({Topic(each.message_type, type(each).__name__) for each in events}, group=group):
        pass
    emitter = EventEmitter(message_broker=broker)
    for event in events:
        await emitter.emit(event)
    return broker


@asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator[asyncio.Task[None]]:
    """Run *consumer* during the block; then stop it, and raise the error of its `run`."""
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0)
    try:
        yield run
    finally:
        consumer.stop()
        await asyncio.wait({run}, timeout=5)
        if not run.done():
            run.cancel()
            raise AssertionError("the run does not end")
    await run


async def until(holds: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(3):
        while not holds():  # noqa: ASYNC110  # whatever it is: nobody sets an event for it
            await asyncio.sleep(0.001)
