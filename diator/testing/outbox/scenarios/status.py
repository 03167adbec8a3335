"""STO-STA: the status, and the check of the tables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from time import monotonic

from diator.exceptions import ConfigurationError, DiatorError
from diator.testing.outbox._context import LONG, Context
from diator.testing.outbox._harness import Spoiled
from diator.testing.outbox._scenario import scenario


@scenario("STO-STA-01", "The status of an empty outbox is zero")
async def empty(ctx: Context) -> None:
    """Catch a store that counts wrongly, or fails, without rows."""
    found = await ctx.store.status()
    counts = (found.pending, found.oldest, found.scheduled, found.leased, found.dead, found.blocked, found.blocked_keys)
    ctx.same(counts, (0,) * 7, "pending, oldest, scheduled, leased, dead, blocked, blocked_keys")
    ctx.same((found.held_back, found.held_back_by, found.held_back_for), (0, None, 0), "what is held back")


@scenario("STO-STA-02", "The status counts each row where it belongs")
async def exact(ctx: Context) -> None:
    """Catch a store that counts rows twice, or not at all."""
    await ctx.kill(ctx.message(1, key="a"), ctx.message(2), ctx.message(3, key="b"))
    await ctx.add(ctx.message(4), ctx.message(5))
    claim = await ctx.claim()
    await ctx.finish(claim, failed=claim.rows[1:], retry_after=LONG)
    await ctx.add(*ctx.messages(2, start=10, key="a"))
    await ctx.add(*ctx.messages(4, start=20, key="c"))
    await ctx.add(*ctx.messages(5, start=30), due=timedelta(hours=1))
    async with ctx.undone() as session:
        await ctx.store_in(session, ctx.message(40))
    found = await ctx.store.status()
    ctx.same(found.pending, 7, "pending: one leased, two blocked, four that may be sent")
    ctx.same(found.scheduled, 6, "scheduled: five for a time, one for its retry")
    ctx.same(found.leased, 1, "leased")
    ctx.same(found.dead, 3, "dead: two with a key")
    ctx.same((found.blocked, found.blocked_keys), (2, 2), "blocked, and the keys with a dead row")
    ctx.same((found.held_back, found.held_back_by), (0, None), "what is held back")
    await ctx.all_sent(await ctx.claim())
    found = await ctx.store.status()
    ctx.same((found.pending, found.leased), (3, 1), "pending and leased, after what may be sent was sent")


@scenario("STO-STA-03", "A row whose lease has ended is pending, and not leased")
async def lease_ended(ctx: Context) -> None:
    """Catch a store that counts ended leases."""
    await ctx.add(ctx.message())
    await ctx.claim(lease=ctx.limits.brief)

    async def ended() -> bool:
        found = await ctx.store.status()
        ctx.same(found.pending, 1, "pending")
        return found.leased == 0

    await ctx.until(ended, "the row is still counted as leased")


@scenario("STO-STA-04", "The status says for how long the oldest row has been due")
async def oldest(ctx: Context) -> None:
    """Catch a store that counts from the time of storing, or takes dead and scheduled rows for old ones."""
    start = monotonic()
    await ctx.kill(ctx.message(1))
    await ctx.add(ctx.message(2), due=timedelta(hours=1))
    await asyncio.sleep(ctx.limits.brief)
    ctx.same((await ctx.store.status()).oldest, 0, "oldest, with nothing pending")
    since = monotonic()
    await ctx.add(ctx.message(3), due=timedelta(seconds=2 * ctx.limits.brief))
    await ctx.until(_pending(ctx), "a scheduled row did not become due")
    found = (await ctx.store.status()).oldest
    most = monotonic() - since - 2 * ctx.limits.brief + 0.01
    ctx.check(0 <= found <= most, f"oldest is {found}, and the row has been due for at most {most:.3f} s")
    await ctx.add(ctx.message(4))
    await asyncio.sleep(ctx.limits.brief)
    found, most = (await ctx.store.status()).oldest, monotonic() - start
    ctx.check(ctx.limits.brief - 0.01 <= found <= most, f"oldest is {found}, and at most {most:.3f} s have passed")


def _pending(ctx: Context) -> Callable[[], Awaitable[bool]]:
    async def pending() -> bool:
        return (await ctx.store.status()).pending == 1

    return pending


@scenario("STO-STA-05", "The check of right tables passes")
async def check(ctx: Context) -> None:
    """Catch a store that refuses its own tables."""
    await ctx.store.check()
    await ctx.add(ctx.message())
    await ctx.another().check()


@scenario("STO-STA-06", "The check refuses missing and older tables", level="X", facilities=["tables"])
async def check_refuses(ctx: Context) -> None:
    """Catch a store that lets the relay start, and fail at each claim."""
    spoiled: tuple[Spoiled, ...] = ("column missing", "inbox missing", "outbox missing")
    for how in spoiled:
        await ctx.database.spoil(how)
        error = await ctx.raises(ConfigurationError, ctx.another().check(), f"check, with the {how},")
        ctx.check(str(error).strip(), "the error has no text that says what to do")


@scenario("STO-STA-07", "Errors of the database are raised as they are", level="X", facilities=["tables"])
async def errors(ctx: Context) -> None:
    """Catch a store that swallows errors, or wraps them, so that a program does not recognize them."""
    await ctx.database.spoil("outbox missing")
    for what, doing in {"claim": ctx.claim(), "status": ctx.store.status(), "add": ctx.add(ctx.message())}.items():
        error = await ctx.raises(Exception, doing, f"{what}, without its table,")
        ctx.check(not isinstance(error, DiatorError), f"{what} raised {error!r}, which is not one of the database")
