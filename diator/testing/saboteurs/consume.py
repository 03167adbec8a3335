"""Consumers that are wrong, above a transport that is not."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from diator._handling import Handled
from diator.brokers.base import ReadableBroker
from diator.brokers.capabilities import Capabilities
from diator.consumer import Consumer, Health
from diator.retrying import RetryPolicy
from diator.testing.saboteurs._base import FOREVER, Saboteur, caught_by


def _consumed_by(consumer: type[Consumer], *ids: str) -> None:
    """Make a saboteur that is the healthy transport below a broken *consumer*."""
    made: type[Saboteur] = type(consumer.__name__, (Saboteur,), {"consumer": consumer, "__doc__": consumer.__doc__})
    caught_by(*ids)(made)


class CutsOff(Consumer):
    """Cancels what is being handled when it is stopped."""

    def stop(self) -> None:
        super().stop()
        super().stop()


class GoesOnForever(Consumer):
    """Waits for what is being handled, however long that takes."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["drain_timeout"] = 1.0
        super().__init__(broker, **options)

    def stop(self) -> None:
        if not self._stopping.is_set():
            super().stop()


class HandlesOneMore(Consumer):
    """Handles one more at once than it was allowed."""

    def __init__(self, broker: ReadableBroker, *, concurrency: int = 1, **options: Any) -> None:
        super().__init__(broker, concurrency=concurrency + 1, **options)


class HasNoTimeout(Consumer):
    """Lets a handler hang."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["handler_timeout"] = FOREVER
        super().__init__(broker, **options)


class RetriesOnceMore(Consumer):
    """Handles once more than it was told."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        more = RetryPolicy(immediate_pause=0.01) if retry is None else retry
        more = replace(more, immediate_retries=more.immediate_retries + 1, permanent=())
        super().__init__(broker, retry=more, **options)


class IgnoresRequirements(Consumer):
    """Starts whatever is required."""

    def __init__(self, broker: ReadableBroker, *, requires: Capabilities | None = None, **options: Any) -> None:
        super().__init__(broker, **options)


class ReadsTheEventOnce(Consumer):
    """Gives a handler that is called again what the first call has left."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        routes = self._handling._routes  # noqa: SLF001  # where a defect of reading would be
        for topic, route in routes.items():
            routes[topic] = replace(route, read=functools.cache(route.read))


class GivesUpOnAnAnswer(Consumer):
    """Takes an answer for a failure, and success for a reason to stop."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, outcome="dead_lettered"))

        super().__init__(broker, on_handled=note, **options)


class NeverForgets(Consumer):
    """Counts as in flight what is done."""

    def health(self) -> Health:
        return replace(super().health(), in_flight=1, receiving=True)


class StopsWithTheNextMessage(Consumer):
    """Does not notice its stop while it waits."""

    def stop(self) -> None:
        asyncio.get_running_loop().call_later(1.5, super().stop)


class RetriesWhatCannotBeRead(Consumer):
    """Says nothing about why it put something aside."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, reason=None))

        super().__init__(broker, on_handled=note, **options)


class ReadsWhateverSize(Consumer):
    """Has no limit to what it reads."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        self._handling._max_message_bytes *= 2  # noqa: SLF001


class TakesAnyRetry(Consumer):
    """Accepts a policy, and leaves out what the transport cannot."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        super().__init__(broker, retry=retry and replace(retry, delayed_retries=0), **options)


for _consumer, _ids in {
    CutsOff: ("LIF-05",),
    GoesOnForever: ("LIF-06", "LIF-20"),
    HandlesOneMore: ("FLW-01", "FLW-13"),
    HasNoTimeout: ("PSN-07",),
    RetriesOnceMore: ("PSN-04", "PSN-14"),
    IgnoresRequirements: ("API-02",),
    ReadsTheEventOnce: ("PSN-10",),
    GivesUpOnAnAnswer: ("SUB-11", "ISO-08", "ACK-18", "PSN-09", "PSN-11"),
    NeverForgets: ("LEK-09", "LIF-21"),
    StopsWithTheNextMessage: ("LIF-21",),
    RetriesWhatCannotBeRead: ("PSN-01", "PSN-03", "PSN-13"),
    ReadsWhateverSize: ("SEC-07",),
    TakesAnyRetry: ("ACK-04",),
}.items():
    _consumed_by(_consumer, *_ids)


@caught_by("PSN-15")
class CannotRetryAndSaysNothing(Saboteur):
    """Does not promise a retry, and is run by a consumer that takes any policy."""

    consumer: ClassVar[type[Consumer]] = TakesAnyRetry

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, delayed_retry=False)
