"""STO-DUE: scheduled messages, and how they are cancelled."""

from __future__ import annotations

import asyncio
from datetime import timedelta, timezone

from diator.brokers.sending import Due
from diator.testing.outbox._context import Context, now, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-DUE-01", "What is due already is sent at once")
async def overdue(ctx: Context) -> None:
    """Catch a store that refuses a time in the past, or takes a time with an offset for one without."""
    dues: list[Due] = [None, timedelta(0), -timedelta(hours=1), now() - timedelta(days=400)]
    dues += [(now() - timedelta(minutes=5)).astimezone(timezone(timedelta(hours=hours))) for hours in (-11, 14)]
    async with ctx.database.session() as session:
        await ctx.store.add(ctx.messages(len(dues)), dues, session)
    ctx.same(numbers((await ctx.claim()).rows), [*range(len(dues))], "the claimed messages")


@scenario("STO-DUE-02", "What is scheduled is not sent before its time")
async def scheduled(ctx: Context) -> None:
    """Catch a store that ignores the time, or the offset in it."""
    dues: list[Due] = [timedelta(hours=1), now() + timedelta(hours=1), now() + timedelta(days=10_000)]
    dues += [(now() + timedelta(minutes=5)).astimezone(timezone(timedelta(hours=hours))) for hours in (-11, 14)]
    async with ctx.database.session() as session:
        await ctx.store.add(ctx.messages(len(dues)), dues, session)
    ctx.same(numbers((await ctx.claim()).rows), [], "the claimed messages")
    status = await ctx.store.status()
    ctx.same((status.pending, status.scheduled), (0, len(dues)), "the pending and the scheduled rows")


@scenario("STO-DUE-03", "What is scheduled is sent when its time has come")
async def in_time(ctx: Context) -> None:
    """Catch a store that never sends it, or too early."""
    delay = 3 * ctx.limits.brief
    start = asyncio.get_running_loop().time()
    await ctx.add(ctx.message(1), due=timedelta(seconds=delay))
    await ctx.add(ctx.message(2), due=now() + timedelta(seconds=2 * delay))
    ctx.same(numbers((await ctx.claim_in_time()).rows), [1], "what was claimed first")
    took = asyncio.get_running_loop().time() - start
    ctx.check(took >= delay - 0.01, f"a message that is due in {delay:g} s was claimed after {took:.3f} s")
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what was claimed then")


@scenario("STO-DUE-04", "A scheduled row blocks nothing, also with its key")
async def blocks_nothing(ctx: Context) -> None:
    """Catch a store that lets a reminder for tomorrow stop everything of its key."""
    await ctx.add(ctx.message(1, key="a"), due=timedelta(hours=1))
    await ctx.add(ctx.message(2, key="a"), ctx.message(3))
    ctx.same(numbers((await ctx.claim()).rows), [2, 3], "what was claimed behind a scheduled row")


@scenario("STO-DUE-05", "A message that nobody has claimed can be cancelled, once")
async def cancelled(ctx: Context) -> None:
    """Catch a store that cancels nothing, something else, or only one of two rows with the id."""
    soon, later, other = ctx.messages(3)
    await ctx.add(soon)
    await ctx.add(later, due=timedelta(hours=1))
    await ctx.add(other, later)
    ctx.is_false(await ctx.cancel(ctx.message()), "cancel of a message that never existed")
    ctx.same([await ctx.cancel(later), await ctx.cancel(soon)], [True, True], "cancel of two messages")
    ctx.same([await ctx.cancel(later), await ctx.cancel(soon)], [False, False], "cancel of the same again")
    ctx.same(numbers((await ctx.claim()).rows), [2], "what was claimed")
    ctx.same((await ctx.store.status()).scheduled, 0, "the scheduled rows")


@scenario("STO-DUE-06", "What was claimed cannot be cancelled any more")
async def too_late(ctx: Context) -> None:
    """Catch a store that reports a message as cancelled while a relay sends it, or has tried to."""
    sending, waiting, dead, sent = messages = ctx.messages(4)
    await ctx.add(*messages)
    claim = await ctx.claim()
    await ctx.finish(claim, sent=claim.rows[3:], failed=claim.rows[1:2], retry_after=3_600)
    await ctx.finish(claim, failed=claim.rows[2:3])
    found = [await ctx.cancel(each) for each in (sending, waiting, dead, sent)]
    ctx.same(found, [False] * 4, "cancel of what is sent just now, waits for its retry, is dead, was sent")
    ctx.same(await ctx.finish(claim, sent=claim.rows[:1]), 0, "the lost leases")
    ctx.same(len(await ctx.store.dead()), 1, "the dead rows")


@scenario("STO-DUE-07", "To cancel is part of the transaction")
async def cancel_undone(ctx: Context) -> None:
    """Catch a store that cancels although the unit of work failed, or sends although it has promised not to."""
    kept, gone = ctx.messages(2)
    await ctx.add(kept, gone)
    async with ctx.undone() as session:
        ctx.is_true(await ctx.store.cancel(kept.message_id, session), "cancel in a transaction")
    async with ctx.database.session() as session:
        ctx.is_true(await ctx.store.cancel(gone.message_id, session), "cancel in a transaction")
        claiming = await ctx.meanwhile(ctx.claim())
    claim = await ctx.ended(claiming, "claim, beside a transaction that cancels,")
    ctx.same(numbers([*claim.rows, *(await ctx.claim()).rows]), [0], "what was claimed")


@scenario("STO-DUE-08", "A message can be cancelled in the transaction that stores it")
async def cancel_own(ctx: Context) -> None:
    """Catch a store that looks only for what is committed."""
    message, other = ctx.messages(2)
    async with ctx.database.session() as session:
        await ctx.store_in(session, message, other)
        ctx.is_true(await ctx.store.cancel(message.message_id, session), "cancel in the same transaction")
        ctx.is_false(await ctx.store.cancel(message.message_id, session), "cancel of the same again")
    ctx.same(numbers((await ctx.claim()).rows), [1], "what was claimed")


@scenario("STO-DUE-09", "Released rows can be cancelled, and later rows with the key are free then")
async def cancel_frees(ctx: Context) -> None:
    """Catch a store that remembers a row which was cancelled."""
    first, second = ctx.messages(2, key="a")
    await ctx.add(first, second)
    ctx.is_true(await ctx.cancel(first), "cancel")
    ctx.same(numbers((await ctx.claim()).rows), [1], "what was claimed")
