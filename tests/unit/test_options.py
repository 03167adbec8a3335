"""A wrong argument of a constructor is a ConfigurationError at once, and its text shows nothing of a content."""

import inspect
import math
from dataclasses import dataclass

import pytest

from diator._hints import described
from diator.brokers.connecting import ClientConnection
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.brokers.wrapping import Wrapped
from diator.consumer import Consumer
from diator.events import EventEmitter
from diator.exceptions import ConfigurationError
from diator.mediator import Mediator
from diator.middlewares import LoggingMiddleware
from diator.retrying import RetryPolicy
from diator.testing.faults import FaultyMessageBroker
from tests.unit.doubles import UserJoined, events_of, requests_of

SECRET = "redis://user:s3cret@host"


async def on_joined(event: UserJoined) -> None: ...


def makers():
    """Return how to make each object of a program's wiring, with some of its options."""
    made = {
        Mediator: lambda **options: Mediator(**{"request_map": requests_of()} | options),
        EventEmitter: EventEmitter,
        Consumer: lambda **options: Consumer(
            **{"broker": MemoryMessageBroker(), "event_map": events_of(on_joined)} | options
        ),
        Wrapped: Wrapped,
        MemoryMessageBroker: MemoryMessageBroker,
        FaultyMessageBroker: FaultyMessageBroker,
        RetryPolicy: RetryPolicy,
        ReconnectPolicy: ReconnectPolicy,
        LoggingMiddleware: LoggingMiddleware,
    }
    for module, name, needed in (
        ("diator.brokers.redis", "RedisMessageBroker", {"client": "redis://host"}),
        ("diator.brokers.redis_streams", "RedisStreamMessageBroker", {"client": "redis://host"}),
        ("diator.brokers.rabbitmq", "RabbitMQMessageBroker", {"url": "amqp://host"}),
        ("diator.brokers.kafka", "KafkaMessageBroker", {"bootstrap_servers": "host:9092"}),
        ("diator.container.rodi", "RodiContainer", None),
        ("diator.container.dishka", "DishkaContainer", {}),
        ("diator.telemetry", "OpenTelemetry", {}),
        ("diator.telemetry", "Prometheus", {}),
    ):
        try:
            made_by = getattr(__import__(module, fromlist=[name]), name)
        except ImportError:  # an extra that is not installed here
            continue
        if needed is None:
            made[made_by.attach_external_container] = lambda container, kind=made_by: kind().attach_external_container(
                container
            )
        else:
            made[made_by] = lambda needed=needed, kind=made_by, **options: kind(**needed | options)
    return made


#: What is true or false takes any object, as `if` does.
FLAGS = {
    *("log_errors", "retry_undecodable", "require_receiver", "older_senders", "create_topics", "retry_in_place"),
    *("parent",),
}
MAKERS = makers()
OPTIONS = [
    (thing, name)
    for thing in MAKERS
    for name in inspect.signature(thing).parameters
    if name not in {*FLAGS, "self", "args", "kwargs"}
]


@dataclass(frozen=True)
class Odd:
    text: str = SECRET


@pytest.mark.parametrize("wrong", [Odd(), Odd, -1, math.nan, True, {"a": SECRET}], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(("thing", "name"), OPTIONS, ids=lambda each: getattr(each, "__qualname__", each))
def test_a_wrong_argument_is_refused_at_once(thing, name, wrong):
    with pytest.raises(ConfigurationError) as caught:
        MAKERS[thing](**{name: wrong})

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("zero", ["", 0, [], ()])
@pytest.mark.parametrize("thing", [thing for thing, name in OPTIONS if name == "reconnect"])
def test_what_is_false_is_not_taken_for_nothing(thing, zero):
    with pytest.raises(ConfigurationError, match=r"^reconnect must be of the type ReconnectPolicy, and"):
        MAKERS[thing](reconnect=zero)


class Connection(ClientConnection):
    open = _connect = _close = None


def test_a_connection_of_another_package_checks_its_policy():
    with pytest.raises(ConfigurationError, match=r"^reconnect must be .* it is None$"):
        Connection("where", timeout=1, reconnect=None)


@pytest.mark.parametrize(
    ("make", "option", "text"),
    [
        (Consumer, {"concurrency": 0}, "concurrency must be a whole number of at least 1, and it is 0"),
        (Consumer, {"concurrency": 1.5}, "concurrency must be a whole number of at least 1, and it is 1.5"),
        (Consumer, {"prefetch": "5"}, "prefetch must be a whole number of at least 1, and it is an object of str"),
        (Consumer, {"handler_timeout": 0}, "handler_timeout must be a number above 0, and it is 0"),
        (Consumer, {"handler_timeout": None}, "handler_timeout must be a number above 0, and it is None"),
        (Consumer, {"handler_timeout": math.nan}, "handler_timeout must be a number above 0, and it is nan"),
        (Consumer, {"drain_timeout": -0.1}, "drain_timeout must be a number of at least 0, and it is -0.1"),
        (Consumer, {"group": ""}, "group is empty; name it after the program, or leave it out"),
        (Consumer, {"group": 3}, "group must be text, and it is 3"),
        (Consumer, {"middlewares": "x"}, "middlewares must be a list of middlewares, and it is an object of str"),
        (
            Consumer,
            {"on_gap": on_joined},
            "on_gap must be a function that is not asynchronous, and it is an",
        ),
        (
            Consumer,
            {"on_handled": Odd},
            "on_handled must be a function that is not asynchronous, and it is the",
        ),
        (Mediator, {"middlewares": 3}, "middlewares must be a list of middlewares, and it is an object of int"),
        (
            Wrapped,
            {"broker": MemoryMessageBroker},
            "broker must be an object with `send_message`, and it is the class Mem",
        ),
        (Wrapped, {"broker": SECRET}, "broker must be an object with `send_message`, and it is an object of str"),
        (LoggingMiddleware, {"logger": "diator"}, "logger must be a logger, and it is an object of str"),
        (RetryPolicy, {"backoff_factor": 0.5}, "backoff_factor must be a number of at least 1, and it is 0.5"),
        (ReconnectPolicy, {"max_delay": "1"}, "max_delay must be a number of at least 0, and it is an object of str"),
    ],
)
def test_the_text_names_the_argument_and_what_it_is(make, option, text):
    with pytest.raises(ConfigurationError) as caught:
        MAKERS[make](**option)

    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("make", [Mediator, Consumer])
@pytest.mark.parametrize("none", [None, (), []])
def test_there_may_be_no_middlewares(make, none):
    MAKERS[make](middlewares=none)


def test_limits_are_accepted():
    MAKERS[Consumer](concurrency=1, prefetch=1, handler_timeout=0.001, drain_timeout=0, on_handled=None, on_gap=print)
    RetryPolicy(immediate_retries=0, first_delay=0, max_delay=math.inf, backoff_factor=1)
    ReconnectPolicy(first_delay=0, max_delay=0.0, idle_timeout=math.inf)
    Wrapped(Wrapped(MemoryMessageBroker(capacity=1, max_message_bytes=1)))


def test_what_is_wrong_is_described_without_its_content():
    assert SECRET not in described(Odd())
