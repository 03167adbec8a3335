"""Telemetry for others: an OTLP receiver, and programs that are traced by other libraries."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.consumer import Consumer
from diator.context import MessageContext, correlated
from diator.events import EventEmitter, EventMap, Events, NotificationEvent
from diator.mediator import Mediator
from diator.requests import Request, RequestMap
from diator.retrying import RetryPolicy
from diator.telemetry import OpenTelemetry
from tests import peers
from tests.integration.transports import broker_for

pytestmark = pytest.mark.timeout(180)  # the first test installs the other libraries

LIBRARIES = ["faststream", "aio_pika"]


class Joined(NotificationEvent):
    """The event of these tests."""


@contextmanager
def private_receiver() -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    """Receive OTLP over HTTP, as a collector does. Yield the address, and the bodies by path."""
    received: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.setdefault(self.path, []).append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


async def test_a_collector_receives_spans_and_metrics() -> None:
    events, handled = EventMap(), asyncio.Event()

    @events.handler
    async def welcome(event: Joined) -> None:
        handled.set()

    with private_receiver() as (address, received):
        tracers = TracerProvider()
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{address}/v1/traces")))
        meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(f"{address}/v1/metrics"))])
        instrument = OpenTelemetry(tracer_provider=tracers, meter_provider=meters)
        broker = MemoryMessageBroker()
        async with Consumer(broker, event_map=events, group="greeters", instrument=instrument):
            await EventEmitter(message_broker=broker, instrument=instrument).emit(Joined())
            await asyncio.wait_for(handled.wait(), 60)
        await asyncio.to_thread(tracers.shutdown)
        await asyncio.to_thread(meters.shutdown)

    spans = [
        span
        for body in received["/v1/traces"]
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(span.name for span in spans) == [
        "create Joined",
        "process notification_event.Joined",
        "send notification_event.Joined",
    ]
    assert len({span.trace_id for span in spans}) == 1
    metrics = {
        metric.name
        for body in received["/v1/metrics"]
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert {"messaging.client.sent.messages", "messaging.process.duration", "diator.deliveries"} <= metrics


@pytest.fixture
def command(pytestconfig: pytest.Config) -> list[str]:
    """Return the command of a program whose messages other libraries trace."""
    return peers.command("traced_peer", pytestconfig.cache.mkdir("peers"))


def instrument_of(exporter: InMemorySpanExporter) -> OpenTelemetry:
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetry(tracer_provider=tracers)


class Traced:
    """An instrument, and the traces of its spans by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.instrument = instrument_of(self._exporter)

    def trace_of(self, name: str) -> str:
        [span] = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return f"{span.get_span_context().trace_id:032x}"


@pytest.mark.parametrize("library", LIBRARIES)
async def test_what_another_library_receives_belongs_to_our_trace(rabbitmq_url, command, library) -> None:
    prefix, traced = f"traced-{uuid4().hex[:8]}", Traced()
    async with RabbitMQMessageBroker(rabbitmq_url, prefix) as broker:
        address = f"{prefix}/notification_event.Joined"
        async with peers.running(*command, "receive", library, rabbitmq_url, address) as peer:
            assert await peers.next_line(peer) == ["ready"]
            await EventEmitter(message_broker=broker, instrument=traced.instrument).emit(Joined())
            assert await peers.next_line(peer) == [traced.trace_of("create Joined")]


@pytest.mark.parametrize("library", LIBRARIES)
async def test_what_another_library_sends_is_handled_in_its_trace(rabbitmq_url, command, library) -> None:
    prefix, traced, events, handled = f"traced-{uuid4().hex[:8]}", Traced(), EventMap(), asyncio.Event()

    @events.handler
    async def welcome(event: Joined) -> None: ...

    async with (
        RabbitMQMessageBroker(rabbitmq_url, prefix) as broker,
        Consumer(
            broker,
            event_map=events,
            group="readers",
            instrument=traced.instrument,
            on_handled=lambda _: handled.set(),
        ),
    ):
        body = {"message_type": "notification_event", "message_name": "Joined", "payload": {}}
        body["message_id"] = str(uuid4())
        address = f"{prefix}/notification_event.Joined"
        async with peers.running(*command, "send", library, rabbitmq_url, address) as peer:
            peer.stdin.write(json.dumps(body).encode() + b"\n")
            sent = await peers.next_line(peer)
        await asyncio.wait_for(handled.wait(), 60)
    assert sent == [traced.trace_of("process notification_event.Joined")]


# -- one request through everything ----------------------------------------------------------------------------------


class Order(Request[None]):
    """The request of the trace."""


class Ordered(NotificationEvent):
    """Goes through RabbitMQ."""


class Shipped(NotificationEvent):
    """Goes through Kafka."""


class Unlucky:
    """
    A service whose first delivery never ends, and whose second one fails.

    It is killed while it handles the first one, and started again. Its instruments share nothing with other services.
    """

    def __init__(self, group: str, connect: Callable[[], Any], exporter: InMemorySpanExporter) -> None:
        self.events = EventMap()
        self.correlation_ids: list[str] = []
        self.subscribed, self._begun = asyncio.Event(), asyncio.Event()
        self._group, self._connect, self._exporter = group, connect, exporter

    async def begin(self, context: MessageContext) -> None:
        """Begin to handle a message: the third attempt succeeds."""
        self.correlation_ids.append(context.correlation_id)
        self._begun.set()
        match len(self.correlation_ids):
            case 1:
                await asyncio.Event().wait()
            case 2:
                raise TimeoutError

    async def run(self, connect_next: Callable[[], Any], until: asyncio.Event) -> None:
        for last in (self._begun, until):
            telemetry = instrument_of(self._exporter)
            async with self._connect() as broker, connect_next() as next_broker:
                consumer = Consumer(
                    broker,
                    event_map=self.events,
                    group=self._group,
                    event_emitter=EventEmitter(message_broker=next_broker, instrument=telemetry),
                    instrument=telemetry,
                    retry=RetryPolicy(immediate_retries=0, first_delay=0.1),
                )
                running = asyncio.create_task(consumer.run(signals=False))
                await consumer.ready()
                self.subscribed.set()
                await last.wait()
                if last is until:
                    consumer.stop()
                    await running
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


async def test_one_correlation_id_and_one_trace_go_through_retries_and_redeliveries(rabbitmq_url, kafka_servers):
    """A request sends to RabbitMQ, and the consumer there to Kafka, whose consumer is the last."""
    prefix, exporter, ended, requests = (
        f"trace-{uuid4().hex[:8]}",
        InMemorySpanExporter(),
        asyncio.Event(),
        RequestMap(),
    )
    rabbitmq, kafka = (partial(broker_for, each, prefix) for each in (rabbitmq_url, f"kafka://{kafka_servers}"))
    shipping, following = Unlucky("shipping", rabbitmq, exporter), Unlucky("following", kafka, exporter)

    @requests.handler
    async def order(_request: Order, events: Events) -> None:
        events.append(Ordered())

    @shipping.events.handler
    async def ship(_event: Ordered, context: MessageContext, events: Events) -> None:
        await shipping.begin(context)
        events.append(Shipped())

    @following.events.handler
    async def follow(_event: Shipped, context: MessageContext) -> None:
        await following.begin(context)
        ended.set()

    async with asyncio.timeout(120), asyncio.TaskGroup() as services, rabbitmq() as broker:
        for service in (shipping, following):
            services.create_task(service.run(kafka, ended))
            await service.subscribed.wait()
        with correlated("request-7"):
            await Mediator(requests, message_broker=broker, instrument=instrument_of(exporter)).send(Order())

    assert shipping.correlation_ids == following.correlation_ids == ["request-7"] * 3
    spans = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)
    assert len({span.context.trace_id for span in spans}) == 1
    named = {name: [span for span in spans if span.name == name] for name in {span.name for span in spans}}
    [handled] = named["handle Order"]
    ordered, shipped = (named[f"process notification_event.{event}"] for event in ("Ordered", "Shipped"))
    for processed, parent in ((ordered, handled), (shipped, ordered[-1])):
        assert [span.attributes["diator.outcome"] for span in processed] == ["unsettled", "retried", "acked"]
        assert len({span.attributes["messaging.message.id"] for span in processed}) == 1
        assert {span.parent.span_id for span in processed} == {parent.context.span_id}
    for event, parent in (("Ordered", handled), ("Shipped", ordered[-1])):
        assert [span.parent.span_id for span in named[f"send notification_event.{event}"]] == [parent.context.span_id]
