"""Concurrent sends share a batch: which ones, within which deadline, and which error each caller receives."""

import asyncio
from contextlib import suppress
from uuid import uuid4

import pytest

from diator.brokers.batching import BatchSender, own_error
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerUnavailable,
    MessageRejected,
    MessageTooLarge,
    MessageUnroutable,
    OutcomeUnknown,
    UsageError,
)


class Service:
    """Records the batches that it receives, and answers when the test allows it."""

    def __init__(self):
        self.batches, self.deadlines = [], []
        self.may_answer = asyncio.Event()
        self.error = None

    async def receive(self, items, until):
        self.batches.append("".join(items))
        self.deadlines.append(until)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
async def service():
    return Service()


def sender_to(service, **limits):
    return BatchSender[str](service.receive, **{"timeout": 10.0, **limits})


async def begun(sender, items, *, size=1):
    """Send each of *items* in a task of its own, and wait until the service has received what it accepts."""
    sends = [asyncio.create_task(sender.send(item, size=size, message_id=uuid4())) for item in items]
    await asyncio.sleep(0.01)
    return sends


async def test_items_that_are_sent_during_a_batch_form_the_next_one_in_order(service):
    sender = sender_to(service)

    sends = [*await begun(sender, "abc"), *await begun(sender, "d"), *await begun(sender, "ef")]
    assert service.batches == ["abc"]
    service.may_answer.set()
    await asyncio.gather(*sends)

    assert service.batches == ["abc", "def"]


async def test_an_item_that_is_sent_later_starts_a_new_batch(service):
    sender = sender_to(service)
    service.may_answer.set()

    for item in "ab":
        await sender.send(item, size=1, message_id=uuid4())

    assert service.batches == ["a", "b"]


async def test_a_batch_has_at_most_max_items(service):
    sender = sender_to(service, max_items=2)
    service.may_answer.set()

    await asyncio.gather(*await begun(sender, "abcde"))

    assert service.batches == ["ab", "cd", "e"]


async def test_a_batch_ends_at_max_bytes_and_a_larger_item_is_sent_alone(service):
    sender = sender_to(service, max_bytes=10)
    service.may_answer.set()

    await asyncio.gather(*await begun(sender, "abc", size=5))
    await asyncio.gather(*await begun(sender, "de", size=50))

    assert service.batches == ["ab", "c", "d", "e"]


async def test_a_batch_is_full_with_exactly_max_bytes(service):
    sender = sender_to(service, max_bytes=10)
    service.may_answer.set()

    sends = []
    for item, size in zip("abc", (9, 1, 1), strict=True):
        sends.append(asyncio.create_task(sender.send(item, size=size, message_id=uuid4())))
    await asyncio.gather(*sends)

    assert service.batches == ["ab", "c"]


async def test_by_default_a_batch_has_500_messages_of_a_usual_size_or_4_mib(service):
    sender = sender_to(service)
    service.may_answer.set()

    await asyncio.gather(*await begun(sender, "a" * 501, size=1_000))
    await asyncio.gather(*await begun(sender, "b" * 5, size=1024 * 1024))

    assert service.batches == ["a" * 500, "a", "bbbb", "b"]


async def test_the_deadline_of_a_batch_is_that_of_its_first_call(service):
    sender = sender_to(service, timeout=5.0)
    now = asyncio.get_running_loop().time()

    sends = []
    for item in "abc":
        sends += await begun(sender, item)
        await asyncio.sleep(0.1)
    service.may_answer.set()
    await asyncio.gather(*sends)

    assert service.batches == ["a", "bc"]
    assert [deadline - now for deadline in service.deadlines] == pytest.approx([5.0, 5.11], abs=0.05)


@pytest.mark.parametrize(
    "kind", [AccessRefused, BrokerClosed, BrokerUnavailable, MessageRejected, MessageUnroutable, OutcomeUnknown]
)
async def test_each_caller_receives_an_error_of_its_own(service, kind):
    sender = sender_to(service)
    cause = OSError("gone")
    service.error = kind("no answer")
    service.error.__cause__ = cause
    service.may_answer.set()
    ids = [uuid4(), uuid4()]

    errors = await asyncio.gather(
        *(sender.send("a", size=1, message_id=message_id) for message_id in ids), return_exceptions=True
    )

    assert [type(error) for error in errors] == [kind, kind]
    assert [error.message_id for error in errors] == ids
    assert all(str(error.message_id) in str(error) for error in errors)
    assert [error.__cause__ for error in errors] == [cause, cause]


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), MessageTooLarge(2, 1)], ids=repr)
async def test_any_other_error_reaches_every_caller_and_the_next_batch_is_unaffected(service, error):
    sender = sender_to(service)
    service.error = error
    service.may_answer.set()

    assert await asyncio.gather(*await begun(sender, "ab"), return_exceptions=True) == [error, error]

    service.error = None
    await sender.send("c", size=1, message_id=uuid4())


async def test_an_item_whose_caller_is_cancelled_before_its_batch_is_left_out(service):
    sender = sender_to(service)
    [first, *others] = [*await begun(sender, "a"), *await begun(sender, "bcd")]

    others[1].cancel()
    service.may_answer.set()
    await asyncio.gather(first, others[0], others[2])

    assert service.batches == ["a", "bd"]


async def test_cancelling_one_caller_during_its_batch_does_not_affect_the_others(service):
    sender = sender_to(service)
    cancelled, other = await begun(sender, "ab")

    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not other.done()
    service.may_answer.set()
    await other

    assert service.batches == ["ab"]


async def test_wait_returns_when_all_sends_have_ended_even_if_another_wait_is_cancelled(service):
    sender = sender_to(service, max_items=1)
    await sender.wait()  # nothing has been sent yet
    sends = await begun(sender, "ab")

    impatient, waiting = asyncio.create_task(sender.wait()), asyncio.create_task(sender.wait())
    await asyncio.sleep(0)
    impatient.cancel()
    with suppress(asyncio.CancelledError):
        await impatient
    assert not waiting.done()
    service.may_answer.set()
    await waiting

    assert service.batches == ["a", "b"]
    await asyncio.wait_for(asyncio.gather(*sends), 1)


async def test_if_the_client_cancels_a_batch_by_itself_each_caller_receives_an_error(service):
    sender = sender_to(service)
    service.error = asyncio.CancelledError()
    service.may_answer.set()

    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match=r": the client library cancelled the request by itself$"):
            await asyncio.wait_for(sender.send("a", size=1, message_id=uuid4()), 1)


async def test_if_the_event_loop_ends_during_a_batch_every_caller_is_cancelled_and_the_sender_ends(service):
    """The callers of this batch, and those who wait for the next one."""
    sender = sender_to(service, max_items=1)
    before = asyncio.all_tasks()
    sends = await begun(sender, "ab")
    [sending] = asyncio.all_tasks() - before - {*sends}

    sending.cancel()
    ends = await asyncio.wait_for(asyncio.gather(sending, *sends, return_exceptions=True), 1)

    assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
    assert service.batches == ["a"]


def test_a_new_event_loop_starts_without_earlier_sends():
    """The sends of the earlier event loop ended with it, even if nobody cancelled them."""
    service = Service()
    sender = sender_to(service)
    first = asyncio.new_event_loop()
    first.run_until_complete(begun(sender, "a"))
    tasks = asyncio.all_tasks(first)
    service.may_answer = asyncio.Event()
    service.may_answer.set()

    async def send_again():
        await sender.wait()
        await asyncio.wait_for(sender.send("b", size=1, message_id=uuid4()), 1)

    asyncio.run(send_again())
    assert service.batches == ["a", "b"]
    for task in tasks:
        task.cancel()
    first.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    first.close()


@pytest.mark.real_time
async def test_an_event_loop_that_still_runs_keeps_its_sender(service):
    sender = sender_to(service)
    [first] = await begun(sender, "a")

    async def send_elsewhere():
        await sender.send("b", size=1, message_id=uuid4())

    with pytest.raises(UsageError):
        await asyncio.to_thread(asyncio.run, send_elsewhere())

    service.may_answer.set()
    await first
    assert service.batches == ["a"]


@pytest.mark.parametrize("message_id", [None, uuid4()], ids=["unknown", "of the message"])
@pytest.mark.parametrize(
    "error", [OutcomeUnknown("lost", message_id=uuid4()), MessageTooLarge(2, 1)], ids=["message", "size"]
)
def test_an_error_that_names_its_message_or_its_size_stays_the_same(error, message_id):
    assert own_error(error, message_id) is error


def test_a_message_without_an_id_receives_an_error_of_its_own_too():
    """The tracebacks of several callers would add up in one error."""
    error, cause = OutcomeUnknown("lost"), OSError()
    error.__cause__ = cause
    own = own_error(error, None)

    assert own is not error
    assert (type(own), str(own), own.message_id, own.__cause__) == (OutcomeUnknown, "lost", None, cause)
