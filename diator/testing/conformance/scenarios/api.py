"""API: the shape of the contract."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

from diator.brokers.base import ReadableBroker
from diator.brokers.capabilities import Capabilities
from diator.exceptions import BrokerClosed, ConfigurationError, DiatorError, MessageTooLarge, UnsupportedCapability
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._refusals import REFUSALS
from diator.testing.conformance._scenario import scenario


async def _handle(event: Happened) -> None:
    """Accept the event."""


_STRONGEST = Capabilities(
    guarantee="at_least_once",
    receipt="durable",
    settlement="individual",
    redelivery=frozenset({"retry", "close", "crash", "deadline"}),
    delayed_retry=True,
    dead_letter=True,
    delivery_count="exact",
    ordering="destination",
    ordered_retry=True,
    distribution=frozenset({"broadcast", "competing"}),
    subscription="durable",
    replay="position",
    durability="crash",
    unroutable="reported",
    headers="native",
    backpressure="pull",
    max_message_bytes=2**40,
    multi_process=True,
)


@scenario("API-01", "Every failure is an error of diator")
async def own_errors(ctx: Context) -> None:
    """Catch an exception of the client library that a program would have to know."""
    broker, topic = await ctx.broker(), ctx.topic()
    huge = ctx.message(topic, text="x" * ctx.capabilities.max_message_bytes)
    await ctx.raises(MessageTooLarge, broker.send_message(huge), "a huge message")
    await broker.aclose()
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")
    subscribing = broker.subscribe([topic]).__aenter__()
    await ctx.raises(DiatorError, subscribing, "subscribing when closed")


@scenario("API-02", "A capability that is not promised is refused by name when a consumer is configured")
async def refused_when_wired(ctx: Context) -> None:
    """Catch a requirement that is accepted and not kept."""
    broker = await ctx.broker()
    lacks = ctx.capabilities.missing(_STRONGEST)
    ctx.check(lacks, "the transport promises everything, even messages of a TiB")
    for lack in lacks:
        name = lack.split()[0]
        needed = replace(Capabilities(), **{name: getattr(_STRONGEST, name)})
        try:
            ctx.consumer_run(broker, _handle, requires=needed)
        except UnsupportedCapability as refused:
            ctx.check(name in str(refused), f"the refusal does not name {name}: {refused}")
        else:
            ctx.check(holds=False, otherwise=f"a consumer that requires {name} is accepted")
        if name in REFUSALS:
            await REFUSALS[name](ctx, needed)
    ctx.consumer_run(broker, _handle, requires=ctx.capabilities)


@scenario("API-03", "The capabilities never change and are the same for every broker")
async def capabilities_stay(ctx: Context) -> None:
    """Catch promises that change with the connection, or that a program can modify."""
    broker, topic = await ctx.broker(), ctx.topic()
    before = broker.capabilities
    async with ctx.reading(broker, topic):
        await ctx.send(broker, topic)
        ctx.same(broker.capabilities, before, "the capabilities while it is in use")
    ctx.same((await ctx.broker()).capabilities, before, "the capabilities of another broker")
    ctx.same(type(before), Capabilities, "the type of the capabilities")
    with suppress(FrozenInstanceError):
        before.guarantee = "at_most_once"  # type: ignore[misc]
    ctx.same(broker.capabilities, ctx.capabilities, "the capabilities after an attempt to change them")


@scenario("API-04", "The methods have the names and parameters of the contract")
async def signatures(ctx: Context) -> None:
    """Catch a transport that passes its own tests and cannot replace another transport."""
    broker = await ctx.broker()
    for name in ("send_message", "subscribe"):
        wanted = inspect.signature(getattr(ReadableBroker, name))
        found = inspect.signature(getattr(type(broker), name))
        for parameter in wanted.parameters.values():
            own = found.parameters.get(parameter.name)
            if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name == "self":
                continue
            ctx.check(own is not None, f"{name} has no parameter {parameter.name}")
            ctx.same(own and own.default, parameter.default, f"the default of {name}(…, {parameter.name}=…)")
        extra = [
            each.name for each in found.parameters.values() if _needed(each) and each.name not in wanted.parameters
        ]
        names_only = sum(each.kind is each.POSITIONAL_ONLY for each in wanted.parameters.values())
        ctx.check(len(extra) <= names_only, f"{name} requires {extra}, which the contract does not have")
    ctx.check(inspect.iscoroutinefunction(type(broker).send_message), "send_message is not a coroutine function")


def _needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not variable and parameter.default is parameter.empty


@scenario("API-06", "Sending, receiving and closing honour cancellation and asyncio.timeout")
async def cancellable(ctx: Context) -> None:
    """Catch a call that swallows the cancellation of its task."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        try:
            async with asyncio.timeout(ctx.limits.quiet):
                await reader.next()
        except TimeoutError:
            pass
        else:
            ctx.check(holds=False, otherwise="reading from an empty subscription returned")
        messages = await ctx.send(broker, topic, 2)
        await reader.until_fence()
    for doing in (broker.send_message(ctx.message(ctx.topic())), broker.aclose()):
        task = asyncio.create_task(_forever(doing))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=ctx.limits.lag)
        ctx.check(task.cancelled(), "a cancellation was swallowed")
    ctx.ledger.compare(reader.name, messages).verify()


async def _forever(doing: Any) -> None:
    await doing
    await asyncio.Event().wait()


@scenario("API-07", "The transport works in asyncio's debug mode")
async def debug_mode(ctx: Context) -> None:
    """Catch calls from another thread and forgotten coroutines, which asyncio reports only in debug mode."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60
    try:
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            messages = await ctx.send(broker, topic, 20)
            await reader.until_fence()
        await broker.aclose()
    finally:
        loop.set_debug(False)
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("API-10", "The capabilities are consistent")
async def consistent(ctx: Context) -> None:
    """Catch a promise that cannot be kept without another one, which is not made."""
    ctx.same(ctx.capabilities.contradictions(), [], "the rules that the capabilities break")


@scenario("API-12", "A prefetch below 1 is refused, and a large one accepted")
async def odd_prefetches(ctx: Context) -> None:
    """Catch a subscription that can never receive anything, and a limit of the service's protocol."""
    broker, topic = await ctx.broker(), ctx.topic()
    group = ctx.name() if "competing" in ctx.capabilities.distribution else None
    for prefetch in (0, -1):
        subscribing = _enter(ctx.reading(broker, topic, group=group, prefetch=prefetch))
        await ctx.raises(ConfigurationError, subscribing, f"subscribe(prefetch={prefetch})")
    async with ctx.reading(broker, topic, group=group, prefetch=100_000) as reader:
        messages = await ctx.send(broker, topic, 3)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


async def _enter(reading: AbstractAsyncContextManager[object]) -> None:
    async with reading:
        pass


@scenario("API-11", "A broker that is not an outbox does not claim to be transactional")
async def not_enlisted(ctx: Context) -> None:
    """Catch a transport that would be called before the middlewares have committed."""
    from diator.brokers.sending import transactional  # noqa: PLC0415

    ctx.check(not transactional(await ctx.broker()), "the broker claims to be transactional")
    ctx.check(inspect.iscoroutinefunction(type(await ctx.broker()).aclose), "aclose is not a coroutine function")


@scenario("API-09", "A random program ends in the state that a simple model predicts", level="S", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry", "close"}), subscription="durable"), timeout=60)  # fmt: skip
async def random_program(ctx: Context) -> None:
    """Catch a defect that needs an unusual order of calls. The report has the seed."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = await ctx.send(broker, ctx.topic(), 0)
    for _ in range(8):
        async with ctx.reading(broker, topic, group=group, prefetch=20) as reader:
            out = 0
            for _ in range(ctx.random.randrange(25)):
                todo = [each for each in ctx.ledger.received if each.subscription == group]
                done = {each.id for each in todo if each.delivery.outcome == "ack"}
                if ctx.random.random() < 0.5 or len(done) + out >= len(messages):  # noqa: PLR2004
                    messages += await ctx.send(broker, topic, start=len(messages))
                else:
                    delivery = (await reader.next()).delivery
                    match ctx.random.randrange(3):
                        case 0:
                            await delivery.ack()
                        case 1:
                            await delivery.retry()
                        case _:
                            out += 1
                if out >= 15:  # noqa: PLR2004
                    break
    messages += await ctx.send(broker, topic, start=len(messages))
    async with ctx.reading(broker, topic, group=group) as reader:
        done = {each.id for each in ctx.ledger.received if each.delivery.outcome == "ack"}
        while len(done) < len(messages):
            done |= {each.id for each in await reader.take(1)}
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify(may_duplicate=ctx.capabilities.settlement == "cumulative")
