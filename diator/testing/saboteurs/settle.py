"""Settling gone wrong."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from diator.brokers.base import Delivery, Settler
from diator.brokers.codec import decode
from diator.exceptions import BrokerError
from diator.testing.saboteurs._base import Saboteur, again, caught_by, subscription_of


@caught_by("ACK-05", "ACK-14", "ACK-18", "ACK-24")
class AcksOnArrival(Saboteur):
    """Acknowledges what it gives out."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        await delivery.settler.ack(delivery)
        return delivery


@caught_by("ACK-01", "ACK-06", "ACK-21")
class LosesAcks(Saboteur):
    """Takes note of every second acknowledgement."""

    _count = 0

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._count += 1
        if self._count % 2:
            await super().ack(settle, delivery)


@caught_by("ACK-08")
class AcksAllBefore(Saboteur):
    """Takes an acknowledgement for one of everything before it too."""

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        for each in [*subscription_of(settle).unsettled]:
            await super().ack(settle, each)
            if each is delivery:
                break


@caught_by("ACK-03", "ACK-04", "ACK-10", "ACK-19", "PSN-04")
class TakesRetryForAck(Saboteur):
    """Acknowledges what is given back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)


@caught_by("ACK-03", "ACK-19")
class RetriesTwice(Saboteur):
    """Puts two copies back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@caught_by("HDR-04", "ACK-03")
class RetriesWithANewId(Saboteur):
    """Sends it anew instead of giving it back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)
        await self.send_message(replace(decode(delivery.body), message_id=uuid4()))


@caught_by("ACK-11")
class IgnoresTheDelay(Saboteur):
    """Gives back at once."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.retry(delivery, 0)


@caught_by("ACK-11", "PSN-09")
class WaitsWithTheDelay(Saboteur):
    """Holds everything up until the delay is over."""

    _until = 0.0

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        self._until = time.monotonic() + after
        await settle.retry(delivery, after)

    async def deliver(self, delivery: Delivery) -> Delivery:
        await asyncio.sleep(max(0.0, self._until - time.monotonic()))
        return delivery


@caught_by("ACK-15")
class GivesUpAfterTwenty(Saboteur):
    """Drops what comes for the twentieth time."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await (settle.ack(delivery) if delivery.attempt >= 20 else settle.retry(delivery, after))  # noqa: PLR2004


@caught_by("FLW-14", "FLW-15")
class CountsWhatWasGivenBack(Saboteur):
    """Makes room only for what was acknowledged."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        subscription_of(settle).unsettled[again(delivery)] = None

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        subscription_of(settle).unsettled[again(delivery)] = None


@caught_by("ACK-10", "ACK-24", "PSN-04")
class CountsNoAttempts(Saboteur):
    """Says that each attempt is the first."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt = 1
        return delivery


@caught_by("SUB-07", "ACK-10")
class CountsAttemptsFromZero(Saboteur):
    """Says 0 for the first attempt."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt -= 1
        return delivery


@caught_by("ACK-09", "PSN-06")
class ForgetsDeadLetters(Saboteur):
    """Acknowledges what is to be put aside."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await settle.ack(delivery)


@caught_by("ACK-09", "ACK-20")
class DeliversDeadLetters(Saboteur):
    """Puts aside, and gives back."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@caught_by("PSN-06")
class SpoilsDeadLetters(Saboteur):
    """Puts aside what is left of a message when it was read as text."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        letter = self._dead_letters.pop()
        self._dead_letters.append(replace(letter, body=letter.body.decode(errors="replace").encode()))


@caught_by("ACK-22")
class RefusesToAckTwice(Saboteur):
    """Has a delivery that cannot be acknowledged twice."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        return _Touchy(**{name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler")})


class _Touchy(Delivery):
    async def ack(self) -> None:
        if self.outcome:
            raise OSError("it is acknowledged")
        await super().ack()
