"""The request for the ids of topics. The tests of Kafka read what a real Kafka answers."""

from uuid import uuid4

import pytest

pytest.importorskip("aiokafka")

from diator.brokers.kafka._topic_ids import topic_ids

SHOP, BANK = uuid4(), uuid4()


class Client:
    """Answers as a Kafka that knows the metadata request up to version *newest*."""

    def __init__(self, newest):
        self.newest = newest

    def get_random_node(self):
        return 1

    async def send(self, node, request):
        prepared = request.prepare({3: (0, self.newest)})
        topics = [
            (0, "shop", SHOP, False, [(0, 0, 1, 7, [1], [1], [], {})], 0, {}),
            (3, "bank", BANK, False, [], 0, {}),
        ]
        brokers = [(1, "127.0.0.1", 9092, None, {})]
        response = prepared.RESPONSE_TYPE(0, brokers, "cluster", 1, topics, 0, {})
        return prepared.RESPONSE_TYPE.decode(response.encode())


async def test_the_ids_of_topics_that_exist():
    assert await topic_ids(Client(newest=13), ["shop", "bank"]) == {"shop": SHOP}


async def test_an_older_kafka_has_no_ids():
    assert await topic_ids(Client(newest=9), ["shop"]) == {}
