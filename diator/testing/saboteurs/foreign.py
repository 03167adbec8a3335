"""Defects: a message of another program stops other messages, or gets what it asks for."""

from __future__ import annotations

import logging

from diator.brokers.base import Delivery, Settler, Topic
from diator.exceptions import MessageRejected
from diator.testing.saboteurs._base import FOREVER, Saboteur, Subscription, caught_by, fields_of

logger: logging.Logger = logging.getLogger("diator.brokers.sabotaged")

_GZIP = b"\x1f\x8b"


def _headers_of(delivery: Delivery) -> dict[str, object]:
    headers = fields_of(delivery.body).get("headers")
    return headers if isinstance(headers, dict) else {}


@caught_by("FRN-01")
class DecodesMetadataStrictly(Saboteur):
    """Returns a message with a header that is not text to the service, again and again."""

    async def read(self, subscription: Subscription) -> Delivery:
        while True:
            delivery = await super().read(subscription)
            if all(isinstance(value, str) for value in _headers_of(delivery).values()):
                return delivery
            await delivery.retry(after=0.01)


@caught_by("FRN-02")
class CannotWriteHeaders(Saboteur):
    """Cannot requeue or dead-letter a message with a header whose name is empty."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        _refuse("" in _headers_of(delivery))
        await super().retry(settle, delivery, after)

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        _refuse("" in _headers_of(delivery))
        await super().dead_letter(settle, delivery, reason)


@caught_by("FRN-03", "SEC-07")
class RefusesLargeDeadLetters(Saboteur):
    """Has a dead-letter queue that takes only messages of the size that a program may send."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        _refuse(len(delivery.body) > self.capabilities.max_message_bytes)
        await super().dead_letter(settle, delivery, reason)


@caught_by("FRN-04")
class BelievesCounters(Saboteur):
    """Counts the attempts that a header of the message claims."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt = int(str(_headers_of(delivery).get("diator-attempt", delivery.attempt)))
        return delivery


@caught_by("FRN-05")
class Decompresses(Saboteur):
    """Waits for the rest of a body that it cannot decompress."""

    async def read(self, subscription: Subscription) -> Delivery:
        while (delivery := await super().read(subscription)).body.startswith(_GZIP):
            pass
        return delivery


@caught_by("FRN-06")
class WaitsForTheLatest(Saboteur):
    """Lets every retry wait for the message with the latest due time."""

    _waits = False

    async def deliver(self, delivery: Delivery) -> Delivery:
        self._waits = self._waits or "diator-due" in _headers_of(delivery)
        return delivery

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, FOREVER if self._waits else after)


@caught_by("FRN-07")
class TrustsTheBody(Saboteur):
    """Delivers a message as one of the topic that its body names."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        fields = fields_of(delivery.body)
        delivery.topic = Topic(str(fields["message_type"]), str(fields["message_name"]))
        return delivery


@caught_by("FRN-08")
class LogsBodies(Saboteur):
    """Logs the body of a message that is dead-lettered."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        logger.warning("dead-lettered: %s", delivery.body.decode(errors="replace"))
        await super().dead_letter(settle, delivery, reason)


@caught_by("FRN-09")
class LogsEachDeadLetter(Saboteur):
    """Logs a line for each message that is dead-lettered."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        logger.warning("a message was dead-lettered")
        await super().dead_letter(settle, delivery, reason)


def _refuse(is_refused: bool) -> None:  # noqa: FBT001
    if is_refused:
        raise MessageRejected("the service refuses it; it will refuse it again")
