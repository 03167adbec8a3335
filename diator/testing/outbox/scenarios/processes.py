"""STO-PRC: several processes, which may be killed."""

from __future__ import annotations

from diator.testing.outbox._context import Context, numbers
from diator.testing.outbox._process import other_process
from diator.testing.outbox._scenario import scenario

PROCESSES = ["processes"]


@scenario("STO-PRC-01", "A process that dies before the commit has stored nothing", level="F", facilities=PROCESSES)
async def before_the_commit(ctx: Context) -> None:
    """Catch a store that adds in a transaction of its own."""
    async with other_process(ctx, "store", ctx.message(key="a")) as other:
        await other.kill()
    await ctx.add(ctx.message(2, key="a"))
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what was claimed after a process was killed")


@scenario("STO-PRC-02", "A process that dies after the commit has stored everything", level="F", facilities=PROCESSES)
async def after_the_commit(ctx: Context) -> None:
    """Catch a store that writes messages after the commit, and loses them between the two."""
    async with other_process(ctx, "store and commit", ctx.message()) as other:
        await other.proceed()
        await other.kill()
    ctx.same(numbers((await ctx.claim_in_time()).rows), [1], "what was claimed after a process was killed")


@scenario("STO-PRC-03", "What a killed relay held is claimed when its lease ends", level="F", facilities=PROCESSES)
async def killed_relay(ctx: Context) -> None:
    """Catch a store that keeps a lock for a dead relay, or forgets its attempt."""
    await ctx.add(*ctx.messages(3, key="a"))
    async with other_process(ctx, "claim", ctx.message(), lease=5 * ctx.limits.brief) as other:
        await other.kill()
    found = await ctx.claim_one_by_one(3)
    ctx.same([(row.attempts, *numbers([row])) for row in found], [(2, 0), (2, 1), (2, 2)], "attempts and messages")


@scenario("STO-PRC-04", "A duplicate waits for another process, also if it dies", level="F", facilities=PROCESSES)
async def killed_handler(ctx: Context) -> None:
    """Catch a store that takes a message for handled whose handler has died."""
    message = ctx.message()
    async with other_process(ctx, "first time", message) as other:
        second = await ctx.meanwhile(ctx.first_time(message))
        ctx.check(not second.done(), "first_time returned while another process handles the message")
        await other.kill()
        ctx.is_true(await ctx.ended(second, "first_time"), "first_time after the other process was killed")
    message = ctx.message()
    async with other_process(ctx, "first time", message) as other:
        second = await ctx.meanwhile(ctx.first_time(message))
        await other.proceed()
        ctx.is_false(await ctx.ended(second, "first_time"), "first_time after the other process has committed")


@scenario("STO-PRC-05", "`wait` ends when another process commits", level="F", facilities=["processes", "wakes"])
async def wakes(ctx: Context) -> None:
    """Catch a store that notices only what its own process stores."""
    async with other_process(ctx, "store and commit", ctx.message()) as other:
        waiting = await ctx.asleep()
        await other.proceed()
        await ctx.ended(waiting, "wait, after another process has committed,")
