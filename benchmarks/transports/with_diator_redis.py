from with_diator import Diator

from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker


class PubSub(Diator):
    group = None

    def broker_for(self, url: str, name: str) -> RedisMessageBroker:
        return RedisMessageBroker.from_url(url, name)


class Streams(Diator):
    def broker_for(self, url: str, name: str) -> RedisStreamMessageBroker:
        # What was handled is removed after some seconds only where a million messages go through.
        return RedisStreamMessageBroker.from_url(url, name, retention=2.0 if name.endswith("-flat") else None)
