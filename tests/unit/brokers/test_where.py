"""Addresses and texts of services, as errors and logs show them: without credentials and content."""

import pytest

pytest.importorskip("redis")
pytest.importorskip("aiormq")
pytest.importorskip("aiokafka")

from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.kafka._client import Cluster
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.rabbitmq._client import Address
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis._client import client_of, send_error, where
from diator.brokers.redis_streams import RedisStreamMessageBroker


async def test_an_address_is_named_without_credentials():
    assert Address("amqps://u:secret@h:1/v?heartbeat=3&x=secret", None).where == "amqps://h:1/v"
    assert where(client_of("redis://u:secret@h:1/2", timeout=1)[0]) == "h:1/2"
    assert where(client_of("redis://h", timeout=1)[0]) == "h:6379/0"
    assert where(client_of("redis://[::1]", timeout=1)[0]) == "[::1]:6379/0"
    assert where(client_of("unix://:secret@/a.sock", timeout=1)[0]) == "unix:///a.sock"
    assert where(object()) == "the servers of object"
    assert Cluster(bootstrap_servers=("a:1", "b:2"), timeout=1).where == "a:1,b:2"


def test_an_unknown_command_does_not_show_its_arguments():
    """Redis quotes the first arguments of a command that it does not know: one may be a message."""
    error = Exception("unknown command 'XADD', with args beginning with: 'stream' '*' 'body' 'secret'")
    assert "secret" not in str(send_error(error, None, written=False))


def test_the_time_limit_of_a_broker_is_known():
    """A relay has to know how long a send may take."""
    assert RedisMessageBroker("redis://h", timeout=1.5).timeout == 1.5
    assert RedisStreamMessageBroker("redis://h", timeout=1.5).timeout == 1.5
    assert RabbitMQMessageBroker("amqp://h", timeout=1.5).timeout == 1.5
    assert KafkaMessageBroker("h:1", timeout=1.5).timeout == 1.5
