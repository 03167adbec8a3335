"""API: the shape of the contract."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

from diator.brokers.base import ReadableBroker
from diator.brokers.capabilities import _LEVELS, Capabilities
from diator.exceptions import BrokerClosed, DiatorError, MessageTooLarge, UnsupportedCapability
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._refusals import REFUSALS
from diator.testing.conformance._scenario import scenario


async def _handle(event: Happened) -> None:
    """Do nothing."""


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


@scenario("API-01", "what goes wrong is an error of diator")
async def own_errors(ctx: Context) -> None:
    """Catches an exception of the client library that a program would have to know."""
    broker, topic = await ctx.broker(), ctx.topic()
    huge = ctx.message(topic, text="x" * ctx.capabilities.max_message_bytes)
    await ctx.raises(MessageTooLarge, broker.send_message(huge), "a huge message")
    await broker.aclose()
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")
    subscribing = broker.subscribe([topic]).__aenter__()
    await ctx.raises(DiatorError, subscribing, "subscribing when closed")


@scenario("API-02", "what is not promised is refused when a program is wired, by its name")
async def refused_when_wired(ctx: Context) -> None:
    """Catches a requirement that is accepted and not kept."""
    broker = await ctx.broker()
    lacks = ctx.capabilities.missing(_STRONGEST)
    ctx.check(lacks, "it promises everything, even a message of a TiB")
    for lack in lacks:
        name = lack.split()[0]
        needed = replace(Capabilities(), **{name: getattr(_STRONGEST, name)})
        try:
            ctx.consumer_run(broker, _handle, requires=needed)
        except UnsupportedCapability as refused:
            ctx.check(name in str(refused), f"the refusal of {name} does not say so: {refused}")
        else:
            ctx.check(holds=False, otherwise=f"a consumer that requires {name} is accepted")
        if name in REFUSALS:
            await REFUSALS[name](ctx, needed)
    ctx.consumer_run(broker, _handle, requires=ctx.capabilities)


@scenario("API-03", "the capabilities are the same all the time, and of every broker")
async def capabilities_stay(ctx: Context) -> None:
    """Catches promises that change with the connection, or that anybody can change."""
    broker, topic = await ctx.broker(), ctx.topic()
    before = broker.capabilities
    async with ctx.reading(broker, topic):
        await ctx.send(broker, topic)
        ctx.same(broker.capabilities, before, "the capabilities while it is in use")
    ctx.same((await ctx.broker()).capabilities, before, "the capabilities of another broker")
    ctx.same(type(before), Capabilities, "their type")
    with suppress(FrozenInstanceError):
        before.guarantee = "at_most_once"  # type: ignore[misc]
    ctx.same(broker.capabilities, ctx.capabilities, "the capabilities after somebody tried to change them")


@scenario("API-04", "the methods have the contract's names and parameters")
async def signatures(ctx: Context) -> None:
    """Catches a transport that works in its own tests, and not where it is put in for another."""
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
        ctx.check(len(extra) <= names_only, f"{name} asks for {extra}, which the contract does not have")
    ctx.check(inspect.iscoroutinefunction(type(broker).send_message), "send_message is no coroutine function")


def _needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not variable and parameter.default is parameter.empty


@scenario("API-06", "sending, reading and closing honour a cancellation and asyncio.timeout")
async def cancellable(ctx: Context) -> None:
    """Catches a call that swallows the cancellation of its task."""
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


@scenario("API-07", "it works in asyncio's debug mode")
async def debug_mode(ctx: Context) -> None:
    """Catches what asyncio only complains about when it is asked: another thread's calls, forgotten coroutines."""
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


@scenario("API-10", "the promises fit together")
async def consistent(ctx: Context) -> None:
    """Catches a record that was filled in by guessing: the second promise cannot be kept without the first."""
    told = ctx.capabilities
    for field in fields(Capabilities):
        value = getattr(told, field.name)
        if isinstance(value, str):
            ctx.check(value in _LEVELS[field.name], f"{field.name} is {value!r}")
    follows = {
        "at_least_once takes settlement": told.guarantee == "at_most_once" or told.settlement != "none",
        "at_least_once takes a receipt": told.guarantee == "at_most_once" or told.receipt != "none",
        "redelivery takes settlement": not told.redelivery or told.settlement != "none",
        "a delayed retry is a retry": not told.delayed_retry or "retry" in told.redelivery,
        "a retry in order is a retry, and takes an order": not told.ordered_retry
        or ("retry" in told.redelivery and told.ordering != "none"),
        "a count takes redelivery": told.delivery_count == "none" or bool(told.redelivery),
        "a crash or a deadline has a bound": not {"crash", "deadline"} & told.redelivery
        or told.redelivery_bound is not None,
        "somebody gets the messages": bool(told.distribution),
        "durable subscriptions have a name, their group": told.subscription == "ephemeral"
        or "competing" in told.distribution,
        "a durable receipt takes durability": told.receipt != "durable" or told.durability != "none",
        "several processes take a network": not told.multi_process or told.network,
        "messages have a size": told.max_message_bytes > 0,
    }
    broken = [what for what, holds in follows.items() if not holds]
    ctx.same(broken, [], "the promises that do not fit")


@scenario("API-11", "a broker that is not an outbox does not say that it is one")
async def not_enlisted(ctx: Context) -> None:
    """Catches a transport that would be called before the middlewares have committed."""
    from diator.brokers.sending import transactional  # noqa: PLC0415

    ctx.check(not transactional(await ctx.broker()), "it says that it transactional")
    ctx.check(inspect.iscoroutinefunction(type(await ctx.broker()).aclose), "aclose is no coroutine function")


@scenario("API-09", "what a random program does comes to what a simple model says", level="S", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry", "close"}), subscription="durable"), timeout=60)  # fmt: skip
async def random_program(ctx: Context) -> None:
    """Catches what only an unusual order of calls brings about. The report has the seed."""
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
