"""Leases: what a dead consumer held is claimed by another."""

import asyncio
from collections import Counter
from contextlib import suppress
from time import monotonic

import pytest

from diator.brokers.redis._connection import CommandConnection
from diator.exceptions import BrokerUnavailable, OutcomeUnknown
from tests.integration.redis_streams.helpers import (
    LEASE,
    LONG,
    SLACK,
    acked,
    attempts,
    consuming,
    dead_letters,
    eventually,
    message,
    nothing_comes,
    nothing_left,
    number_of,
    pending,
    send,
    subscribed,
    take,
)


async def test_another_consumer_claims_the_messages_of_a_dead_one(*, make, proxy, proxied_url, broker, admin, stream):
    """It takes the lease and two scans. A consumer that was only disconnected does not claim them back."""
    cut_off = await make(proxied_url)
    async with subscribed(cut_off) as deliveries, subscribed(broker) as others:
        await asyncio.sleep(0.1)
        while not deliveries._received:
            await send(broker, 1)
            await asyncio.sleep(0.05)
            if others._received:
                await acked(others, 1)
        [held] = await take(deliveries, 1)
        proxy.refuse()
        proxy.cut()
        died = monotonic()

        [delivery] = await take(others, 1)
        assert LEASE * 0.6 < monotonic() - died < LEASE + 2 + SLACK
        assert (delivery.attempt, delivery.body) == (2, held.body)
        await proxy.heal()
        await asyncio.sleep(LEASE * 1.5)
        ((owner),) = await admin.xpending_range(stream, "billing", "-", "+", 10)
        assert owner["message_id"] == delivery.token.id
        assert owner["consumer"] == delivery.settler.group.consumer
        await delivery.ack()
        await nothing_left(admin, stream)
        await nothing_comes(deliveries)


async def test_a_long_handler_keeps_its_lease(make, redis_url, broker, admin, stream) -> None:
    """Messages behind it keep theirs too: for three leases, and each is handled once."""
    handled, second = Counter(), await make(redis_url)

    def handle(event):
        handled[event.number] += 1
        return asyncio.sleep(LEASE * 3)

    async for pace in attempts(admin):
        handled.clear()
        await send(broker, 1, 2)
        async with pace, consuming(broker, handle), consuming(second, handle):
            await nothing_left(admin, stream)

    assert handled == {1: 1, 2: 1}


async def test_what_waits_behind_its_key_keeps_its_lease(make, redis_url, broker, admin, stream) -> None:
    """For three leases, while a second consumer of the group looks for entries to take over."""
    handled, begun, second = [], asyncio.Event(), await make(redis_url)

    async def handle(event):
        handled.append(event.number)
        begun.set()
        if event.number == 0:
            await asyncio.sleep(LEASE * 3)

    async for pace in attempts(admin):
        handled.clear()
        begun.clear()
        async with pace, consuming(broker, handle, concurrency=2):
            await broker.send_messages([message(number, key="slow") for number in range(50)])
            await begun.wait()
            async with consuming(second, handle):
                await nothing_left(admin, stream)

    assert handled == [*range(50)]


async def test_a_lost_lease_is_not_stolen_back(make, redis_url, admin, stream) -> None:
    broker = await make(redis_url, lease=1.5)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        await admin.xclaim(stream, "billing", "another", 0, [delivery.token.id], justid=True)
        await asyncio.sleep(1.3)

        [owner] = await admin.xpending_range(stream, "billing", "-", "+", 10)
        assert (owner["consumer"], owner["times_delivered"]) == (b"another", 1)
        assert owner["time_since_delivered"] > 1200
        await admin.xack(stream, "billing", delivery.token.id)


async def test_what_waits_here_and_is_given_to_another_consumer_is_not_handled(make, redis_url, admin, stream) -> None:
    """As after a stop of this process: behind its key, and before it is handed out."""
    broker, handled = await make(redis_url, extra_prefetch=10), []

    async def handle(event):
        handled.append(event.number)
        if event.number in {0, 1}:
            await asyncio.sleep(LEASE * 2)

    async with consuming(broker, handle, concurrency=2):
        await broker.send_messages([message(number, key=f"{number % 2}") for number in range(6)])
        await broker.send_messages([message(number) for number in range(6, 9)])

        async def all_are_here() -> bool:
            return await pending(admin, stream) == 9

        await eventually(all_are_here)
        ids = [each["message_id"] for each in await admin.xpending_range(stream, "billing", "-", "+", 9)]
        await admin.xclaim(stream, "billing", "another", 0, ids[2:8], justid=True)
        await admin.xack(stream, "billing", *ids[2:8])
        await nothing_left(admin, stream)

    assert handled == [0, 1, 8]


@pytest.mark.parametrize(("is_over", "left"), [(True, []), (False, [2])])
async def test_an_entry_that_was_removed_is_handed_out_while_its_lease_lasts(
    *, make, redis_url, admin, stream, is_over, left
):
    """After that, most probably another consumer has claimed and finished it."""
    broker = await make(redis_url, lease=10 * LEASE)
    async with subscribed(broker, prefetch=1) as deliveries:
        await send(broker, 1, 2)
        [first] = await take(deliveries, 1)

        async def both_are_here() -> bool:
            return len([*deliveries.leases]) == 2

        await eventually(both_are_here)
        [second] = [entry for entry in deliveries.leases if entry is not first.token]
        await admin.xdel(stream, second.id)
        if is_over:
            second.leased_until = 0.0  # as after a stop of this process
        before = first.token.leased_until

        async def leases_are_renewed() -> bool:
            return first.token.leased_until > before

        await eventually(leases_are_renewed)
        await first.ack()

        assert [number_of(each) for each in await take(deliveries, len(left))] == left
        await nothing_comes(deliveries)


@pytest.mark.usefixtures("quick")
async def test_messages_behind_many_pending_ones_are_found(*, make, redis_url, broker, admin, stream) -> None:
    """XAUTOCLAIM looks at ten pending entries for each one that it is asked for; there are more behind them."""
    reader = await make(redis_url, extra_prefetch=0)
    await admin.xgroup_create(stream, "billing", "0", mkstream=True)
    await send(broker, *range(31))
    await admin.xreadgroup("billing", "alive", {stream: ">"}, count=30)
    await admin.xreadgroup("billing", "dead", {stream: ">"}, count=1)
    alive = [each["message_id"] for each in await admin.xpending_range(stream, "billing", "-", "+", 30)]

    async def keep_alive() -> None:
        while True:
            await admin.xclaim(stream, "billing", "alive", 0, alive, justid=True)
            await asyncio.sleep(LEASE / 4)

    keeping = asyncio.create_task(keep_alive())
    try:
        async with subscribed(reader, prefetch=1) as deliveries:
            assert await acked(deliveries, 1) == [30]
    finally:
        keeping.cancel()


@pytest.mark.usefixtures("quick")
async def test_claimed_messages_are_not_lost_if_claiming_fails(*, make, redis_url, admin, stream, monkeypatch):
    """The connection breaks between claiming and the reply with the delivery counts."""
    broker = await make(redis_url)
    await send(broker, 1, 2, 3)
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "dead", {stream: ">"}, count=3)
    execute, counts = CommandConnection.execute, 0

    async def fail_once(self, *command, **options):
        nonlocal counts
        if command[0] == b"XPENDING":
            counts += 1
            if counts == 2:
                raise OutcomeUnknown("the connection to Redis failed")
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", fail_once)
    async with subscribed(broker) as deliveries:
        assert sorted(await acked(deliveries, 3)) == [1, 2, 3]


@pytest.mark.usefixtures("quick")
async def test_a_message_acknowledged_during_a_takeover_is_dropped(
    *, make, redis_url, admin, stream, monkeypatch, caplog
) -> None:
    """Its previous consumer was slow, not dead."""
    execute = CommandConnection.execute

    async def acknowledged_first(self, *command, **options):
        if command[0] == b"XPENDING" and b"1" in command[4:]:
            await admin.xack(stream, "billing", command[3])
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", acknowledged_first)
    broker = await make(redis_url)
    await send(broker, 1)
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "late", {stream: ">"}, count=1)
    async with subscribed(broker) as deliveries:
        await nothing_comes(deliveries, within=2 * LEASE)
        await nothing_left(admin, stream)
    assert "reconnecting" not in caplog.text


@pytest.mark.parametrize("outcome", ["dead_letter", "retry"])
async def test_a_message_that_could_not_be_settled_is_redelivered(
    *, make, proxy, proxied_url, broker, admin, stream, outcome
) -> None:
    """Settling failed while Redis was away. The message must not stay pending for this consumer forever."""
    reader = await make(proxied_url)
    async with subscribed(reader) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        proxy.refuse()
        proxy.cut()
        await asyncio.sleep(0.05)
        with pytest.raises(BrokerUnavailable):
            await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))
        await proxy.heal()

        [again] = await take(deliveries, 1, within=LEASE + 2 + SLACK)
        assert (number_of(again), again.attempt) == (1, 2)
        await again.ack()
        await nothing_left(admin, stream)


@pytest.mark.parametrize(
    "settle",
    [lambda each: each.ack(), lambda each: each.retry(), lambda each: each.dead_letter("bad")],
    ids=["ack", "retry", "dead letter"],
)
async def test_a_message_that_another_claimed_is_not_settled(patient, admin, stream, settle) -> None:
    """
    It is settled too late, and by the other consumer as well: dead-lettered or requeued, it would exist twice.

    Acknowledged, it would be lost with the other one.
    """
    async with subscribed(patient) as deliveries:
        await send(patient, 1, 2)
        [delivery, own] = await take(deliveries, 2)
        await admin.xclaim(stream, "billing", "another", 0, [delivery.token.id], justid=True)

        await settle(delivery)
        await own.ack()
        await asyncio.sleep(0.1)

        assert await pending(admin, stream) == 1
        assert not await admin.xlen(f"{stream}:billing:again")
        assert not await dead_letters(admin, stream)
        await admin.xack(stream, "billing", delivery.token.id)


@pytest.mark.parametrize("outcome", ["dead_letter", "retry"])
async def test_settling_again_after_a_lost_reply_settles_once(
    *, make, redis_url, admin, stream, monkeypatch, outcome
) -> None:
    execute, settled = CommandConnection.execute, 0

    async def lose_one(self, *command, **options):
        nonlocal settled
        reply = await execute(self, *command, **options)
        if command[0] == b"EVAL" and b"XACK" in command[1]:
            settled += 1
            if settled == 1:
                raise OutcomeUnknown("the connection to Redis failed")
        return reply

    monkeypatch.setattr(CommandConnection, "execute", lose_one)
    broker = await make(redis_url, lease=LONG)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        for _ in range(2):
            with suppress(OutcomeUnknown):
                await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))

        assert settled == 2
        if outcome == "retry":
            assert await acked(deliveries, 1) == [1]
            await nothing_comes(deliveries)
        else:
            assert len(await dead_letters(admin, stream)) == 1


async def test_the_age_of_the_oldest_message_is_reported(broker):
    async with subscribed(broker) as deliveries:
        assert deliveries.oldest_message == 0
        await send(broker, 1, 2)
        first, second = await take(deliveries, 2)
        await asyncio.sleep(1.0)

        assert 1.0 <= deliveries.oldest_message < 1.0 + SLACK
        await second.ack()
        assert deliveries.oldest_message >= 1.0
        await first.ack()
        assert deliveries.oldest_message == 0
