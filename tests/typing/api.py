"""What type checkers know of a program that uses diator. Checked by mypy and pyright, never run."""

# An error that is expected stays one: mypy and pyright both report an ignore that is not needed.
# pyright: reportUnnecessaryTypeIgnoreComment=true

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, assert_type

import aio_pika
from redis.asyncio import Redis
from yarl import URL

from diator.brokers import Message
from diator.brokers.base import Delivery, Gap, OnGap, ReadableBroker, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.consumer import Consumer, Handled, Health
from diator.container import Container
from diator.events import DomainEvent, Event, EventEmitter, EventHandler, EventMap, Events, NotificationEvent
from diator.mediator import Mediator
from diator.middlewares import BaseMiddleware, Handle, LoggingMiddleware
from diator.requests import Request, RequestHandler, RequestMap
from diator.response import Response
from diator.retrying import PermanentError, RetryPolicy

T = TypeVar("T")

# -- requests name their answers -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Link(Response):
    url: str


@dataclass(frozen=True, kw_only=True)
class ReadLink(Request[Link]):
    meeting_id: int


class Count(Request[int]): ...


class ListLinks(Request[list[Link]]): ...


class FindLink(Request[Link | None]): ...


@dataclass
class Join(Request[None]):
    user_id: int


class Bare(Request): ...


class OfNobody: ...


class CountMore(Count): ...


async def answers(mediator: Mediator) -> None:
    """The answer has the type that the request names."""
    assert_type(await mediator.send(ReadLink(meeting_id=1)), Link)
    assert_type(await mediator.send(Count()), int)
    assert_type(await mediator.send(CountMore()), int)
    assert_type(await mediator.send(ListLinks()), list[Link])
    assert_type(await mediator.send(FindLink()), Link | None)
    assert_type(await mediator.send(Bare()), Any)
    assert_type(await mediator.send(OfNobody()), Any)
    assert_type(await mediator.send("any class"), Any)
    # By way of `gather`, because mypy refuses to look at a None that is awaited.
    assert_type(await asyncio.gather(mediator.send(Join(user_id=1)), mediator.send(Count())), tuple[None, int])


# -- handlers --------------------------------------------------------------------------------------------------------


class Api:
    async def link(self, meeting_id: int) -> str:
        return f"https://meet/{meeting_id}"


class ReadLinkHandler(RequestHandler[ReadLink, Link]):
    def __init__(self, api: Api) -> None:
        self._api = api

    async def handle(self, request: ReadLink) -> Link:
        return Link(url=await self._api.link(request.meeting_id))


class JoinHandler(RequestHandler[Join, None]):
    """as in older programs: with a property of its own."""

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


async def list_links(query: ListLinks, api: Api, events: Events) -> list[Link]:
    events.append(Joined(user_id=1))
    return [Link(url=await api.link(1))]


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


class JoinedHandler(EventHandler[Joined]):
    async def handle(self, event: Joined) -> None:
        assert_type(event.user_id, int)
        self.events.append(UserJoined(user_id=event.user_id))


async def on_joined(event: Joined, api: Api) -> None: ...


async def on_any_event(event: Event) -> None: ...


# -- what may be bound, and what may not -----------------------------------------------------------------------------


def bind(requests: RequestMap, events: EventMap) -> None:
    """Classes and functions, for the very type or a base of it."""
    requests.bind(ReadLink, ReadLinkHandler)
    requests.bind(Join, JoinHandler)
    requests.bind(Count, CountHandler)
    requests.bind(CountMore, CountHandler)
    requests.bind(ListLinks, list_links)
    events.bind(Joined, JoinedHandler)
    events.bind(Joined, on_joined)
    events.bind(UserJoined, on_any_event)

    requests.bind(Join, ReadLinkHandler)  # type: ignore[arg-type]
    requests.bind(Join, list_links)  # type: ignore[arg-type]
    requests.bind(Join, ReadLinkHandler(Api()))  # type: ignore[arg-type]
    events.bind(UserJoined, JoinedHandler)  # type: ignore[arg-type]
    events.bind(UserJoined, on_joined)  # type: ignore[arg-type]


def decorate(requests: RequestMap, events: EventMap) -> None:
    """The decorators return their argument."""
    assert_type(requests.handler(ReadLinkHandler), type[ReadLinkHandler])
    assert_type(events.handler(JoinedHandler), type[JoinedHandler])


# -- wiring ----------------------------------------------------------------------------------------------------------


class Hooks(BaseMiddleware):
    async def process_request(self, request: Request) -> None: ...

    async def process_response(self, response: Response) -> None: ...


async def function(message: Any, handle: Handle) -> Any:
    return await handle(message)


class OwnContainer:
    async def resolve(self, type_: type[T], /) -> T:
        return type_()


class OwnBroker:
    async def send_message(self, message: Message, /) -> None:
        assert_type(message.message_name, str)


class OwnBatchBroker(OwnBroker):
    async def send_messages(self, messages: Sequence[Message], /) -> None: ...


def wire(requests: RequestMap, events: EventMap) -> None:
    """The parts fit, as in older programs and shorter; contradictions do not."""
    Mediator(
        request_map=requests,
        event_emitter=EventEmitter(message_broker=OwnBroker(), event_map=events, container=Container()),
        container=Container(),
        middlewares=[Hooks(), function, LoggingMiddleware()],
    )
    Mediator(requests, OwnContainer(), event_map=events, message_broker=MemoryMessageBroker())
    Mediator(requests, message_broker=OwnBatchBroker())
    Mediator(requests, event_emitter=EventEmitter(), event_map=events)  # type: ignore[call-overload]
    Mediator(requests, message_broker=object())  # type: ignore[call-overload]


async def contain(container: Container) -> None:
    """A factory makes what it is registered for."""

    async def make_api() -> Api:
        return Api()

    container.register(Api)
    container.register(Api, make_api, lifetime="singleton")
    container.register_instance(Api, Api())
    assert_type(await container.resolve(Api), Api)


# -- brokers: one constructor, with and without the name `from_url` ---------------------------------------------------


class OwnRedisBroker(RedisMessageBroker): ...


def construct(client: Redis) -> None:
    """`from_url` has the options of the constructor, and the type of the class that it is called on."""
    RedisMessageBroker(client, "prefix", timeout=1.0, require_receiver=True)
    RedisMessageBroker("redis://localhost", channel_prefix="prefix")
    RedisStreamMessageBroker(client=client, durability="crash", retention=3600)
    RedisStreamMessageBroker("redis://localhost", "prefix", lease=30)
    assert_type(RedisMessageBroker.from_url("redis://localhost", "prefix", older_senders=True), RedisMessageBroker)
    assert_type(RedisStreamMessageBroker.from_url("redis://localhost", lease=30), RedisStreamMessageBroker)
    assert_type(OwnRedisBroker.from_url("redis://localhost", channel_prefix="prefix", timeout=1), OwnRedisBroker)

    RedisMessageBroker()  # type: ignore[call-arg]
    RedisMessageBroker(6379)  # type: ignore[arg-type]
    RedisMessageBroker(client, lease=30)  # type: ignore[call-arg]
    RedisMessageBroker.from_url()  # type: ignore[call-arg]
    RedisMessageBroker.from_url(client)  # type: ignore[arg-type]
    RedisMessageBroker.from_url("redis://localhost", lease=30)  # type: ignore[call-arg]
    RedisMessageBroker.from_url("redis://localhost", timeout="1")  # type: ignore[arg-type]
    RedisStreamMessageBroker.from_url("redis://localhost", durability="forever")  # type: ignore[arg-type]
    RedisStreamMessageBroker.from_url("redis://localhost", "prefix", 30)  # type: ignore[call-arg]


async def construct_rabbitmq(url: URL) -> None:
    """It takes an address, or what aio-pika returns."""
    RabbitMQMessageBroker("amqp://localhost", "prefix", queue_type="classic")
    RabbitMQMessageBroker(url)
    RabbitMQMessageBroker(aio_pika.Connection(url), timeout=1.0)
    RabbitMQMessageBroker(await aio_pika.connect(url))
    robust: aio_pika.abc.AbstractRobustConnection = await aio_pika.connect_robust(url)
    RabbitMQMessageBroker(robust)
    RabbitMQMessageBroker(b"amqp://localhost")  # type: ignore[arg-type]
    RabbitMQMessageBroker(object())  # type: ignore[arg-type]


# -- consuming -------------------------------------------------------------------------------------------------------


class OwnReadableBroker(OwnBroker):
    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(distribution={"competing"}, redelivery={"crash", "close"}, delayed_retry=True)

    def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        raise NotImplementedError


class Refused(PermanentError): ...


def on_gap(gap: Gap) -> None:
    assert_type(gap.until - gap.since, timedelta)


def on_handled(handled: Handled) -> None:
    assert_type(handled.error, BaseException | None)
    assert_type(handled.topic, Topic)


async def consume(events: EventMap) -> None:
    """What is sent only cannot be consumed from; levels that do not exist are no levels."""
    broker: ReadableBroker = MemoryMessageBroker()
    policy = RetryPolicy(immediate_retries=1, delayed_retries=2, permanent=(Refused, LookupError))
    consumer = Consumer(broker, event_map=events, group="billing", retry=policy, on_gap=on_gap)
    assert_type(consumer.health(), Health)
    assert_type(consumer.health().oldest_in_flight, float)
    assert_type(consumer.health().oldest_message, float | None)
    consumer.stop()
    # As above, because mypy refuses to look at a None that is awaited.
    assert_type(await asyncio.gather(consumer.run(signals=False)), tuple[None])

    Consumer(
        OwnReadableBroker(),
        event_map=events,
        container=OwnContainer(),
        concurrency=8,
        middlewares=[Hooks(), function],
        event_emitter=EventEmitter(),
        requires=Capabilities(guarantee="at_least_once", distribution=frozenset({"competing"})),
        on_handled=on_handled,
    )
    Consumer(OwnBroker(), event_map=events)  # type: ignore[arg-type]
    Consumer(broker, events)  # type: ignore[call-arg]
    Capabilities(guarantee="exactly_once")  # type: ignore[arg-type]
    Capabilities(redelivery={"never"})  # type: ignore[arg-type]
    RetryPolicy(permanent=(SystemExit,))  # type: ignore[arg-type]


async def settle(deliveries: AsyncIterator[Delivery]) -> None:
    async for delivery in deliveries:
        assert_type(delivery.body, bytes)
        assert_type(delivery.topic.message_name, str)
        await delivery.ack()
        await delivery.retry(after=1.5)
        await delivery.dead_letter("it is of no use")
        await delivery.retry(1.5)  # type: ignore[call-arg]
