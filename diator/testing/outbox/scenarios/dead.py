"""STO-DED: dead rows."""

from __future__ import annotations

from datetime import timedelta

from diator.testing.outbox._context import Context, now, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-DED-01", "Dead rows are listed with what is known of them")
async def listed(ctx: Context) -> None:
    """Catch a store that hides what somebody needs to decide about a dead row."""
    rows = await ctx.kill(ctx.message(1, key="a"), ctx.message(2), ctx.message(3, key="b"))
    await ctx.add(*ctx.messages(2, start=4, key="a"), ctx.message(6))
    found = await ctx.store.dead()
    ctx.same(numbers(found), [1, 2, 3], "the dead messages")
    ctx.same([each.position for each in found], [row.position for row in rows], "the positions")
    ctx.same([each.attempts for each in found], [1, 1, 1], "the attempts")
    ctx.same([each.reason for each in found], ["rejected: ValueError"] * 3, "the reasons")
    ctx.same([each.blocked for each in found], [2, 0, 0], "the rows that wait behind them")
    ctx.same([each.stored_at for each in found], [row.stored_at for row in rows], "stored_at")
    late = timedelta(seconds=60)
    for each in found:
        ctx.check(each.died_at.tzinfo is not None, "died_at has no time zone")
        ctx.check(each.stored_at <= each.died_at <= now() + late, f"died_at is {each.died_at}")


@scenario("STO-DED-02", "Dead rows are listed in pages")
async def pages(ctx: Context) -> None:
    """Catch a store that ignores `limit` or `after`, or includes the row itself."""
    await ctx.add(*ctx.messages(5))
    claim = await ctx.claim()
    await ctx.finish(claim, failed=claim.rows)
    await ctx.add(*ctx.messages(2, start=5))
    first = await ctx.store.dead(limit=2)
    second = await ctx.store.dead(limit=2, after=first[-1].position)
    third = await ctx.store.dead(limit=2, after=second[-1].position)
    ctx.same([numbers(each) for each in (first, second, third)], [[0, 1], [2, 3], [4]], "the pages")
    ctx.same(await ctx.store.dead(after=third[-1].position), [], "the page after the last one")


@scenario("STO-DED-03", "A dead row is never claimed")
async def not_claimed(ctx: Context) -> None:
    """Catch a store that sends what somebody has to decide about."""
    await ctx.kill(ctx.message(1), ctx.message(2, key="a"))
    for on_dead in ("block", "skip"):
        for order in ("key", "none"):
            claim = await ctx.claim(on_dead=on_dead, order=order)
            ctx.same(numbers(claim.rows), [], f"what was claimed with {order}, {on_dead}")


@scenario("STO-DED-04", "Redriven rows are sent again, with no attempts, before those behind them")
async def redriven(ctx: Context) -> None:
    """Catch a store that keeps the attempts, so that the row dies at once, or appends it at the end of its key."""
    rows = await ctx.kill(ctx.message(1, key="a"), ctx.message(2), ctx.message(3, key="b"))
    await ctx.add(ctx.message(4, key="a"))
    ctx.same(await ctx.store.redrive([rows[0].position]), 1, "the redriven rows")
    claim = await ctx.claim()
    ctx.same([(row.attempts, *numbers([row])) for row in claim.rows], [(1, 1), (1, 4)], "attempts and messages")
    ctx.same(claim.rows[0].position, rows[0].position, "the position of the redriven row")
    ctx.same(numbers(await ctx.store.dead()), [2, 3], "the rows that are still dead")
    ctx.same((await ctx.store.status()).blocked, 0, "the blocked rows")


@scenario("STO-DED-05", "All are redriven only if nobody says which")
async def redrive_all(ctx: Context) -> None:
    """Catch a store that takes an empty list for all."""
    await ctx.kill(ctx.message(1), ctx.message(2, key="a"))
    ctx.same(await ctx.store.redrive([]), 0, "the redriven rows of no positions")
    ctx.same(len(await ctx.store.dead()), 2, "the dead rows")
    ctx.same(await ctx.store.redrive(), 2, "the redriven rows without positions")
    ctx.same(numbers((await ctx.claim()).rows), [1, 2], "what was claimed")
    ctx.same(await ctx.store.redrive(), 0, "the redriven rows, without dead ones")


@scenario("STO-DED-06", "Discarded rows are gone, and free those behind them")
async def discarded(ctx: Context) -> None:
    """Catch a store that deletes something else, or nothing."""
    rows = await ctx.kill(ctx.message(1, key="a"), ctx.message(2))
    await ctx.add(ctx.message(3, key="a"))
    ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed behind the dead row")
    ctx.same(await ctx.store.discard([]), 0, "the discarded rows of no positions")
    ctx.same(await ctx.store.discard([rows[0].position]), 1, "the discarded rows")
    ctx.same(await ctx.store.discard([rows[0].position]), 0, "the discarded rows, again")
    ctx.same(numbers(await ctx.store.dead()), [2], "the rows that are still dead")
    ctx.same(numbers((await ctx.claim()).rows), [3], "what was claimed behind the discarded row")


@scenario("STO-DED-07", "Rows that are not dead are neither redriven nor discarded")
async def living(ctx: Context) -> None:
    """Catch a store that deletes what a relay sends just now, or gives it to a second one."""
    await ctx.add(*ctx.messages(2))
    await ctx.add(ctx.message(2), due=timedelta(hours=1))
    claim = await ctx.claim(limit=1)
    first = claim.rows[0].position
    positions = range(max(first - 10, 0), first + 50)
    ctx.same(await ctx.store.redrive(positions), 0, "the redriven rows that were not dead")
    ctx.same(await ctx.store.discard(positions), 0, "the discarded rows that were not dead")
    ctx.same(numbers((await ctx.claim()).rows), [1], "what was claimed")
    await ctx.all_sent(claim)
    ctx.same((await ctx.store.status()).scheduled, 1, "the scheduled rows")


@scenario("STO-DED-08", "A redriven row may die again, and the last reason is shown")
async def dies_again(ctx: Context) -> None:
    """Catch a store that keeps the reason or the time of the first death."""
    (row,) = await ctx.kill(ctx.message(1))
    (first,) = await ctx.store.dead()
    await ctx.store.redrive([row.position])
    claim = await ctx.claim()
    await ctx.finish(claim, failed=claim.rows, retry_after=0)
    claim = await ctx.claim_in_time()
    await ctx.finish(claim, failed=claim.rows)
    (second,) = await ctx.store.dead()
    ctx.same(second.attempts, 2, "the attempts since the redrive")
    ctx.check(second.died_at > first.died_at, "died_at is that of the first death")
