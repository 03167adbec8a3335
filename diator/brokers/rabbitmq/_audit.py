"""What of RabbitMQ can be looked into by AMQP: whether what is declared is what diator would declare."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from diator.brokers.audit import Finding
from diator.brokers.rabbitmq._channel import (
    CLIENT_ERRORS,
    NOT_ALLOWED,
    Address,
    Channel,
    Frame,
    Refused,
    commands,
    explained,
)
from diator.brokers.rabbitmq._publisher import topic_exchange
from diator.brokers.rabbitmq._subscription import Subscription, passively
from diator.exceptions import BrokerUnavailable


async def inspect(
    address: Address, prefix: str, subscriptions: Iterable[Subscription], *, timeout: float
) -> list[Finding]:
    """
    Compare what is declared with what *subscriptions* need.

    Raises:
        BrokerUnavailable: RabbitMQ cannot be reached within *timeout* seconds.
    """
    channel = Channel()
    try:
        async with asyncio.timeout(timeout):
            await channel.open(*await address.dial("auditing"))
            findings = await _compared(
                channel,
                commands.Exchange.Declare(exchange=prefix, passive=True),
                topic_exchange(prefix),
                capability="guarantee",
                missing=None,  # the first message declares it
            )
            for subscription in subscriptions:
                for queue in subscription.queues:
                    for declaration in subscription.declarations(queue):
                        findings += await _compared(
                            channel,
                            passively(declaration.queue),
                            declaration,
                            capability="guarantee" if declaration.queue == queue else "dead_letter",
                            missing=f"the queue {declaration.queue!r} is gone, and what should go there is dropped",
                        )
            return findings
    except CLIENT_ERRORS as error:
        raise BrokerUnavailable(f"RabbitMQ cannot be looked into ({explained(error)})") from error
    finally:
        await channel.hang_up()


async def _compared(
    channel: Channel, passive: Frame, declaration: Frame, *, capability: str, missing: str | None
) -> list[Finding]:
    """Declare again what is there, which changes nothing: RabbitMQ says what differs."""
    try:
        if await channel.is_there(passive):
            await channel.ask_beside(declaration)
        elif missing is not None:
            return [Finding(capability=capability, problem=missing, remedy="subscribe again, which declares it")]
    except Refused as error:
        remedy = "delete it once it is empty, and subscribe again, which declares it"
        if error.code == NOT_ALLOWED:
            remedy = "let this user configure what begins with the prefix"
        return [Finding(capability=capability, problem=str(error), remedy=remedy)]
    return []
