"""Mediator, emitter and middlewares: right programs, and wrong lines with the error of each type checker."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, assert_type

from diator.brokers import Message
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.container import Container
from diator.context import ContextFilter, MessageContext, correlated, correlation
from diator.events import EventEmitter, EventMap, Events, NotificationEvent, WithHeaders
from diator.exceptions import EventsNotSent
from diator.instruments import Handled, Instrument, OutboxState
from diator.mediator import Mediator
from diator.middlewares import BaseMiddleware, Handle, LoggingMiddleware, only_for
from diator.requests import Request, RequestMap
from diator.response import Response
from diator.testing import Recorder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


class Hooks(BaseMiddleware):
    async def process_request(self, request: Request) -> None: ...

    async def process_response(self, response: Response) -> None: ...


class Timed:
    async def __call__(self, message: object, handle: Handle, /) -> Any:
        return await handle(message)


async def function(message: Any, handle: Handle) -> Any:
    return await handle(message)


class Tracing(Instrument):
    """Derived: it observes two things."""

    def processing(self, context: MessageContext, broker: object, /) -> AbstractContextManager[None]:
        return self._span(context.message_name)

    def headers(self, event: object, /) -> Mapping[str, str]:
        return {"traceparent": ""}

    @contextmanager
    def _span(self, name: str) -> Generator[None]:
        yield


class Counting:
    """Not derived: it has all methods."""

    def handling(self, request: object, /) -> AbstractContextManager[int]:
        raise NotImplementedError

    def headers(self, event: object, /) -> dict[str, str]:
        return {}

    def sending(self, messages: Sequence[Message], broker: object, /) -> AbstractContextManager[int]:
        raise NotImplementedError

    def processing(self, context: MessageContext, broker: object, /) -> AbstractContextManager[int]:
        raise NotImplementedError

    def settled(self, handled: Handled, broker: object, /) -> None: ...

    def outbox(self, state: OutboxState, broker: object, /) -> None: ...


class Partial:
    def settled(self, handled: Handled, broker: object, /) -> None: ...


def tenant(event: object) -> dict[str, str]:
    return {"tenant": "42"}


def of_joined(event: UserJoined) -> Mapping[str, str]:
    return {"user": str(event.user_id)}


def no_text(event: object) -> dict[str, int]:
    return {"tenant": 42}


async def later(event: object) -> dict[str, str]:
    return {}


def headers(requests: RequestMap, events: EventMap, broker: MemoryMessageBroker, raised: Events) -> None:
    Mediator(requests, message_broker=broker, headers=[tenant, correlation, of_joined])
    EventEmitter(headers=[tenant])
    Consumer(broker, event_map=events, headers=(tenant,))
    raised.append(UserJoined(user_id=7), headers={"tenant": "42"})
    raised.append(WithHeaders(UserJoined(user_id=7), {"tenant": "42"}))
    with correlated("request-7") as given:
        assert_type(given, str)
    logging.StreamHandler().addFilter(ContextFilter())
    assert_type(Recorder().one(UserJoined, headers={"tenant": "42"}, user_id=7), UserJoined)

    EventEmitter(headers=tenant)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EventEmitter(headers=[no_text])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    EventEmitter(headers=[later])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    EventEmitter(headers=[{"tenant": "42"}])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    raised.append(UserJoined(user_id=7), headers={"tenant": 42})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    Recorder().one(UserJoined, headers=["tenant"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def instrument(requests: RequestMap, events: EventMap, broker: MemoryMessageBroker) -> None:
    Mediator(requests, instrument=Tracing())
    Mediator(requests, event_emitter=EventEmitter(instrument=Counting()), instrument=Counting())
    Consumer(broker, event_map=events, instrument=Tracing())
    Mediator(requests, instrument=Tracing)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    EventEmitter(instrument=Partial())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, instrument=Partial())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Audited(ABC):
    @property
    @abstractmethod
    def user_id(self) -> int: ...


async def audit(message: Audited, handle: Handle) -> Any:
    assert_type(message.user_id, int)
    return await handle(message)


async def on_joined(message: UserJoined, handle: Handle) -> Any:
    return await handle(message)


def is_join(message: object) -> bool:
    return isinstance(message, UserJoined)


async def lacks_handle(message: Any) -> Any: ...


def at_once(message: Any, handle: Handle) -> int:
    return 1


class OwnContainer:
    async def resolve(self, type_: type[T], /) -> T:
        return type_()


class OwnBroker:
    async def send_message(self, message: Message, /) -> None:
        assert_type(message.message_name, str)


class OwnBatchBroker(OwnBroker):
    async def send_messages(self, messages: Sequence[Message], /) -> None: ...


class SendsAtOnce:
    def send_message(self, message: Message, /) -> None: ...


def wire(requests: RequestMap, events: EventMap) -> None:
    """The parts fit, as in older programs and shorter; contradictions do not."""
    Mediator(
        request_map=requests,
        event_emitter=EventEmitter(message_broker=OwnBroker(), event_map=events, container=Container()),
        container=Container(),
        middlewares=[Hooks(), function, LoggingMiddleware(), Timed()],
    )
    Mediator(requests)
    Mediator(requests, OwnContainer(), event_map=events, message_broker=MemoryMessageBroker())
    Mediator(requests, message_broker=OwnBatchBroker())
    Mediator(requests, middlewares=(function,))
    Mediator(requests, middlewares=None)

    limited = [only_for(UserJoined, on_joined), only_for(UserJoined, function), only_for(Request, LoggingMiddleware())]
    Mediator(
        requests, middlewares=[*limited, only_for(Audited, audit), only_for(UserJoined, only_for(is_join, Timed()))]
    )
    only_for(lambda message: message.user_id == 1, function)

    only_for(Request, on_joined)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    only_for(UserJoined, lacks_handle)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    only_for("UserJoined", function)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    only_for(UserJoined)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Mediator(requests, middlewares=[only_for(Request, function), only_for(UserJoined, Hooks())])
    Mediator(requests, middlewares=[only_for(lambda message: True, function)])

    Mediator()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Mediator(events)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, events)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, event_emitter=EventEmitter(), event_map=events)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Mediator(requests, message_broker=object())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    Mediator(requests, message_broker=MemoryMessageBroker)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    Mediator(requests, message_broker=SendsAtOnce())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    Mediator(requests, container=object())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, event_map=requests)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    Mediator(requests, middlewares=[Hooks])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, middlewares=[lacks_handle])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, middlewares=[at_once])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Mediator(requests, middlewares=function)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    EventEmitter(requests)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EventEmitter(message_broker="redis://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def emit(emitter: EventEmitter, error: EventsNotSent) -> None:
    await emitter.emit(UserJoined(user_id=1))
    for event in error.events:
        await emitter.emit(event)
    assert_type(await asyncio.gather(emitter.emit(UserJoined(user_id=1))), tuple[None])

    await emitter.emit()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sent: bool = await emitter.emit(UserJoined(user_id=1))  # type: ignore[assignment, func-returns-value]  # pyright: ignore[reportAssignmentType]


async def send_messages(broker: OwnBatchBroker) -> None:
    message = Message.create(message_name="UserJoined", payload={"user_id": 1})
    message = Message(message_type="notification_event", message_name="UserJoined", payload={"user_id": 1})
    message = Message(message_type="a", message_name="b", message_id=message.message_id, payload_json=b"{}")
    await broker.send_message(message)
    await broker.send_messages([message, message])
    assert_type(message.payload_json, bytes)

    await broker.send_message(UserJoined(user_id=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await broker.send_messages(message)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Message(message_type="a", message_name="b")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Message(message_type="a", message_name="b", payload_json=b"{}")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Message(message_type="a", message_name="b", payload={}, payload_json=b"{}")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    message.message_name = "UserLeft"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    Message.create(message_name="UserJoined")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Message.create(message_name=UserJoined, payload={})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
