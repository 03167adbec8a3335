from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any
from uuid import uuid4

from dropping import providers
from measuring import Finished, Handle, Settled
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.trace import Link, Span, SpanKind
from with_diator_memory import Memory
from with_diator_redis import Streams

from diator.telemetry import OpenTelemetry


class Traced(Streams):
    plain = Streams

    def __init__(self, url: str, name: str) -> None:
        tracers, meters = providers()
        self.instrument = OpenTelemetry(tracer_provider=tracers, meter_provider=meters)
        super().__init__(url, name)


class TracedInMemory(Memory):
    def __init__(self, url: str, name: str) -> None:
        tracers, meters = providers(max_queue_size=None)
        self.instrument = OpenTelemetry(tracer_provider=tracers, meter_provider=meters)
        super().__init__(url, name)


class ByHand(Streams):
    """The spans and the values of the instrument, written out: what the SDK takes by itself."""

    plain = Streams

    def __init__(self, url: str, name: str) -> None:
        tracers, meters = providers()
        self._tracer, meter = tracers.get_tracer("by hand"), meters.get_meter("by hand")
        self._sent_for = meter.create_histogram("messaging.client.operation.duration", unit="s")
        self._handled_for = meter.create_histogram("messaging.process.duration", unit="s")
        self._age = meter.create_histogram("diator.critical_time", unit="s")
        super().__init__(url, name)
        common = {"messaging.system": "redis", "messaging.destination.name": "notification_event.UserJoined"}
        group = {"messaging.consumer.group.name": "benchmark"}
        self._send = {**common, "messaging.operation.name": "send"}
        self._process = {**common, **group, "messaging.operation.name": "process"}

    def _span(self, measured: dict[str, str], kind: SpanKind, inside: contexts.Context, links: list[Link]) -> Span:
        operation = measured["messaging.operation.name"]
        service = {"messaging.operation.type": operation, "server.address": "127.0.0.1", "server.port": 6379}
        of_message = {"messaging.message.id": str(uuid4()), "diator.delivery.attempt": 1}
        return self._tracer.start_span(operation, inside, kind, {**measured, **service, **of_message}, links)

    async def send(self, number: int) -> None:
        self._carrier: dict[str, str] = {}
        created = self._tracer.start_span("create", kind=SpanKind.PRODUCER)
        inside = trace.set_span_in_context(created)
        propagate.inject(self._carrier, inside)
        created.end()
        span, began = self._span(self._send, SpanKind.CLIENT, inside, []), perf_counter()
        token = contexts.attach(trace.set_span_in_context(span))
        await super().send(number)
        contexts.detach(token)
        span.end()
        self._sent_for.record(perf_counter() - began, self._send)

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        async def traced(event: Any) -> None:
            inside = propagate.extract(self._carrier, contexts.Context())
            link = Link(trace.get_current_span(inside).get_span_context())
            span, began = self._span(self._process, SpanKind.CONSUMER, inside, [link]), perf_counter()
            token = contexts.attach(trace.set_span_in_context(span, inside))
            await handle(event)
            span.set_attribute("diator.outcome", "acked")
            self._handled_for.record(perf_counter() - began, self._process)
            contexts.detach(token)
            span.end()
            self._age.record(perf_counter() - began, self._process)

        async with super().consuming(traced, settled, concurrency) as finished:
            yield finished
