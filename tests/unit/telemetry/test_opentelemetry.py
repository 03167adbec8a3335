"""What `OpenTelemetry` records, read from the SDK."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from diator.brokers import Message
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.container import Container
from diator.events import EventEmitter, Events, NotificationEvent
from diator.exceptions import BrokerUnavailable, ConfigurationError, EventsNotSent
from diator.mediator import Mediator
from diator.outbox import Outbox, Relay
from diator.outbox.memory import MemorySession, MemoryStore
from diator.requests import RequestMap
from diator.telemetry import OpenTelemetry
from diator.testing import Recorder
from tests.unit.consumer.helpers import quick
from tests.unit.doubles import Join, UserJoined, events_of, running, until

CANARY = "canary-4711"


class Welcomed(NotificationEvent):
    """The event of the second hop."""


class Recorded:
    """An instrument with the SDK behind it, and what that has recorded."""

    def __init__(self, **options):
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.instrument = OpenTelemetry(
            tracer_provider=self.tracers, meter_provider=MeterProvider([self.reader]), **options
        )

    @property
    def spans(self):
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def parent_of(self, name):
        """Return the name of the parent of the span of this name; None for a root."""
        parent = self.spans[name].parent
        names = {span.context.span_id: span.name for span in self.exporter.get_finished_spans()}
        return None if parent is None else names.get(parent.span_id, "a stranger")

    def links_of(self, name):
        names = {span.context.span_id: span.name for span in self.exporter.get_finished_spans()}
        return [names.get(link.context.span_id, "a stranger") for link in self.spans[name].links]

    def metrics(self):
        """Return all points of all metrics, by name."""
        return {
            metric.name: metric.data.data_points
            for resource in self.reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def recorded():
    return Recorded()


async def join(command: Join, events: Events) -> str:
    events.append(UserJoined(user_id=1))
    return "joined"


def mediator_of(broker, instrument, handler=join):
    requests = RequestMap()
    requests.bind(Join, handler)
    return Mediator(requests, message_broker=broker, instrument=instrument)


async def consume(broker, instrument, *handlers, outcomes=1, **options):
    handled = []
    consumer = Consumer(
        broker,
        event_map=events_of(*handlers),
        group="readers",
        instrument=instrument,
        on_handled=handled.append,
        **options,
    )
    async with running(consumer):
        await until(lambda: len(handled) >= outcomes)
    return consumer


async def welcome(event: UserJoined, events: Events) -> None:
    events.append(Welcomed())


async def goodbye(event: Welcomed) -> None: ...


JOINED, WELCOMED = "notification_event.UserJoined", "notification_event.Welcomed"


async def test_one_trace_leads_from_the_request_through_two_consumers(recorded):
    broker = MemoryMessageBroker()
    await mediator_of(broker, recorded.instrument).send(Join())
    await consume(broker, recorded.instrument, welcome, goodbye, outcomes=2)

    assert {span.context.trace_id for span in recorded.spans.values()} == {
        recorded.spans["handle Join"].context.trace_id
    }
    assert {name: recorded.parent_of(name) for name in recorded.spans} == {
        "handle Join": None,
        f"send {JOINED}": "handle Join",
        f"process {JOINED}": "handle Join",
        f"send {WELCOMED}": f"process {JOINED}",
        f"process {WELCOMED}": f"process {JOINED}",
    }
    assert recorded.links_of(f"process {JOINED}") == ["handle Join"]
    assert recorded.links_of(f"send {JOINED}") == []  # its parent says the same
    assert {name: span.kind for name, span in recorded.spans.items()} == {
        "handle Join": SpanKind.INTERNAL,
        f"send {JOINED}": SpanKind.CLIENT,
        f"process {JOINED}": SpanKind.CONSUMER,
        f"send {WELCOMED}": SpanKind.CLIENT,
        f"process {WELCOMED}": SpanKind.CONSUMER,
    }


async def test_the_attributes_follow_the_conventions(recorded):
    broker = MemoryMessageBroker()
    event = UserJoined(user_id=7)
    await EventEmitter(message_broker=broker, instrument=recorded.instrument).emit(event)
    await consume(broker, recorded.instrument, welcome)

    common = {
        "messaging.system": "diator_memory",
        "messaging.destination.name": JOINED,
        "messaging.message.id": str(event.event_id),
    }
    assert recorded.spans[f"send {JOINED}"].attributes == {
        **common,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    assert recorded.spans[f"process {JOINED}"].attributes == {
        **common,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "readers",
        "diator.delivery.attempt": 1,
        "diator.outcome": "acked",
    }


async def test_an_event_outside_of_any_trace_begins_one(recorded):
    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker, instrument=recorded.instrument).emit(UserJoined())
    await consume(broker, recorded.instrument, welcome)

    assert recorded.parent_of("create UserJoined") is None
    assert recorded.spans["create UserJoined"].kind == SpanKind.PRODUCER
    assert recorded.parent_of(f"send {JOINED}") == "create UserJoined"
    assert recorded.parent_of(f"process {JOINED}") == "create UserJoined"


async def test_several_messages_are_sent_in_one_span(recorded):
    async def twice(command: Join, events: Events) -> str:
        events.append(UserJoined(user_id=1))
        events.append(Welcomed())
        return ""

    await mediator_of(Recorder(), recorded.instrument, twice).send(Join())

    assert recorded.parent_of("send") == "handle Join"
    assert recorded.links_of("send") == []
    assert recorded.spans["send"].attributes["messaging.batch.message_count"] == 2
    assert "messaging.message.id" not in recorded.spans["send"].attributes


@pytest.mark.parametrize(
    ("inside", "links"),
    [(None, ["first", "second"]), ("first", ["second"]), ("third", ["first", "second"])],
)
async def test_a_send_has_a_link_to_each_span_in_which_its_messages_were_raised_elsewhere(recorded, inside, links):
    tracer = trace.get_tracer("program", tracer_provider=recorded.tracers)
    spans = {name: tracer.start_span(name) for name in ("first", "second", "third")}
    messages = []
    for name in ("first", "second", "first"):
        with trace.use_span(spans[name]):
            headers = recorded.instrument.headers(UserJoined())
        messages.append(Message.create(message_name="UserJoined", payload={}, headers={"region": "eu", **headers}))

    with trace.use_span(spans.get(inside, trace.INVALID_SPAN)), recorded.instrument.sending(messages, Recorder()):
        pass
    for span in spans.values():
        span.end()

    assert recorded.links_of(f"send {JOINED}") == links
    assert recorded.parent_of(f"send {JOINED}") == inside


async def test_the_trace_of_a_message_from_elsewhere_goes_on_when_it_is_sent(recorded):
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    message = Message.create(message_name="UserJoined", payload={}, headers=headers)
    with recorded.instrument.sending([message], Recorder()):
        pass

    sent = recorded.spans[f"send {JOINED}"]
    assert (f"{sent.context.trace_id:032x}", f"{sent.parent.span_id:016x}") == (trace_id, span_id)


async def test_a_message_that_is_sent_later_belongs_to_its_own_trace(recorded):
    of_first, of_second = (recorded.instrument.headers(UserJoined()) for _ in range(2))
    message = Message.create(message_name="UserJoined", payload={}, headers=of_first)
    with recorded.instrument.sending([message], Recorder()):
        pass

    [_, trace_id, span_id, _] = of_first["traceparent"].split("-")
    sent = recorded.spans[f"send {JOINED}"]
    assert of_second["traceparent"] != of_first["traceparent"]
    assert (f"{sent.context.trace_id:032x}", f"{sent.parent.span_id:016x}") == (trace_id, span_id)


async def test_without_a_parent_a_message_begins_a_trace_and_has_the_link():
    recorded, broker = Recorded(parent=False), MemoryMessageBroker()
    await mediator_of(broker, recorded.instrument).send(Join())
    await consume(broker, recorded.instrument, welcome)

    assert recorded.parent_of(f"process {JOINED}") is None
    assert recorded.links_of(f"process {JOINED}") == ["handle Join"]
    assert recorded.parent_of(f"send {WELCOMED}") == f"process {JOINED}"


@pytest.mark.parametrize(
    "traceparent",
    ["", "nonsense", "00-0-0-00", f"00-{'0' * 32}-{'1' * 16}-01", f"ff-{'1' * 32}-{'1' * 16}-01", "00-" + "g" * 51],
)
async def test_a_foreign_traceparent_that_is_none_is_ignored(recorded, traceparent):
    broker = MemoryMessageBroker()
    headers = {"traceparent": traceparent, "tracestate": "\x00=,=", "baggage": ";;=" * 3_000}
    await broker.send_message(Message.create(message_name="UserJoined", payload={}, headers=headers))
    await consume(broker, recorded.instrument, welcome)

    assert recorded.spans[f"process {JOINED}"].attributes["diator.outcome"] == "acked"
    assert recorded.parent_of(f"process {JOINED}") is None
    assert recorded.links_of(f"process {JOINED}") == []


async def test_a_foreign_trace_goes_on(recorded):
    broker, trace_id, span_id = MemoryMessageBroker(), "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    await broker.send_message(Message.create(message_name="UserJoined", payload={}, headers=headers))
    await consume(broker, recorded.instrument, welcome)

    span = recorded.spans[f"process {JOINED}"]
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, span_id)


async def test_the_baggage_reaches_the_handlers_of_each_service(recorded):
    broker, seen = MemoryMessageBroker(), []

    async def first(event: UserJoined, events: Events) -> None:
        seen.append(baggage.get_baggage("tenant"))
        events.append(Welcomed())

    async def second(event: Welcomed) -> None:
        seen.append(baggage.get_baggage("tenant"))

    token = context.attach(baggage.set_baggage("tenant", "7"))
    await mediator_of(broker, recorded.instrument).send(Join())
    context.detach(token)
    await consume(broker, recorded.instrument, first, second, outcomes=2)

    assert seen == ["7", "7"]


async def test_the_messages_are_not_children_of_what_surrounds_the_consumer(recorded):
    broker = MemoryMessageBroker()
    await broker.send_message(Message.create(message_name="UserJoined", payload={}))
    with trace.get_tracer("program", tracer_provider=recorded.tracers).start_as_current_span("start of the program"):
        await consume(broker, recorded.instrument, welcome)

    assert recorded.parent_of(f"process {JOINED}") is None


async def test_an_error_is_recorded_by_its_type_alone(recorded):
    async def fail(event: UserJoined) -> None:
        raise LookupError(CANARY)

    broker = MemoryMessageBroker()
    await mediator_of(broker, recorded.instrument).send(Join())
    await consume(broker, recorded.instrument, fail, retry=quick())

    processed, settled = recorded.spans[f"process {JOINED}"], recorded.spans[f"settle {JOINED}"]
    assert processed.status.status_code == StatusCode.ERROR
    assert processed.attributes["error.type"] == settled.attributes["error.type"] == "LookupError"
    assert settled.attributes["diator.outcome"] == "dead_lettered"
    assert recorded.parent_of(f"settle {JOINED}") == f"process {JOINED}"
    assert CANARY not in "".join(span.to_json() for span in recorded.exporter.get_finished_spans())


async def test_two_groups_that_handle_one_message_at_once_keep_their_spans(recorded):
    handling = asyncio.Barrier(2)

    async def fail(event: UserJoined) -> None:
        await handling.wait()
        raise LookupError

    broker = MemoryMessageBroker()
    outcomes = []
    consumers = [
        Consumer(
            broker,
            event_map=events_of(fail),
            group=group,
            instrument=recorded.instrument,
            retry=quick(),
            on_handled=outcomes.append,
        )
        for group in ("billing", "shipping")
    ]
    async with running(consumers[0]), running(consumers[1]):
        await mediator_of(broker, recorded.instrument).send(Join())
        await until(lambda: len(outcomes) == len(consumers))

    spans = {span.context.span_id: span for span in recorded.exporter.get_finished_spans()}
    settled = [span for span in spans.values() if span.name == f"settle {JOINED}"]
    group = "messaging.consumer.group.name"
    assert {span.attributes[group] for span in settled} == {"billing", "shipping"}
    for span in settled:
        assert spans[span.parent.span_id].attributes[group] == span.attributes[group]


async def test_a_send_that_fails_is_recorded_with_the_type_of_its_error(recorded):
    class Refusing(Recorder):
        async def send_message(self, message):
            raise BrokerUnavailable(CANARY)

    broker = Refusing()
    with pytest.raises(EventsNotSent):
        await mediator_of(broker, recorded.instrument).send(Join())

    for name in (f"send {JOINED}", "handle Join"):
        assert recorded.spans[name].status.status_code == StatusCode.ERROR
    assert CANARY not in "".join(span.to_json() for span in recorded.exporter.get_finished_spans())
    [point] = recorded.metrics()["messaging.client.sent.messages"]
    assert point.attributes["error.type"] == recorded.spans[f"send {JOINED}"].attributes["error.type"]


async def test_no_span_has_a_payload_a_header_or_a_key(recorded):
    broker = MemoryMessageBroker()
    await broker.send_message(
        Message.create(
            message_name="UserJoined", payload={"user_id": 1, "x": CANARY}, key=CANARY, headers={"h": CANARY}
        )
    )
    await consume(broker, recorded.instrument, welcome)
    assert CANARY not in "".join(span.to_json() for span in recorded.exporter.get_finished_spans())
    assert CANARY not in recorded.reader.get_metrics_data().to_json()


async def test_concurrent_messages_keep_their_own_traces(recorded):
    async def slow(event: UserJoined, events: Events) -> None:
        await asyncio.sleep(1 / (1 + event.user_id))
        events.append(Welcomed())

    broker = MemoryMessageBroker()
    emitter = EventEmitter(message_broker=broker, instrument=recorded.instrument)
    for number in range(10):
        await emitter.emit(UserJoined(user_id=number))
    await consume(broker, recorded.instrument, slow, goodbye, outcomes=20, concurrency=10)

    traces = Counter(span.context.trace_id for span in recorded.exporter.get_finished_spans())
    assert [*traces.values()] == [5] * 10  # create, send, process, send, process


async def test_metrics_count_and_measure(recorded):
    broker, fails = MemoryMessageBroker(), [True]

    async def fail_once(event: UserJoined) -> None:
        if fails:
            fails.pop()
            raise LookupError

    await mediator_of(broker, recorded.instrument).send(Join())
    await consume(broker, recorded.instrument, fail_once, outcomes=2, retry=quick(delayed_retries=1))

    common = {
        "messaging.system": "diator_memory",
        "messaging.destination.name": JOINED,
        "messaging.consumer.group.name": "readers",
    }
    metrics = recorded.metrics()
    [sent] = metrics["messaging.client.sent.messages"]
    assert (sent.value, sent.attributes["messaging.operation.name"]) == (1, "send")
    assert [point.count for point in metrics["messaging.client.operation.duration"]] == [1]
    assert [point.value for point in metrics["messaging.client.consumed.messages"]] == [2]
    assert {point.attributes.get("error.type"): point.count for point in metrics["messaging.process.duration"]} == {
        "LookupError": 1,
        None: 1,
    }
    assert {
        (point.attributes["diator.outcome"], point.attributes.get("diator.reason")): point.value
        for point in metrics["diator.deliveries"]
    } == {("retried", "failed"): 1, ("acked", None): 1}
    assert all(common.items() <= point.attributes.items() for point in metrics["diator.deliveries"])
    assert [point.value for point in metrics["diator.in_flight"]] == [0]


async def test_a_watched_consumer_shows_its_health(recorded):
    broker = MemoryMessageBroker()
    await broker.send_message(Message.create(message_name="UserJoined", payload={}))
    consumer = Consumer(broker, event_map=events_of(welcome), instrument=recorded.instrument)
    recorded.instrument.watch(billing=consumer)
    async with running(consumer):
        await until(lambda: consumer.health().receiving)
        [connected] = recorded.metrics()["diator.connected"]
        assert (connected.value, connected.attributes) == (1.0, {"diator.consumer": "billing"})
        assert [point.value for point in recorded.metrics()["diator.reconnects"]] == [0.0]
    recorded.instrument.watch(audit=consumer)
    names = {point.attributes["diator.consumer"] for point in recorded.metrics()["diator.receiving"]}
    assert names == {"audit", "billing"}


def test_what_is_watched_is_a_consumer(recorded):
    with pytest.raises(ConfigurationError, match=r"^watch\(billing=…\) must have a Consumer, .* MemoryMessageBroker$"):
        recorded.instrument.watch(billing=MemoryMessageBroker())


async def test_without_an_sdk_nothing_is_recorded_and_everything_works():
    broker = MemoryMessageBroker()
    await mediator_of(broker, OpenTelemetry()).send(Join())
    await consume(broker, OpenTelemetry(), welcome)


@pytest.mark.parametrize(
    ("where", "address"),
    [
        ("amqp://rabbit:5672/", {"server.address": "rabbit", "server.port": 5672}),
        ("one:9092,two:9092", {"server.address": "one", "server.port": 9092}),
        ("redis://[::1]/0", {"server.address": "::1"}),
        ("[fe80::1%eth0]:9092", {"server.address": "fe80::1%eth0", "server.port": 9092}),
        ("unix:///run/redis.sock", {}),
        ("the server of Sentinel's main", {}),
        ("", {}),
    ],
)
async def test_spans_and_no_metrics_have_the_address_of_the_service(recorded, where, address):
    async def welcome(event: UserJoined) -> None: ...

    broker = MemoryMessageBroker()
    broker.where = where
    await EventEmitter(message_broker=broker, instrument=recorded.instrument).emit(UserJoined(user_id=7))
    await consume(broker, recorded.instrument, welcome)

    for span in (recorded.spans[f"send {JOINED}"], recorded.spans[f"process {JOINED}"]):
        assert {name: value for name, value in span.attributes.items() if name.startswith("server.")} == address
    points = [point for points in recorded.metrics().values() for point in points]
    assert not any("server.address" in point.attributes for point in points)


async def test_what_a_relay_sends_belongs_to_the_trace_of_its_message(recorded):
    """Also if the program started the relay in a span of its own, and the handler is long gone."""
    store, broker, container = MemoryStore(), MemoryMessageBroker(), Container()

    async def session() -> AsyncIterator[MemorySession]:
        async with store.begin() as opened:
            yield opened

    container.register(MemorySession, session)
    requests = RequestMap()
    requests.bind(Join, join)
    outbox = Outbox(store, broker)
    await Mediator(requests, container, message_broker=outbox, instrument=recorded.instrument).send(Join())
    with recorded.tracers.get_tracer("program").start_as_current_span("start"):
        relay = Relay(outbox, instrument=recorded.instrument)
        async with relay:
            await until(lambda: relay.health().sent)

    assert recorded.parent_of(f"send {JOINED}") == "handle Join"


async def test_a_relay_reports_the_state_of_its_outbox(recorded):
    store = MemoryStore()
    async with store.begin() as session:
        await store.add([Message.create(message_name="A", payload={})], [timedelta(days=1)], session)
    async with Relay(Outbox(store, MemoryMessageBroker()), instrument=recorded.instrument):
        await until(lambda: recorded.instrument._outboxes)

    metrics = recorded.metrics()
    [scheduled] = metrics["diator.outbox.scheduled"]
    assert (scheduled.value, scheduled.attributes) == (1.0, {"messaging.system": "diator_memory"})
    assert {name for name in metrics if name.startswith("diator.outbox.")} == {
        *("diator.outbox.pending", "diator.outbox.oldest", "diator.outbox.scheduled", "diator.outbox.dead"),
        *("diator.outbox.blocked", "diator.outbox.blocked_keys", "diator.outbox.held_back"),
        *("diator.outbox.held_back_for", "diator.outbox.lease_lost"),
    }
