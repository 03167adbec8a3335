"""Whatever fails and whenever a relay ends: nothing is lost, keys keep their order, and leases are kept."""

import asyncio
import random
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator.exceptions import (
    AccessRefused,
    BrokerUnavailable,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
)
from diator.outbox import Outbox, Relay
from tests.unit.outbox.relaying import MIDNIGHT, Broker, Store, now
from tests.unit.virtual_time import VirtualTimeLoop

MESSAGES = 40
CHAOS = 120.0
ERRORS = [BrokerUnavailable, AccessRefused, MessageUnroutable, OutcomeUnknown, KeyError, asyncio.CancelledError]


class Unreliable(Store):
    """A database whose calls take a while, and fail sometimes, before or after they had an effect."""

    def __init__(self, chance, failing):
        super().__init__()
        self.chance, self.share = chance, failing

    async def note(self, call, *details):
        await asyncio.sleep(self.chance.uniform(0, 0.5))
        if self.chance.random() < self.share:
            raise OSError

    async def claim(self, **options):
        claim = await super().claim(**options)
        await self.note("claim")
        return claim

    async def finish(self, lease, /, **results):
        lost = await super().finish(lease, **results)
        await self.note("finish")
        return lost


class Flaky(Broker):
    """A broker that fails sometimes, before or after the message has arrived, and checks the leases."""

    def __init__(self, store, chance, failing):
        super().__init__(self.fails_sometimes)
        self.store, self.chance, self.share = store, chance, failing
        self.arrived = []
        self.rejected = set()
        self.without_lease = []

    @property
    def takes(self):
        return self.chance.choice([0.0, 0.001, 0.01, 1.0, 9.9, 60.0 if self.share else 0.0])

    @takes.setter
    def takes(self, _): ...

    async def send_message(self, message, /):
        number = message.message_id.int
        row = self.store._database.rows.get(number)
        if row is None or row.leased_until < MIDNIGHT + timedelta(seconds=now() + self.timeout):
            self.without_lease.append(number)
        if self.chance.random() < self.share / 2:
            self.arrived.append(number)
            raise OutcomeUnknown("it has arrived")
        await super().send_message(message)
        self.arrived.append(number)

    def fails_sometimes(self, number, attempt):
        if self.chance.random() < self.share / 10:
            self.rejected.add(number)
            return MessageRejected("no")
        if self.chance.random() < self.share:
            return self.chance.choice(ERRORS)("no")
        return None


async def end_and_begin_relays(outbox, chance, options):
    """Run a relay for a while, end it in any way, and run the next one."""
    while True:
        relay = Relay(outbox, **options)
        running = asyncio.create_task(relay.run(signals=False))
        try:
            await asyncio.sleep(chance.uniform(0, 60))
            match chance.choice(["stop", "stop at once", "cancel", "kill"]):
                case "stop":
                    relay.stop()
                case "stop at once":
                    relay.stop()
                    relay.stop()
                case "cancel":
                    running.cancel()
                case "kill":
                    for task in asyncio.all_tasks():
                        if task.get_name() == "diator: relay" and chance.random() < 0.5:
                            task.cancel()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def program(seed, failing, relays, keys, options):
    chance = random.Random(seed)
    store = Unreliable(chance, failing)
    broker = Flaky(store, chance, failing)
    outbox = Outbox(store, broker)
    await store.fill(*((number, f"key {number % keys}" if keys else None) for number in range(1, MESSAGES + 1)))
    chaos = [asyncio.create_task(end_and_begin_relays(outbox, chance, options)) for _ in range(relays)]
    await asyncio.sleep(CHAOS)
    for task in chaos:
        task.cancel()
    await asyncio.gather(*chaos, return_exceptions=True)
    store.share = broker.share = 0.0
    async with Relay(outbox, **options):
        await store.is_settled(options["on_dead"])
    dead = {row.position for row in await store.dead(limit=MESSAGES)}
    return broker, dead


@pytest.mark.timeout(400)
@pytest.mark.parametrize("on_dead", ["block", "skip"])
@given(
    seed=st.integers(0, 2**32),
    failing=st.sampled_from([0.0, 0.02, 0.15, 0.4]),
    relays=st.integers(1, 3),
    keys=st.sampled_from([0, 1, 4, 30]),
    batch=st.sampled_from([1, 7, 100]),
    concurrency=st.sampled_from([1, 3, 50]),
)
def test_nothing_is_lost_and_keys_keep_their_order(on_dead, seed, failing, relays, keys, batch, concurrency):  # noqa: PLR0917
    options = {"on_dead": on_dead, "batch": batch, "concurrency": concurrency, "lease": 30.0}
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        clock = runner.get_loop().time
        for module in ("diator._deadlines", "diator.outbox._relay"):
            patch.setattr(f"{module}.monotonic", clock)
        broker, dead = runner.run(program(seed, failing, relays, keys, options))

    arrived = [*dict.fromkeys(broker.arrived)]
    assert dead <= broker.rejected
    waiting = {
        number
        for number in range(1, MESSAGES + 1)
        if on_dead == "block" and keys and any(number % keys == each % keys and number > each for each in dead)
    }
    assert {*arrived} | dead | waiting == {*range(1, MESSAGES + 1)}
    assert broker.without_lease == []
    if keys:
        assert broker.beside == []
        for key in range(keys):
            own = [number for number in arrived if number % keys == key]
            assert own == sorted(own)
