"""DUR: confirmed messages survive a restart or a crash of the service, as far as promised."""

from __future__ import annotations

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Outages
from diator.testing.conformance._recovery import service_is_down
from diator.testing.conformance._scenario import scenario

_RESTART = Capabilities(
    durability="restart",
    distribution=frozenset({"competing"}),
    subscription="durable",
    settlement="cumulative",
)
_CRASH = Capabilities(
    durability="crash", distribution=_RESTART.distribution, subscription="durable", settlement="cumulative"
)


async def _restart(ctx: Context, service: Outages) -> None:
    await service.stop()
    await service_is_down(ctx)
    await service.start()


async def _create_group(ctx: Context, topic: object, group: str) -> None:
    """Create *group* and leave it without a consumer."""
    async with ctx.reading(await ctx.broker(), topic, group=group):  # type: ignore[arg-type]
        pass


async def _all_arrive(ctx: Context, topic: Topic, group: str, messages: list[Message]) -> None:
    """Check that *group*, with a new broker, receives each of *messages* that it has not acknowledged yet."""
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-01", "Confirmed messages survive a restart", level="F", needs=_RESTART, facilities=["outages"], timeout=120
)
async def survives_restart(ctx: Context) -> None:
    """Catch messages that are confirmed before they are stored, or that are never stored."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _create_group(ctx, topic, group)
    messages = await ctx.send(broker, topic, 200)
    await _restart(ctx, service)
    await _all_arrive(ctx, topic, group, messages)


@scenario(
    "DUR-02",
    "Confirmed messages survive a crash of the service right after the confirmation",
    level="F",
    needs=_CRASH,
    facilities=["outages"],
    timeout=120,
)
async def survives_crash(ctx: Context) -> None:
    """Catch a confirmation that comes before the message is safe."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _create_group(ctx, topic, group)
    messages = await ctx.send(broker, topic, 200)
    await service.kill()
    await service_is_down(ctx)
    await service.start()
    await _all_arrive(ctx, topic, group, messages)


@scenario(
    "DUR-03",
    "A group survives a restart and continues to collect messages",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def groups_survive(ctx: Context) -> None:
    """Catch a group that exists only in its consumers or in the service's memory."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _create_group(ctx, topic, group)
    await _restart(ctx, service)
    messages = [ctx.message(topic, number) for number in range(20)]
    for message in messages:
        await ctx.send_until_confirmed(broker, message)
    await _all_arrive(ctx, topic, group, messages)


@scenario(
    "DUR-04",
    "A message acknowledged before a restart is not redelivered after it",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def acknowledged_is_done(ctx: Context) -> None:
    """Catch an acknowledgement that is stored less safely than its message."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.take(20)
    await _restart(ctx, service)
    await _all_arrive(ctx, topic, group, messages)


@scenario(
    "DUR-05",
    "A message delivered but not settled before a restart is redelivered after it",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def unsettled_is_redelivered(ctx: Context) -> None:
    """Catch a service that counts a delivered message as done."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 10)
        held = await reader.take(10, settle="nothing")
        await _restart(ctx, service)
    ctx.check(all(each.abandoned for each in held), "a delivery is settled that nobody has settled")
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await ctx.within(ctx.redelivery_bound, ctx.until_acknowledged(reader, 10), "the redelivery")
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-06",
    "A transport without durability does not claim to store messages",
    level="F",
    facilities=["outages"],
    timeout=120,
)
async def promises_nothing(ctx: Context) -> None:
    """Catch a receipt that claims too much, and a transport that does not recover when its service loses its memory."""
    ctx.applies(ctx.capabilities.durability == "none", "the transport promises durability")
    ctx.check(ctx.capabilities.receipt != "durable", "the receipt is durable although the durability is none")
    service = await ctx.outages()
    broker, topic = await ctx.broker(), ctx.topic()
    for _ in range(5):
        await ctx.use(broker, topic)
    await _restart(ctx, service)
    await ctx.within(
        ctx.limits.recovery, ctx.send_until_confirmed(broker, ctx.message(topic, 5)), "sending after the restart"
    )
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 5, start=6)
        came = [each.id for each in await reader.until_fence()]
    ctx.check({each.message_id for each in messages} <= {*came}, "a message sent after the restart did not arrive")
    ctx.check(len(came) == len({*came}), "a message was delivered twice")
