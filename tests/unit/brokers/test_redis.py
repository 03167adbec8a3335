"""Options of the Redis brokers. Nothing here connects."""

import pytest

pytest.importorskip("redis")

from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import ConfigurationError


def test_an_unknown_durability_is_refused_at_once():
    with pytest.raises(ConfigurationError, match="durability must be one of none, restart, crash"):
        RedisStreamMessageBroker("redis://localhost", durability="high")
