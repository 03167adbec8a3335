"""STO-INB: the ids of the inbox."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from diator.testing.outbox._context import Context
from diator.testing.outbox._scenario import scenario

_NAMES = ["a", "A", "a ", "", "ü", "日本語", "'; --", "x" * 200]


@scenario("STO-INB-01", "A message is new once for each group and handler")
async def once(ctx: Context) -> None:
    """Catch a store that forgets, or that takes one handler or group for another."""
    first, second = ctx.messages(2)
    ctx.is_true(await ctx.first_time(first), "first_time of a new message")
    ctx.is_false(await ctx.first_time(first), "first_time of the same again")
    ctx.is_true(await ctx.first_time(second), "first_time of another message")
    ctx.is_true(await ctx.first_time(first, group="other"), "first_time of another group")
    ctx.is_true(await ctx.first_time(first, handler="other"), "first_time of another handler")
    ctx.is_false(await ctx.first_time(first, group="other"), "first_time of that group again")
    for name in _NAMES:
        ctx.is_true(await ctx.first_time(first, group=name), f"first_time of the group {name[:10]!r}")
        ctx.is_true(await ctx.first_time(first, handler=name), f"first_time of the handler {name[:10]!r}")
        ctx.is_false(await ctx.first_time(first, group=name), f"first_time of the group {name[:10]!r} again")


@scenario("STO-INB-02", "A message stays new if the unit of work fails")
async def undone(ctx: Context) -> None:
    """Catch a store that notes it in a transaction of its own: the message would be lost."""
    message = ctx.message()
    for _ in range(2):
        async with ctx.undone() as session:
            first = await ctx.store.first_time(message.message_id, "group", "handler", session)
            ctx.is_true(first, "first_time after a rollback")
    ctx.is_true(await ctx.first_time(message), "first_time after a rollback")
    ctx.is_false(await ctx.first_time(message), "first_time after a commit")


@scenario("STO-INB-03", "In one transaction a message is new once")
async def same_transaction(ctx: Context) -> None:
    """Catch a store that looks only for what is committed."""
    message = ctx.message()
    async with ctx.database.session() as session:
        found = [await ctx.store.first_time(message.message_id, "group", "handler", session) for _ in range(2)]
        await ctx.store_in(session, ctx.message(1))
    ctx.same(found, [True, False], "first_time, twice in one transaction")
    ctx.same(len((await ctx.claim()).rows), 1, "the rows that were stored after a duplicate")


@scenario("STO-INB-04", "A duplicate waits until it is known whether the first handling succeeded")
async def waits(ctx: Context) -> None:
    """Catch a store that lets both handle the message, or reports a duplicate of what is rolled back later."""
    message = ctx.message()
    async with ctx.undone() as session:
        await ctx.store.first_time(message.message_id, "group", "handler", session)
        second = await ctx.meanwhile(ctx.first_time(message))
        ctx.check(not second.done(), "first_time returned while another transaction with the same is open")
    ctx.is_true(await ctx.ended(second, "first_time"), "first_time after the other transaction was rolled back")
    other = ctx.message()
    async with ctx.database.session() as session:
        await ctx.store.first_time(other.message_id, "group", "handler", session)
        second = await ctx.meanwhile(ctx.first_time(other))
        ctx.check(not second.done(), "first_time returned while another transaction with the same is open")
    ctx.is_false(await ctx.ended(second, "first_time"), "first_time after the other transaction was committed")


@scenario("STO-INB-05", "Of many duplicates at the same time, one is the first", level="S")
async def many(ctx: Context) -> None:
    """Catch a store that asks and then writes, so that two see nothing."""
    for _ in range(5):
        message = ctx.message()
        found = await asyncio.gather(*(ctx.first_time(message) for _ in range(6)))
        ctx.same(sum(found), 1, "how many of six at the same time were the first")


@scenario("STO-INB-06", "Other messages do not wait", level="X", facilities=["writers"])
async def beside(ctx: Context) -> None:
    """Catch a store that locks the whole table."""
    async with ctx.database.session() as session:
        await ctx.store.first_time(ctx.message().message_id, "group", "handler", session)
        second = await ctx.meanwhile(ctx.first_time(ctx.message()))
        ctx.is_true(await ctx.ended(second, "first_time of another message"), "first_time of another message")


@scenario("STO-INB-07", "Ids are kept as long as asked for")
async def keep(ctx: Context) -> None:
    """Catch a store that deletes what is younger, or something else."""
    message = ctx.message()
    await ctx.first_time(message)
    await ctx.add(ctx.message(1))
    ctx.same(await ctx.store.prune(keep=timedelta(hours=1)), 0, "what was pruned that is younger")
    ctx.is_false(await ctx.first_time(message), "first_time of what is kept")
    await asyncio.sleep(ctx.limits.brief)
    ctx.same(await ctx.store.prune(keep=timedelta(seconds=ctx.limits.brief / 2)), 1, "what was pruned that is older")
    ctx.is_true(await ctx.first_time(message), "first_time of what was pruned")
    ctx.same(len((await ctx.claim()).rows), 1, "the rows of the outbox")


@scenario("STO-INB-08", "One call prunes at most as many as asked for")
async def bounded(ctx: Context) -> None:
    """Catch a store that deletes a million ids in one transaction."""
    async with ctx.database.session() as session:
        for number in range(10):
            await ctx.store.first_time(ctx.message().message_id, "group", f"handler {number}", session)
    await asyncio.sleep(0.01)
    found = [await ctx.store.prune(keep=timedelta(0), limit=4) for _ in range(4)]
    ctx.same(found, [4, 4, 2, 0], "what four calls with the limit 4 pruned, of 10 ids")


@scenario("STO-INB-09", "Several processes prune beside each other", level="S")
async def prune_beside(ctx: Context) -> None:
    """Catch a store whose processes delete the same ids and fail, or count them twice."""
    count = 30
    async with ctx.database.session() as session:
        for number in range(count):
            await ctx.store.first_time(ctx.message().message_id, "group", f"handler {number}", session)
    await asyncio.sleep(0.01)
    stores, total = [ctx.another() for _ in range(4)], 0

    async def all_pruned() -> bool:
        nonlocal total
        total += sum(await asyncio.gather(*(store.prune(keep=timedelta(0), limit=7) for store in stores)))
        return total >= count

    await ctx.until(all_pruned, "ids are left that were to be pruned")
    ctx.same(total, count, "what all processes pruned")
