"""STO-USE: how a program uses a store: event loops, tasks, cancelled calls, and many rows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from diator.outbox.store import Store
from diator.testing.outbox._context import LONG, Context, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-USE-01", "A store is made without an event loop")
async def without_a_loop(ctx: Context) -> None:
    """Catch a store that makes tasks or locks of an event loop when it is made."""
    store = ctx.closing(await asyncio.to_thread(ctx.database.store))
    await ctx.add(ctx.message(1), store=store)
    ctx.same(numbers((await ctx.claim(store=store)).rows), [1], "what was claimed")
    ctx.check(isinstance(store.session_type, type), f"session_type is {store.session_type!r}, which is not a class")


@scenario("STO-USE-02", "Several tasks use one store at the same time")
async def several_tasks(ctx: Context) -> None:
    """Catch a store with one connection for all, or with state that two calls mix up."""
    await ctx.kill(ctx.message(-1))
    await ctx.listening()
    claimed: list[object] = []

    async def write(number: int) -> None:
        await ctx.add(ctx.message(number), ctx.message(100 + number))
        await ctx.first_time(ctx.message())

    async def relay() -> None:
        for _ in range(5):
            claim = await ctx.claim()
            claimed.extend(numbers(claim.rows))
            await ctx.all_sent(claim)

    async def look() -> None:
        for _ in range(5):
            await ctx.store.status()
            ctx.same(len(await ctx.store.dead()), 1, "the dead rows")
            await ctx.store.prune(keep=timedelta(hours=1))
            await ctx.store.wait(0.001)

    await asyncio.gather(*map(write, range(10)), relay(), look(), relay())
    claimed.extend(numbers((await ctx.claim()).rows))
    ctx.same(sorted(claimed, key=str), sorted([*range(10), *range(100, 110)], key=str), "what was claimed")


@scenario("STO-USE-03", "The session is that of the program, and stays open")
async def the_session(ctx: Context) -> None:
    """Catch a store that commits, rolls back or closes the session of the program."""
    message = ctx.message()
    async with ctx.database.session() as session:
        ctx.check(isinstance(session, ctx.store.session_type), f"a session is a {type(session)}, not a session_type")
        await ctx.store_in(session, ctx.message(1))
        await ctx.store.first_time(message.message_id, "group", "handler", session)
        await ctx.store.first_time(message.message_id, "group", "handler", session)
        await ctx.store.cancel(message.message_id, session)
        await ctx.store_in(session, ctx.message(2))
    ctx.same(numbers((await ctx.claim()).rows), [1, 2], "what was claimed")


@scenario("STO-USE-04", "A cancelled call leaves no transaction open", level="X", facilities=["transactions"])
async def cancelled_calls(ctx: Context) -> None:
    """Catch a store that returns a connection in a transaction to its pool, or loses one from it."""
    await ctx.kill(ctx.message(1))
    await ctx.add(*ctx.messages(20))
    claim = await ctx.claim(limit=5)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: ctx.claim(limit=1, lease=0.001),
        lambda: ctx.finish(claim, untried=claim.rows),
        ctx.store.status,
        ctx.store.dead,
        ctx.store.check,
        lambda: ctx.store.redrive([]),
        lambda: ctx.store.prune(keep=timedelta(hours=1)),
        lambda: ctx.add(ctx.message()),
        lambda: ctx.first_time(ctx.message()),
    ]
    for steps in range(8):
        for call in calls:
            await ctx.store.status()  # so that a connection is there, and the call is cancelled in its transaction
            await ctx.first_time(ctx.message())
            task = asyncio.ensure_future(call())
            for step in range(steps):
                await asyncio.sleep(0.001 * (step % 3 == 2))  # noqa: PLR2004
            task.cancel()
            await asyncio.wait({task})

    async def none_is_open() -> bool:
        return await ctx.database.transactions() == 0

    await ctx.until(none_is_open, "transactions are open, or connections in use, after all calls were cancelled")
    await ctx.store.finish(claim.lease, sent=[], untried=[row.position for row in claim.rows], failed=[])
    await ctx.claim_in_time()


@scenario("STO-USE-05", "What is not due costs nothing", level="X", facilities=["cost"], timeout=120)
async def cost(ctx: Context) -> None:
    """Catch a store whose claims look at every row: scheduled ones, dead ones, and those that wait for a retry."""

    async def grow(count: int) -> None:
        await ctx.add(*ctx.messages(count // 2), *ctx.messages(count // 2, key="a"), due=timedelta(hours=1))
        await ctx.add(*(ctx.message(each, key=f"{count} {each}") for each in range(count)))
        claim = await ctx.claim(limit=count)
        half = len(claim.rows) // 2
        await ctx.finish(claim, failed=claim.rows[:half])
        await ctx.finish(claim, failed=claim.rows[half:], retry_after=LONG)

    await _stays(ctx, grow)


@scenario("STO-USE-06", "What waits behind a dead row costs nothing", level="X", facilities=["cost"], timeout=120)
async def cost_of_blocked(ctx: Context) -> None:
    """Catch a store whose claims look again and again at a key that is blocked."""
    await ctx.kill(ctx.message(key="blocked"))

    async def grow(count: int) -> None:
        await ctx.add(*ctx.messages(count, key="blocked"))

    await _stays(ctx, grow)


async def _stays(ctx: Context, grow: Callable[[int], Awaitable[None]]) -> None:
    """Check that the cost of a claim stays the same, however many rows *grow* has added."""
    few, many = 100, 2_000

    async def one_claim(store: Store[Any]) -> None:
        claim = await ctx.claim(limit=5, store=store)
        ctx.same(len(claim.rows), 5, "the claimed rows")
        await ctx.finish(claim, untried=claim.rows, store=store)

    async def steady() -> int:
        await ctx.claim()
        await ctx.add(*ctx.messages(5))
        return min([await ctx.database.cost(one_claim) for _ in range(4)])  # the first may note what it has looked at

    await grow(few)
    before = await steady()
    await grow(many)
    after = await steady()
    ctx.check(
        after <= 3 * before + 50, f"a claim of 5 rows cost {before} beside {few} other rows, {after} beside {many}"
    )
