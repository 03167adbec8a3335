"""STO-WKE: `wait`."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from time import monotonic

from diator.testing.outbox._context import LONG, Context, numbers
from diator.testing.outbox._scenario import scenario

WAKES = ["wakes"]


@scenario("STO-WKE-01", "`wait` ends after its time, and raises nothing")
async def timeout(ctx: Context) -> None:
    """Catch a store that waits for ever, not at all, or raises a TimeoutError."""
    await ctx.listening()
    for seconds in (2 * ctx.limits.brief, 0.0):
        start = monotonic()
        await ctx.within(ctx.limits.lag, ctx.store.wait(seconds), f"wait({seconds:g})")
        took = monotonic() - start
        ctx.check(took >= seconds - 0.01, f"wait({seconds:g}) ended after {took:.3f} s, and nothing was stored")


@scenario("STO-WKE-02", "`wait` ends when another one stores a message", level="X", facilities=WAKES)
async def wakes(ctx: Context) -> None:
    """Catch a store that lets the relay sleep."""
    waiting = await ctx.asleep()
    await ctx.add(ctx.message(), store=ctx.another())
    await ctx.ended(waiting, "wait, after a message was committed,")


@scenario("STO-WKE-03", "`wait` does not end before the commit", level="X", facilities=["wakes", "writers"])
async def not_before(ctx: Context) -> None:
    """Catch a store that wakes the relay while there is nothing to claim: it would find nothing, and sleep again."""
    await ctx.listening()
    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(), store=ctx.another())
        waiting = await ctx.asleep()
    await ctx.ended(waiting, "wait, after the commit,")


@scenario("STO-WKE-04", "What was stored after the last claim ends `wait` at once", level="X", facilities=WAKES)
async def no_lost_wake_up(ctx: Context) -> None:
    """Catch a store that listens only while it waits: a message between a claim and `wait` would sleep there."""
    other = ctx.another()
    await ctx.listening()
    for number in range(5):
        ctx.same((await ctx.claim()).rows, [], "what was claimed")
        await ctx.add(ctx.message(number), store=other)
        await ctx.within(ctx.limits.lag, ctx.store.wait(LONG), "wait, after a message was committed,")
        ctx.same(numbers((await ctx.claim_in_time()).rows), [number], "what was claimed then")


@scenario("STO-WKE-05", "The first `wait` of a store misses nothing", level="X", facilities=WAKES)
async def first_wait(ctx: Context) -> None:
    """Catch a store that begins to listen in its first `wait`, and misses what was stored after the first claim."""
    ctx.same((await ctx.claim()).rows, [], "what was claimed")
    await ctx.add(ctx.message(), store=ctx.another())
    await ctx.within(ctx.limits.lag, ctx.store.wait(LONG), "the first wait, after a message was committed,")


@scenario("STO-WKE-06", "`close` releases what waits, and the store can be used again", level="C")
async def closed(ctx: Context) -> None:
    """Catch a store that cannot be used after `close`, or that fails if it is closed twice."""
    await ctx.store.wait(0)
    await ctx.store.close()
    await ctx.store.close()
    await ctx.add(ctx.message(1))
    ctx.same(numbers((await ctx.claim_in_time()).rows), [1], "what was claimed after close")
    await ctx.store.wait(0)
    if "wakes" in ctx.harness.facilities:
        waiting = await ctx.asleep()
        await ctx.add(ctx.message(2), store=ctx.another())
        await ctx.ended(waiting, "wait, after close and a commit,")


@scenario("STO-WKE-07", "A cancelled `wait` can be called again", level="X", facilities=WAKES)
async def cancelled(ctx: Context) -> None:
    """Catch a store that keeps a connection for each wait, or cannot listen twice."""
    await ctx.listening()
    for _ in range(3):
        waiting = await ctx.meanwhile(ctx.store.wait(LONG))
        waiting.cancel()
        await asyncio.wait({waiting})
        ctx.check(waiting.cancelled(), "wait was cancelled, and did not end so")
    waiting = await ctx.asleep()
    await ctx.add(ctx.message(), store=ctx.another())
    await ctx.ended(waiting, "wait, after a message was committed,")


@scenario("STO-WKE-08", "`wait` survives the loss of its connection", level="F", facilities=["wakes", "connections"])
async def disconnected(ctx: Context) -> None:
    """Catch a store that raises the error of the connection, polls without a pause, or never listens again."""
    await ctx.listening()
    waiting = await ctx.meanwhile(ctx.store.wait(4 * ctx.limits.brief))
    await ctx.database.disconnect()
    await ctx.ended(waiting, "wait, after its connection was lost,")
    start, calls, wait = monotonic(), 0, 2.0
    until = start + ctx.limits.recovery
    while True:
        asked = monotonic()
        waiting = await ctx.meanwhile(ctx.store.wait(wait))
        await ctx.add_again(ctx.message(calls))
        await ctx.ended(waiting, "wait, after its connection was lost,")
        calls += 1
        if monotonic() - asked < wait - ctx.limits.brief:
            break
        ctx.check(monotonic() < until, f"wait did not notice a commit for {monotonic() - start:.0f} s")
    ctx.same((await ctx.claim_in_time(calls)).rows[-1].message.payload["number"], calls - 1, "the last claimed message")


@scenario("STO-WKE-09", "Scheduled rows do not end `wait` again and again", level="X", facilities=WAKES)
async def scheduled(ctx: Context) -> None:
    """Catch a store that counts what is not due as news at each call."""
    await ctx.add(ctx.message(), due=timedelta(hours=1))
    ctx.same((await ctx.claim()).rows, [], "what was claimed")
    await ctx.listening()
    await ctx.claim()
    start = monotonic()
    await ctx.store.wait(2 * ctx.limits.brief)
    took = monotonic() - start
    ctx.check(took >= 2 * ctx.limits.brief - 0.01, f"wait ended after {took:.3f} s, and nothing new was stored")
