"""Concurrent sends in one exchange: who goes with whom, until when, and what each is told."""

import asyncio
from contextlib import suppress
from uuid import uuid4

import pytest

from diator.brokers.batching import BatchSender
from diator.exceptions import BrokerClosed, BrokerUnavailable, MessageRejected, MessageTooLarge, OutcomeUnknown


class Service:
    """Notes what it is given, and answers when it may."""

    def __init__(self):
        self.exchanges, self.deadlines = [], []
        self.may_answer = asyncio.Event()
        self.error = None

    async def exchange(self, items, until):
        self.exchanges.append("".join(items))
        self.deadlines.append(until)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
async def service():
    return Service()


def batches_of(service, **limits):
    return BatchSender[str](service.exchange, **{"timeout": 10.0, **limits})


async def begun(batches, items, *, size=1):
    """Send *items*, each in a task of its own, and let the service have what it takes."""
    sends = [asyncio.create_task(batches.send(item, size=size, message_id=uuid4())) for item in items]
    await asyncio.sleep(0.01)
    return sends


async def test_what_is_sent_at_once_or_during_an_exchange_goes_together_and_in_order(service):
    batches = batches_of(service)

    sends = [*await begun(batches, "abc"), *await begun(batches, "d"), *await begun(batches, "ef")]
    assert service.exchanges == ["abc"]
    service.may_answer.set()
    await asyncio.gather(*sends)

    assert service.exchanges == ["abc", "def"]


async def test_whoever_comes_later_begins_an_exchange_again(service):
    batches = batches_of(service)
    service.may_answer.set()

    for item in "ab":
        await batches.send(item, size=1, message_id=uuid4())

    assert service.exchanges == ["a", "b"]


async def test_an_exchange_has_so_many_items(service):
    batches = batches_of(service, max_items=2)
    service.may_answer.set()

    await asyncio.gather(*await begun(batches, "abcde"))

    assert service.exchanges == ["ab", "cd", "e"]


async def test_an_exchange_has_so_many_bytes_and_whatever_is_larger_goes_alone(service):
    batches = batches_of(service, max_bytes=10)
    service.may_answer.set()

    await asyncio.gather(*await begun(batches, "abc", size=5))
    await asyncio.gather(*await begun(batches, "de", size=50))

    assert service.exchanges == ["ab", "c", "d", "e"]


async def test_an_exchange_has_to_end_by_the_deadline_of_its_first_call(service):
    batches = batches_of(service, timeout=5.0)
    now = asyncio.get_running_loop().time()

    sends = []
    for item in "abc":
        sends += await begun(batches, item)
        await asyncio.sleep(0.1)
    service.may_answer.set()
    await asyncio.gather(*sends)

    assert service.exchanges == ["a", "bc"]
    assert [deadline - now for deadline in service.deadlines] == pytest.approx([5.0, 5.11], abs=0.05)


@pytest.mark.parametrize("kind", [BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown])
async def test_each_caller_gets_a_verdict_of_his_own(service, kind):
    batches = batches_of(service)
    cause = OSError("gone")
    service.error = kind("no answer")
    service.error.__cause__ = cause
    service.may_answer.set()
    ids = [uuid4(), uuid4()]

    verdicts = await asyncio.gather(
        *(batches.send("a", size=1, message_id=message_id) for message_id in ids), return_exceptions=True
    )

    assert [type(verdict) for verdict in verdicts] == [kind, kind]
    assert [verdict.message_id for verdict in verdicts] == ids
    assert all(str(verdict.message_id) in str(verdict) for verdict in verdicts)
    assert [verdict.__cause__ for verdict in verdicts] == [cause, cause]


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), MessageTooLarge(2, 1)], ids=repr)
async def test_any_other_error_reaches_every_caller_and_the_next_exchange_is_unaffected(service, error):
    batches = batches_of(service)
    service.error = error
    service.may_answer.set()

    assert await asyncio.gather(*await begun(batches, "ab"), return_exceptions=True) == [error, error]

    service.error = None
    await batches.send("c", size=1, message_id=uuid4())


async def test_whoever_is_cancelled_before_its_exchange_is_left_out(service):
    batches = batches_of(service)
    [first, *others] = [*await begun(batches, "a"), *await begun(batches, "bcd")]

    others[1].cancel()
    service.may_answer.set()
    await asyncio.gather(first, others[0], others[2])

    assert service.exchanges == ["a", "bd"]


async def test_whoever_is_cancelled_during_its_exchange_ends_it_for_nobody_else(service):
    batches = batches_of(service)
    cancelled, other = await begun(batches, "ab")

    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not other.done()
    service.may_answer.set()
    await other

    assert service.exchanges == ["ab"]


async def test_done_is_when_everybody_has_a_verdict_whoever_waits_for_it(service):
    batches = batches_of(service, max_items=1)
    await batches.wait()  # there is nothing yet
    sends = await begun(batches, "ab")

    impatient, waiting = asyncio.create_task(batches.wait()), asyncio.create_task(batches.wait())
    await asyncio.sleep(0)
    impatient.cancel()
    with suppress(asyncio.CancelledError):
        await impatient
    assert not waiting.done()
    service.may_answer.set()
    await waiting

    assert service.exchanges == ["a", "b"]
    await asyncio.wait_for(asyncio.gather(*sends), 1)


async def test_an_exchange_that_the_client_cancels_by_itself_leaves_nobody_without_a_verdict(service):
    batches = batches_of(service)
    service.error = asyncio.CancelledError()
    service.may_answer.set()

    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="the client library cancelled the request by itself"):
            await asyncio.wait_for(batches.send("a", size=1, message_id=uuid4()), 1)


def test_on_another_event_loop_it_begins_anew():
    """What the loop before had begun died with it, whether or not anybody had time to cancel it."""
    service = Service()
    batches = batches_of(service)
    first = asyncio.new_event_loop()
    first.run_until_complete(begun(batches, "a"))
    tasks = asyncio.all_tasks(first)
    service.may_answer = asyncio.Event()
    service.may_answer.set()

    async def go_on():
        await batches.wait()
        await asyncio.wait_for(batches.send("b", size=1, message_id=uuid4()), 1)

    asyncio.run(go_on())
    assert service.exchanges == ["a", "b"]
    for task in tasks:
        task.cancel()
    first.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    first.close()
