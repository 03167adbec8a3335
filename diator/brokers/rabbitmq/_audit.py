"""Whether the exchange and the queues in RabbitMQ are declared as diator declares them: what AMQP can show."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from diator._text import explained, listed
from diator.brokers.audit import Finding
from diator.brokers.rabbitmq._channel import ACCESS_REFUSED, CHANNEL_ERRORS, Channel, Refused
from diator.brokers.rabbitmq._client import Address, Frame, commands
from diator.brokers.rabbitmq._publisher import retaining_exchange
from diator.brokers.rabbitmq._subscription import Subscription, passively
from diator.exceptions import BrokerUnavailable


async def inspect(
    address: Address, prefix: str, subscriptions: Iterable[Subscription], *, retains: bool, timeout: float
) -> list[Finding]:
    """
    Compare the exchange and the queues of *subscriptions* with their declarations.

    Raises:
        BrokerUnavailable: RabbitMQ cannot be reached within *timeout* seconds.
    """
    channel = Channel()
    try:
        async with asyncio.timeout(timeout):
            await channel.open(*await address.dial("auditing"))
            findings: list[Finding] = []
            if retains:
                findings += await _compared(
                    channel,
                    commands.Exchange.Declare(exchange=prefix, passive=True),
                    retaining_exchange(prefix),
                    capability="unroutable",
                    missing=None,  # no finding: the first message declares it
                    remedy="delete the exchange, and each consumer declares it again",
                )
            for subscription in subscriptions:
                if subscription.witness and not await channel.is_there(
                    commands.Exchange.Declare(exchange=subscription.witness, passive=True)
                ):
                    problem = (
                        f"the exchange {prefix!r} was deleted, and {listed([*subscription.queues])} were bound to it"
                    )
                    remedy = "none: the subscription binds them again when it probes its connection, and reports a gap"
                    findings.append(Finding(capability="guarantee", problem=problem, remedy=remedy))
                for queue in subscription.queues:
                    for declaration in subscription.declarations(queue, channel.version):
                        findings += await _compared(
                            channel,
                            passively(declaration.queue),
                            declaration,
                            capability="guarantee" if declaration.queue == queue else "dead_letter",
                            missing=f"the queue {declaration.queue!r} is gone, and its messages are dropped",
                        )
            return findings
    except CHANNEL_ERRORS as error:
        why = explained(error, within=timeout)
        raise BrokerUnavailable(f"RabbitMQ at {address.where} cannot be audited ({why})") from error
    finally:
        await channel.close()


async def _compared(
    channel: Channel,
    passive: Frame,
    declaration: Frame,
    *,
    capability: str,
    missing: str | None,
    remedy: str = "delete it when it is empty, and subscribe again, which declares it",
) -> list[Finding]:
    """Declare what exists again. That changes nothing, and RabbitMQ reports a difference."""
    try:
        if await channel.is_there(passive):
            await channel.ask_aside(declaration)
        elif missing is not None:
            return [Finding(capability=capability, problem=missing, remedy="subscribe again, which declares it")]
    except Refused as error:
        if error.code == ACCESS_REFUSED:
            remedy = "permit this user to configure the names that start with the prefix"
        return [Finding(capability=capability, problem=str(error), remedy=remedy)]
    return []
