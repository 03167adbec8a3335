"""Defects of settling."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

from diator.brokers.base import Delivery, Settler
from diator.brokers.codec import decode, encode
from diator.exceptions import BrokerError
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by, copy_of, fields_of, subscription_of


@caught_by("ACK-05", "ACK-14", "ACK-18", "ACK-24")
class AcksOnArrival(Saboteur):
    """Acknowledges a delivery before the consumer receives it."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        await delivery.settler.ack(delivery)
        return delivery


@caught_by("ACK-01", "ACK-06", "ACK-21")
class LosesAcks(Saboteur):
    """Ignores every second acknowledgement."""

    _count = 0

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._count += 1
        if self._count % 2:
            await super().ack(settle, delivery)


@caught_by("ACK-08")
class AcksAllBefore(Saboteur):
    """Acknowledges all earlier deliveries too."""

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        for each in [*subscription_of(settle).unsettled]:
            await super().ack(settle, each)
            if each is delivery:
                break


@caught_by("ACK-03", "ACK-04", "ACK-10", "ACK-19", "PSN-04")
class TakesRetryForAck(Saboteur):
    """Acknowledges a message that is requeued."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)


@caught_by("ACK-03", "ACK-19")
class RequeuesTwice(Saboteur):
    """Requeues two copies of a message."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@caught_by("HDR-04", "ACK-03")
class RequeuesWithANewId(Saboteur):
    """Requeues a message with a new id."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)
        await self.send_message(replace(decode(delivery.body), message_id=uuid4()))


@caught_by("ACK-11")
class IgnoresTheDelay(Saboteur):
    """Requeues at once despite a delay."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.retry(delivery, 0)


@caught_by("ACK-11", "PSN-09")
class BlocksDuringTheDelay(Saboteur):
    """Holds up all messages until the delay of one is over."""

    _until = 0.0

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        self._until = time.monotonic() + after
        await settle.retry(delivery, after)

    async def deliver(self, delivery: Delivery) -> Delivery:
        await asyncio.sleep(max(0.0, self._until - time.monotonic()))
        return delivery


@caught_by("ACK-15")
class GivesUpAfterTwenty(Saboteur):
    """Drops a message at its twentieth delivery."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await (settle.ack(delivery) if delivery.attempt >= 20 else settle.retry(delivery, after))  # noqa: PLR2004


@caught_by("PSN-16")
class LosesRetriesOfStoppedConsumers(Saboteur):
    """Loses a requeued message if the consumer that requeued it stops during the delay."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._stopped: set[Subscription] = set()

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        subscription = subscription_of(settle)
        entry = subscription.unsettled.pop(delivery)

        def requeue() -> None:
            if subscription not in self._stopped:
                subscription.queue.requeue([entry])

        asyncio.get_running_loop().call_later(after, requeue)

    def before_unsubscribe(self, subscription: Subscription) -> None:
        self._stopped.add(subscription)


@caught_by("FLW-14", "FLW-15")
class CountsRequeued(Saboteur):
    """Frees a prefetch slot only for an acknowledgement."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        subscription_of(settle).unsettled[copy_of(delivery)] = None

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        subscription_of(settle).unsettled[copy_of(delivery)] = None


@caught_by("ACK-10", "ACK-24", "PSN-04")
class CountsNoAttempts(Saboteur):
    """Delivers each message as the first attempt."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt = 1
        return delivery


@caught_by("ACK-30")
class CountsForAllGroups(Saboteur):
    """Counts the attempts of a message in all groups together."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._requeued: Counter[bytes] = Counter()

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        self._requeued[delivery.body] += 1
        await super().retry(settle, delivery, after)

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt = max(delivery.attempt, 1 + self._requeued[delivery.body])
        return delivery


@caught_by("ACK-31")
class DeadLettersForEverybody(Saboteur):
    """Takes a dead-lettered message away from every group."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        for queue in self._queues:
            for entry in [each for each in queue.waiting if each.body == delivery.body]:
                queue.waiting.remove(entry)


@caught_by("ACK-32")
class SettlesTooLate(Saboteur):
    """Settles the message of a delivery, whoever holds it by now."""

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        for subscription in self._open_subscriptions:
            for each in [each for each in subscription.unsettled if each.body == delivery.body]:
                del subscription.unsettled[each]
        await super().ack(settle, delivery)


@caught_by("ACK-32")
class RequeuesTooLate(Saboteur):
    """Requeues a message although another consumer holds it."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        if delivery not in subscription_of(settle).unsettled:
            await self.send_message(decode(delivery.body))
        await super().retry(settle, delivery, after)


@caught_by("ACK-33")
class ForgetsDelays(Saboteur):
    """Forgets a message that waits for its retry when its subscription ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiting: list[Any] = []

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        entry = subscription_of(settle).unsettled.pop(delivery)
        requeuing = subscription_of(settle).queue.requeue
        self._waiting.append(asyncio.get_running_loop().call_later(after, requeuing, [entry]))

    def before_unsubscribe(self, subscription: Subscription) -> None:
        for each in self._waiting:
            each.cancel()


@caught_by("ACK-11")
class DropsHeadersInTheDelay(Saboteur):
    """Requeues a message with a delay without its headers."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        entry = subscription_of(settle).unsettled[delivery]
        if after:
            entry.body = encode(replace(decode(entry.body), headers={}), headers_in_body=True)
        await super().retry(settle, delivery, after)


@caught_by("ACK-34")
class RequeuesToOneTopic(Saboteur):
    """Requeues every message to the first topic of its subscription."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        subscription = subscription_of(settle)
        subscription.unsettled[delivery].topic = min(subscription.topics)
        await super().retry(settle, delivery, after)


@caught_by("ACK-35")
class RemovesBeforeItStores(Saboteur):
    """Removes a message before it has stored its copy or its dead letter."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        entry = subscription_of(settle).unsettled.pop(delivery)
        await asyncio.sleep(0)
        subscription_of(settle).queue.requeue([entry])


@caught_by("SUB-07", "ACK-10")
class CountsAttemptsFromZero(Saboteur):
    """Delivers the first attempt with the number 0."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.attempt -= 1
        return delivery


@caught_by("ACK-09", "PSN-06")
class ForgetsDeadLetters(Saboteur):
    """Acknowledges a message that is dead-lettered."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await settle.ack(delivery)


@caught_by("ACK-09", "ACK-20")
class DeliversDeadLetters(Saboteur):
    """Dead-letters a message and redelivers it."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@caught_by("PSN-06")
class SpoilsDeadLetters(Saboteur):
    """Dead-letters a body that is changed because it was decoded as text."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        letter = self._dead_letters.pop()
        self._dead_letters.append(replace(letter, body=letter.body.decode(errors="replace").encode()))


@caught_by("HDR-14")
class DeadLettersTheBodyAlone(Saboteur):
    """Dead-letters a message without its headers."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        letter = self._dead_letters.pop()
        body = json.dumps({**fields_of(letter.body), "headers": None}).encode()
        self._dead_letters.append(replace(letter, body=body))


@caught_by("HDR-04", "HDR-13")
class RetriesTheBodyAlone(Saboteur):
    """Redelivers a message without its headers."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        if delivery.attempt > 1:
            delivery.body = json.dumps({**fields_of(delivery.body), "headers": None}).encode()
        return delivery


@caught_by("ACK-22")
class RefusesToAckTwice(Saboteur):
    """Raises when a delivery is acknowledged twice."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        return _Touchy(**{name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler")})


class _Touchy(Delivery):
    async def ack(self) -> None:
        if self.outcome:
            raise OSError("it is acknowledged already")
        await super().ack()
