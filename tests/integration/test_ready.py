"""A program that sends as soon as its consumer is ready: on every transport, the message is received."""

import asyncio
from uuid import uuid4

import pytest

from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent
from diator.exceptions import BrokerUnavailable
from tests.integration.transports import broker_for


class Sent(NotificationEvent):
    """An event of a topic that does not exist before."""


#: With these, a send raises an error if nobody has subscribed.
STRICT = {"redis": {"require_receiver": True}, "amqp": {"unroutable": "raise"}}


@pytest.fixture(params=["redis", "redis-streams", "amqp", "kafka"])
def broker(request):
    fixture = {"amqp": "rabbitmq_url", "kafka": "kafka_servers"}.get(request.param, "redis_url")
    rest = request.getfixturevalue(fixture).rpartition("://")[2]
    return broker_for(f"{request.param}://{rest}", f"test-{uuid4().hex[:12]}", **STRICT.get(request.param, {}))


def consumer_of(broker, handled):
    events = EventMap()

    @events.handler
    async def handle(event: Sent) -> None:
        handled.put_nowait(event)

    return Consumer(broker, event_map=events)


@pytest.mark.parametrize("how", ["run", "async with"])
async def test_what_is_sent_to_a_consumer_that_is_ready_is_handled(broker, how):
    handled = asyncio.Queue()
    event = Sent()
    async with broker, asyncio.timeout(60):
        consumer = consumer_of(broker, handled)
        if how == "run":
            running = asyncio.create_task(consumer.run(signals=False))
            await consumer.ready()
            await EventEmitter(message_broker=broker).emit(event)
            received = await handled.get()
            consumer.stop()
            await running
        else:
            async with consumer:
                await EventEmitter(message_broker=broker).emit(event)
                received = await handled.get()

    assert received == event


@pytest.mark.parametrize("scheme", ["redis", "redis-streams", "amqp", "kafka"])
async def test_a_service_that_is_away_is_the_error_of_who_waits(scheme):
    address = f"{scheme}://127.0.0.1:9"  # the discard service, which nothing runs
    broker = broker_for(address, "test", timeout=1.0)  # not opened: that would raise the error before
    async with asyncio.timeout(30):
        consumer = consumer_of(broker, asyncio.Queue())
        running = asyncio.create_task(consumer.run(signals=False))
        with pytest.raises(BrokerUnavailable):
            await consumer.ready()
        with pytest.raises(BrokerUnavailable):
            await running
        with pytest.raises(BrokerUnavailable):
            await consumer_of(broker, asyncio.Queue()).__aenter__()
        await broker.aclose()
