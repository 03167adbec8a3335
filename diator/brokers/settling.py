"""How transports settle deliveries: acknowledgements in batches, and the headers of a dead letter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import Context
from datetime import UTC, datetime
from typing import Generic, TypeVar

from diator._hints import name_of
from diator._text import counted
from diator.brokers.base import Delivery
from diator.brokers.connecting import BackgroundTasks
from diator.exceptions import DiatorError, MessageRejected

T = TypeVar("T")

# A batch is sent when it has so many items, or when its first item has waited so many seconds.
_MAX_ITEMS = 100
_MAX_DELAY = 0.002

#: The header of a dead letter that names what could not be stored, separated by commas without spaces.
OMITTED = "diator-dlq-omitted"
#: Its value if the dead letter only says where its message lies.
ALL_OMITTED = "body,headers,key"

logger: logging.Logger = logging.getLogger(__name__)


class Acknowledgements(Generic[T]):
    """
    Sends acknowledgements in batches, because a round trip for each message would dominate a consumer's time.

    *send* is called with the added items, in their order: as soon as there are 100, and otherwise 2 ms after the first
    one. It runs in the background, and several calls may overlap. If it raises an error of diator, the error is logged
    with *log_fields*, those of the subscription; the service redelivers those messages.
    """

    def __init__(self, send: Callable[[Sequence[T]], Awaitable[None]], log_fields: Mapping[str, object]) -> None:
        self._send = send
        self._log_fields = log_fields
        self._pending: list[T] = []
        self._timer: asyncio.TimerHandle | None = None
        self._background = BackgroundTasks()

    def add(self, item: T) -> None:
        """Add *item* to the next batch, without waiting."""
        self._pending.append(item)
        if len(self._pending) >= _MAX_ITEMS:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_MAX_DELAY, self._flush)

    async def flush(self) -> None:
        """Send all added items, and wait until every batch has been sent."""
        self._flush()
        await self._background.wait()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pending:
            batch, self._pending = self._pending, []
            # A batch has several messages, so its log lines are about none of them.
            self._background.start(self._send_batch(batch), "acknowledging", context=Context())

    async def _send_batch(self, batch: Sequence[T]) -> None:
        try:
            await self._send(batch)
        except DiatorError as error:
            logger.warning(
                "%s did not reach the service; %s will be redelivered: %s",
                counted(len(batch), "acknowledgement"),
                "its message" if len(batch) == 1 else "their messages",
                error,
                extra={**self._log_fields, "messages": len(batch), "error_type": name_of(type(error))},
            )


async def confirmed(sending: Mapping[Delivery, Awaitable[None]]) -> Collection[Delivery]:
    """Wait until all of *sending* have ended, and return the deliveries whose dead letter was sent without an error."""
    futures = {delivery: asyncio.ensure_future(each) for delivery, each in sending.items()}
    try:
        for future in futures.values():
            if not future.done():  # most end together: to be woken by each would take a tenth of the time of sending it
                await asyncio.wait([future])
    finally:
        for future in futures.values():
            future.cancel()  # nobody waits for it any more
    return {delivery for delivery, future in futures.items() if not future.cancelled() and future.exception() is None}


async def send_dead_letter(
    body: bytes,
    headers: Mapping[str, str],
    about: Mapping[str, str],
    send: Callable[[bytes, Mapping[str, str]], Awaitable[None]],
    *,
    omitted: Collection[str] = (),
) -> None:
    """
    Send a dead letter: whole, or else without the headers of its message, or else without its body too.

    Args:
        body: The body of the message.
        headers: The headers of the message.
        about: What `dead_letter_headers` returns.
        send: Called with the body and the headers of each of these forms, until it raises no `MessageRejected`.
        omitted: What is missing in each form, such as `headers` if only some of them can be written.

    Raises:
        MessageRejected: That of the last form.
    """
    theirs, lacks = dict(headers), {*omitted}
    while True:
        lacking = {OMITTED: ",".join(sorted(lacks))} if lacks else {}
        try:
            return await send(body, {**theirs, **about, **lacking})
        except MessageRejected:
            if theirs:
                theirs = {}
                lacks.add("headers")
            elif body:
                body = b""
                lacks.add("body")
            else:
                raise


def dead_letter_headers(delivery: Delivery, reason: str, *, source: str, group: str, **place: str) -> dict[str, str]:
    """
    Return the headers of a dead letter: why *delivery* was dead-lettered, and where it came from.

    Args:
        delivery: The delivery.
        reason: Why it is dead-lettered.
        source: The stream, queue or topic that it came from.
        group: Its consumer group; empty if the subscription has none.
        place: Its place in the source, in the service's own terms, such as `entry_id`, `partition` or `offset`.
    """
    return {
        "diator-dlq-version": "1",
        "diator-dlq-reason": reason,
        "diator-dlq-source": source,
        "diator-dlq-consumer-group": group,
        "diator-dlq-attempts": str(delivery.attempt),
        "diator-dlq-last-failed-at": datetime.now(UTC).isoformat(),
        **{f"diator-dlq-{name.replace('_', '-')}": value for name, value in place.items()},
    }
