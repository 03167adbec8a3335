"""Options of the Redis brokers. Nothing here connects."""

import pytest

pytest.importorskip("redis")

from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import ConfigurationError


@pytest.mark.parametrize("arguments", [{}, {"channel_prefix": None}], ids=["left out", "None"])
def test_the_default_prefix_is_that_of_older_programs(arguments):
    broker = RedisMessageBroker("redis://localhost", **arguments)

    assert broker._channel(Topic("notification_event", "A")) == b"python_diator_channel:notification_event:A"


def test_an_unknown_durability_is_refused_at_once():
    with pytest.raises(ConfigurationError, match="durability must be one of none, restart, crash"):
        RedisStreamMessageBroker("redis://localhost", durability="high")


def test_replicas_need_a_client_with_its_own_connections():
    """Commands of another client may go to another connection, for which WAIT says nothing."""
    RedisStreamMessageBroker("redis://localhost", replicas=1)

    class Cluster:
        async def execute_command(self, *command): ...

    with pytest.raises(ConfigurationError, match="a Cluster sends by itself"):
        RedisStreamMessageBroker(Cluster(), replicas=1)
    with pytest.raises(ConfigurationError, match="replicas must be a whole number of at least 0"):
        RedisStreamMessageBroker("redis://localhost", replicas=-1)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost/abc",
        "redis://localhost/-1",
        "redis://localhost:0/0",
        "redis://localhost:99999/0",
        "redis://u:s3cret@localhost/abc",
        "redis://u:s3cret\ud800@localhost/0",
        "redis://u:s3cret@localhost/0?protocol=9",
    ],
)
def test_a_url_that_redis_py_would_misread_is_refused(url):
    with pytest.raises(ConfigurationError, match="this is not a URL of Redis") as refused:
        RedisStreamMessageBroker(url)

    assert "s3cret" not in str(refused.value)
