"""A RabbitMQ that allows few channels on a connection, as the production checklist of RabbitMQ recommends."""

import asyncio

import pytest

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.rabbitmq._subscription import passively
from tests.integration.rabbitmq.helpers import RECONNECT, SLACK, counted, numbers

MANY = [Topic("notification_event", f"Many{number}") for number in range(20)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("most", [2, 16])
async def test_many_topics_need_no_more_channels_than_rabbitmq_allows(private_rabbitmq, most):
    await asyncio.to_thread(private_rabbitmq.run, f"rabbitmqctl eval 'application:set_env(rabbit,channel_max,{most}).'")
    private_rabbitmq.let_go()
    gaps = []
    async with (
        asyncio.timeout(3 * SLACK),
        RabbitMQMessageBroker(private_rabbitmq.url, f"few{most}", reconnect=RECONNECT) as broker,
        broker.subscribe(MANY, group="readers", on_gap=gaps.append) as deliveries,
    ):
        await broker.send_messages([counted(number, topic=topic) for number, topic in enumerate(MANY)])
        assert sorted(await numbers(deliveries, len(MANY))) == [*range(len(MANY))]
        assert (deliveries.reconnects, gaps) == (0, [])


async def test_cancelled_questions_do_not_confuse_the_answers_to_the_next(raw, plain):
    """RabbitMQ refuses a question at the same time as its channel is closed, and confirms both."""
    raw.connection.connection_tune.channel_max = 3
    await plain.declare_queue("here", auto_delete=True)

    async def ask(queue):
        return queue, await raw.is_there(passively(queue))

    for number in range(60):
        asking = [asyncio.create_task(ask(queue)) for queue in ["here", f"nowhere{number}"] * 20]
        for each in asking[: number % 20]:
            await asyncio.sleep(0.0005)
            each.cancel()
        await asyncio.wait(asking)
        answers = {each.result() for each in asking if not each.cancelled()}
        assert answers == {("here", True), (f"nowhere{number}", False)}
    await plain.queue_delete("here")
