from with_diator import Diator

from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker


class PubSub(Diator):
    group = None

    def broker_for(self, url: str, name: str) -> RedisMessageBroker:
        return RedisMessageBroker.from_url(url, name)


class Streams(Diator):
    def broker_for(self, url: str, name: str) -> RedisStreamMessageBroker:
        # Trimming of handled messages after some seconds matters only in the flood of a million.
        return RedisStreamMessageBroker.from_url(url, name, retention=2.0 if name.endswith("-flat") else None)
