"""STO-LNG: transactions that commit in another order than they stored."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from diator.testing.outbox._context import Context, numbers
from diator.testing.outbox._scenario import scenario

WRITERS = ["writers"]


@scenario("STO-LNG-01", "A long transaction holds back later rows with its key", level="X", facilities=WRITERS)
async def held_back(ctx: Context) -> None:
    """Catch a store that hands out a row before an earlier one which is not committed yet."""
    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(1, key="a"))
        await ctx.add(ctx.message(2, key="a"))
        ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed while an earlier transaction is open")
    ctx.same(numbers((await ctx.claim_in_time(2)).rows), [1, 2], "what was claimed after the commit")


@scenario("STO-LNG-02", "The end of a long transaction releases what it held back", level="X", facilities=WRITERS)
async def released(ctx: Context) -> None:
    """Catch a store that waits for ever for a position that was rolled back."""
    async with ctx.undone() as session:
        await ctx.store_in(session, ctx.message(1, key="a"))
        await ctx.add(ctx.message(2, key="a"))
        ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed while an earlier transaction is open")
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what was claimed after the rollback")


@scenario("STO-LNG-03", "With the order `none`, a long transaction holds back nothing", level="X", facilities=WRITERS)
async def without_order(ctx: Context) -> None:
    """Catch a store that lets one slow transaction stop a relay for which the order does not matter."""
    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(1, key="a"))
        await ctx.add(ctx.message(2, key="a"))
        ctx.same(numbers((await ctx.claim(order="none")).rows), [2], "what was claimed without an order")


@scenario("STO-LNG-04", "The status says what is held back", level="X", facilities=WRITERS)
async def status(ctx: Context) -> None:
    """Catch a store that says nothing while a transaction somebody forgot stops the relay."""
    ctx.same((await ctx.store.status()).held_back, 0, "the rows held back in an empty outbox")
    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(1, key="a"))
        await ctx.add(ctx.message(2, key="a"), ctx.message(3, key="a"))
        await asyncio.sleep(ctx.limits.brief)
        found = await ctx.store.status()
        ctx.same((found.held_back, found.pending), (2, 2), "the rows that are held back, and those that are pending")
        ctx.check(found.held_back_for >= ctx.limits.brief, f"held_back_for is {found.held_back_for}")
    found = await ctx.store.status()
    ctx.same((found.held_back, found.held_back_by, found.held_back_for), (0, None, 0), "what holds back afterwards")


@scenario("STO-LNG-06", "The status says which transaction holds back", level="X", facilities=["writers", "pids"])
async def held_back_by(ctx: Context) -> None:
    """Catch a store that names itself, or a later transaction: somebody would end the wrong one."""
    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(1, key="a"))
        async with ctx.database.session() as later:
            await ctx.store_in(later, ctx.message(2, key="b"))
            await ctx.add(ctx.message(3, key="a"))
            found = await ctx.store.status()
            ctx.same(found.held_back_by, await ctx.database.pid(session), "held_back_by")


@scenario("STO-LNG-05", "The order of keys survives commits in any order", level="S", facilities=WRITERS, timeout=60)
async def any_order(ctx: Context) -> None:
    """Catch a store that looks for open transactions before it looks for rows, or the reverse."""
    ended, claimed = asyncio.Event(), defaultdict[str | None, list[int]](list)
    keys = ["a", "b", "c"]

    async def unit_of_work(number: int) -> None:
        async with ctx.database.session() as session:
            for key in ctx.random.sample(keys, 2):
                await ctx.store_in(session, ctx.message(number, key=key))
                await asyncio.sleep(ctx.random.random() / 100)

    async def relay() -> None:
        while True:
            last = ended.is_set()
            claim = await ctx.claim()
            for row in claim.rows:
                claimed[row.message.key].append(row.position)
            await ctx.all_sent(claim)
            await asyncio.sleep(0)
            if last and not claim.rows:
                return

    relaying = ctx.start(relay())
    for start in range(0, 60, 6):
        await asyncio.gather(*(unit_of_work(number) for number in range(start, start + 6)))
    ended.set()
    await ctx.ended(relaying, "a relay, which has to claim all rows,")
    ctx.same(sum(map(len, claimed.values())), 120, "the claimed rows")
    for key, positions in claimed.items():
        ctx.same(positions, sorted(positions), f"the positions with the key {key}, as they were claimed")
