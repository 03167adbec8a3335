"""diator 0.1.2 with rodi. It makes messages for a broker but reads none."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import orjson
import rodi
from diator.message_brokers.protocol import Message
from workloads import (
    LINK,
    MEETING_ID,
    NICKNAME,
    TYPES,
    USER_ID,
    Outbox,
    Tally,
    Workload,
    construction,
    copy_of,
    encoding,
    query,
    sending,
    sending_at_once,
    sending_in_turn,
)

from diator.container.rodi import RodiContainer
from diator.events import (
    DomainEvent,
    Event,
    EventEmitter,
    EventHandler,
    EventMap,
    NotificationEvent,
)
from diator.mediator import Mediator
from diator.middlewares import MiddlewareChain
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response


@dataclass(frozen=True, kw_only=True)
class Join(Request):
    meeting_id: int
    user_id: int


class JoinHandler(RequestHandler[Join, None]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)


class YieldingJoinHandler(JoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        await asyncio.sleep(0)


class AnnouncingJoinHandler(JoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        self._events.append(Joined(meeting_id=request.meeting_id, user_id=request.user_id))


@dataclass(frozen=True, kw_only=True)
class ReadLink(Request):
    meeting_id: int


@dataclass(frozen=True, kw_only=True)
class MeetingLink(Response):
    meeting_id: int
    link: str


class ReadLinkHandler(RequestHandler[ReadLink, MeetingLink]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


class PassThrough:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Request, handle: Callable) -> Response | None:
        self._tally.calls += 1
        return await handle(request)


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    meeting_id: int
    user_id: int


class JoinedHandler(EventHandler[Joined]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


class AlsoJoinedHandler(JoinedHandler):
    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    meeting_id: int
    user_id: int
    nickname: str


class EncodingBroker:
    """Encode like the library's own Redis broker and keep the bytes."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def send_message(self, message: Message) -> None:
        self._outbox.body = orjson.dumps(message)


def workloads() -> dict[str, Workload]:
    tally = Tally()
    join = Join(meeting_id=MEETING_ID, user_id=USER_ID)

    def container_of(*handler_types: type) -> RodiContainer:
        registered = rodi.Container()
        registered.add_instance(tally)
        for handler_type in handler_types:
            registered.register(handler_type)
        container = RodiContainer()
        container.attach_external_container(registered)
        return container

    def mediator_of(handlers: dict[type, type], middlewares: MiddlewareChain | None = None) -> Mediator:
        request_map = RequestMap()
        for request_type, handler_type in handlers.items():
            request_map.bind(request_type, handler_type)
        event_map = EventMap()
        event_map.bind(Joined, JoinedHandler)
        event_map.bind(Joined, AlsoJoinedHandler)
        container = container_of(*handlers.values(), JoinedHandler, AlsoJoinedHandler)
        emitter = EventEmitter(event_map=event_map, container=container)
        return Mediator(
            request_map=request_map,
            container=container,
            event_emitter=emitter,
            middleware_chain=middlewares,
        )

    three = MiddlewareChain()
    for _ in range(3):
        three.add(PassThrough(tally))

    many = {
        dataclass(frozen=True, kw_only=True)(type(f"Join{number}", (Join,), {})): copy_of(JoinHandler, number)
        for number in range(TYPES)
    }

    outbox = Outbox()
    emitter = EventEmitter(event_map=EventMap(), container=container_of(), message_broker=EncodingBroker(outbox))
    event = UserJoined(meeting_id=MEETING_ID, user_id=USER_ID, nickname=NICKNAME)

    plain = mediator_of({Join: JoinHandler, ReadLink: ReadLinkHandler})
    return {
        "W0": construction(Join),
        "W1": sending(plain.send, join, tally),
        "W2": query(plain.send, ReadLink(meeting_id=MEETING_ID), tally),
        "W3": sending(mediator_of({Join: JoinHandler}, three).send, join, tally, counted=4),
        "W4": sending(mediator_of({Join: AnnouncingJoinHandler}).send, join, tally, counted=3),
        "W5": sending_in_turn(
            mediator_of(many).send,
            [request_type(meeting_id=MEETING_ID, user_id=USER_ID) for request_type in many],
            tally,
        ),
        "W6": sending_at_once(mediator_of({Join: YieldingJoinHandler}).send, join, tally),
        "W7e": encoding(emitter.emit, event, outbox),
    }
