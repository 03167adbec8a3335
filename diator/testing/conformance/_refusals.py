"""Check that a transport refuses what it does not promise. Silently doing something weaker would lose data."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.exceptions import UnsupportedCapability
from diator.testing.conformance._context import Context


async def verify_refusal(context: Context, needed: Capabilities) -> None:
    """Use each capability of *needed* that the transport does not promise. Raise `Nonconformance` if it is accepted."""
    lacks = {each.split()[0] for each in context.capabilities.missing(needed)}
    for name in sorted(lacks & REFUSALS.keys()):
        await REFUSALS[name](context, needed)


async def _distribution(context: Context, needed: Capabilities) -> None:
    broker = await context.broker()
    for kind in needed.distribution - context.capabilities.distribution:
        group = context.name() if kind == "competing" else None
        subscribing = _enter(broker.subscribe([context.topic()], group=group))
        await context.raises(UnsupportedCapability, subscribing, f"subscribe(group={group!r}), which is {kind},")


async def _enter(subscription: object) -> None:
    async with subscription:  # type: ignore[attr-defined]
        await asyncio.sleep(0)


async def _delayed_retry(context: Context, needed: Capabilities) -> None:  # noqa: ARG001
    await _settling(context, lambda delivery: delivery.retry(after=0.05), "Delivery.retry(after=0.05)")


async def _redelivery(context: Context, needed: Capabilities) -> None:
    if "retry" in needed.redelivery - context.capabilities.redelivery:
        await _settling(context, lambda delivery: delivery.retry(), "Delivery.retry()")


async def _dead_letter(context: Context, needed: Capabilities) -> None:  # noqa: ARG001
    await _settling(context, lambda delivery: delivery.dead_letter("no reason"), "Delivery.dead_letter")


async def _settling(context: Context, settle: Callable[[Delivery], Awaitable[None]], what: str) -> None:
    broker, topic = await context.broker(), context.topic()
    async with context.reading(broker, topic) as reader:
        await context.send(broker, topic)
        received = await reader.next()
        await context.raises(UnsupportedCapability, settle(received.delivery), what)


REFUSALS: dict[str, Callable[[Context, Capabilities], Awaitable[None]]] = {
    "dead_letter": _dead_letter,
    "delayed_retry": _delayed_retry,
    "distribution": _distribution,
    "redelivery": _redelivery,
}
"""
How to use each capability that has a call which the transport can refuse.

The other capabilities are refused when a consumer is configured.
"""
