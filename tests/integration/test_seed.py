"""
The program of the library's first description against a real Redis: as it was written, with its mistakes fixed.

Comments mark what was fixed: colons and `self` that were missing, imports, and the address of Redis, which is the
program's argument here. `MeetingAPI` is the user's own class, which the description leaves out.
"""

import asyncio
import dataclasses  # fixed: this import was missing, and the next five
import json
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from redis import asyncio as redis  # fixed: the client is meant to be the asynchronous one
from rodi import Container as ExternalContainer  # using rodi as di-framework

from diator.container.rodi import RodiContainer
from diator.events import Event, EventEmitter, EventHandler, EventMap, NotificationEvent  # fixed: Event
from diator.events.message_brokers.redis import RedisMessageBroker
from diator.mediator import Mediator
from diator.middlewares import BaseMiddleware
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response

# -- the program -------------------------------------------------------------------------------------------------


class MeetingAPI:  # the user's own
    async def join(self, meeting_id: int, user_id: int) -> None:
        print(f"join {meeting_id} {user_id}")  # noqa: T201  # a program's output

    async def notify(self, meeting_id: int, text: str) -> None:
        print(f"notify {meeting_id} {text}")  # noqa: T201

    async def get_link(self, meeting_id: int) -> str:
        print(f"get_link {meeting_id}")  # noqa: T201
        return f"https://meeting.example/{meeting_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinMeetingCommand(Request):  # fixed: the colon
    meeting_id: int = dataclasses.field(default=1)
    user_id: int = dataclasses.field(default=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadMeetingQuery(Request):  # fixed: the colon
    meeting_id: int = dataclasses.field(default=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadMeetingQueryResult(Response):
    meeting_id: int = dataclasses.field(default=1)
    link: str = dataclasses.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserJoinedDomainEvent(Event):  # will be handled by special event handler
    user_id: int = dataclasses.field()
    meeting_id: int = dataclasses.field()
    timestamp: datetime = dataclasses.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserJoinedNotificationEvent(NotificationEvent):  # will be sent to a message broker
    user_id: int = dataclasses.field()


class JoinMeetingCommandHandler(RequestHandler[JoinMeetingCommand, None]):  # Command Handler doesn't return anything
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: JoinMeetingCommand) -> None:
        await self._meeting_api.join(request.meeting_id, request.user_id)
        self._events.append(
            UserJoinedDomainEvent(
                user_id=request.user_id,
                timestamp=datetime.utcnow(),  # noqa: DTZ003  # as it was written
                meeting_id=request.meeting_id,
            )
        )
        self._events.append(UserJoinedNotificationEvent(user_id=request.user_id))


class UserJoinedDomainEventHandler(EventHandler[UserJoinedDomainEvent]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserJoinedDomainEvent) -> None:
        await self._meeting_api.notify(event.meeting_id, "New user joined!")


class ReadMeetingQueryHandler(
    RequestHandler[ReadMeetingQuery, ReadMeetingQueryResult]
):  # Request Handler returns query result
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: ReadMeetingQuery) -> ReadMeetingQueryResult:
        link = await self._meeting_api.get_link(request.meeting_id)
        return ReadMeetingQueryResult(meeting_id=request.meeting_id, link=link)


def setup_di() -> RodiContainer:
    external_container = ExternalContainer()

    external_container.register(MeetingAPI)  # the user's own
    external_container.register(UserJoinedDomainEventHandler)
    external_container.register(JoinMeetingCommandHandler)
    external_container.register(ReadMeetingQueryHandler)

    container = RodiContainer()
    container.attach_external_container(external_container)

    return container


class SomeMiddleware(BaseMiddleware):
    async def process_request(self, request: Request) -> None:  # fixed: self, the colon
        """
        Some logic related to request part of the circle.
        """  # noqa: D200

    async def process_response(self, response: Response) -> None:  # fixed: self, the colon
        """
        Some logic related to response part of the circle.
        """  # noqa: D200


async def main() -> None:
    container = setup_di()

    event_map = EventMap()
    event_map.bind(UserJoinedDomainEvent, UserJoinedDomainEventHandler)  # Mapping event to event handler
    request_map = RequestMap()
    request_map.bind(JoinMeetingCommand, JoinMeetingCommandHandler)  # Mapping command to command handler
    request_map.bind(ReadMeetingQuery, ReadMeetingQueryHandler)  # Mapping query to query handler

    redis_client = redis.Redis.from_url(sys.argv[1])  # Creating Async Redis Client  # fixed: the address

    event_emitter = EventEmitter(
        message_broker=RedisMessageBroker(redis_client),
        event_map=event_map,
        container=container,
    )

    mediator = Mediator(
        request_map=request_map, event_emitter=event_emitter, container=container, middlewares=[SomeMiddleware()]
    )

    """
    1. JoinMeetingCommand is handled by JoinMeetingCommandHandler
    2. JoinMeetingCommandHandler publishes Domain and Notification Events
    3. UserJoinedDomainEvent is handled by UserJoinedDomainEventHandler
    4. UserJoinedNotificationEvent is sent to the Redis Pub/Sub
    """
    await mediator.send(JoinMeetingCommand(user_id=1))

    # Returns ReadMeetingQueryResult
    response = await mediator.send(ReadMeetingQuery(meeting_id=1))
    print(response)  # noqa: T201  # so that it can be seen


if __name__ == "__main__":
    asyncio.run(main())


# -- what it does ------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_url(private_redis) -> str:
    """A private server: a program of the tester's may use the same channel."""
    return private_redis.url


@pytest.fixture
async def pubsub(redis_url: str) -> AsyncIterator[redis.client.PubSub]:
    async with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        yield pubsub


async def run(redis_url: str) -> str:
    """Run the program as its user would, without warnings, and return its output."""
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "ignore:datetime.datetime.utcnow:DeprecationWarning", __file__, redis_url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complaints = await program.communicate()
    assert (program.returncode, complaints.decode()) == (0, "")
    return printed.decode()


async def heard(pubsub: redis.client.PubSub) -> dict[str, Any]:
    found = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
    assert found is not None, "nothing was heard"
    return found


async def test_it_prints_what_it_does(redis_url: str) -> None:
    printed = await run(redis_url)

    assert printed.splitlines() == [
        "join 1 1",
        "notify 1 New user joined!",
        "get_link 1",
        "ReadMeetingQueryResult(meeting_id=1, link='https://meeting.example/1')",
    ]


async def test_its_event_is_received_on_its_channel(redis_url: str, pubsub: redis.client.PubSub) -> None:
    """The JSON has four keys in the described order, equal ids and an aware timestamp."""
    await pubsub.subscribe("python_diator_channel:notification_event:UserJoinedNotificationEvent")
    await pubsub.get_message(timeout=5)

    await run(redis_url)

    body = json.loads((await heard(pubsub))["data"])
    assert list(body) == ["message_type", "message_name", "message_id", "payload"]
    assert body["message_type"] == "notification_event"
    assert body["message_name"] == "UserJoinedNotificationEvent"
    assert str(UUID(body["message_id"])) == body["message_id"] == body["payload"]["event_id"]
    assert list(body["payload"]) == ["event_id", "event_timestamp", "user_id"]
    assert body["payload"]["user_id"] == 1
    assert datetime.fromisoformat(body["payload"]["event_timestamp"]).tzinfo is not None
    assert await pubsub.get_message(timeout=0.1) is None


async def test_its_event_is_received_by_pattern(redis_url: str, pubsub: redis.client.PubSub) -> None:
    await pubsub.psubscribe("python_diator_channel:notification_event:*")
    await pubsub.get_message(timeout=5)

    await run(redis_url)

    channel = (await heard(pubsub))["channel"].decode()
    assert channel == "python_diator_channel:notification_event:UserJoinedNotificationEvent"
