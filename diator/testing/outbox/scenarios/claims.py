"""STO-CLM: claims and leases."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from uuid import UUID, uuid4

from diator.testing.outbox._clock import shifted
from diator.testing.outbox._context import LONG, Context, now, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-CLM-01", "A leased row is not claimed again")
async def once(ctx: Context) -> None:
    """Catch a store that hands out rows which are leased, to the same relay or to another one."""
    await ctx.add(*ctx.messages(3))
    ctx.same(numbers((await ctx.claim()).rows), [0, 1, 2], "the claimed messages")
    for store in (ctx.store, ctx.another()):
        for order in ("key", "none"):
            claim = await ctx.claim(store=store, order=order)
            ctx.same(numbers(claim.rows), [], f"what was claimed of leased rows with the order {order}")


@scenario("STO-CLM-02", "The earliest rows are claimed first, at most as many as asked for")
async def limit(ctx: Context) -> None:
    """Catch a store that ignores the limit, or takes any rows."""
    await ctx.add(*ctx.messages(10))
    ctx.same(numbers((await ctx.claim(limit=3)).rows), [0, 1, 2], "the first claim")
    ctx.same(numbers((await ctx.claim(limit=1)).rows), [3], "the second claim")
    ctx.same(numbers((await ctx.claim(limit=100)).rows), [4, 5, 6, 7, 8, 9], "the third claim")


@scenario("STO-CLM-03", "The claims of several relays never overlap", level="S")
async def apart(ctx: Context) -> None:
    """Catch a store that reads rows and leases them afterwards, so that two relays read the same ones."""
    count = 200
    await ctx.add(*ctx.messages(count))
    claimed: Counter[object] = Counter()

    async def relay(store: object) -> None:
        while sum(claimed.values()) < count:  # a claim may be empty because another one has locked what is left
            claim = await ctx.claim(limit=7, store=store, order=ctx.random.choice(["key", "none"]))  # type: ignore[arg-type]
            claimed.update(numbers(claim.rows))
            await asyncio.sleep(0)

    await asyncio.gather(*(relay(ctx.another()) for _ in range(4)))
    claimed.update(numbers((await ctx.claim()).rows))
    ctx.same(claimed, Counter(range(count)), "how often each message was claimed")


@scenario("STO-CLM-04", "What was sent is gone for good")
async def sent(ctx: Context) -> None:
    """Catch a store that keeps rows which were sent, and claims them again when their lease has ended."""
    await ctx.add(*ctx.messages(3))
    claim = await ctx.claim(lease=ctx.limits.brief)
    ctx.same(await ctx.finish(claim, sent=claim.rows[:2]), 0, "the lost leases")
    again = await ctx.claim_in_time()
    ctx.same(numbers(again.rows), [2], "what was claimed after the end of the lease")


@scenario("STO-CLM-05", "A lease ends by itself, and the attempt counts")
async def expired(ctx: Context) -> None:
    """Catch a store that never ends a lease, so that a crash of a relay loses rows, or counts when it finishes."""
    await ctx.add(ctx.message(1, key="a"), ctx.message(2))
    first = await ctx.claim(lease=ctx.limits.brief)
    ctx.same([row.attempts for row in first.rows], [1, 1], "the attempts of the first claim")
    second = await ctx.claim_in_time(2, lease=ctx.limits.brief, store=ctx.another())
    ctx.same([row.attempts for row in second.rows], [2, 2], "the attempts after a crash")
    third = await ctx.claim_in_time(2)
    ctx.same([row.attempts for row in third.rows], [3, 3], "the attempts after two crashes")
    ctx.same([row.position for row in third.rows], [row.position for row in first.rows], "the positions")


@scenario("STO-CLM-06", "A lease does not end before its time")
async def not_yet(ctx: Context) -> None:
    """Catch a store whose leases are shorter than asked for."""
    await ctx.add(ctx.message())
    start = asyncio.get_running_loop().time()
    await ctx.claim(lease=4 * ctx.limits.brief)
    await ctx.claim_in_time()
    took = asyncio.get_running_loop().time() - start
    ctx.check(took >= 4 * ctx.limits.brief - 0.01, f"a lease of {4 * ctx.limits.brief:g} s ended after {took:.3f} s")


@scenario("STO-CLM-07", "What was not tried is released, and its attempt too")
async def untried(ctx: Context) -> None:
    """Catch a store that counts an attempt for a row which nobody tried to send."""
    await ctx.add(ctx.message(1), ctx.message(2, key="a"))
    for _ in range(3):
        claim = await ctx.claim()
        ctx.same([(row.attempts, *numbers([row])) for row in claim.rows], [(1, 1), (1, 2)], "attempts and messages")
        ctx.same(await ctx.finish(claim, untried=claim.rows), 0, "the lost leases")


@scenario("STO-CLM-08", "What failed waits for its retry")
async def retried(ctx: Context) -> None:
    """Catch a store that retries at once, or never, or forgets the attempts."""
    await ctx.add(*ctx.messages(3))
    claim = await ctx.claim()
    later, soon, at_once = claim.rows
    await ctx.finish(claim, failed=[later], retry_after=LONG)
    await ctx.finish(claim, failed=[soon], retry_after=2 * ctx.limits.brief)
    start = asyncio.get_running_loop().time()
    await ctx.finish(claim, failed=[at_once], retry_after=0)
    found = await ctx.claim_in_time()
    ctx.same([(row.attempts, *numbers([row])) for row in found.rows], [(2, 2)], "what is retried at once")
    found = await ctx.claim_in_time()
    took = asyncio.get_running_loop().time() - start
    ctx.same([(row.attempts, *numbers([row])) for row in found.rows], [(2, 1)], "what is retried soon")
    ctx.check(took >= 2 * ctx.limits.brief - 0.01, f"a retry after {2 * ctx.limits.brief:g} s came after {took:.3f} s")
    ctx.same(numbers((await ctx.claim()).rows), [], "what is retried in an hour")


@scenario("STO-CLM-09", "A relay that has lost its lease changes nothing, and learns how many it lost")
async def fenced(ctx: Context) -> None:
    """Catch a store that finishes rows by their positions alone: it would delete what another relay sends just now."""
    await ctx.add(*ctx.messages(4))
    stale = await ctx.claim(lease=ctx.limits.brief)
    fresh = await ctx.claim_in_time(4)
    one, two, three, four = stale.rows
    lost = await ctx.finish(stale, sent=[one], untried=[two], failed=[three], retry_after=0)
    lost += await ctx.finish(stale, failed=[four])
    ctx.same(lost, 4, "the rows whose lease was lost")
    ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed, while another relay has the lease")
    ctx.same(len(await ctx.store.dead()), 0, "the dead rows")
    await ctx.all_sent(fresh)
    ctx.same(await ctx.finish(stale, sent=stale.rows), 4, "the rows that are gone")
    ctx.same((await ctx.store.status()).pending, 0, "the pending rows")


@scenario("STO-CLM-10", "Rows that another claim has are counted as lost, the own ones are finished")
async def half_lost(ctx: Context) -> None:
    """Catch a store that finishes all or nothing, or counts wrongly."""
    await ctx.add(*ctx.messages(3))
    first, second = await ctx.claim(limit=1), await ctx.claim(limit=2)
    lost = await ctx.finish(second, sent=[*first.rows, second.rows[0]], failed=second.rows[1:], retry_after=0)
    ctx.same(lost, 1, "the rows whose lease was lost")
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what failed and is claimed again")
    ctx.same(await ctx.finish(first, sent=first.rows), 0, "the lost leases of the other claim")
    ctx.same(await ctx.finish(first, sent=[]), 0, "the lost leases of nothing")
    ctx.same((await ctx.store.status()).pending, 1, "the pending rows")


@scenario("STO-CLM-11", "Each claim has a token of its own")
async def tokens(ctx: Context) -> None:
    """Catch a store that uses one token for each relay, so that its second claim is not fenced from its first."""
    await ctx.add(*ctx.messages(3))
    claims = [await ctx.claim(limit=1) for _ in range(4)]
    ctx.same(len({claim.lease for claim in claims}), 4, "the number of tokens of four claims")
    ctx.check(all(type(claim.lease) is UUID for claim in claims), "a token is not a UUID")
    ctx.same(
        await ctx.store.finish(uuid4(), sent=[claims[0].rows[0].position], untried=[], failed=[]), 1, "lost leases"
    )


@scenario("STO-CLM-12", "`stored_at` is the time at which a message was stored")
async def stored_at(ctx: Context) -> None:
    """Catch a store whose times have no time zone, or that takes another one's time for UTC."""
    before = now()
    await ctx.add(ctx.message())
    after = now()
    (row,) = (await ctx.claim(lease=ctx.limits.brief)).rows
    ctx.check(row.stored_at.tzinfo is not None, "stored_at has no time zone")
    late = timedelta(seconds=60)  # the clock of the database is another one
    ctx.check(before - late <= row.stored_at <= after + late, f"stored_at is {row.stored_at}, and it is {after}")
    (again,) = (await ctx.claim_in_time()).rows
    ctx.same(again.stored_at, row.stored_at, "stored_at at the second claim")


@scenario("STO-CLM-13", "A claim says when the next row becomes due")
async def next_due(ctx: Context) -> None:
    """Catch a store that lets the relay sleep past a retry or a scheduled time, or wakes it for nothing."""
    ctx.same((await ctx.claim()).next_due, None, "next_due of an empty outbox")
    await ctx.add(ctx.message(), due=timedelta(hours=2))
    await _due_in(ctx, 7_200.0, "a scheduled row")
    await ctx.add(ctx.message())
    claim = await ctx.claim()
    ctx.same((len(claim.rows), claim.next_due), (1, None), "the rows, and next_due beside rows")
    await _due_in(ctx, 7_200.0, "a scheduled row, beside a leased one")
    await ctx.finish(claim, failed=claim.rows, retry_after=600)
    await _due_in(ctx, 600.0, "a row that is retried")


async def _due_in(ctx: Context, seconds: float, what: str) -> None:
    due = (await ctx.claim()).next_due
    ctx.check(due is not None and seconds - 60 <= due <= seconds, f"next_due is {due} for {what} in {seconds:g} s")


@scenario("STO-CLM-14", "The clock of a relay does not matter", level="X", facilities=["clock"])
async def other_clock(ctx: Context) -> None:
    """Catch a store that writes or compares times of the relay: a clock five minutes off takes a lease from another."""
    await ctx.add(*ctx.messages(2))
    ahead, behind = ctx.another(), ctx.another()
    claim = await ctx.claim(limit=1, lease=60)
    with shifted(ahead, timedelta(minutes=5)):
        ctx.same(numbers((await ctx.claim(store=ahead, limit=1, lease=60)).rows), [1], "what a clock ahead claimed")
        ctx.same(numbers((await ctx.claim(store=ahead)).rows), [], "the leased rows that a clock ahead claimed")
        await ctx.finish(claim, failed=claim.rows, retry_after=60, store=ahead)
        ctx.same(numbers((await ctx.claim(store=ahead)).rows), [], "what a clock ahead retried too early")
    with shifted(behind, -timedelta(minutes=5)):
        await ctx.add(ctx.message(2), store=behind)
        claim = await ctx.claim(store=behind, lease=ctx.limits.brief)
        ctx.same(numbers(claim.rows), [2], "what a clock behind claimed")
    again = await ctx.claim_in_time()
    ctx.same(numbers(again.rows), [2], "what was claimed after the end of a lease by a clock behind")
    with shifted(behind, -timedelta(minutes=5)):
        await ctx.finish(again, failed=again.rows, retry_after=0, store=behind)
        await ctx.add(ctx.message(3), due=timedelta(seconds=ctx.limits.brief), store=behind)
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what a clock behind retried at once")
    ctx.same(numbers((await ctx.claim_in_time()).rows), [3], "what a clock behind scheduled")
