"""
A user joins a meeting: a command, a query, a domain event, and an integration event through a message broker.

    python examples/meetings.py                                               # in memory, needs no service

The same program with a broker. The first process consumes, until Ctrl-C, the events that the second one sends:

    python examples/meetings.py --broker redis-streams://localhost:6379/0 --consume
    python examples/meetings.py --broker redis-streams://localhost:6379/0

Use redis://… for Redis Pub/Sub, amqp://guest:guest@localhost/ for RabbitMQ, and kafka://localhost:9092 for Kafka. With
Redis Pub/Sub, consume first: a message that nobody has subscribed to is lost.
"""

import argparse
import asyncio
import json
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from diator.brokers import Message, MessageBroker
from diator.brokers.base import Transport
from diator.brokers.codec import encode
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.container import Container
from diator.events import DomainEvent, EventHandler, EventMap, NotificationEvent
from diator.exceptions import BrokerError, ConfigurationError, EventsNotSent, MissingExtra
from diator.mediator import Mediator
from diator.middlewares import BaseMiddleware
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response

# -- requests, responses and events -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JoinMeetingCommand(Request[None]):
    meeting_id: int
    user_id: int


@dataclass(frozen=True, kw_only=True)
class ReadMeetingQueryResult(Response):
    meeting_id: int
    link: str


@dataclass(frozen=True, kw_only=True)
class ReadMeetingQuery(Request[ReadMeetingQueryResult]):
    meeting_id: int


@dataclass(frozen=True, kw_only=True)
class UserJoinedDomainEvent(DomainEvent):  # handled in this process
    meeting_id: int
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserJoinedNotificationEvent(NotificationEvent):  # sent to the message broker
    user_id: int


# -- handlers -----------------------------------------------------------------------------------------------------


class MeetingAPI:
    """Stands for a real dependency, such as a database or another service."""

    async def join(self, meeting_id: int, user_id: int) -> None:
        say(f"user {user_id} joins meeting {meeting_id}", by="MeetingAPI")

    async def notify(self, meeting_id: int, text: str) -> None:
        say(f"everybody in meeting {meeting_id} reads: {text}", by="MeetingAPI")

    async def get_link(self, meeting_id: int) -> str:
        return f"https://meetings.example/{meeting_id}"


requests, events = RequestMap(), EventMap()


@requests.handler
class JoinMeetingCommandHandler(RequestHandler[JoinMeetingCommand, None]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, request: JoinMeetingCommand) -> None:
        say(f"handles {request}", by="JoinMeetingCommandHandler")
        await self._meeting_api.join(request.meeting_id, request.user_id)
        self.events.append(UserJoinedDomainEvent(meeting_id=request.meeting_id, user_id=request.user_id))
        self.events.append(UserJoinedNotificationEvent(user_id=request.user_id))


@events.handler
class UserJoinedDomainEventHandler(EventHandler[UserJoinedDomainEvent]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserJoinedDomainEvent) -> None:
        say(f"handles {event}", by="UserJoinedDomainEventHandler")
        await self._meeting_api.notify(event.meeting_id, "New user joined!")


@requests.handler  # a handler may be a function; the container passes its other arguments
async def read_meeting(request: ReadMeetingQuery, meeting_api: MeetingAPI) -> ReadMeetingQueryResult:
    say(f"handles {request}", by="read_meeting")
    return ReadMeetingQueryResult(meeting_id=request.meeting_id, link=await meeting_api.get_link(request.meeting_id))


elsewhere = EventMap()  # the handlers of another service
arrived = asyncio.Event()


@elsewhere.handler
async def count_members(event: UserJoinedNotificationEvent) -> None:
    say(f"handles {event}", by="count_members")
    arrived.set()


# -- putting it together ------------------------------------------------------------------------------------------


class Narrator(BaseMiddleware):
    async def process_request(self, request: Any) -> None:
        say(f"{type(request).__name__} comes in", by="middleware")

    async def process_response(self, response: Any) -> None:
        say(f"{response} goes out", by="middleware")


class Announcing:
    """A message broker is any object with this one method. This one prints each message that it passes on."""

    def __init__(self, broker: MessageBroker) -> None:
        self._broker = broker

    async def send_message(self, message: Message) -> None:
        await self._broker.send_message(message)
        say(f"{type(self._broker).__name__} confirmed", by="message broker")
        print(textwrap.indent(json.dumps(json.loads(encode(message)), indent=2), " " * 32))


def broker_for(address: str) -> Transport:
    match address.partition("://"):
        case ("memory", *_):
            return MemoryMessageBroker()
        case ("redis" | "rediss", *_):
            from diator.brokers.redis import RedisMessageBroker  # noqa: PLC0415  # needs the extra `redis`

            return RedisMessageBroker.from_url(address)
        case ("redis-streams", _, rest):
            from diator.brokers.redis_streams import RedisStreamMessageBroker  # noqa: PLC0415

            return RedisStreamMessageBroker.from_url(f"redis://{rest}")
        case ("amqp" | "amqps", *_):
            from diator.brokers.rabbitmq import RabbitMQMessageBroker  # noqa: PLC0415

            return RabbitMQMessageBroker(address)
        case ("kafka", _, servers):
            from diator.brokers.kafka import KafkaMessageBroker  # noqa: PLC0415

            return KafkaMessageBroker(servers)
        case (unknown, *_):
            raise ConfigurationError(
                f"there is no broker for {unknown!r}; use memory or an address as in the help text"
            )


async def send(broker: MessageBroker) -> None:
    async with Container() as container:
        container.register(MeetingAPI, lifetime="singleton")
        mediator = Mediator(
            requests, container, event_map=events, message_broker=Announcing(broker), middlewares=[Narrator()]
        )

        step("A command: user 7 joins meeting 1")
        await mediator.send(JoinMeetingCommand(meeting_id=1, user_id=7))

        step("A query: where is meeting 1?")
        answer = await mediator.send(ReadMeetingQuery(meeting_id=1))
        say(answer.link, by="answer")  # a type checker knows that this is a str


async def main(address: str, *, consume: bool) -> None:
    async with broker_for(address) as broker:
        consumer = Consumer(broker, event_map=elsewhere)
        if consume:
            step("Consuming; Ctrl-C ends it")
            await consumer.run()
        elif isinstance(broker, MemoryMessageBroker):  # another process cannot consume from memory
            async with consumer:
                await send(broker)
                step("The other service: an event from the message broker")
                await arrived.wait()
        else:
            await send(broker)


# -- output -------------------------------------------------------------------------------------------------------


def step(title: str) -> None:
    print(f"\n{title}")


def say(what: str, *, by: str) -> None:
    print(f"  {by:<29} {what}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A user joins a meeting.")
    parser.add_argument(
        "--broker",
        default="memory",
        metavar="ADDRESS",
        help="memory, redis://…, redis-streams://…, amqp://… or kafka://…",
    )
    parser.add_argument("--consume", action="store_true", help="consume the events that another process sends")
    arguments = parser.parse_args()
    try:
        asyncio.run(main(arguments.broker, consume=arguments.consume))
    except (BrokerError, EventsNotSent, MissingExtra, ConfigurationError) as error:
        sys.exit(f"meetings: {error}")
