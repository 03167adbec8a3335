"""The options of the Kafka broker that are refused when it is constructed."""

import math

import pytest

pytest.importorskip("aiokafka")

from diator.brokers.cloudevents import CloudEvents
from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.message import Message
from diator.exceptions import ConfigurationError

SECRET = "swordfish"


@pytest.mark.parametrize(
    "servers",
    [
        "",
        "kafka-1",
        "kafka-1:",
        ":9092",
        "kafka-1:0",
        "kafka-1:65536",
        "kafka-1:99999",
        "kafka-1:-1",
        "kafka-1:9092,",
        "kafka 1:9092",
        "::1:9092",
        "[::1]",
        "[::1:9092",
        f"{'k' * 64}:9092",
        "kafka..example:9092",
        ".:9092",
        "\udc80:9092",
        "kafka-1:٩٠٩٢",
        f"kafka://user:{SECRET}@kafka-1:9092",
        f"user:{SECRET}@kafka-1:9092",
        "PLAINTEXT://kafka-1:9092",
        None,
        ["kafka-1:9092"],
    ],
)
def test_an_address_that_cannot_be_one_is_refused(servers):
    with pytest.raises(ConfigurationError, match="bootstrap_servers must be one string of the form host:port") as error:
        KafkaMessageBroker(servers)
    assert SECRET not in repr(error.value)


@pytest.mark.parametrize(
    "servers", ["kafka-1:9092", "[::1]:9092", " [fe80::1%eth0]:1 , kafka_2.example:65535 ", "bücher:1"]
)
def test_addresses_that_people_write(servers):
    KafkaMessageBroker(servers)


@pytest.mark.parametrize("option", ["timeout", "session_timeout", "heartbeat_interval", "metadata_max_age"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e9])
def test_a_time_that_cannot_be_one_is_refused(option, value):
    with pytest.raises(ConfigurationError, match=option):
        KafkaMessageBroker("kafka-1:9092", **{option: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, 1e9])
def test_a_drain_timeout_that_cannot_be_one_is_refused(value):
    with pytest.raises(ConfigurationError, match="drain_timeout"):
        KafkaMessageBroker("kafka-1:9092", drain_timeout=value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_message_bytes", 2**31), ("partitions", 2**31), ("replication_factor", 2**15), ("replication_factor", 0)],
)
def test_a_number_that_kafka_cannot_hold_is_refused(option, value):
    with pytest.raises(ConfigurationError, match=option):
        KafkaMessageBroker("kafka-1:9092", **{option: value})


@pytest.mark.parametrize("name", ["username", "password"])
def test_a_login_with_invalid_unicode_is_refused(name):
    login = {"sasl_mechanism": "PLAIN", "username": "user", "password": SECRET} | {name: f"{SECRET}\udc80"}
    with pytest.raises(ConfigurationError, match="valid Unicode") as error:
        KafkaMessageBroker("kafka-1:9092", **login)
    assert SECRET not in f"{error.value!r}{error.value.__cause__!r}"


def test_a_message_with_a_codec_has_headers_without_a_key():
    broker = KafkaMessageBroker("kafka-1:9092")
    codec = CloudEvents("/shop")

    _, _, key, headers = broker._record(Message.create(message_name="Joined", payload={}, codec=codec))

    assert (key, headers) == (None, [("content-type", b"application/cloudevents+json")])
