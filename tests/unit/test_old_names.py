"""A name from before the first release has no alias: using it raises the ordinary error of Python."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from diator.brokers.audit import Finding
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import Message
from diator.events import EventEmitter, EventMap
from diator.exceptions import MissingExtra
from diator.retrying import RetryPolicy


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("diator.exceptions", "WiringError"),
        ("diator.brokers.supervisor", "Patience"),
        ("diator.brokers.supervisor", "Supervised"),
        ("diator.brokers.sending", "enlists"),
        ("diator.brokers.connecting", "Shared"),
        ("diator.brokers.connecting", "Beside"),
    ],
)
def test_an_old_name_cannot_be_imported(module, name):
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from '{module}'"):
        exec(f"from {module} import {name}")


@pytest.mark.parametrize("module", ["diator.brokers.shared", "diator.brokers._listing"])
def test_an_old_module_cannot_be_imported(module):
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}'"):
        importlib.import_module(module)


def kafka(**options: Any) -> object:
    broker = pytest.importorskip("diator.brokers.kafka", exc_type=MissingExtra).KafkaMessageBroker
    return broker(**{"bootstrap_servers": "localhost:9092"} | options)


def rabbitmq(**options: Any) -> object:
    return pytest.importorskip("diator.brokers.rabbitmq", exc_type=MissingExtra).RabbitMQMessageBroker(
        "amqp://localhost/", **options
    )


def redis(**options: Any) -> object:
    return pytest.importorskip("diator.brokers.redis", exc_type=MissingExtra).RedisMessageBroker.from_url(
        "redis://localhost:6379/0", **options
    )


def redis_streams(**options: Any) -> object:
    module = pytest.importorskip("diator.brokers.redis_streams", exc_type=MissingExtra)
    return module.RedisStreamMessageBroker.from_url("redis://localhost:6379/0", **options)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (RetryPolicy, {"immediate": 1}, {"immediate_retries": 1}),
        (RetryPolicy, {"delayed": 1}, {"delayed_retries": 1}),
        (RetryPolicy, {"factor": 2.0}, {"backoff_factor": 2.0}),
        (RetryPolicy, {"crashes": 1}, {"max_crashes": 1}),
        (kafka, {"servers": "localhost:9092"}, {"bootstrap_servers": "localhost:9092"}),
        (kafka, {"session": 10.0}, {"session_timeout": 10.0}),
        (kafka, {"heartbeat": 1.0}, {"heartbeat_interval": 1.0}),
        (kafka, {"drain": 1.0}, {"drain_timeout": 1.0}),
        (kafka, {"window": 8}, {"max_unacked_per_partition": 8}),
        (kafka, {"metadata_age": 60.0}, {"metadata_max_age": 60.0}),
        (kafka, {"read_ahead": 8}, {"extra_prefetch": 8}),
        (kafka, {"patience": None}, {"reconnect": None}),
        (rabbitmq, {"patience": None}, {"reconnect": None}),
        (rabbitmq, {"read_ahead": 8}, {"extra_prefetch": 8}),
        (redis, {"patience": None}, {"reconnect": None}),
        (redis_streams, {"patience": None}, {"reconnect": None}),
        (redis_streams, {"read_ahead": 8}, {"extra_prefetch": 8}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_an_old_option_is_refused(make: Callable[..., object], old: dict[str, object], new: dict[str, object]):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(old))}'"):
        make(**old)

    make(**new)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RetryPolicy, "most_attempts"),
        (Finding, "weakens"),
        (Message, "of_fields"),
        (EventMap, "settle"),
        (EventMap, "claim_name"),
        (EventEmitter, "handle"),
        (EventEmitter, "send"),
        (EventEmitter, "wire"),
        (MemoryMessageBroker, "enlists"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_old_attribute_does_not_exist(owner, name):
    assert not hasattr(owner, name)
