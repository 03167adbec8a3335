"""Metrics for Prometheus, for programs without OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter, time

from diator._extras import importing
from diator._hints import name_of
from diator._options import check_type
from diator.brokers.message import Message, Topic
from diator.consumer import Consumer, Health
from diator.context import MessageContext
from diator.exceptions import ConfigurationError
from diator.instruments import Handled, Instrument, OutboxState
from diator.telemetry._names import (
    HEALTH,
    OUTBOX,
    Figure,
    check_consumers,
    destination_of,
    kind_of,
    system_of,
    where_of,
)

with importing("diator.telemetry.Prometheus", "prometheus", "prometheus_client"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric

_SENT = "sent"


class Prometheus(Instrument):
    """
    Counts and measures requests, sends and messages for Prometheus.

    Labels are names only: of requests, topics, groups, outcomes and types of errors. No label has an id, a key or
    anything else of a message. One instrument serves all mediators, emitters and consumers of a process.

    Args:
        registry: Where the metrics are registered. Default: the global one.

    Raises:
        ConfigurationError: The registry has these metrics already, or is none.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        check_type("registry", registry, CollectorRegistry, is_needed=True)
        try:
            self._requests = Histogram(
                "diator_request_seconds", "How long a request took.", ["request", "outcome"], registry=registry
            )
            self._sent = Counter(
                "diator_sent_messages", "Messages that were to be sent.", ["topic", "outcome"], registry=registry
            )
            self._sends = Histogram("diator_send_seconds", "How long a send took.", ["topic"], registry=registry)
            self._deliveries = Counter(
                "diator_deliveries",
                "Deliveries, by their outcome.",
                ["topic", "group", "outcome", "reason"],
                registry=registry,
            )
            self._retries = Counter(
                "diator_retries", "Immediate retries of handlers.", ["topic", "group"], registry=registry
            )
            self._redelivered = Counter(
                "diator_redelivered", "Messages that were delivered before.", ["topic", "group"], registry=registry
            )
            self._handling_seconds = Histogram(
                "diator_handling_seconds",
                "How long the handling of a message took, with its immediate retries.",
                ["topic", "group"],
                registry=registry,
            )
            self._age = Histogram(
                "diator_critical_time_seconds",
                "How old a message was when it was handled, by the time that the service gave it.",
                ["topic", "group"],
                registry=registry,
            )
            self._in_flight = Gauge(
                "diator_in_flight", "Messages that are being handled.", ["topic", "group"], registry=registry
            )
            self._health = _Health()
            registry.register(self._health)
            self._outboxes = _Outboxes()
            registry.register(self._outboxes)
        except ValueError as error:
            raise ConfigurationError(
                "the registry has the metrics of diator already; pass the same Prometheus object to all mediators, "
                "emitters and consumers"
            ) from error

    def watch(self, **consumers: Consumer) -> None:
        """
        Export the health of *consumers*, each under its name here, whenever the metrics are read.

        Raises:
            ConfigurationError: One of them is not a `Consumer`.
        """
        check_consumers(consumers)
        self._health.consumers.update(consumers)

    def handling(self, request: object, /) -> AbstractContextManager[object]:
        def note(outcome: str, took: float) -> None:
            self._requests.labels(name_of(type(request)), outcome).observe(took)

        return _timed("answered", note)

    def sending(self, messages: Sequence[Message], broker: object, /) -> AbstractContextManager[object]:
        topics = [destination_of(Topic(message.message_type, message.message_name)) for message in messages]

        def note(outcome: str, took: float) -> None:
            for topic in topics:
                self._sent.labels(topic, outcome).inc()
            for topic in {*topics}:
                self._sends.labels(topic).observe(took)

        return _timed(_SENT, note)

    def processing(self, context: MessageContext, broker: object, /) -> AbstractContextManager[object]:
        labels = destination_of(context.topic), context.group or ""
        if context.redelivered:
            self._redelivered.labels(*labels).inc()
        return self._processing(labels, context)

    @contextmanager
    def _processing(self, labels: tuple[str, str], context: MessageContext) -> Generator[None]:
        in_flight = self._in_flight.labels(*labels)
        in_flight.inc()
        try:
            yield
        finally:
            in_flight.dec()
            if context.sent_at is not None:
                self._age.labels(*labels).observe(max(0.0, time() - context.sent_at.timestamp()))

    def settled(self, handled: Handled, broker: object, /) -> None:
        labels = destination_of(handled.topic), handled.group or ""
        self._deliveries.labels(*labels, handled.outcome, kind_of(handled.reason)).inc()
        self._handling_seconds.labels(*labels).observe(handled.seconds)
        if handled.retries:
            self._retries.labels(*labels).inc(handled.retries)

    def outbox(self, state: OutboxState, broker: object, /) -> None:
        self._outboxes.states[system_of(broker), where_of(broker)] = state


@contextmanager
def _timed(success: str, note: Callable[[str, float], None]) -> Generator[None]:
    """Pass the outcome of the block, *success* or the type of its error, and its duration in seconds to *note*."""
    began, outcome = perf_counter(), success
    try:
        yield
    except BaseException as error:
        outcome = name_of(type(error))
        raise
    finally:
        note(outcome, perf_counter() - began)


class _Health:
    """Reads the health of the watched consumers when Prometheus asks."""

    def __init__(self) -> None:
        self.consumers: dict[str, Consumer] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        found: dict[tuple[str, ...], Health | OutboxState] = {
            (name,): consumer.health() for name, consumer in self.consumers.items()
        }
        return _families("diator_consumer", HEALTH, ["consumer"], found)


class _Outboxes:
    """Has the states that relays have reported, until Prometheus asks."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, ...], OutboxState] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        return _families("diator_outbox", OUTBOX, ["system", "where"], {**self.states})


def _families(
    prefix: str,
    figures: Sequence[Figure],
    labels: Sequence[str],
    states: Mapping[tuple[str, ...], Health | OutboxState],
) -> Iterable[Metric]:
    for figure in figures:
        kind = CounterMetricFamily if figure.only_grows else GaugeMetricFamily
        name = f"{prefix}_{figure.name}" + ("_seconds" if figure.unit == "s" else "")
        family = kind(name, figure.meaning, labels=labels)
        for values, state in states.items():
            if (value := figure.of(state)) is not None:
                family.add_metric(values, value)
        yield family
