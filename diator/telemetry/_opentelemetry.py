"""Traces and metrics for OpenTelemetry, by its semantic conventions for messaging."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from threading import Lock
from time import perf_counter, time
from typing import TypeAlias

from diator._extras import importing
from diator._hints import name_of
from diator._options import check_type
from diator.brokers.message import Message, Topic
from diator.consumer import Consumer
from diator.context import MessageContext
from diator.instruments import Handled, Instrument, OutboxState
from diator.telemetry._names import (
    HEALTH,
    OUTBOX,
    Figure,
    address_of,
    check_consumers,
    destination_of,
    kind_of,
    system_of,
    where_of,
)

with importing("diator.telemetry.OpenTelemetry", "opentelemetry", "opentelemetry"):
    from opentelemetry import context as contexts
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.propagators.textmap import Setter, TextMapPropagator
    from opentelemetry.trace import (
        INVALID_SPAN,
        INVALID_SPAN_CONTEXT,
        Link,
        NonRecordingSpan,
        Span,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TracerProvider,
    )

# The conventions for messaging are still in development, so these names are ours to keep.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"
SYSTEM = "messaging.system"
OPERATION, OPERATION_TYPE = "messaging.operation.name", "messaging.operation.type"
DESTINATION = "messaging.destination.name"
GROUP = "messaging.consumer.group.name"
MESSAGE_ID = "messaging.message.id"
BATCH = "messaging.batch.message_count"
SERVER, PORT = "server.address", "server.port"
ERROR = "error.type"
CONSUMER = "diator.consumer"
REQUEST, ATTEMPT, OUTCOME, REASON = "diator.request.type", "diator.delivery.attempt", "diator.outcome", "diator.reason"

# In seconds, as the conventions advise.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

_Attributes: TypeAlias = dict[str, str | int]
_NONE: _Attributes = {}


class OpenTelemetry(Instrument):
    """
    Traces requests, sends and messages with OpenTelemetry, and measures sends and messages.

    A message carries the context of the span in which its event was raised (`traceparent`, `tracestate`, and the
    baggage), so that the traces of several services, written with any library, are one trace. Spans and metrics contain
    neither payloads nor headers nor keys, and of an error only its type. A `traceparent` that is none is ignored.

    Only the API is needed: without an SDK in the program, nothing is recorded.

    Args:
        tracer_provider: Default: the global one.
        meter_provider: Default: the global one.
        propagator: How the context is written into headers. Default: the global one.
        parent: Whether the span of a message is a child of the span that its headers name. If not, it begins a new
            trace with a link to that span. It has the link in both cases.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagator: TextMapPropagator | None = None,
        parent: bool = True,
    ) -> None:
        check_type("tracer_provider", tracer_provider, TracerProvider)
        check_type("meter_provider", meter_provider, MeterProvider)
        check_type("propagator", propagator, TextMapPropagator)
        self._tracer = trace.get_tracer("diator", tracer_provider=tracer_provider, schema_url=SCHEMA_URL)
        self._propagator = propagator
        self._parent = parent
        meter = metrics.get_meter("diator", meter_provider=meter_provider, schema_url=SCHEMA_URL)
        self._sent_for = meter.create_histogram(
            "messaging.client.operation.duration",
            unit="s",
            description="How long a send took.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._handled_for = meter.create_histogram(
            "messaging.process.duration",
            unit="s",
            description="How long the handling of a message took, with its immediate retries.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._age = meter.create_histogram(
            "diator.critical_time",
            unit="s",
            description="How old a message was when it was handled, by the time that the service gave it.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._sent = _Count(
            meter.create_observable_counter,
            "messaging.client.sent.messages",
            "{message}",
            "Messages that were to be sent.",
        )
        self._consumed = _Count(
            meter.create_observable_counter,
            "messaging.client.consumed.messages",
            "{message}",
            "Messages that were received.",
        )
        self._deliveries = _Count(
            meter.create_observable_counter,
            "diator.deliveries",
            "{delivery}",
            "Deliveries, by their outcome.",
            attrgetter("common"),
        )
        self._in_flight = _Count(
            meter.create_observable_up_down_counter, "diator.in_flight", "{message}", "Messages that are being handled."
        )
        self._processing: dict[Hashable, Span] = {}  # of the deliveries whose outcome is not reported yet
        # The headers that were made last, and of which span: mostly, their message is the next that is sent.
        self._made: tuple[dict[str, str], SpanContext] = {}, INVALID_SPAN_CONTEXT
        self._meter = meter
        self._watched: dict[str, Consumer] = {}
        self._outboxes: dict[tuple[str, str], OutboxState] = {}

    def watch(self, **consumers: Consumer) -> None:
        """
        Measure the health of *consumers*, each under its name here, whenever metrics are read.

        Raises:
            ConfigurationError: One of them is not a `Consumer`.
        """
        check_consumers(consumers)
        if not self._watched:
            for figure in HEALTH:
                self._meter.create_observable_gauge(
                    f"diator.{figure.name}", [self._reader(figure)], unit=figure.unit, description=figure.meaning
                )
        self._watched.update(consumers)

    def _reader(self, figure: Figure) -> Callable[[CallbackOptions], list[Observation]]:
        def read(_: CallbackOptions) -> list[Observation]:
            found = {name: figure.of(consumer.health()) for name, consumer in self._watched.items()}
            return [Observation(value, {CONSUMER: name}) for name, value in found.items() if value is not None]

        return read

    def outbox(self, state: OutboxState, broker: object, /) -> None:
        if not self._outboxes:
            for figure in OUTBOX:
                create = (
                    self._meter.create_observable_counter if figure.only_grows else self._meter.create_observable_gauge
                )
                create(
                    f"diator.outbox.{figure.name}",
                    [self._outbox_reader(figure)],
                    unit=figure.unit,
                    description=figure.meaning,
                )
        self._outboxes[system_of(broker), where_of(broker)] = state

    def _outbox_reader(self, figure: Figure) -> Callable[[CallbackOptions], list[Observation]]:
        def read(_: CallbackOptions) -> list[Observation]:
            return [
                Observation(value, _address(system, where))
                for (system, where), state in [*self._outboxes.items()]
                if (value := figure.of(state)) is not None
            ]

        return read

    def handling(self, request: object, /) -> AbstractContextManager[object]:
        name = name_of(type(request))
        return _Current(self._tracer.start_span(f"handle {name.rpartition('.')[2]}", attributes={REQUEST: name}))

    def headers(self, event: object, /) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        span = trace.get_current_span()
        if span.get_span_context().is_valid:
            self._inject(carrier)
        else:
            # Nothing traces this event yet. Its message begins a trace, which the send and its readers belong to.
            name = f"create {name_of(type(event)).rpartition('.')[2]}"
            span = self._tracer.start_span(name, kind=SpanKind.PRODUCER)
            self._inject(carrier, trace.set_span_in_context(span))
            span.end()
        self._made = carrier, span.get_span_context()
        return carrier

    def _inject(self, carrier: dict[str, str], context: Context | None = None) -> None:
        inject = propagate.inject if self._propagator is None else self._propagator.inject
        inject(carrier, context=context, setter=_SETTER)

    def _extract(self, headers: Mapping[str, str]) -> Context:
        extract = propagate.extract if self._propagator is None else self._propagator.extract
        return extract(headers, context=Context())

    def _made_in(self, headers: Mapping[str, str]) -> SpanContext:
        """Return the span that the headers of a message to send name: without parsing them, if they were made last."""
        made, span = self._made
        if made and made.items() <= headers.items():
            return span
        return trace.get_current_span(self._extract(headers)).get_span_context()

    def sending(self, messages: Sequence[Message], broker: object, /) -> AbstractContextManager[object]:
        topics = {(message.message_type, message.message_name) for message in messages}
        known = _known(system_of(broker), where_of(broker), topics.pop() if len(topics) == 1 else None, None, "send")
        spans = [self._made_in(message.headers) for message in messages]
        inside, parent, is_one = None, trace.get_current_span().get_span_context(), len(messages) == 1
        if is_one and not parent.is_valid:
            [parent] = spans
            inside = trace.set_span_in_context(NonRecordingSpan(parent), Context())
        span = self._tracer.start_span(
            known.span,
            inside,
            SpanKind.CLIENT,
            {**known.traced, **({MESSAGE_ID: str(messages[0].message_id)} if is_one else {BATCH: len(messages)})},
            [
                *{
                    each.span_id: Link(each) for each in spans if each.is_valid and each.span_id != parent.span_id
                }.values()
            ],
        )
        began = perf_counter()

        def measure(error: BaseException | None) -> None:
            failed = _failed(error)
            self._sent_for.record(perf_counter() - began, {**known.measured, **failed} if failed else known.measured)
            self._sent.add(len(messages), known, failed)

        return _Current(span, then=measure)

    def processing(self, context: MessageContext, broker: object, /) -> AbstractContextManager[object]:
        topic = context.message_type, context.message_name
        known = _known(system_of(broker), where_of(broker), topic, context.group, "process")
        inside = self._extract(context.headers)
        made = trace.get_current_span(inside).get_span_context()
        if not self._parent:  # the baggage is for the handlers
            inside = trace.set_span_in_context(INVALID_SPAN, inside)
        span = self._tracer.start_span(
            known.span,
            inside,  # so the span in which the program started the consumer is not the parent
            SpanKind.CONSUMER,
            {**known.traced, MESSAGE_ID: str(context.message_id), ATTEMPT: context.attempt},
            [Link(made)] if made.is_valid else (),
        )
        self._processing[topic, context.group, context.message_id, context.attempt] = span
        self._consumed.add(1, known)
        self._in_flight.add(1, known)

        def measure(_: BaseException | None) -> None:
            self._in_flight.add(-1, known)
            if context.sent_at is not None:
                self._age.record(max(0.0, time() - context.sent_at.timestamp()), known.measured)

        return _Current(span, inside, then=measure)

    def settled(self, handled: Handled, broker: object, /) -> None:
        # Each group has a message, and events of two sources may have one id.
        key = handled.topic, handled.group, handled.message_id, handled.attempt
        known = _known(system_of(broker), where_of(broker), handled.topic, handled.group, "process")
        processing = self._processing.pop(key, INVALID_SPAN)
        outcome: _Attributes = {OUTCOME: handled.outcome}
        if reason := kind_of(handled.reason):
            outcome[REASON] = reason
        failed = _failed(handled.error)
        self._deliveries.add(1, known, outcome)
        self._handled_for.record(handled.seconds, {**known.measured, **failed} if failed else known.measured)
        if processing.is_recording():  # otherwise it has ended before its dead letter was stored
            for name, value in outcome.items():
                processing.set_attribute(name, value)
        if handled.outcome != "acked":
            settling = {**known.common, **outcome, **failed, OPERATION: "settle", OPERATION_TYPE: "settle"}
            inside = trace.set_span_in_context(processing, Context())
            self._tracer.start_span(f"settle {known.destination}", inside, SpanKind.CLIENT, settling).end()


def _failed(error: BaseException | None) -> _Attributes:
    return {} if error is None else {ERROR: name_of(type(error))}


class _Current(AbstractContextManager[None]):
    """
    Makes a span the current one, and ends it.

    It has the type of an error, and neither its text nor its traceback: they may have content. A generator inside of
    the one of `start_as_current_span` would take longer than the handler of a message.
    """

    __slots__ = ("_inside", "_span", "_then", "_token")

    def __init__(
        self,
        span: Span,
        inside: Context | None = None,
        then: Callable[[BaseException | None], None] = lambda _: None,
    ) -> None:
        self._span = span
        self._inside = inside
        self._then = then

    def __enter__(self) -> None:
        self._token = contexts.attach(trace.set_span_in_context(self._span, self._inside))

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        contexts.detach(self._token)
        if error is not None:
            self._span.set_attribute(ERROR, name_of(type(error)))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
        self._then(error)


class _Count:
    """A counter that is read with the metrics. This class adds, because an addition by the SDK takes 8 µs."""

    def __init__(
        self,
        create: Callable[..., object],
        name: str,
        unit: str,
        description: str,
        attributes: Callable[[_Known], _Attributes] = attrgetter("measured"),
    ) -> None:
        self._counts: dict[tuple[_Known, tuple[tuple[str, str | int], ...]], int] = {}
        self._attributes = attributes
        self._lock = Lock()  # a program may run an event loop in each of several threads
        create(name, [self._read], unit=unit, description=description)

    def add(self, number: int, known: _Known, more: _Attributes = _NONE) -> None:
        key = known, (*more.items(),)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + number

    def _read(self, _: CallbackOptions) -> list[Observation]:
        with self._lock:
            counts = [*self._counts.items()]
        return [Observation(count, {**self._attributes(known), **dict(more)}) for (known, more), count in counts]


class _Setter(Setter[dict[str, str]]):
    def set(self, carrier: dict[str, str], key: str, value: str) -> None:
        carrier[key] = value


_SETTER = _Setter()


@dataclass(frozen=True, eq=False)  # there is one for each destination, whose hash is its identity
class _Known:
    """
    What all messages of a destination have in common.

    Attributes:
        destination: Its name; empty for messages to several.
        span: The name of their spans.
        traced: Attributes of their spans.
        measured: Attributes of their metrics.
        common: Those of both that do not name the operation.
    """

    destination: str
    span: str
    traced: _Attributes
    measured: _Attributes
    common: _Attributes


def _address(system: str, where: str) -> _Attributes:
    host, port = address_of(where)
    return {SYSTEM: system, **({SERVER: host} if host else {}), **({PORT: port} if port else {})}


@cache
def _known(system: str, where: str, topic: tuple[str, str] | None, group: str | None, operation: str) -> _Known:
    destination = "" if topic is None else destination_of(Topic(*topic))
    common: _Attributes = {SYSTEM: system}
    if destination:
        common[DESTINATION] = destination
    if group is not None:
        common[GROUP] = group
    measured: _Attributes = {**common, OPERATION: operation}
    traced: _Attributes = {**measured, OPERATION_TYPE: operation, **_address(system, where)}
    return _Known(destination, f"{operation} {destination}".strip(), traced, measured, common)
