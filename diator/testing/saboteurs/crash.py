"""What a subscription leaves behind that died, and members that know nothing of each other, gone wrong."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from diator.brokers.message import Message
from diator.exceptions import BrokerClosed
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by


@caught_by("ACK-02", "GRP-07")
class ForgetsTheDead(Saboteur):
    """Loses what a subscription held that died."""

    def on_crash(self, subscription: Subscription) -> None:
        subscription.unsettled.clear()
        subscription.leave()


@caught_by("GRP-15")
class KeepsGroupsToItself(Saboteur):
    """Has groups that end at its own members, each of which gets everything."""

    def adjust_subscription(self, topics: Any, group: str | None, prefetch: int) -> Any:
        return topics, group and f"{group} of {id(self)}", prefetch


@caught_by("LIF-10")
class ConfirmsTooEarly(Saboteur):
    """Confirms before it sends, and sends no more once it is closed."""

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
