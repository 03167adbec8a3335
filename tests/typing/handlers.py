"""Requests, events, their handlers and maps: right programs, and wrong lines with the error of each type checker."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_type
from uuid import UUID

from diator.brokers.base import Topic
from diator.context import MessageContext, current_message
from diator.events import DomainEvent, ECSTEvent, Event, EventHandler, EventMap, Events, NotificationEvent
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response


@dataclass(frozen=True, kw_only=True)
class Link(Response):
    url: str


@dataclass(frozen=True, kw_only=True)
class ReadLink(Request[Link]):
    meeting_id: int


class Count(Request[int]): ...


class CountMore(Count): ...


class ListLinks(Request[list[Link]]): ...


@dataclass
class Join(Request[None]):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserChanged(ECSTEvent):
    name: str


class Api:
    async def link(self, meeting_id: int) -> str:
        return f"https://meet/{meeting_id}"


# -- of requests -----------------------------------------------------------------------------------------------------


class ReadLinkHandler(RequestHandler[ReadLink, Link]):
    def __init__(self, api: Api) -> None:
        self._api = api

    async def handle(self, request: ReadLink) -> Link:
        self.events.append(Joined(user_id=1))
        return Link(url=await self._api.link(request.meeting_id))


class JoinHandler(RequestHandler[Join, None]):
    """As in older programs: with a property of its own."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> None:
        self._events.append(Joined(user_id=request.user_id))


class CountHandler:
    """Derives from nothing."""

    async def handle(self, request: Count) -> int:
        return 1


class CallableHandler:
    """An object that is called as a function is."""

    async def __call__(self, request: Count, api: Api) -> int:
        return 1


async def list_links(query: ListLinks, api: Api, events: Events) -> list[Link]:
    events.append(Joined(user_id=1))
    return [Link(url=await api.link(1))]


async def count_from(start: int, request: Count) -> int:
    return start


def bind_requests(requests: RequestMap) -> None:
    """A handler is a class or an async function, for the class itself or a base of it."""
    requests.bind(ReadLink, ReadLinkHandler)
    requests.bind(Join, JoinHandler)
    requests.bind(Count, CountHandler)
    requests.bind(CountMore, CountHandler)
    requests.bind(ListLinks, list_links)
    requests.bind(Count, CallableHandler())
    requests.bind(Count, functools.partial(CallableHandler(), api=Api()))
    requests.bind(Count, functools.partial(count_from, 1))

    requests.bind(Join, ReadLinkHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, list_links)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, ReadLinkHandler(Api()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Count, answer_at_once)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, Api)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, CallableHandler())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join(user_id=1), JoinHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    requests.get(Join(user_id=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def answer_at_once(request: Count) -> int:
    return 1


def decorate(requests: RequestMap, events: EventMap) -> None:
    """The decorators return their argument."""
    assert_type(requests.handler(ReadLinkHandler), type[ReadLinkHandler])
    assert_type(events.handler(JoinedHandler), type[JoinedHandler])

    @requests.handler
    async def join(command: Join, api: Api) -> None:
        await api.link(command.user_id)

    @events.handler
    async def joined(event: Joined) -> None: ...

    requests.handler(answer_at_once)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    events.handler(Joined(user_id=1))  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


class OtherAnswer(RequestHandler[Count, int]):
    async def handle(self, request: Count) -> str:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return "1"


class OtherRequest(RequestHandler[Count, int]):
    async def handle(self, request: Join) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1


class NotAsync(RequestHandler[Count, int]):
    def handle(self, request: Count) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1


class NoHandle(RequestHandler[Count, int]): ...


def construct() -> None:
    NoHandle()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
    Join()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Join(user_id="7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UserJoined(7)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    UserJoined(user_id=7, event_id="no UUID")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# -- of events -------------------------------------------------------------------------------------------------------


class JoinedHandler(EventHandler[Joined]):
    async def handle(self, event: Joined) -> None:
        assert_type(event.user_id, int)
        self.events.append(UserJoined(user_id=event.user_id))


class OtherEvent(EventHandler[Joined]):
    async def handle(self, event: UserJoined) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]


class OnAny:
    async def __call__(self, event: Event) -> None: ...


async def on_joined(event: Joined, api: Api) -> None: ...


async def on_any_event(event: Event) -> None: ...


def on_joined_at_once(event: Joined) -> None: ...


async def with_context(event: UserJoined, context: MessageContext, events: Events) -> None:
    assert_type(context.message_id, UUID)
    assert_type(context.topic, Topic)
    assert_type(context.headers, Mapping[str, str])
    assert_type(context.correlation_id, str)
    assert_type(context.causation_id, str | None)
    assert_type(context.sent_at, datetime | None)
    context.attempt = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    context.headers["tenant"] = "7"  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


async def perhaps_with_context(request: Count, context: MessageContext | None) -> int:
    return context.attempt  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


class WithContext(EventHandler[UserJoined]):
    def __init__(self, context: MessageContext) -> None:
        self._context = context

    async def handle(self, event: UserJoined) -> None:
        current_message().attempt  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


def bind_with_context(events: EventMap, requests: RequestMap) -> None:
    """The context is one of the parameters that are injected, so it is not part of what `bind` checks."""
    events.bind(UserJoined, with_context)
    events.bind(UserJoined, WithContext)
    requests.bind(Count, perhaps_with_context)
    MessageContext(message_id="7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MessageContext(headers={"tenant": 7})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


def bind_events(events: EventMap) -> None:
    """As handlers of requests; an event may have several."""
    events.bind(Joined, JoinedHandler)
    events.bind(Joined, on_joined)
    events.bind(UserJoined, on_any_event)
    events.bind(UserChanged, on_any_event)
    events.bind(UserJoined, OnAny())
    events.bind(UserJoined, functools.partial(OnAny()))
    for event_type in events:
        assert_type(event_type, type)

    events.bind(UserJoined, JoinedHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    events.bind(UserJoined, on_joined)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    events.bind(Joined, on_joined_at_once)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    events.bind(Joined, JoinedHandler())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    events.bind(Joined(user_id=1), on_joined)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def raised(handler: JoinedHandler, ids: Sequence[int]) -> None:
    handler.events.extend(UserJoined(user_id=each) for each in ids)
    handler.events = []  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
