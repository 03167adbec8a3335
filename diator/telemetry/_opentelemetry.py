"""Traces and metrics for OpenTelemetry, by its semantic conventions for messaging."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from time import perf_counter, time
from typing import TypeAlias

from diator._extras import importing
from diator._hints import name_of
from diator.brokers.message import Message, Topic
from diator.consumer import Consumer
from diator.context import MessageContext
from diator.instruments import Handled, Instrument
from diator.telemetry._names import HEALTH, Figure, address_of, check_consumers, destination_of, kind_of, system_of

with importing("diator.telemetry.OpenTelemetry", "opentelemetry", "opentelemetry"):
    from opentelemetry import context as contexts
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.propagators.textmap import Setter, TextMapPropagator
    from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode, TracerProvider

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
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", unit="{message}", description="Messages that were to be sent."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", unit="{message}", description="Messages that were received."
        )
        self._deliveries = meter.create_counter(
            "diator.deliveries", unit="{delivery}", description="Deliveries, by their outcome."
        )
        self._in_flight = meter.create_up_down_counter(
            "diator.in_flight", unit="{message}", description="Messages that are being handled."
        )
        self._processing: dict[Hashable, Span] = {}  # of the deliveries whose outcome is not reported yet
        self._meter = meter
        self._watched: dict[str, Consumer] = {}

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

    def handling(self, request: object, /) -> AbstractContextManager[object]:
        return self._handling(name_of(type(request)))

    @contextmanager
    def _handling(self, name: str) -> Generator[None]:
        with self._span(f"handle {name.rpartition('.')[2]}", SpanKind.INTERNAL, {REQUEST: name}):
            yield

    def headers(self, event: object, /) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        if trace.get_current_span().get_span_context().is_valid:
            self._inject(carrier)
            return carrier
        # Nothing traces this event yet. Its message begins a trace, which the send and its readers belong to.
        with self._tracer.start_as_current_span(
            f"create {name_of(type(event)).rpartition('.')[2]}", kind=SpanKind.PRODUCER
        ):
            self._inject(carrier)
        return carrier

    def _inject(self, carrier: dict[str, str]) -> None:
        inject = propagate.inject if self._propagator is None else self._propagator.inject
        inject(carrier, setter=_Setter())

    def _extract(self, headers: Mapping[str, str]) -> tuple[Context, list[Link]]:
        """Return the context of *headers*, and a link to their span if they name one."""
        extract = propagate.extract if self._propagator is None else self._propagator.extract
        found = extract(headers, context=Context())
        span = trace.get_current_span(found).get_span_context()
        return found, [Link(span)] if span.is_valid else []

    @contextmanager
    def sending(self, messages: Sequence[Message], broker: object, /) -> Generator[None]:
        links = [link for message in messages for link in self._extract(message.headers)[1]]
        topics = {Topic(message.message_type, message.message_name) for message in messages}
        where = destination_of(topics.pop()) if len(topics) == 1 else ""
        common = {**_service(broker), **({DESTINATION: where} if where else {}), OPERATION: "send"}
        attributes = {**common, OPERATION_TYPE: "send", **_address(broker)}
        if len(messages) == 1:
            attributes[MESSAGE_ID] = str(messages[0].message_id)
        else:
            attributes[BATCH] = len(messages)
        measured: _Attributes = {**common}
        began = perf_counter()
        is_traced = trace.get_current_span().get_span_context().is_valid
        inside = self._extract(messages[0].headers)[0] if not is_traced and len(messages) == 1 else None
        try:
            with self._span(f"send {where}".strip(), SpanKind.CLIENT, attributes, links, inside):
                yield
        except BaseException as error:
            measured[ERROR] = name_of(type(error))
            raise
        finally:
            self._sent_for.record(perf_counter() - began, measured)
            self._sent.add(len(messages), measured)

    @contextmanager
    def processing(self, context: MessageContext, broker: object, /) -> Generator[None]:
        where = destination_of(context.topic)
        common: _Attributes = {**_service(broker), DESTINATION: where, OPERATION: "process"}
        if context.group is not None:
            common[GROUP] = context.group
        attributes = {
            **common,
            OPERATION_TYPE: "process",
            **_address(broker),
            MESSAGE_ID: str(context.message_id),
            ATTEMPT: context.attempt,
        }
        found, links = self._extract(context.headers)
        self._consumed.add(1, common)
        self._in_flight.add(1, common)
        # The span in which the program started the consumer is not the parent. The baggage is for the handlers.
        attached = contexts.attach(found if self._parent else trace.set_span_in_context(INVALID_SPAN, found))
        try:
            with self._span(f"process {where}", SpanKind.CONSUMER, attributes, links) as span:
                self._processing[_key(context)] = span
                yield
        finally:
            contexts.detach(attached)
            self._in_flight.add(-1, common)
            if context.sent_at is not None:
                self._age.record(max(0.0, time() - context.sent_at.timestamp()), common)

    def settled(self, handled: Handled, broker: object, /) -> None:
        processing = self._processing.pop(_key(handled), INVALID_SPAN)
        where = destination_of(handled.topic)
        common: _Attributes = {**_service(broker), DESTINATION: where}
        if handled.group is not None:
            common[GROUP] = handled.group
        outcome: _Attributes = {OUTCOME: handled.outcome}
        if reason := kind_of(handled.reason):
            outcome[REASON] = reason
        failed: _Attributes = {} if handled.error is None else {ERROR: name_of(type(handled.error))}
        self._deliveries.add(1, {**common, **outcome})
        self._handled_for.record(handled.seconds, {**common, OPERATION: "process", **failed})
        if processing.is_recording():  # otherwise it has ended before its dead letter was stored
            processing.set_attributes(outcome)
        if handled.outcome != "acked":
            settling = {**common, **outcome, **failed, OPERATION: "settle", OPERATION_TYPE: "settle"}
            inside = trace.set_span_in_context(processing, Context())
            self._tracer.start_span(f"settle {where}", inside, SpanKind.CLIENT, settling).end()

    @contextmanager
    def _span(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, str | int],
        links: Sequence[Link] = (),
        inside: Context | None = None,
    ) -> Generator[Span]:
        """Start a span. It has the type of an error, and neither its text nor its traceback: they may have content."""
        with self._tracer.start_as_current_span(
            name,
            inside,
            kind,
            attributes,
            links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute(ERROR, name_of(type(error)))
                span.set_status(Status(StatusCode.ERROR))
                raise


def _key(of: MessageContext | Handled) -> Hashable:
    """Return what tells deliveries apart: each group has a message, and events of two sources may have one id."""
    return of.topic, of.group, of.message_id, of.attempt


class _Setter(Setter[dict[str, str]]):
    def set(self, carrier: dict[str, str], key: str, value: str) -> None:
        carrier[key] = value


@lru_cache(maxsize=64)
def _known(system: str) -> _Attributes:
    return {SYSTEM: system}


def _service(broker: object) -> _Attributes:
    return _known(system_of(broker))


def _address(broker: object) -> _Attributes:
    host, port = address_of(broker)
    return {**({SERVER: host} if host else {}), **({PORT: port} if port else {})}
