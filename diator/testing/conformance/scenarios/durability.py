"""DUR: what was confirmed survives the service's restart or death, as far as the transport promises."""

from __future__ import annotations

from diator.brokers.capabilities import Capabilities
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


async def _collects(ctx: Context, topic: object, group: str) -> None:
    """Have *group* exist, with nobody there."""
    async with ctx.reading(await ctx.broker(), topic, group=group):  # type: ignore[arg-type]
        pass


@scenario(
    "DUR-01", "what was confirmed survives a restart", level="F", needs=_RESTART, facilities=["outages"], timeout=120
)
async def survives_restart(ctx: Context) -> None:
    """Catches messages that are confirmed before they are stored, or that are stored nowhere."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _collects(ctx, topic, group)
    messages = await ctx.send(broker, topic, 200)
    await _restart(ctx, service)
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-02",
    "what was confirmed survives the death of the service at once after it",
    level="F",
    needs=_CRASH,
    facilities=["outages"],
    timeout=120,
)
async def survives_death(ctx: Context) -> None:
    """Catches a confirmation that comes before the message is safe."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _collects(ctx, topic, group)
    messages = await ctx.send(broker, topic, 200)
    await service.kill()
    await service_is_down(ctx)
    await service.start()
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-03",
    "a group survives a restart and goes on collecting",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def groups_survive(ctx: Context) -> None:
    """Catches a group that lives only in its members, or in the service's memory."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    await _collects(ctx, topic, group)
    await _restart(ctx, service)
    messages = [ctx.message(topic, number) for number in range(20)]
    for message in messages:
        await ctx.send_until_confirmed(broker, message)
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-04",
    "what was acknowledged before a restart does not come after it",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def acknowledged_is_done(ctx: Context) -> None:
    """Catches an acknowledgement that is kept where the message is not."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.take(20)
    await _restart(ctx, service)
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "DUR-05",
    "what was given out and not settled comes after a restart",
    level="F",
    needs=_RESTART,
    facilities=["outages"],
    timeout=120,
)
async def unsettled_comes_again(ctx: Context) -> None:
    """Catches a service that counts as done what it has given out."""
    service = await ctx.outages()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 10)
        held = await reader.take(10, settle="nothing")
        await _restart(ctx, service)
    ctx.check(all(each.abandoned for each in held), "something was settled, and nobody did that")
    async with ctx.reading(await ctx.broker(), topic, group=group) as reader:
        bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery + ctx.limits.recovery
        await ctx.within(bound, ctx.until_acknowledged(reader, 10), "coming again")
    ctx.ledger.compare(group, messages).verify()


@scenario("DUR-06", "who promises no durability confirms none", level="F", facilities=["outages"], timeout=120)
async def promises_nothing(ctx: Context) -> None:
    """Catches a receipt that says more than is true, and a transport that does not outlive its service's memory."""
    ctx.applies(ctx.capabilities.durability == "none", "it promises durability")
    ctx.check(ctx.capabilities.receipt != "durable", "a receipt is called durable, and nothing is")
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
    ctx.check({each.message_id for each in messages} <= {*came}, "what was sent after the restart did not come")
    ctx.check(len(came) == len({*came}), "something came twice")
