"""STO-KEY: rows with one key are claimed one after the other."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from diator.outbox.store import Row
from diator.testing.outbox._context import LONG, Context, numbers
from diator.testing.outbox._scenario import scenario


@scenario("STO-KEY-01", "Rows with one key come in the order in which they were stored")
async def in_order(ctx: Context) -> None:
    """Catch a store that orders by something else than the position, such as the id or the time."""
    async with ctx.database.session() as session:
        await ctx.store_in(session, *ctx.messages(20, key="a"))
        await ctx.store_in(session, *ctx.messages(20, start=20, key="a"))
    await ctx.add(*ctx.messages(20, start=40, key="a"))
    found: list[object] = []
    while rows := (claim := await ctx.claim(limit=7)).rows:
        found += numbers(rows)
        await ctx.all_sent(claim)
    ctx.same(found, [*range(60)], "the claimed messages")


@scenario("STO-KEY-02", "Nothing is claimed while an earlier row with its key is leased to another claim")
async def behind_a_lease(ctx: Context) -> None:
    """Catch a store that lets another relay overtake."""
    await ctx.add(ctx.message(1, key="a"), ctx.message(2, key="a"), ctx.message(3, key="b"), ctx.message(4))
    first = await ctx.claim(limit=1)
    second = await ctx.claim(store=ctx.another())
    ctx.same(numbers(second.rows), [3, 4], "what was claimed beside a leased row with the key a")
    ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed while all keys are leased")
    await ctx.all_sent(first)
    ctx.same(numbers((await ctx.claim_in_time()).rows), [2], "what was claimed after the earlier row was sent")


@scenario("STO-KEY-03", "Nothing is claimed while an earlier row with its key waits for its retry")
async def behind_a_retry(ctx: Context) -> None:
    """Catch a store that sends the next row with the key while one that failed waits."""
    await ctx.add(ctx.message(1, key="a"), ctx.message(2, key="a"), ctx.message(3))
    claim = await ctx.claim()
    one, two, three = claim.rows
    await ctx.finish(claim, untried=[two])
    await ctx.finish(claim, failed=[one, three], retry_after=LONG)
    await ctx.add(ctx.message(4, key="a"), ctx.message(5, key="b"), ctx.message(6))
    ctx.same(numbers((await ctx.claim()).rows), [5, 6], "what was claimed behind a row that waits for its retry")


@scenario("STO-KEY-04", "A row that was retried comes before the later ones")
async def after_a_retry(ctx: Context) -> None:
    """Catch a store that orders rows by the time at which they become due."""
    await ctx.add(ctx.message(1, key="a"), ctx.message(2, key="a"))
    claim = await ctx.claim()
    await ctx.finish(claim, failed=claim.rows[:1], untried=claim.rows[1:], retry_after=ctx.limits.brief)
    await ctx.add(ctx.message(3, key="a"))
    again = await ctx.claim_one_by_one(3)
    ctx.same([(row.attempts, *numbers([row])) for row in again], [(2, 1), (1, 2), (1, 3)], "attempts and messages")


@scenario("STO-KEY-05", "A dead row blocks its key, or the rows behind it are skipped to, as asked for")
async def behind_a_dead_row(ctx: Context) -> None:
    """Catch a store that lets a dead row stop other keys, or rows without a key, or its own key in spite of `skip`."""
    await ctx.kill(ctx.message(1, key="a"), ctx.message(2))
    await ctx.add(ctx.message(3, key="a"), ctx.message(4, key="b"), ctx.message(5), ctx.message(6, key="a"))
    ctx.same(numbers((await ctx.claim(on_dead="block")).rows), [4, 5], "what was claimed while dead rows block")
    ctx.same(numbers((await ctx.claim(on_dead="skip")).rows), [3, 6], "what was claimed while dead rows are skipped")


@scenario("STO-KEY-06", "With the order `none`, nothing waits for another row")
async def without_order(ctx: Context) -> None:
    """Catch a store that keeps an order nobody asked for."""
    await ctx.kill(ctx.message(1, key="a"))
    await ctx.add(*ctx.messages(4, start=2, key="a"))
    first = await ctx.claim(limit=1, order="none")
    await ctx.finish(first, failed=first.rows, retry_after=LONG)
    await ctx.claim(limit=1, order="none")
    ctx.same(numbers((await ctx.claim(order="none")).rows), [4, 5], "what was claimed without an order")


@scenario("STO-KEY-07", "Keys that are not equal have nothing to do with each other")
async def different_keys(ctx: Context) -> None:
    """Catch a store that compares keys as texts for people: without case, accents or spaces at the end."""
    keys = ["a", "A", "a ", " a", "ä", "a\u0308", "ß", "ss", "", " "]
    for number, key in enumerate(keys):
        await ctx.add(ctx.message(number, key=key), ctx.message(100 + number, key=key))
    for number in range(len(keys)):
        ctx.same(
            numbers((await ctx.claim(limit=1)).rows), [number], "what was claimed beside leased rows of other keys"
        )
    ctx.same(numbers((await ctx.claim()).rows), [], "what was claimed while the rows of all keys are leased")


@scenario("STO-KEY-08", "What an ended lease leaves is claimed in the order of the key")
async def after_a_crash(ctx: Context) -> None:
    """Catch a store that lets later rows overtake those that a relay held when it crashed."""
    await ctx.add(*ctx.messages(3, key="a"))
    await ctx.claim(limit=2, lease=ctx.limits.brief)
    again = await ctx.claim_one_by_one(3)
    ctx.same(numbers(again), [0, 1, 2], "what was claimed after the end of the lease")


@scenario("STO-KEY-09", "Rows without a key are never blocked")
async def unkeyed(ctx: Context) -> None:
    """Catch a store for which no key is a key like any other."""
    await ctx.kill(ctx.message(1))
    await ctx.add(ctx.message(2))
    claim = await ctx.claim(limit=1)
    await ctx.finish(claim, failed=claim.rows, retry_after=LONG)
    await ctx.add(*ctx.messages(3, start=3))
    ctx.same(numbers((await ctx.claim(limit=1)).rows), [3], "beside a dead row and one that is retried")
    ctx.same(numbers((await ctx.claim()).rows), [4, 5], "beside a leased one")


@scenario("STO-KEY-11", "Nothing overtakes a row that may be cancelled just now", level="X", facilities=["writers"])
async def behind_a_cancel(ctx: Context) -> None:
    """Catch a store that skips a locked row, and claims the next one with its key: the cancel may be rolled back."""
    first, second = ctx.messages(2, key="a")
    await ctx.add(first, second)
    async with ctx.undone() as session:
        await ctx.store.cancel(first.message_id, session)
        claiming = await ctx.meanwhile(ctx.claim())
    claim = await ctx.ended(claiming, "claim, beside a transaction that cancels,")
    await ctx.all_sent(claim)
    found = numbers(claim.rows)
    if len(found) < len([first, second]):
        found += numbers(await ctx.claim_one_by_one(len([first, second]) - len(found)))
    ctx.same(found, [0, 1], "what was claimed, beside and after a cancel that was rolled back")


@scenario("STO-KEY-10", "The order of keys survives several relays that fail", level="S", timeout=60)
async def several_relays(ctx: Context) -> None:
    """Catch a store whose claims look at other rows before they wait for another relay."""
    keys, count, sent = [f"key {each}" for each in range(5)], 12, defaultdict[object, list[object]](list)
    for number in range(count):
        await ctx.add(*[ctx.message(number, key=key) for key in keys])

    async def relay(store: object) -> None:
        while sum(map(len, sent.values())) < count * len(keys):
            claim = await ctx.claim(limit=ctx.random.randint(1, 9), store=store)  # type: ignore[arg-type]
            await asyncio.sleep(ctx.random.random() / 200)
            failed, done, left = set[object](), list[Row](), list[Row]()
            for row in claim.rows:
                fails = row.message.key not in failed and not ctx.random.randrange(5)
                (left if row.message.key in failed or fails else done).append(row)
                if fails:
                    failed.add(row.message.key)
            for row in done:
                sent[row.message.key].append(row.message.payload["number"])
            firsts = {row.message.key: row for row in reversed(left)}
            ctx.same(
                await ctx.finish(
                    claim,
                    sent=done,
                    failed=[*firsts.values()],
                    untried=[row for row in left if row not in firsts.values()],
                    retry_after=0.001,
                    store=store,  # type: ignore[arg-type]
                ),
                0,
                "the lost leases",
            )
            await asyncio.sleep(0)

    await asyncio.gather(*(relay(ctx.another()) for _ in range(3)))
    ctx.same(dict(sent), {key: [*range(count)] for key in keys}, "what was sent, by key")
