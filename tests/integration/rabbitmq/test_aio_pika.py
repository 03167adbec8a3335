"""A program that has a connection of aio-pika already, and hands it to the broker."""

import aio_pika
import pytest
from yarl import URL

from diator.brokers.rabbitmq import RabbitMQMessageBroker
from tests.integration.rabbitmq.helpers import COUNTED, RECONNECT, counted, numbers


async def sends_and_receives(broker: RabbitMQMessageBroker) -> None:
    async with broker, broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_messages([counted(number) for number in range(10)])
        assert await numbers(deliveries, 10) == [*range(10)]


@pytest.mark.parametrize("connect", [aio_pika.connect, aio_pika.connect_robust])
async def test_a_connection_lends_its_address_and_stays_its_owners(connect, rabbitmq_url, proxy, prefix):
    url = str(URL(rabbitmq_url).with_host(proxy.host).with_port(proxy.port))
    async with await connect(url) as connection:
        accepted = proxy.accepted
        await sends_and_receives(RabbitMQMessageBroker(connection, prefix, reconnect=RECONNECT))

        assert proxy.accepted == accepted + 2  # diator's own: one publishes, one consumes
        assert not connection.is_closed
        channel = await connection.channel()
        await channel.get_exchange(prefix)


async def test_a_connection_that_is_closed_lends_its_address_as_well(rabbitmq_url, prefix):
    async with await aio_pika.connect(rabbitmq_url) as connection:
        pass

    await sends_and_receives(RabbitMQMessageBroker(connection, prefix, reconnect=RECONNECT))


async def test_an_address_of_yarl(rabbitmq_url, prefix):
    await sends_and_receives(RabbitMQMessageBroker(URL(rabbitmq_url), prefix, reconnect=RECONNECT))
