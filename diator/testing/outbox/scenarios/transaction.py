"""STO-TXN: a row exists if and only if the transaction that added it was committed."""

from __future__ import annotations

from contextlib import suppress

from diator.testing.outbox._context import Context, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-TXN-01", "What was committed is claimed once, all of it")
async def committed(ctx: Context) -> None:
    """Catch a store that loses messages, or stores one twice."""
    await ctx.add(*ctx.messages(40))
    await ctx.add(ctx.message(40))
    claim = await ctx.claim()
    ctx.same(numbers(claim.rows), [*range(41)], "the claimed messages")
    await ctx.all_sent(claim)
    ctx.same(numbers((await ctx.claim()).rows), [], "the messages that were claimed after all were sent")


@scenario("STO-TXN-02", "Nothing exists before the commit")
async def uncommitted(ctx: Context) -> None:
    """Catch a store that commits by itself, or that adds in a transaction of its own."""
    async with ctx.undone() as session:
        await ctx.store_in(session, ctx.message())
        claiming = await ctx.meanwhile(ctx.claim())
        ctx.check(
            not claiming.done() or not claiming.result().rows, "a message was claimed while its transaction was open"
        )
    early = await ctx.ended(claiming, "claim, beside a transaction that was rolled back,")
    ctx.same(numbers(early.rows), [], "the messages of a transaction that was rolled back")


@scenario("STO-TXN-03", "Nothing exists of a unit of work that failed")
async def rolled_back(ctx: Context) -> None:
    """Catch a store that adds in a transaction of its own, or that needs an `add` which the program waits for."""
    async with ctx.undone() as session:
        await ctx.store_in(session, ctx.message(1), ctx.message(2))
        await ctx.store_in(session, ctx.message(3))
    await ctx.add(ctx.message(4))
    ctx.same(numbers((await ctx.claim()).rows), [4], "the claimed messages")
    ctx.same((await ctx.store.status()).pending, 1, "the pending messages")


@scenario("STO-TXN-04", "What a savepoint undoes is gone, and the rest is there", level="X", facilities=["savepoints"])
async def savepoint(ctx: Context) -> None:
    """Catch a store that keeps messages elsewhere until the commit, such as in a list."""

    class Undone(Exception):
        pass

    async with ctx.database.session() as session:
        await ctx.store_in(session, ctx.message(1))
        with suppress(Undone):
            async with ctx.database.savepoint(session):
                await ctx.store_in(session, ctx.message(2))
                raise Undone
        async with ctx.database.savepoint(session):
            await ctx.store_in(session, ctx.message(3))
        await ctx.store_in(session, ctx.message(4))
    ctx.same(numbers((await ctx.claim()).rows), [1, 3, 4], "the claimed messages")


@scenario("STO-TXN-05", "`add` says whether its transaction was rolled back")
async def was_rolled_back(ctx: Context) -> None:
    """Catch a store that reports an open or a committed transaction as rolled back, or the reverse."""
    async with ctx.undone() as session:
        undone = await ctx.store_in(session, ctx.message())
        ctx.check(undone is None or undone() is False, "an open transaction was reported as rolled back")
    async with ctx.database.session() as session:
        done = await ctx.store_in(session, ctx.message())
    ctx.check(done is None or done() is False, "a committed transaction was reported as rolled back")
    ctx.check(undone is None or undone() is True, "a transaction that was rolled back was not reported as such")
    ctx.same(undone is None, done is None, "whether the store cannot know it")


@scenario("STO-TXN-06", "To store no message is nothing")
async def nothing(ctx: Context) -> None:
    """Catch a store that writes a statement without rows, which most databases refuse."""
    async with ctx.database.session() as session:
        await ctx.store_in(session)
        await ctx.store_in(session, ctx.message(1))
    ctx.same(numbers((await ctx.claim()).rows), [1], "the claimed messages")


@scenario("STO-TXN-07", "Of two open transactions, the committed one counts", level="X", facilities=["writers"])
async def both_ways(ctx: Context) -> None:
    """Catch a store that keeps what it adds for the whole process instead of for each transaction."""
    async with ctx.database.session() as kept:
        async with ctx.undone() as undone:
            await ctx.store_in(undone, ctx.message(1))
            await ctx.store_in(kept, ctx.message(2))
            await ctx.store_in(undone, ctx.message(3))
        await ctx.store_in(kept, ctx.message(4))
    ctx.same(numbers((await ctx.claim()).rows), [2, 4], "the claimed messages")


@scenario("STO-TXN-08", "A lost connection rolls back", level="F", facilities=["connections"])
async def disconnected(ctx: Context) -> None:
    """Catch a store that adds in a transaction of its own, and an environment whose fault has no effect."""
    await ctx.add(ctx.message(1))
    lost = False
    try:
        async with ctx.database.session() as session:
            await ctx.store_in(session, ctx.message(2))
            await ctx.database.disconnect()
    except Exception:  # noqa: BLE001  # whatever the client library raises
        lost = True
    ctx.check(lost, "the transaction was committed over a connection that was lost")
    claim = await ctx.claim_in_time(store=ctx.another())
    ctx.same(numbers(claim.rows), [1], "the claimed messages")
