"""Defects after a crash, and of consumers that use different brokers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from diator.brokers.message import Message
from diator.exceptions import BrokerClosed
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by


@caught_by("ACK-02", "GRP-07")
class ForgetsTheCrashed(Saboteur):
    """Loses the deliveries of a crashed consumer."""

    def on_crash(self, subscription: Subscription) -> None:
        subscription.unsettled.clear()
        subscription.leave()


@caught_by("UNR-13")
class CollectsForTheDead(Saboteur):
    """Collects messages for a subscription without a group whose process has crashed."""

    def on_crash(self, subscription: Subscription) -> None:
        subscription.leave()


@caught_by("GRP-15")
class KeepsGroupsToItself(Saboteur):
    """Has groups that are limited to one broker."""

    def adjust_subscription(self, topics: Any, group: str | None, prefetch: int) -> Any:
        return topics, group and f"{group} of {id(self)}", prefetch


@caught_by("LIF-10")
class ConfirmsTooEarly(Saboteur):
    """Confirms a message before it sends it, and sends nothing after its close."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._sending: list[asyncio.Task[None]] = []

    async def send_message(self, message: Message, /) -> None:
        self.check_open()
        self._sending.append(asyncio.create_task(self._send_later(message)))

    async def _send_later(self, message: Message) -> None:
        await asyncio.sleep(0.001)
        with suppress(BrokerClosed):
            await super().send_message(message)
