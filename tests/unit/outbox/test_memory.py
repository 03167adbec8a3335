"""The store in memory: what is its own. What every store promises is proved by `diator.testing.outbox`."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from diator.brokers import Message
from diator.exceptions import UsageError
from diator.outbox.memory import MemorySession, MemoryStore
from diator.outbox.store import Failure

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


def message(number, key=None):
    return Message.create(message_name="Counted", payload={}, message_id=UUID(int=number), key=key)


async def claim(store, **options):
    options = {"limit": 100, "lease": 30.0, "order": "key", "on_dead": "block", **options}
    claimed = await store.claim(**options)
    return claimed, [row.message.message_id.int for row in claimed.rows]


async def test_a_transaction_is_committed_or_rolled_back():
    store = MemoryStore()
    async with store.begin() as session:
        gone = await store.add([message(1)], [None], session)
        assert (await claim(store))[1] == []
    with suppress(KeyError):
        async with store.begin() as session:
            lost = await store.add([message(2)], [None], session)
            raise KeyError

    assert (await claim(store))[1] == [1]
    assert (gone(), lost()) == (False, True)


async def test_a_session_has_one_transaction_after_the_other():
    store = MemoryStore()
    session = store.session()
    with pytest.raises(UsageError, match=r"begin one, such as by `async with store\.begin"):
        await store.add([message(1)], [None], session)
    await session.rollback()
    with pytest.raises(UsageError, match="nothing to commit"):
        await session.commit()
    for number in 1, 2:
        await session.begin()
        await store.add([message(number)], [None], session)
        with pytest.raises(UsageError, match="a transaction is open"):
            await session.begin()
        await session.commit()

    assert (await claim(store))[1] == [1, 2]


async def test_a_session_of_another_store_is_refused():
    with pytest.raises(UsageError, match="a MemorySession of this store, and it is an object of MemorySession"):
        await MemoryStore().add([message(1)], [None], MemoryStore().session())
    with pytest.raises(UsageError, match="and it is None"):
        await MemoryStore().first_time(UUID(int=1), "g", "h", None)
    assert MemoryStore.session_type is MemorySession


async def test_the_clock_decides_what_is_due_and_which_lease_is_over():
    clock = Clock()
    store = MemoryStore(clock=clock)
    async with store.begin() as session:
        due = [timedelta(seconds=10), NOON + timedelta(seconds=20), None]
        await store.add([message(1), message(2), message(3)], due, session)

    assert (await claim(store, lease=15.0))[1] == [3]
    assert (await claim(store))[0].next_due == 10
    clock.now += timedelta(seconds=15)
    assert (await claim(store))[1] == [1, 3]
    assert (await claim(store))[0].next_due == 5


async def test_a_row_waits_for_an_open_transaction_that_has_stored_an_earlier_one():
    clock = Clock()
    store = MemoryStore(clock=clock)
    slow, fast = store.session(), store.session()
    await slow.begin()
    await fast.begin()
    await store.add([message(1, "k")], [None], slow)
    await store.add([message(2, "k"), message(3, "other")], [None, None], fast)
    await fast.commit()
    clock.now += timedelta(seconds=7)

    assert (await claim(store))[1] == [3]
    status = await store.status()
    assert (status.held_back, status.held_back_for) == (1, 7)
    waiting = asyncio.create_task(store.wait(60.0))
    await asyncio.sleep(0)
    await slow.commit()
    await waiting
    assert (await claim(store))[1] == [1, 2]
    assert (await store.status()).held_back == 0


async def test_wait_ends_when_a_message_is_stored_and_otherwise_after_its_time():
    store, loop = MemoryStore(), asyncio.get_running_loop()
    began = loop.time()
    await store.wait(3.0)
    assert loop.time() == began + 3
    waiting = asyncio.create_task(store.wait(60.0))
    await asyncio.sleep(1)
    async with store.begin() as session:
        await store.add([message(1)], [None], session)
    await waiting
    await store.wait(60.0)  # no claim since
    assert loop.time() == began + 4


def test_another_event_loop_may_use_it_after_close():
    store = MemoryStore()

    async def wait():
        await store.wait(0.01)
        await store.close()

    asyncio.run(wait())
    asyncio.run(wait())


async def test_two_transactions_cancel_a_message_one_after_the_other():
    store = MemoryStore()
    async with store.begin() as session:
        await store.add([message(1), message(2)], [timedelta(hours=1), None], session)
    first, second = store.session(), store.session()
    await first.begin()
    await second.begin()
    assert await store.cancel(UUID(int=1), first)
    waiting = asyncio.create_task(store.cancel(UUID(int=1), second))
    await asyncio.sleep(0)
    assert not waiting.done()
    await first.rollback()
    assert await waiting
    await second.commit()
    assert (await store.status()).scheduled == 0


async def test_the_state_counts_what_waits_behind_a_dead_row():
    store = MemoryStore()
    async with store.begin() as session:
        await store.add([message(1, "k"), message(2, "k"), message(3)], [None] * 3, session)
    claimed, _ = await claim(store)
    dead = Failure(position=1, reason="rejected: MessageTooLarge", retry_after=None)
    assert await store.finish(claimed.lease, sent=[3], untried=[2], failed=[dead]) == 0
    assert await store.finish(claimed.lease, sent=[3], untried=[2], failed=[dead]) == 3  # nobody holds the lease

    status = await store.status()
    assert (status.pending, status.dead, status.blocked, status.blocked_keys) == (1, 1, 1, 1)
    (row,) = await store.dead()
    assert (row.reason, row.blocked, row.attempts) == ("rejected: MessageTooLarge", 1, 1)
    assert (await claim(store))[1] == []
    assert await store.redrive() == 1
    assert (await claim(store))[1] == [1, 2]
