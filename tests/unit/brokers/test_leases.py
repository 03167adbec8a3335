"""Leases are renewed while a consumer lives, and are over for one that has slept too long."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from diator.brokers.base import Delivery, Topic
from diator.brokers.leases import Leased, Leases
from diator.brokers.supervisor import ReconnectPolicy, ResilientSubscription, SubscriptionSettings
from diator.exceptions import BrokerUnavailable
from tests.records import fields

pytestmark = pytest.mark.usefixtures("loop_clock")

LEASE = 30.0


class Token(Leased):
    number: int


class Subscription(ResilientSubscription):
    """A subscription that receives `numbers`. Its service forgets `lost` tokens, and raises `errors` first."""

    def __init__(self, *numbers, prefetch=10):
        topics = [Topic("notification_event", "Counted")]
        settings = SubscriptionSettings(
            topics=topics,
            group="g",
            broker="B",
            prefetch=prefetch,
            on_gap=None,
            reconnect=ReconnectPolicy(),
            registry=set(),
        )
        super().__init__(settings, lossy=False)
        self.arriving = [Token(number) for number in numbers]
        self.leases = Leases(self, LEASE, self.renew)
        self.renewed, self.lost, self.errors = [], lambda _: False, []
        self.left_with = None

    @asynccontextmanager
    async def connect(self):
        self.leases.begin()
        self.leases.begin()  # as another connection does
        yield self

    async def receive(self, limit, /):
        if not self.arriving:
            await asyncio.sleep(1)
        taken, self.arriving = self.arriving[:limit], self.arriving[limit:]
        self.leases.hold(taken)
        topic = Topic("notification_event", "Counted")
        return [Delivery(topic=topic, body=b"", headers={}, attempt=1, settler=self, token=token) for token in taken]

    async def probe(self):
        pass

    async def renew(self, held):
        self.renewed.append((asyncio.get_running_loop().time(), sorted(token.number for token in held)))
        if self.errors:
            raise self.errors.pop()
        return [token for token in held if self.lost(token)]

    async def ack(self, delivery, /):
        self.leases.release(delivery.token)

    async def leave(self, prefetched, /):
        self.left_with = sorted(token.number for token in await self.leases.end())


async def test_leases_are_renewed_at_each_third_while_the_consumer_lives():
    began = asyncio.get_running_loop().time()
    async with Subscription(1, 2) as subscription:
        first, second = await anext(subscription), await anext(subscription)
        await asyncio.sleep(5 * LEASE + 1)
        await first.ack()
        await asyncio.sleep(LEASE / 3)

        thirds = [began + LEASE / 3 * each for each in range(1, 17)]
        assert [time for time, _ in subscription.renewed] == pytest.approx(thirds)
        assert [numbers for _, numbers in subscription.renewed] == [[1, 2]] * 15 + [[2]]
        assert second.token.is_leased
        assert not first.token.is_leased or first.token.leased_until <= second.token.leased_until - LEASE / 3
    assert subscription.left_with == [2]


async def test_nothing_is_renewed_after_the_end():
    async with Subscription(1) as subscription:
        await anext(subscription)
        await asyncio.sleep(LEASE / 2)
    await asyncio.sleep(LEASE)

    assert len(subscription.renewed) == 1
    assert not [task for task in asyncio.all_tasks() if "leases" in task.get_name()]


async def test_a_lease_that_cannot_be_renewed_ends_and_the_next_third_tries_again(caplog):
    async with Subscription(1) as subscription:
        delivery = await anext(subscription)
        subscription.errors = [BrokerUnavailable("away"), ValueError("odd"), BrokerUnavailable("away")]
        await asyncio.sleep(LEASE - 0.5)
        assert delivery.token.is_leased
        await asyncio.sleep(0.75)

        assert len(subscription.renewed) == 3
        assert not delivery.token.is_leased
        await asyncio.sleep(LEASE / 3)
        assert delivery.token.is_leased  # the service still had it for this consumer
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines] == ["the leases of 1 message could not be renewed"] * 3
    assert "ValueError: odd" in lines[1]
    of_all = {"broker": "B", "group": "g", "message_names": ["Counted"], "messages": 1}
    assert fields(caplog.records[1]) == {**of_all, "error_type": "ValueError"}


async def test_the_line_counts_the_leases_that_were_not_renewed(caplog):
    """Not those that are held when the error comes: a handler may have ended meanwhile."""
    async with Subscription(1, 2) as subscription:
        first, _ = await anext(subscription), await anext(subscription)

        async def renew(held):
            await first.ack()
            raise BrokerUnavailable("away")

        subscription.leases._renew = renew
        await asyncio.sleep(LEASE / 3 + 1)

    [line] = [record.getMessage() for record in caplog.records]
    assert line == "the leases of 2 messages could not be renewed: BrokerUnavailable: away"


async def test_a_process_that_slept_past_its_lease_finds_nothing_leased():
    """It hands out nothing of what it had prefetched, if the service tells nothing either."""
    async with Subscription(1, 2, prefetch=1) as subscription:
        subscription._buffer_size = 2
        delivery = await anext(subscription)
        await asyncio.sleep(1)
        subscription.lost = lambda token: not token.is_leased
        asyncio.get_running_loop().advance(2 * LEASE)

        assert not delivery.token.is_leased
        await asyncio.sleep(LEASE / 3)
        assert not delivery.token.is_leased
        assert [token.number for token in subscription.leases] == [1]  # its handler is running
        assert subscription.unsettled == 1
        await delivery.ack()
        assert subscription.unsettled == 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(subscription), LEASE)


async def test_a_held_token_takes_a_place_until_it_is_released():
    async with Subscription(1, 2, prefetch=1) as subscription:
        first = await anext(subscription)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(subscription), LEASE)
        waiting = asyncio.create_task(anext(subscription))
        await asyncio.sleep(0)
        await first.ack()

        assert (await waiting).token.number == 2


async def test_a_lease_that_began_before_its_token_is_held_ends_no_later():
    """A message that was pushed has waited for `receive`; one that was claimed has not."""
    async with Subscription() as subscription:
        began = asyncio.get_running_loop().time()
        pushed, claimed = Token(1, leased_until=began + LEASE), Token(2)
        await asyncio.sleep(LEASE / 6)
        subscription.leases.hold([pushed, claimed])

        assert [token.leased_until - began for token in (pushed, claimed)] == [LEASE, pytest.approx(LEASE * 7 / 6)]


async def test_the_held_tokens_may_change_while_somebody_reads_them():
    """Metrics are read in a thread of their own."""
    subscription = Subscription()
    subscription.leases.hold([Token(1), Token(2)])
    for token in subscription.leases:
        subscription.leases.release(token)

    assert [*subscription.leases] == []
