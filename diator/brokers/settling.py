"""What transports share of settling: acknowledgements that go out together, and what is said about a dead letter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Generic, TypeVar

from diator.brokers.base import Delivery
from diator.brokers.connecting import BackgroundTasks
from diator.exceptions import BrokerError

T = TypeVar("T")

_MOST = 100
_DELAY = 0.002
"""Seconds that the first of them waits for others."""

logger: logging.Logger = logging.getLogger(__name__)


class Acknowledgements(Generic[T]):
    """
    Tells the service what was acknowledged, many at once: a round trip for each would be all that a consumer does.

    *tell* is called with what was added, in that order, as soon as there are 100, and within 2 ms of the first. It runs
    beside the work, and several of its calls may overlap. A `BrokerError` that it raises is logged, and those
    messages come again.
    """

    def __init__(self, tell: Callable[[Sequence[T]], Awaitable[None]]) -> None:
        self._tell = tell
        self._noted: list[T] = []
        self._timer: asyncio.TimerHandle | None = None
        self._background = BackgroundTasks()

    def add(self, item: T) -> None:
        """Note *item*, which is told with others."""
        self._noted.append(item)
        if len(self._noted) >= _MOST:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self._flush)

    async def flush(self) -> None:
        """Tell what was noted, and wait until all of it was told."""
        self._flush()
        await self._background.wait()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._noted:
            noted, self._noted = self._noted, []
            self._background.start(self._tell_noted(noted), "acknowledging")

    async def _tell_noted(self, noted: Sequence[T]) -> None:
        try:
            await self._tell(noted)
        except BrokerError as error:
            logger.warning("%d acknowledgements did not reach the service; they come again: %s", len(noted), error)


def dead_letter_headers(delivery: Delivery, reason: str, *, source: str, group: str, **place: str) -> dict[str, str]:
    """
    Give the headers of a dead letter: why *delivery* was put aside, and where it came from.

    *source* is the stream, queue or topic, *place* is where in it, by the service's own words: `entry_id`, `partition`.
    *group* is empty where the subscription had none.
    """
    said = {
        "version": "1",
        "reason": reason,
        "source": source,
        "consumer-group": group,
        "attempts": str(delivery.attempt),
        "last-failed-at": datetime.now(UTC).isoformat(),
        **{name.replace("_", "-"): value for name, value in place.items()},
    }
    return {f"diator-dlq-{name}": value for name, value in said.items()}
