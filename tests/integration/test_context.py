"""What the services tell a handler about its message."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from diator.brokers import Message
from diator.consumer import Consumer
from diator.context import MessageContext
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
