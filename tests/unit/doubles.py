"""What the unit tests play with: a few messages, brokers that remember, and a mediator in one line."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from diator.brokers import Message
from diator.events import DomainEvent, ECSTEvent, EventMap, NotificationEvent
from diator.exceptions import BrokerUnavailable, MessagesNotSent
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
class Unencodable(NotificationEvent):
    """An event that nobody can write as JSON."""

    thing: object = object()


class Api:
    """What handlers depend on."""


class Recorder:
    """A broker that keeps what it is given, and is down for messages of the names in *down_for*."""

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
    """The same, several at a time: a message that fails does not stop those after it."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        verdicts = await asyncio.gather(*map(self.send_message, messages), return_exceptions=True)
        failed = [(message, verdict) for message, verdict in zip(messages, verdicts, strict=True) if verdict]
        if failed:
            raise MessagesNotSent([message.message_id for message, _ in failed]) from failed[0][1]


class Outbox(Recorder):
    """A broker that is part of the unit of work."""

    enlists = True


class Witness:
    """A middleware that remembers how handling ended, and which messages the broker had by then."""

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
