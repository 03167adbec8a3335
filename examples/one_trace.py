"""
Two services, two brokers and one trace, drawn as a tree.

    python examples/one_trace.py                                                         # in memory, needs no service
    python examples/one_trace.py --rabbitmq amqp://guest:guest@localhost/ --kafka localhost:9092

*orders* takes a request and sends an event by RabbitMQ. Its own consumer bills the order, which fails at the first
attempt, and sends an event by Kafka. *mailing* consumes that one. Each service has instruments of its own, as if it ran
elsewhere: all that leads from one to the other is the `traceparent` in the headers of the messages.

It needs `pip install 'diator[rabbitmq,kafka,opentelemetry]' opentelemetry-sdk`, and neither a collector nor a web page.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.context import MessageContext
from diator.events import EventEmitter, EventMap, Events, NotificationEvent
from diator.mediator import Mediator
from diator.requests import Request, RequestMap
from diator.retrying import RetryPolicy
from diator.telemetry import OpenTelemetry


@dataclass(frozen=True, kw_only=True)
class PlaceOrder(Request[None]):
    order_id: int


@dataclass(frozen=True, kw_only=True)
class OrderPlaced(NotificationEvent):
    order_id: int


@dataclass(frozen=True, kw_only=True)
class OrderBilled(NotificationEvent):
    order_id: int


orders, billing, mailing = RequestMap(), EventMap(), EventMap()
mailed = asyncio.Event()


@orders.handler
async def place_order(command: PlaceOrder, events: Events) -> None:
    events.append(OrderPlaced(order_id=command.order_id))


@billing.handler
async def bill(event: OrderPlaced, context: MessageContext, events: Events) -> None:
    if context.attempt == 1:
        raise ConnectionError("the bank does not answer")
    events.append(OrderBilled(order_id=event.order_id))


@mailing.handler
async def write_mail(_event: OrderBilled) -> None:
    mailed.set()


# -- the program ---------------------------------------------------------------------------------------------------


async def run(rabbitmq: Any, kafka: Any, exporter: InMemorySpanExporter) -> None:
    first, second = (instrument(name, exporter) for name in ("orders", "mailing"))
    mediator = Mediator(orders, message_broker=rabbitmq, instrument=first)
    soon = RetryPolicy(immediate_retries=0, first_delay=0.2)
    by_kafka = EventEmitter(message_broker=kafka, instrument=first)
    async with (
        rabbitmq,
        kafka,
        Consumer(rabbitmq, event_map=billing, event_emitter=by_kafka, group="billing", retry=soon, instrument=first),
        Consumer(kafka, event_map=mailing, group="mailing", instrument=second),
    ):
        await mediator.send(PlaceOrder(order_id=7))
        await asyncio.wait_for(mailed.wait(), 60)


def instrument(service: str, exporter: InMemorySpanExporter) -> OpenTelemetry:
    """Return the instrument of a service. A real one would export to a collector."""
    tracers = TracerProvider(resource=Resource({"service.name": service}))
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetry(tracer_provider=tracers)


def tree(spans: Sequence[ReadableSpan], parent: int | None = None, indent: str = "") -> Iterator[str]:
    """Yield the lines of a tree: the spans below *parent*, and what is below them."""
    children = [span for span in spans if (span.parent.span_id if span.parent else None) == parent]
    children.sort(key=lambda span: span.start_time or 0)
    for child in children:
        is_last = child is children[-1]
        attributes = child.attributes or {}
        milliseconds = ((child.end_time or 0) - (child.start_time or 0)) / 1e6
        told = [str(child.resource.attributes["service.name"]), f"{milliseconds:.1f} ms"]
        told += [str(attributes[name]) for name in ("messaging.system", "diator.outcome") if name in attributes]
        branch = "" if parent is None else "└─ " if is_last else "├─ "
        yield f"{indent}{branch}{child.name}  ({', '.join(told)})"
        below = "" if parent is None else "   " if is_last else "│  "
        yield from tree(spans, child.context.span_id if child.context else None, indent + below)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Two services, two brokers and one trace.")
    parser.add_argument("--rabbitmq", help="the URL of RabbitMQ; without it, a broker in memory")
    parser.add_argument("--kafka", help="bootstrap servers of Kafka; without them, a broker in memory")
    chosen = parser.parse_args()
    prefix, exporter = f"one-trace-{uuid4().hex[:8]}", InMemorySpanExporter()
    rabbitmq: Any = MemoryMessageBroker()
    kafka: Any = MemoryMessageBroker()
    if chosen.rabbitmq:
        from diator.brokers.rabbitmq import RabbitMQMessageBroker  # noqa: PLC0415  # needs the extra `rabbitmq`

        rabbitmq = RabbitMQMessageBroker(chosen.rabbitmq, prefix)
    if chosen.kafka:
        from diator.brokers.kafka import KafkaMessageBroker  # noqa: PLC0415  # needs the extra `kafka`

        kafka = KafkaMessageBroker(chosen.kafka, prefix)
    await run(rabbitmq, kafka, exporter)
    spans = exporter.get_finished_spans()
    print("\n".join(tree(spans)))
    traces = {span.context.trace_id for span in spans if span.context}
    print(f"\n{len(spans)} spans, {len(traces)} trace{'s' * (len(traces) != 1)}")


asyncio.run(main())
