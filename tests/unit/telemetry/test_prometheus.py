"""What `Prometheus` exports."""

import asyncio
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from diator.brokers import Message
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.events import EventEmitter, Events, NotificationEvent
from diator.exceptions import BrokerUnavailable, ConfigurationError, EventsNotSent, MessageRejected
from diator.mediator import Mediator
from diator.outbox import Outbox, Relay
from diator.outbox.memory import MemoryStore
from diator.requests import RequestMap
from diator.telemetry import Prometheus
from diator.testing import Recorder
from tests.unit.consumer.helpers import quick
from tests.unit.doubles import Join, UserJoined, events_of, running, until

CANARY = "canary-4711"
JOINED = "notification_event.UserJoined"
DASHBOARD = Path(__file__).parents[3] / "examples" / "grafana-dashboard.json"


class Welcomed(NotificationEvent):
    """The event of the second hop."""


async def join(command: Join, events: Events) -> str:
    events.append(UserJoined(user_id=1))
    return "joined"


async def fail(command: Join) -> str:
    raise LookupError(CANARY)


def mediator_of(broker, instrument, handler=join):
    requests = RequestMap()
    requests.bind(Join, handler)
    return Mediator(requests, message_broker=broker, instrument=instrument)


@pytest.fixture
def registry():
    return CollectorRegistry()


def samples(registry):
    """Return every sample: its name and its labels, with its value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


async def test_a_message_is_counted_where_it_is_sent_and_where_it_is_handled(registry):
    instrument, broker, handled, fails = Prometheus(registry), MemoryMessageBroker(), [], [True]

    async def welcome(event: UserJoined) -> None:
        if fails:
            fails.pop()
            raise LookupError(CANARY)

    await mediator_of(broker, instrument).send(Join())
    consumer = Consumer(
        broker,
        event_map=events_of(welcome),
        group="readers",
        instrument=instrument,
        on_handled=handled.append,
        retry=quick(delayed_retries=1),
    )
    async with running(consumer):
        await until(lambda: len(handled) == 2)

    found = samples(registry)
    reader = (("group", "readers"), ("topic", JOINED))
    assert found["diator_request_seconds_count", ("outcome", "answered"), ("request", "Join")] == 1
    assert found["diator_sent_messages_total", ("outcome", "sent"), ("topic", JOINED)] == 1
    assert found["diator_send_seconds_count", ("topic", JOINED)] == 1
    assert found["diator_handling_seconds_count", *reader] == 2
    assert found["diator_in_flight", *reader] == 0
    assert found["diator_redelivered_total", *reader] == 1
    outcomes = {
        (dict(key[1:])["outcome"], dict(key[1:])["reason"]): value
        for key, value in found.items()
        if key[0] == "diator_deliveries_total"
    }
    assert outcomes == {("retried", "failed"): 1, ("acked", ""): 1}
    assert CANARY not in generate_latest(registry).decode()


async def test_errors_are_counted_by_their_type(registry):
    class Refusing(Recorder):
        async def send_message(self, message):
            raise BrokerUnavailable(CANARY)

    instrument = Prometheus(registry)
    with pytest.raises(EventsNotSent):
        await mediator_of(Refusing(), instrument).send(Join())
    with pytest.raises(LookupError):
        await mediator_of(Refusing(), instrument, fail).send(Join())

    found = samples(registry)
    assert found["diator_request_seconds_count", ("outcome", "EventsNotSent"), ("request", "Join")] == 1
    assert found["diator_request_seconds_count", ("outcome", "LookupError"), ("request", "Join")] == 1
    [sent] = [key for key in found if key[0] == "diator_sent_messages_total"]
    assert dict(sent[1:])["outcome"] != "sent"
    assert CANARY not in generate_latest(registry).decode()


async def test_immediate_retries_are_counted(registry):
    instrument, broker, handled, fails = Prometheus(registry), MemoryMessageBroker(), [], [True, True]

    async def welcome(event: UserJoined) -> None:
        if fails:
            fails.pop()
            raise LookupError

    await EventEmitter(message_broker=broker).emit(UserJoined())
    options = {"instrument": instrument, "on_handled": handled.append, "retry": quick(immediate_retries=2)}
    async with running(Consumer(broker, event_map=events_of(welcome), **options)):
        await until(lambda: handled)
    retries = [value for key, value in samples(registry).items() if key[0] == "diator_retries_total"]
    assert retries == [2]


async def test_the_health_of_watched_consumers_is_exported_when_it_is_asked_for(registry):
    async def welcome(event: UserJoined) -> None: ...

    instrument, broker = Prometheus(registry), MemoryMessageBroker()
    assert not [key for key in samples(registry) if key[0].startswith("diator_consumer_")]
    consumer = Consumer(broker, event_map=events_of(welcome), instrument=instrument)
    instrument.watch(billing=consumer)
    assert samples(registry)["diator_consumer_receiving", ("consumer", "billing")] == 0
    async with running(consumer):
        await until(lambda: consumer.health().receiving)
        found = samples(registry)
    assert found["diator_consumer_receiving", ("consumer", "billing")] == 1
    assert found["diator_consumer_connected", ("consumer", "billing")] == 1
    assert found["diator_consumer_reconnects_total", ("consumer", "billing")] == 0
    assert found["diator_consumer_since_last_progress_seconds", ("consumer", "billing")] == 0


def test_what_is_watched_is_a_consumer(registry):
    instrument = Prometheus(registry)
    with pytest.raises(ConfigurationError, match=r"^watch\(billing=…\) must have a Consumer, .* MemoryMessageBroker$"):
        instrument.watch(billing=MemoryMessageBroker())
    samples(registry)  # nothing of it is left


def test_a_registry_takes_one_instrument(registry):
    Prometheus(registry)
    with pytest.raises(ConfigurationError, match="pass the same Prometheus object"):
        Prometheus(registry)


def test_the_dashboard_asks_for_metrics_that_exist(registry):
    async def welcome(event: UserJoined) -> None: ...

    instrument = Prometheus(registry)
    instrument.watch(billing=Consumer(MemoryMessageBroker(), event_map=events_of(welcome)))
    known = {metric.name: metric.type for metric in registry.collect()}
    exported = {
        name + ending
        for name, kind in known.items()
        for ending in {"counter": ["_total"], "histogram": ["_count", "_sum", "_bucket"], "gauge": [""]}[kind]
    }
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"\bdiator_\w+", query)}
    assert len(queries) >= 8
    assert asked <= exported, asked - exported


async def test_the_state_of_an_outbox_is_exported_as_its_relay_reports_it(registry):
    async def fails(message):
        raise MessageRejected(CANARY)

    instrument, store, broker = Prometheus(registry), MemoryStore(), MemoryMessageBroker()
    async with store.begin() as session:
        messages = [Message.create(message_name="UserJoined", payload={}, key="key") for _ in range(3)]
        await store.add(messages, [None, None, timedelta(days=1)], session)
    broker.send_message = fails
    async with Relay(Outbox(store, broker), instrument=instrument) as relay:
        await until(lambda: relay.health().dead)
        await asyncio.sleep(16)

    labels = [("system", "diator_memory"), ("where", "")]
    found = {name[0]: value for name, value in samples(registry).items() if [*name[1:]] == labels}
    assert found.pop("diator_outbox_oldest_seconds") >= 0
    assert found == {
        "diator_outbox_pending": 1,
        "diator_outbox_scheduled": 1,
        "diator_outbox_dead": 1,
        "diator_outbox_blocked": 2,
        "diator_outbox_blocked_keys": 1,
        "diator_outbox_held_back": 0,
        "diator_outbox_held_back_for_seconds": 0,
        "diator_outbox_lease_lost_total": 0,
    }
    assert CANARY not in generate_latest(registry).decode()
