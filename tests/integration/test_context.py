"""What the services tell a handler about its message, and what goes on with the messages that it sends."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from diator.brokers import Message
from diator.consumer import Consumer
from diator.context import MessageContext, correlated
from diator.events import EventEmitter, Events, NotificationEvent
from diator.mediator import Mediator
from diator.requests import Request, RequestMap
from diator.retrying import RetryPolicy
from tests.integration.transports import broker_for
from tests.unit.doubles import UserJoined, events_of

SCHEMES = ["redis", "redis-streams", "amqp", "kafka"]


@pytest.fixture(params=SCHEMES)
def broker(request):
    """A broker of each service, and its scheme."""
    scheme = request.param
    service = {"redis": "redis_url", "redis-streams": "redis_url", "amqp": "rabbitmq_url", "kafka": "kafka_servers"}
    address = request.getfixturevalue(service[scheme])
    rest = address.partition("://")[2] or address
    return broker_for(f"{scheme}://{rest}", f"context-{uuid4().hex[:8]}")


async def test_a_handler_knows_its_message_and_when_it_was_sent(broker):
    """Headers and key survive a retry; the time is that of the first delivery, or there is none."""
    can_retry = broker.capabilities.delayed_retry
    group = "billing" if "competing" in broker.capabilities.distribution else None
    contexts: list[MessageContext] = []

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        contexts.append(context)
        if can_retry and context.attempt == 1:
            raise TimeoutError
        consumer.stop()

    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.1) if can_retry else None
    consumer = Consumer(broker, event_map=events_of(welcome), group=group, retry=retry)
    payload = {"event_timestamp": "2026-03-07T09:26:02Z", "user_id": 7}
    message = Message.create(message_name="UserJoined", payload=payload, key="k", headers={"tenant": "42é"})
    begun = datetime.now(UTC) - timedelta(seconds=2)  # a timestamp of AMQP has seconds, and clocks differ
    async with broker, asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(consumer.run(signals=False))
        await consumer.ready()
        await broker.send_message(message)

    assert [context.attempt for context in contexts] == ([1, 2] if can_retry else [1])
    assert [context.redelivered for context in contexts] == ([False, True] if can_retry else [False])
    for context in contexts:
        assert (context.message_id, context.group, context.key) == (message.message_id, group, "k")
        assert context.headers == {"tenant": "42é"}
    times = [context.sent_at for context in contexts]
    name = type(broker).__name__
    if name == "RedisMessageBroker":
        assert times == [None]
    else:
        assert begun <= times[0] <= begun + timedelta(seconds=60)
        assert times[1] == (None if name == "KafkaMessageBroker" else times[0])


@dataclass(frozen=True, kw_only=True)
class Ordered(NotificationEvent):
    number: int


@dataclass(frozen=True, kw_only=True)
class Shipped(NotificationEvent):
    number: int


class Order(Request[None]): ...


async def test_one_correlation_id_goes_through_rabbitmq_and_kafka_and_their_retries(rabbitmq_url, kafka_servers):
    """A request sends to RabbitMQ, whose consumer fails once and then sends to Kafka, whose consumer fails once."""
    prefix = f"context-{uuid4().hex[:8]}"
    requests, seen = RequestMap(), []
    rabbitmq = broker_for(rabbitmq_url, prefix)
    kafka = broker_for(f"kafka://{kafka_servers}", prefix)
    by_kafka = EventEmitter(message_broker=kafka, headers=[lambda _: {"tenant": "42"}])
    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.1)

    @requests.handler
    async def order(request: Order, events: Events) -> None:
        events.append(Ordered(number=1))
        events.append(Ordered(number=2))

    def note(event, context):
        seen.append((event, context.attempt, context.correlation_id, context.causation_id, dict(context.headers)))
        if context.attempt == 1:
            raise TimeoutError

    async def ship(event: Ordered, context: MessageContext, events: Events) -> None:
        events.append(Shipped(number=event.number))
        note(event, context)

    async def follow(event: Shipped, context: MessageContext) -> None:
        note(event, context)

    shipping = Consumer(rabbitmq, event_map=events_of(ship), group="shipping", retry=retry, event_emitter=by_kafka)
    following = Consumer(kafka, event_map=events_of(follow), group="following", retry=retry)
    mediator = Mediator(requests, message_broker=rabbitmq)
    async with rabbitmq, kafka, asyncio.timeout(90), shipping, following:
        with correlated("request-7"):
            await mediator.send(Order())
        while len(seen) < 8:  # noqa: ASYNC110  # handlers fill it
            await asyncio.sleep(0.05)

    assert {correlation_id for _, _, correlation_id, _, _ in seen} == {"request-7"}
    for number in (1, 2):
        of_number = [each for each in seen if each[0].number == number]
        assert [(type(event), attempt) for event, attempt, *_ in of_number] == [
            (Ordered, 1),
            (Ordered, 2),
            (Shipped, 1),
            (Shipped, 2),
        ]
        ordered = str(of_number[0][0].event_id)
        assert [causation_id for _, _, _, causation_id, _ in of_number] == [None, None, ordered, ordered]
        ids = {"correlation-id": "request-7"}
        shipped = {**ids, "causation-id": ordered, "tenant": "42"}
        assert [headers for *_, headers in of_number] == [ids, ids, shipped, shipped]
