"""Defects of a consumer, on a healthy transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from uuid import UUID

from diator.brokers.base import Delivery, ReadableBroker
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import Envelope
from diator.consumer import Consumer, Health
from diator.context import MessageContext
from diator.exceptions import DecodingError
from diator.instruments import Handled
from diator.retrying import RetryPolicy
from diator.testing.saboteurs._base import FOREVER, Saboteur, caught_by


def _consumed_by(consumer: type[Consumer], *ids: str) -> None:
    """Register a healthy transport below a broken *consumer*, caught by the scenarios *ids*."""
    made: type[Saboteur] = type(consumer.__name__, (Saboteur,), {"consumer": consumer, "__doc__": consumer.__doc__})
    caught_by(*ids)(made)


class CancelsOnStop(Consumer):
    """Cancels running handlers when it is stopped."""

    def stop(self) -> None:
        super().stop()
        super().stop()


class NeverStops(Consumer):
    """Waits for running handlers without a limit."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["drain_timeout"] = 1.0
        super().__init__(broker, **options)

    def stop(self) -> None:
        if not self._stopping.is_set():
            super().stop()


class HandlesOneMore(Consumer):
    """Handles one event more at once than its concurrency allows."""

    def __init__(self, broker: ReadableBroker, *, concurrency: int = 1, **options: Any) -> None:
        super().__init__(broker, concurrency=concurrency + 1, **options)


class HasNoLimit(Consumer):
    """Lets any number of messages wait behind their keys."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["prefetch"] = 1_000_000
        super().__init__(broker, **options)


class HasNoTimeout(Consumer):
    """Ignores the handler timeout."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["handler_timeout"] = FOREVER
        super().__init__(broker, **options)


class RetriesOnceMore(Consumer):
    """Handles a failing event once more than configured."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        more = RetryPolicy(immediate_pause=0.01) if retry is None else retry
        more = replace(more, immediate_retries=more.immediate_retries + 1, permanent=())
        super().__init__(broker, retry=more, **options)


class IgnoresRequirements(Consumer):
    """Starts whatever capabilities are required."""

    def __init__(self, broker: ReadableBroker, *, requires: Capabilities | None = None, **options: Any) -> None:
        super().__init__(broker, **options)


class DecodesTheEventOnce(Consumer):
    """Passes the event of a failed attempt to the retry."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        routes = self._handling._routes  # noqa: SLF001  # the place of the defect
        for topic, route in routes.items():
            routes[topic] = replace(route, read=_once(route.read))


def _once(read: Callable[[Envelope], Any]) -> Callable[[Envelope], Any]:
    events: dict[UUID, Any] = {}

    def read_once(envelope: Envelope) -> Any:
        if envelope.message_id not in events:
            events[envelope.message_id] = read(envelope)
        return events[envelope.message_id]

    return read_once


class FailsOnAReturnValue(Consumer):
    """Reports a success as a dead letter."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, outcome="dead_lettered"))

        super().__init__(broker, on_handled=note, **options)


class CountsForEver(Consumer):
    """Counts finished deliveries as in flight."""

    def health(self) -> Health:
        return replace(super().health(), in_flight=1, receiving=True)


class StopsWithTheNextMessage(Consumer):
    """Notices its stop only after a while when it waits."""

    def stop(self) -> None:
        asyncio.get_running_loop().call_later(1.5, super().stop)


class HidesReasons(Consumer):
    """Dead-letters a message without reporting the reason."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, reason=None))

        super().__init__(broker, on_handled=note, **options)


class DecodesAnySize(Consumer):
    """Has no limit on the size of a body."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        self._handling._max_message_bytes *= 2  # noqa: SLF001


class AcceptsAnyRetry(Consumer):
    """Accepts any retry policy, and never retries with a delay."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        super().__init__(broker, retry=retry and replace(retry, delayed_retries=0), **options)


class SharesAContext(Consumer):
    """Shows every handler the context of the message that was received last."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        read, make = self._handling.read, self._handling.context_of
        last: list[Delivery] = []

        def noting(delivery: Delivery) -> Envelope | DecodingError:
            last[:] = [delivery]
            return read(delivery)

        def context_of(delivery: Delivery, message: Envelope | None = None) -> MessageContext | None:
            del message
            return make(last[0] if last else delivery)

        self._handling.read = noting  # type: ignore[method-assign]
        self._handling.context_of = context_of  # type: ignore[method-assign]


class DeadLettersMisfits(Consumer):
    """Dead-letters a message that does not fit its class although a retry is left."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        super().__init__(broker, retry=retry and replace(retry, retry_undecodable=False), **options)


for _consumer, _ids in {
    CancelsOnStop: ("LIF-05",),
    NeverStops: ("LIF-06", "LIF-20"),
    HandlesOneMore: ("FLW-01", "FLW-13"),
    HasNoLimit: ("FLW-18",),
    HasNoTimeout: ("PSN-07",),
    RetriesOnceMore: ("PSN-04", "PSN-14"),
    IgnoresRequirements: ("API-02",),
    DecodesTheEventOnce: ("PSN-10",),
    FailsOnAReturnValue: ("SUB-11", "ISO-08", "ACK-18", "PSN-09", "PSN-11"),
    CountsForEver: ("LEK-09", "LIF-21"),
    StopsWithTheNextMessage: ("LIF-21",),
    HidesReasons: ("PSN-01", "PSN-13"),
    DecodesAnySize: ("SEC-07",),
    AcceptsAnyRetry: ("ACK-04",),
    DeadLettersMisfits: ("PSN-16",),
    SharesAContext: ("HDR-12",),
}.items():
    _consumed_by(_consumer, *_ids)


@caught_by("PSN-15")
class CannotRetry(Saboteur):
    """Promises no delayed retry, under a consumer that accepts any retry policy."""

    consumer: ClassVar[type[Consumer]] = AcceptsAnyRetry

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, delayed_retry=False)
