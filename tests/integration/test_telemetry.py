"""Telemetry for others: an OTLP receiver, and programs that are traced by other libraries."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from diator.events import EventEmitter, EventMap, NotificationEvent
from diator.telemetry import OpenTelemetry
from tests import peers

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


class Traced:
    """An instrument, and the traces of its spans by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.instrument = OpenTelemetry(tracer_provider=tracers)

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
