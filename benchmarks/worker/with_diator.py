"""diator as it is installed: with its own container and with rodi, with events and without."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import by_hand
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
    decoding,
    encoding,
    query,
    sending,
    sending_at_once,
    sending_in_turn,
)

from diator.brokers import Message
from diator.brokers.codec import decode, encode, payload_decoder
from diator.container import Container, Resolver
from diator.events import (
    DomainEvent,
    Event,
    EventEmitter,
    EventHandler,
    EventMap,
    NotificationEvent,
)
from diator.mediator import Mediator
from diator.middlewares import Middleware
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response


@dataclass(frozen=True, kw_only=True)
class Join(Request[None]):
    meeting_id: int
    user_id: int


@dataclass(frozen=True, kw_only=True)
class MeetingLink(Response):
    meeting_id: int
    link: str


@dataclass(frozen=True, kw_only=True)
class ReadLink(Request[MeetingLink]):
    meeting_id: int


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    meeting_id: int
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    meeting_id: int
    user_id: int
    nickname: str


class DeclaresEvents(RequestHandler):
    """Return events from a property."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events


class DeclaresNoEvents(RequestHandler):
    """Use the events of the base class."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally


class OwnJoinHandler(RequestHandler[Join, None]):
    """Define the constructor and the property in the class of the handler itself."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)


class OwnYieldingJoinHandler(OwnJoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        await asyncio.sleep(0)


class OwnAnnouncingJoinHandler(OwnJoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        self._events.append(Joined(meeting_id=request.meeting_id, user_id=request.user_id))


class OwnNotifyingJoinHandler(OwnJoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        self._events.append(UserJoined(meeting_id=request.meeting_id, user_id=request.user_id, nickname=NICKNAME))


class OwnReadLinkHandler(RequestHandler[ReadLink, MeetingLink]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


SELF_CONTAINED = SimpleNamespace(
    join=OwnJoinHandler,
    yielding=OwnYieldingJoinHandler,
    announcing=OwnAnnouncingJoinHandler,
    notifying=OwnNotifyingJoinHandler,
    read=OwnReadLinkHandler,
)


def handlers_that_are(base: type) -> SimpleNamespace:
    class JoinHandler(base):
        async def handle(self, request: Join) -> None:
            self._tally.note(request.user_id)

    class YieldingJoinHandler(base):
        async def handle(self, request: Join) -> None:
            self._tally.note(request.user_id)
            await asyncio.sleep(0)

    class AnnouncingJoinHandler(base):
        async def handle(self, request: Join) -> None:
            self._tally.note(request.user_id)
            self.events.append(Joined(meeting_id=request.meeting_id, user_id=request.user_id))

    class NotifyingJoinHandler(base):
        async def handle(self, request: Join) -> None:
            self._tally.note(request.user_id)
            event = UserJoined(meeting_id=request.meeting_id, user_id=request.user_id, nickname=NICKNAME)
            self.events.append(event)

    class ReadLinkHandler(base):
        async def handle(self, request: ReadLink) -> MeetingLink:
            self._tally.calls += 1
            return MeetingLink(meeting_id=request.meeting_id, link=LINK)

    return SimpleNamespace(
        join=JoinHandler,
        yielding=YieldingJoinHandler,
        announcing=AnnouncingJoinHandler,
        notifying=NotifyingJoinHandler,
        read=ReadLinkHandler,
    )


class JoinedHandler(EventHandler[Joined]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


class AlsoJoinedHandler(JoinedHandler):
    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


class EncodingBroker:
    """Encode each message and keep the last one."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def send_message(self, message: Message) -> None:
        self._outbox.body = encode(message)


def own_container() -> dict[str, Workload]:
    return workloads(handlers_that_are(DeclaresEvents), container_of_our_own)


def own_events() -> dict[str, Workload]:
    return workloads(SELF_CONTAINED, container_of_our_own)


def no_events_declared() -> dict[str, Workload]:
    return workloads(handlers_that_are(DeclaresNoEvents), container_of_our_own)


def with_rodi() -> dict[str, Workload]:
    return workloads(handlers_that_are(DeclaresEvents), container_of_rodi)


def container_of_our_own(_: Sequence[type], tally: Tally) -> Container:
    container = Container()
    container.register_instance(Tally, tally)
    return container


def container_of_rodi(handler_types: Sequence[type], tally: Tally) -> Resolver:
    # Imported here, so that the other rows work without rodi.
    import rodi  # noqa: PLC0415

    from diator.container.rodi import RodiContainer  # noqa: PLC0415

    registered = rodi.Container()
    registered.add_instance(tally)
    for handler_type in handler_types:
        registered.register(handler_type)
    container = RodiContainer()
    container.attach_external_container(registered)
    return container


def workloads(
    handlers: SimpleNamespace, container_of: Callable[[Sequence[type], Tally], Resolver]
) -> dict[str, Workload]:
    tally, outbox = Tally(), Outbox()
    join = Join(meeting_id=MEETING_ID, user_id=USER_ID)

    def mediator_of(bound: dict[type, type], middlewares: Sequence[Middleware] = ()) -> Mediator:
        request_map = RequestMap()
        for request_type, handler_type in bound.items():
            request_map.bind(request_type, handler_type)
        event_map = EventMap()
        event_map.bind(Joined, JoinedHandler)
        event_map.bind(Joined, AlsoJoinedHandler)
        container = container_of([*bound.values(), JoinedHandler, AlsoJoinedHandler], tally)
        emitter = EventEmitter(event_map=event_map, container=container, message_broker=EncodingBroker(outbox))
        return Mediator(
            request_map=request_map,
            event_emitter=emitter,
            container=container,
            middlewares=middlewares,
        )

    async def pass_through(message: object, handle: Callable) -> object:
        tally.calls += 1
        return await handle(message)

    many = {
        dataclass(frozen=True, kw_only=True)(type(f"Join{number}", (Join,), {})): copy_of(handlers.join, number)
        for number in range(TYPES)
    }

    emitter = EventEmitter(event_map=EventMap(), message_broker=EncodingBroker(outbox))
    event = UserJoined(meeting_id=MEETING_ID, user_id=USER_ID, nickname=NICKNAME)
    decode_payload = payload_decoder(UserJoined)

    plain = mediator_of({Join: handlers.join, ReadLink: handlers.read})
    return {
        "W0": construction(Join),
        "W1": sending(plain.send, join, tally),
        "W2": query(plain.send, ReadLink(meeting_id=MEETING_ID), tally),
        "W3": sending(mediator_of({Join: handlers.join}, [pass_through] * 3).send, join, tally, counted=4),
        "W4": sending(mediator_of({Join: handlers.announcing}).send, join, tally, counted=3),
        "W5": sending_in_turn(
            mediator_of(many).send,
            [request_type(meeting_id=MEETING_ID, user_id=USER_ID) for request_type in many],
            tally,
        ),
        "W6": sending_at_once(mediator_of({Join: handlers.yielding}).send, join, tally),
        "W7e": encoding(emitter.emit, event, outbox),
        "W7d": decoding(lambda body: decode_payload(decode(body).payload_json), by_hand.encode(event), event),
        "notify": sending(mediator_of({Join: handlers.notifying}).send, join, tally),
    }
