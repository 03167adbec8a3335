"""What a Kafka broker is made with, and the names of its topics. It connects to nothing."""

import ssl

import pytest

pytest.importorskip("aiokafka")

from diator.brokers.base import Topic
from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._consumer import consumer_settings
from diator.brokers.kafka._names import DEAD, RETRY, Names
from diator.brokers.kafka._topics import TopicPolicy
from diator.exceptions import ConfigurationError, MessageRejected

SECRET = "swordfish"


def test_a_plain_name_stays_as_it_is():
    assert Names("shop").topic(Topic("notification_event", "Order.Paid_2")) == "shop.notification_event.Order.Paid_2"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Topic("a", "b.c"), Topic("a.b", "c")),
        (Topic("a", "b-2fc"), Topic("a", "b/c")),
        (Topic("a", "ä"), Topic("a", "a\u0308")),
        (Topic("a", "b"), Topic("a", "b ")),
        (Topic("a", "-"), Topic("a", "")),
    ],
)
def test_different_topics_have_different_names(one, other):
    names = Names("p")

    assert names.topic(one) != names.topic(other)


def test_characters_that_kafka_does_not_allow_are_encoded():
    assert Names("p").topic(Topic("t", "a/b *")) == "p.t.a-2fb-20-2a"


def test_groups_have_topics_that_no_message_can_have():
    names = Names("p")
    topic = names.topic(Topic("t", "N"))

    beside = {names.beside(topic, group, what) for group in ("a", "a.b", "a-b", "ä", None) for what in (RETRY, DEAD)}

    assert len(beside) == 10
    assert f"{topic}.a-retry" in beside
    assert names.topic(Topic("t", "N.a-retry")) not in beside


@pytest.mark.parametrize("name", ["x" * 300, "ä" * 60])
def test_a_name_that_is_too_long_is_refused(name):
    with pytest.raises(MessageRejected, match="Kafka allows 249"):
        Names("p").topic(Topic("t", name))


@pytest.mark.parametrize(
    "options",
    [
        {"bootstrap_servers": "localhost"},
        {"bootstrap_servers": ""},
        {"bootstrap_servers": f"kafka://user:{SECRET}@host:9092"},
        {"bootstrap_servers": "a:1,,b:2"},
        {"prefix": "a b"},
        {"prefix": ""},
        {"timeout": 0},
        {"session_timeout": 3.0, "heartbeat_interval": 2.0},
        {"partitions": 0},
        {"replication_factor": 0},
        {"max_unacked_per_partition": 0},
        {"extra_prefetch": -1},
        {"drain_timeout": -1.0},
        {"ssl_context": True},
        {"sasl_mechanism": "GSSAPI", "username": "u", "password": SECRET},
        {"sasl_mechanism": "PLAIN"},
        {"username": "u", "password": SECRET},
        {"sasl_mechanism": "PLAIN", "username": "u"},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_at_once(options):
    with pytest.raises(ConfigurationError) as refused:
        KafkaMessageBroker(**{"bootstrap_servers": "localhost:9092", **options})

    assert SECRET not in str(refused.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError):
        KafkaMessageBroker("localhost:9092", acks=1)


def test_security_follows_the_options():
    context = ssl.create_default_context()
    login = {"sasl_mechanism": "SCRAM-SHA-256", "username": "u", "password": SECRET}

    protocols = [
        Cluster(bootstrap_servers=("a:1",), timeout=1.0, **options).settings()["security_protocol"]
        for options in ({}, {"ssl_context": context}, login, {"ssl_context": context, **login})
    ]

    assert protocols == ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]


def test_a_password_is_in_no_representation():
    cluster = Cluster(bootstrap_servers=("a:1",), timeout=1.0, sasl_mechanism="PLAIN", username="u", password=SECRET)

    assert SECRET not in repr(cluster)


@pytest.mark.parametrize(("brokers", "copies"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_topics_get_three_copies_where_there_are_three_brokers(brokers, copies):
    policy = TopicPolicy(create=True, partitions=4, replication_factor=None, max_message_bytes=1000)

    assert policy.replicas(brokers) == copies
    assert policy.configs("p.t.N", copies) == ({"min.insync.replicas": "2"} if copies == 3 else {})


def test_dead_letters_are_kept():
    policy = TopicPolicy(create=True, partitions=4, replication_factor=1, max_message_bytes=1000)

    assert policy.configs(f"p.t.N.g{DEAD}", 1) == {"retention.ms": "-1", "max.message.bytes": str(17 * 64 * 1024)}


def test_a_topic_accepts_the_largest_message_of_the_broker():
    policy = TopicPolicy(create=True, partitions=4, replication_factor=1, max_message_bytes=5_000_000)

    assert int(policy.configs("p.t.N", 1)["max.message.bytes"]) > 5_000_000


def test_a_rebalance_waits_longer_than_a_drain():
    options = KafkaMessageBroker("a:1", drain_timeout=120.0)._options
    settings = consumer_settings(Cluster(bootstrap_servers=("a:1",), timeout=1.0), options, "group")

    assert settings["rebalance_timeout_ms"] > 120_000
    assert settings["request_timeout_ms"] > settings["rebalance_timeout_ms"]
    assert settings["enable_auto_commit"] is False
