"""
python-cqrs, with `di` (its default container) and with dependency-injector (the faster of the two).

The mediator is built by hand: `bootstrap` adds a logging middleware, which the others do not have.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import cqrs
import di as di_package
from cqrs.container.dependency_injector import DependencyInjectorCQRSContainer
from cqrs.container.protocol import Container
from cqrs.deserializers import JsonDeserializer
from cqrs.message_brokers.protocol import Message, MessageBroker
from cqrs.middlewares import MiddlewareChain
from cqrs.serializers.default import message_wire_bytes
from dependency_injector import containers, providers
from di.dependent import Dependent
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


class Join(cqrs.Request[None]):
    meeting_id: int
    user_id: int


class JoinHandler(cqrs.RequestHandler[Join]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[cqrs.Event] = []

    @property
    def events(self) -> list[cqrs.Event]:
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


class MeetingLink(cqrs.Response):
    meeting_id: int
    link: str


class ReadLink(cqrs.Request[MeetingLink]):
    meeting_id: int


class ReadLinkHandler(cqrs.RequestHandler[ReadLink]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: list[cqrs.Event] = []

    @property
    def events(self) -> list[cqrs.Event]:
        return self._events

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


class PassThrough:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: cqrs.Request, handle: Callable) -> object:
        self._tally.calls += 1
        return await handle(request)


class Joined(cqrs.DomainEvent):
    meeting_id: int
    user_id: int


class JoinedHandler(cqrs.EventHandler[Joined]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


class AlsoJoinedHandler(JoinedHandler):
    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


@dataclass
class UserJoinedPayload:
    meeting_id: int
    user_id: int
    nickname: str


class UserJoined(cqrs.NotificationEvent[UserJoinedPayload]):
    payload: UserJoinedPayload


class EncodingBroker(MessageBroker):
    """Encode like the library's own brokers and keep the bytes."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def send_message(self, message: Message) -> None:
        self._outbox.body = message_wire_bytes(message)


def di() -> dict[str, Workload]:
    def container_of(_: list[type], tally: Tally) -> Container:
        container = di_package.Container()
        container.bind(di_package.bind_by_type(Dependent(lambda: tally, scope="request"), Tally))
        adapter = cqrs.DIContainer()
        adapter.attach_external_container(container)
        return adapter

    return workloads(container_of)


def dependency_injector() -> dict[str, Workload]:
    def container_of(handler_types: list[type], tally: Tally) -> Container:
        container = containers.DynamicContainer()
        for handler_type in handler_types:
            container.set_provider(handler_type.__name__, providers.Factory(handler_type, tally))
        adapter = DependencyInjectorCQRSContainer()
        adapter.attach_external_container(container)
        return adapter

    return workloads(container_of)


def workloads(container_of: Callable[[list[type], Tally], Container]) -> dict[str, Workload]:
    tally = Tally()
    join = Join(meeting_id=MEETING_ID, user_id=USER_ID)

    def mediator_of(handlers: dict[type, type], middlewares: MiddlewareChain | None = None) -> cqrs.RequestMediator:
        request_map = cqrs.RequestMap()
        for request_type, handler_type in handlers.items():
            request_map.bind(request_type, handler_type)
        event_map = cqrs.EventMap()
        event_map.bind(Joined, JoinedHandler)
        event_map.bind(Joined, AlsoJoinedHandler)
        container = container_of([*handlers.values(), JoinedHandler, AlsoJoinedHandler], tally)
        return cqrs.RequestMediator(
            request_map=request_map,
            container=container,
            event_emitter=cqrs.EventEmitter(event_map=event_map, container=container),
            event_map=event_map,
            middleware_chain=middlewares,
            concurrent_event_handle_enable=False,
        )

    three = MiddlewareChain()
    for _ in range(3):
        three.add(PassThrough(tally))

    many = {type(f"Join{number}", (Join,), {}): copy_of(JoinHandler, number) for number in range(TYPES)}

    outbox = Outbox()
    emitter = cqrs.EventEmitter(
        event_map=cqrs.EventMap(),
        container=container_of([], tally),
        message_broker=EncodingBroker(outbox),
    )
    event = UserJoined(
        event_name="UserJoined",
        payload=UserJoinedPayload(meeting_id=MEETING_ID, user_id=USER_ID, nickname=NICKNAME),
    )
    body = cqrs.JsonEventSerializer().serialize(event)

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
        "W7d": decoding(JsonDeserializer(UserJoined), body, event),
    }
