"""What is said about an address, a user or a name that RabbitMQ does not take."""

import asyncio

import pytest
from yarl import URL

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.exceptions import AccessRefused, BrokerUnavailable, ConfigurationError, MessageRejected
from tests.integration.rabbitmq.helpers import COUNTED, SLACK, become, collect, counted, numbers


def everything(broker):
    return broker.send_message(counted()), broker.subscribe([COUNTED], group="readers").__aenter__(), broker.audit()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda url: url.with_password("swordfish"), "ACCESS_REFUSED"),
        (lambda url: url.with_user("nobody").with_password("swordfish"), "ACCESS_REFUSED"),
        (lambda url: url.with_path("/absent"), "vhost absent not found"),
    ],
    ids=["wrong password", "unknown user", "absent virtual host"],
)
async def test_who_is_not_let_in_is_told_so_at_once(rabbitmq_url, prefix, change, reason):
    url = change(URL(rabbitmq_url))
    async with asyncio.timeout(SLACK):
        for number in range(3):
            broker = RabbitMQMessageBroker(url, prefix)
            doing = everything(broker)
            for each in doing:
                each.close() if each is not doing[number] else None
            with pytest.raises(AccessRefused, match=reason) as refused:
                await doing[number]
            text = str(refused.value)
            assert str(url.host) in text
            assert "swordfish" not in text
            await broker.aclose()


async def test_a_refused_send_names_its_message_and_the_next_one_may_succeed(rabbitmq_url, prefix):
    message = counted()
    async with asyncio.timeout(SLACK):
        broker = RabbitMQMessageBroker(URL(rabbitmq_url).with_password("swordfish"), prefix)
        with pytest.raises(AccessRefused) as refused:
            await broker.send_message(message)
        assert refused.value.message_id == message.message_id
        broker._address._url = URL(rabbitmq_url)
        await broker.send_message(message)
        await broker.aclose()


async def test_a_running_subscription_survives_a_password_that_is_refused_for_a_while(behind_proxy, proxy, caplog):
    """Passwords are changed while programs run."""
    address = behind_proxy._address
    right = address._url
    async with behind_proxy.subscribe([COUNTED], group="readers") as deliveries:
        address._url = right.with_password("swordfish")
        proxy.reset()
        await become(lambda: caplog.text.count("does not let this user in"), 1)
        address._url = right
        waiting = asyncio.create_task(numbers(deliveries, 1))
        await become(lambda: proxy.accepted, proxy.accepted + 1)
        await behind_proxy.send_message(counted(1))
        assert await asyncio.wait_for(waiting, SLACK) == [1]
    assert "swordfish" not in caplog.text


async def test_names_that_rabbitmq_cannot_have(broker):
    for topic, group in [
        (Topic("notification_event", "x" * 300), "readers"),
        (COUNTED, "g" * 300),
        (COUNTED, "g\ud800"),
        (Topic("notification_event", "x\ud800"), "readers"),
    ]:
        with pytest.raises(ConfigurationError, match="no names for the queues") as refused:
            await broker.subscribe([topic], group=group).__aenter__()
        assert str(refused.value).isprintable()
    for name in ("x" * 300, "x" * 232):  # the second is too long for the queue that retains it
        message = counted(topic=Topic("notification_event", name))
        with pytest.raises(MessageRejected, match="255 bytes") as rejected:
            await broker.send_message(message)
        assert rejected.value.message_id == message.message_id
    await collect(broker)


async def test_nobody_listens_there(prefix):
    broker = RabbitMQMessageBroker("amqp://guest:swordfish@127.0.0.1:1/", prefix, timeout=2.0)
    for doing in everything(broker):
        with pytest.raises(BrokerUnavailable, match=r"RabbitMQ at amqp://127\.0\.0\.1:1/") as unavailable:
            await doing
        assert "swordfish" not in str(unavailable.value)
    await broker.aclose()
