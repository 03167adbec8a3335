"""What of RabbitMQ can be looked into by AMQP: whether what is declared is what diator would declare."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from diator.brokers._rabbitmq_channel import (
    CLIENT_ERRORS,
    NOT_ALLOWED,
    Address,
    Channel,
    Frame,
    Refused,
    commands,
    explained,
)
from diator.brokers._rabbitmq_member import Member, passively
from diator.brokers._rabbitmq_publisher import topic_exchange
from diator.brokers.audit import Finding
from diator.exceptions import BrokerUnavailable


async def inspect(address: Address, prefix: str, members: Iterable[Member], *, timeout: float) -> list[Finding]:
    """
    Compare what is declared with what *members* need.

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
                weakens="guarantee",
                missing=None,  # the first message declares it
            )
            for member in members:
                for queue in member.queues:
                    for declaration in member.declarations(queue):
                        findings += await _compared(
                            channel,
                            passively(declaration.queue),
                            declaration,
                            weakens="guarantee" if declaration.queue == queue else "dead_letter",
                            missing=f"the queue {declaration.queue!r} is gone, and what should go there is dropped",
                        )
            return findings
    except CLIENT_ERRORS as error:
        raise BrokerUnavailable(f"RabbitMQ cannot be looked into ({explained(error)})") from error
    finally:
        await channel.hang_up()


async def _compared(
    channel: Channel, passive: Frame, declaration: Frame, *, weakens: str, missing: str | None
) -> list[Finding]:
    """Declare again what is there, which changes nothing: RabbitMQ says what differs."""
    try:
        if await channel.is_there(passive):
            await channel.ask_beside(declaration)
        elif missing is not None:
            return [Finding(weakens=weakens, problem=missing, remedy="subscribe again, which declares it")]
    except Refused as error:
        remedy = "delete it once it is empty, and subscribe again, which declares it"
        if error.code == NOT_ALLOWED:
            remedy = "let this user configure what begins with the prefix"
        return [Finding(weakens=weakens, problem=str(error), remedy=remedy)]
    return []
