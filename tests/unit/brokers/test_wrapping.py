"""A broker that wraps another one has all of its abilities, and none that it lacks."""

import copy
import inspect
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import pytest

from diator.brokers import BatchMessageBroker, Message, MessageBroker
from diator.brokers.audit import Auditable, Finding, audit
from diator.brokers.base import ReadableBroker, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.sending import transactional
from diator.brokers.wrapping import Wrapped
from diator.consumer import Consumer
from diator.events import EventEmitter, Events
from diator.exceptions import BrokerUnavailable, ConfigurationError, EventsNotSent, MessagesNotSent, MessageTooLarge
from diator.testing import FaultyMessageBroker
from tests.unit.consumer.helpers import consume
from tests.unit.doubles import (
    BatchRecorder,
    Join,
    MeetingChanged,
    Outbox,
    Recorder,
    UserJoined,
    Witness,
    events_of,
    mediator_of,
)

PROTOCOLS = [MessageBroker, BatchMessageBroker, ReadableBroker, Transport, Auditable]
CONTRACT = sorted(
    {
        name
        for protocol in PROTOCOLS
        for name, value in vars(protocol).items()
        if (inspect.isfunction(value) or isinstance(value, property))
        and (not name.startswith("_") or name in ("__aenter__", "__aexit__"))
    }
    | {"transactional"}
)
FINDING = Finding(capability="durability", problem="nothing is stored", remedy="set appendonly yes")


def message(number=0):
    return Message.create(message_name="counted", payload={"number": number}, message_id=UUID(int=number))


class Everything:
    """A broker with the whole contract, which records the calls."""

    transactional = True

    def __init__(self):
        self.calls = []
        self.capabilities = Capabilities(max_message_bytes=5, headers="native")
        self.where = "redis://service"

    async def send_message(self, message, /):
        self.calls.append(("send_message", message))

    async def send_messages(self, messages, /):
        self.calls.append(("send_messages", messages))

    @asynccontextmanager
    async def subscribe(self, topics, /, **options):
        self.calls.append(("subscribe", topics, options))
        yield "deliveries"

    async def audit(self):
        return [FINDING]

    async def aclose(self):
        self.calls.append("aclose")

    async def __aenter__(self):
        self.calls.append("open")
        return self

    async def __aexit__(self, *_):
        await self.aclose()

    async def publish(self, message):
        return 7


def test_the_double_has_the_whole_contract():
    assert len(CONTRACT) == 9
    assert [name for name in CONTRACT if not hasattr(Everything(), name)] == []


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_is_written_out(name):
    """Type checkers see it, and a subclass may override it."""
    assert name in vars(Wrapped)


async def test_every_call_reaches_the_wrapped_broker():
    inner, messages = Everything(), [message(1), message(2)]
    options = {"group": "g", "prefetch": 3, "on_gap": print}

    broker = Wrapped(inner)
    async with broker as entered, broker.subscribe(["t"], **options) as deliveries:
        await broker.send_message(messages[0])
        await broker.send_messages(messages)

    assert entered is broker
    assert deliveries == "deliveries"
    assert inner.calls == [
        "open",
        ("subscribe", ["t"], options),
        ("send_message", messages[0]),
        ("send_messages", messages),
        "aclose",
    ]
    assert (broker.capabilities, broker.where, await broker.publish(messages[0])) == (
        inner.capabilities,
        inner.where,
        7,
    )
    assert (transactional(broker), await audit(broker), await broker.audit()) == (True, [FINDING], [FINDING])


TRANSPORTS = {
    "memory.MemoryMessageBroker": (),
    "redis.RedisMessageBroker": ("redis://127.0.0.1:1/0",),
    "redis_streams.RedisStreamMessageBroker": ("redis://127.0.0.1:1/0",),
    "rabbitmq.RabbitMQMessageBroker": ("amqp://127.0.0.1:1/",),
    "kafka.KafkaMessageBroker": ("127.0.0.1:1",),
}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_public_attribute_of_a_transport_is_there(name):
    module, _, class_name = f"diator.brokers.{name}".rpartition(".")
    inner = getattr(pytest.importorskip(module, exc_type=ImportError), class_name)(*TRANSPORTS[name])
    broker = Wrapped(Wrapped(inner))

    missing = [each for each in dir(inner) if not each.startswith("_") and not hasattr(broker, each)]

    assert missing == []
    assert broker.capabilities == inner.capabilities
    assert getattr(broker, "where", None) == getattr(inner, "where", None)


async def test_a_consumer_uses_a_wrapped_transport():
    handled = []

    async def on_joined(event: UserJoined) -> None:
        handled.append(event)

    broker = Wrapped(FaultyMessageBroker())
    await EventEmitter(message_broker=broker).emit(event := UserJoined())

    [report] = await consume(broker, on_joined)

    assert (report.outcome, handled) == ("acked", [event])


async def test_the_size_limit_is_that_of_the_wrapped_broker():
    emitter = EventEmitter(message_broker=Wrapped(MemoryMessageBroker(max_message_bytes=400)))

    with pytest.raises(MessageTooLarge):
        await emitter._handle([MeetingChanged(title="x" * 400)], {})


async def test_a_wrapped_outbox_is_called_inside_the_unit_of_work():
    async def join(command: Join, events: Events) -> str:
        events.append(UserJoined())
        return "joined"

    outbox = Outbox()
    witness = Witness(outbox)
    await mediator_of(join, message_broker=Wrapped(outbox), middlewares=[witness]).send(Join())

    assert witness.sent_by_then == ["UserJoined"]


# -- subclasses --------------------------------------------------------------------------------------------------


class Correlated(Wrapped):
    def outgoing(self, message):
        return replace(message, headers={**message.headers, "correlation-id": "7"})


class Traced(Wrapped):
    def __init__(self, broker):
        super().__init__(broker)
        self.log = []

    async def send_message(self, message, /):
        self.log.append(f"{message.payload['number']} begins")
        await super().send_message(message)
        self.log.append(f"{message.payload['number']} ends")


async def test_an_outgoing_message_is_changed_whichever_way_it_is_sent():
    for inner in (Recorder(), BatchRecorder()):
        broker = Correlated(inner)
        await broker.send_message(message(1))
        await broker.send_messages([message(2), message(3)])

        assert [each.payload["number"] for each in inner.sent] == [1, 2, 3]
        assert [each.headers for each in inner.sent] == [{"correlation-id": "7"}] * 3


async def test_a_batch_stays_a_batch():
    inner = Everything()

    await Correlated(inner).send_messages([message(1), message(2)])

    assert [call for call, _ in inner.calls] == ["send_messages"]


async def test_no_message_of_a_batch_bypasses_an_overridden_send():
    broker = Traced(Everything())

    await broker.send_messages([message(1), message(2)])

    assert broker.log == ["1 begins", "1 ends", "2 begins", "2 ends"]


@pytest.mark.parametrize("wrap", [Wrapped, Traced])
async def test_a_batch_stops_at_the_first_message_that_is_not_sent(wrap):
    inner = Recorder()

    async def send_message(message):
        if message.message_id == UUID(int=2):
            raise BrokerUnavailable("it is down", message_id=message.message_id)
        inner.sent.append(message)

    inner.send_message = send_message

    with pytest.raises(MessagesNotSent) as caught:
        await wrap(inner).send_messages([message(1), message(2), message(3)])

    assert caught.value.message_ids == (UUID(int=2), UUID(int=3))
    assert isinstance(caught.value.__cause__, BrokerUnavailable)
    assert [each.message_id for each in inner.sent] == [UUID(int=1)]


async def test_a_mediator_reports_the_events_that_a_wrapped_broker_did_not_send():
    async def join(command: Join, events: Events) -> str:
        events.extend([UserJoined(), MeetingChanged()])
        return "joined"

    with pytest.raises(EventsNotSent) as caught:
        await mediator_of(join, message_broker=Wrapped(Recorder(down_for=["MeetingChanged"]))).send(Join())

    assert [type(event) for event in caught.value.events] == [MeetingChanged]


# -- a broker with send_message alone ------------------------------------------------------------------------------


async def test_it_lacks_what_the_wrapped_broker_lacks():
    broker = Wrapped(Recorder())

    async with broker:
        pass

    assert (transactional(broker), await audit(broker)) == (False, [])
    assert not hasattr(broker, "capabilities")
    assert not hasattr(broker, "where")
    with pytest.raises(ConfigurationError, match="must be a transport"):
        Consumer(broker, event_map=events_of())


def test_it_can_be_copied():
    inner = Recorder()

    assert copy.copy(Wrapped(inner))._wrapped is inner


async def test_an_audit_that_is_passed_on_dynamically_is_found():
    class ByHand:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    assert await audit(ByHand(Everything())) == [FINDING]
