"""Many messages are under way on one connection: each has its result in time, and the messages keep their order."""

import asyncio
import time
from contextlib import suppress
from uuid import uuid4

import pytest

from diator.brokers.pipelining import Pipeline, PipelinedConnection
from diator.brokers.supervisor import ReconnectPolicy
from diator.context import correlated, current_correlation_id
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    MessageRejected,
    OutcomeUnknown,
)

TIMEOUT = 10.0
POLICY = ReconnectPolicy(connect_timeout=3.0, first_delay=0.01, max_delay=0.01)


class Link(Pipeline[int]):
    """Numbers its messages. The test answers them."""

    def __init__(self, retire, **limits):
        super().__init__(retire, **{"silence": TIMEOUT / 2, "max_in_flight": 100, **limits})
        self.written = []
        self.is_open = True

    def write(self, message, message_id, deadline):
        self.written.append(message)
        return self.expect(len(self.written), message_id, len(message), deadline)

    async def close(self):
        self.is_open = False


class Connection(PipelinedConnection[Link]):
    def __init__(self, **limits):
        super().__init__("the-host:1", timeout=TIMEOUT, reconnect=POLICY)
        self.limits = limits
        self.links = []
        self.error = None
        self.may_connect = asyncio.Event()
        self.may_connect.set()

    @property
    def link(self):
        return self.links[-1]

    async def _connect(self):
        await self.may_connect.wait()
        if self.error is not None:
            raise self.error
        self.links.append(Link(self.retire, **self.limits))
        return self.link

    async def send(self, message, message_id=None):
        deadline = self._bind_to_running_loop().time() + self.timeout
        link = await self._ready(deadline, message_id)
        return await link.write(message, message_id, deadline)


async def begun(connection, *messages):
    """Send, and return the tasks when all that can be written is written."""
    tasks = [asyncio.create_task(connection.send(message)) for message in messages]
    await asyncio.sleep(0)
    await asyncio.sleep(1e-6)  # virtual time passes when nothing is left to do
    return tasks


async def outcomes(tasks):
    return [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)]


def now():
    return asyncio.get_running_loop().time()


# -- results ---------------------------------------------------------------------------------------------------------


async def test_answers_come_in_any_order_and_each_has_its_own_result():
    connection = Connection()
    tasks = await begun(connection, "a", "b", "c")
    link = connection.link
    link.answered(3, "third")
    link.answered(1, error=MessageRejected("no"))
    link.answered(2)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [tasks[0].exception(), None, "third"]
    assert type(tasks[0].exception()) is MessageRejected
    assert not link.in_flight
    await connection.aclose()
    assert not link.is_open


@pytest.mark.parametrize("end", ["answered", "lost", "silent"])
async def test_each_caller_receives_an_error_of_its_own(end):
    connection, ids = Connection(), [uuid4(), uuid4(), None]
    tasks = [asyncio.create_task(connection.send("x", each)) for each in ids]
    await asyncio.sleep(0.1)
    cause, error = OSError("reset"), OutcomeUnknown("no answer")
    error.__cause__ = cause
    if end == "answered":
        for number in (1, 2, 3):
            connection.link.answered(number, error=error)
    elif end == "lost":
        connection.link.lose(error)
    else:
        cause = None
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(each), each.message_id, each.__cause__) for each in errors] == [
        (OutcomeUnknown, each, cause) for each in ids
    ]
    assert len(set(errors)) == len(ids)
    await connection.aclose()


async def test_a_message_without_an_answer_fails_at_its_deadline_alone_if_others_are_answered():
    connection = Connection()
    (first,) = await begun(connection, "first")
    began = now()
    await asyncio.sleep(4)
    (second,) = await begun(connection, "second")
    await asyncio.sleep(4)
    (third,) = await begun(connection, "third")
    connection.link.answered(2)
    await asyncio.wait([first])
    assert now() - began == pytest.approx(TIMEOUT)
    assert await outcomes([first, second]) == [OutcomeUnknown, type(None)]
    assert [*connection.link.in_flight] == [3]

    connection.link.answered(1, "late")  # it goes to nobody
    connection.link.answered(3)
    assert await outcomes([third]) == [type(None)]
    assert len(connection.links) == 1
    await connection.aclose()


async def test_each_message_has_its_own_deadline_whatever_their_order():
    link = Link(lambda _: None, silence=100)
    began = now()
    answers = [link.write("x", None, began + seconds) for seconds in (7, 3, 5)]
    link.answered(3)
    for expected in (3, 7):
        await asyncio.wait([each for each in answers if not each.done()], return_when=asyncio.FIRST_COMPLETED)
        assert now() - began == pytest.approx(expected)
    assert await outcomes(answers) == [OutcomeUnknown, OutcomeUnknown, type(None)]
    assert not link.is_lost


async def test_a_silent_connection_is_closed_and_the_next_call_connects_again():
    connection = Connection()
    tasks = await begun(connection, "a")
    connection.link.answered(1)
    tasks += await begun(connection, "b")
    await asyncio.sleep(1)
    tasks += await begun(connection, "c")  # it fails with the first that is overdue
    began = now()
    assert await outcomes(tasks) == [type(None), OutcomeUnknown, OutcomeUnknown]
    assert now() - began == pytest.approx(TIMEOUT - 1)
    tasks = await begun(connection, "d")
    await asyncio.sleep(0.1)
    assert [link.is_open for link in connection.links] == [False, True]
    assert connection.link.written == ["d"]
    connection.link.answered(1)
    assert await outcomes(tasks) == [type(None)]
    await connection.aclose()


async def test_under_load_a_slow_service_keeps_its_connection_and_a_dead_one_does_not():
    """A message that has waited for room is written late. Without an answer in its last moments, nothing is proved."""
    connection, is_alive = Connection(max_in_flight=10), True

    async def answer():
        while True:
            await asyncio.sleep(0.5)
            if is_alive or connection.link is not connection.links[0]:
                for key in [*connection.link.in_flight]:
                    connection.link.answered(key)

    async def send(seconds):
        tasks = []
        for _ in range(seconds * 30):  # the service answers 20 in each second
            tasks.append(asyncio.create_task(connection.send("x")))
            await asyncio.sleep(1 / 30)
        return tasks

    answering = asyncio.create_task(answer())
    tasks = await send(60)
    assert OutcomeUnknown in await outcomes(tasks[:1500])  # there were messages that were written too late
    assert len(connection.links) == 1

    is_alive = False
    tasks += await send(30)
    assert len(connection.links) == 2
    await outcomes(tasks)
    answering.cancel()
    await connection.aclose()


async def test_a_cancelled_caller_gets_no_answer_and_nobody_else_gets_its_answer():
    connection = Connection()
    first, second = await begun(connection, "a", "b")
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    assert first.cancelled()
    connection.link.answered(1, "of the first")
    connection.link.answered(2, "of the second")
    assert await second == "of the second"
    assert not connection.link.in_flight
    await connection.aclose()


async def test_the_message_of_a_cancelled_caller_loses_its_place_at_its_deadline():
    connection = Connection(max_in_flight=2)
    cancelled, answered = await begun(connection, "a", "b")
    cancelled.cancel()
    await asyncio.sleep(1)
    connection.link.answered(2)
    await answered
    await asyncio.sleep(TIMEOUT)
    assert not connection.link.in_flight
    assert connection.link.has_room
    await connection.aclose()


# -- room and order --------------------------------------------------------------------------------------------------


async def test_what_finds_no_room_waits_in_its_turn():
    connection = Connection(max_in_flight=2)
    tasks = await begun(connection, *"abcdef")
    link = connection.link
    assert link.written == ["a", "b"]
    link.answered(2)
    tasks += await begun(connection, "g")
    assert link.written == ["a", "b", "c"]
    for number in (1, 3, 4, 5, 6, 7):
        link.answered(number)
        await asyncio.sleep(0.1)
    assert link.written == [*"abcdefg"]
    assert await outcomes(tasks) == [type(None)] * 7
    await connection.aclose()


async def test_the_bytes_in_flight_are_bounded():
    connection = Connection(max_bytes=10)
    await begun(connection, "12345", "1234", "1", "2")
    link = connection.link
    assert link.written == ["12345", "1234", "1"]
    link.answered(2)
    await asyncio.sleep(0.1)
    assert link.written == ["12345", "1234", "1", "2"]
    for number in (1, 3, 4):
        link.answered(number)
    assert link.has_room
    await connection.aclose()


async def test_a_message_that_finds_no_room_in_time_was_not_sent():
    connection, message_id = Connection(max_in_flight=1), uuid4()
    await begun(connection, "a")
    link = connection.link
    await asyncio.sleep(5)
    later = asyncio.create_task(connection.send("c", message_id))
    await asyncio.sleep(4)
    link.overdue = lambda key, *, silent: link.in_flight[key].fail(OutcomeUnknown("it keeps its place"))
    with pytest.raises(
        BrokerUnavailable, match=r"the service at the-host:1 .*earlier messages took all of 10 s"
    ) as full:
        await later
    assert full.value.message_id == message_id
    assert isinstance(full.value.__cause__, TimeoutError)
    assert link.written == ["a"]
    await connection.aclose()


async def test_callers_that_wait_for_room_write_to_the_next_connection_after_a_loss():
    connection = Connection(max_in_flight=1)
    tasks = await begun(connection, "a", "b", "c")
    connection.link.lose(OutcomeUnknown("lost"))
    await asyncio.sleep(0.1)
    assert connection.link.written == ["b"]
    connection.link.answered(1)
    await asyncio.sleep(0.1)
    assert connection.link.written == ["b", "c"]
    connection.link.answered(2)
    assert await outcomes(tasks) == [OutcomeUnknown, type(None), type(None)]
    await connection.aclose()


# -- connecting and closing ------------------------------------------------------------------------------------------


async def test_an_attempt_to_connect_that_fails_means_not_sent():
    connection, message_id = Connection(), uuid4()
    connection.error = OSError("refused")
    with pytest.raises(
        BrokerUnavailable, match=r"the service at the-host:1 is not available \(OSError: refused\)"
    ) as refused:
        await connection.send("a", message_id)
    assert (refused.value.message_id, refused.value.__cause__) == (message_id, connection.error)

    connection.error, cause = AccessRefused("this user may not"), PermissionError()
    connection.error.__cause__ = cause
    with pytest.raises(AccessRefused, match="this user may not") as forbidden:
        await connection.send("a", message_id)
    assert (forbidden.value.message_id, forbidden.value.__cause__) == (message_id, cause)

    connection.error = ConfigurationError("an option is wrong")
    with pytest.raises(ConfigurationError, match="an option is wrong"):
        await connection.open()

    connection.may_connect.clear()
    with pytest.raises(BrokerUnavailable, match=r"is not available \(no answer within 3 s\)"):
        await connection.send("a", message_id)
    connection.timeout = 1.0
    with pytest.raises(
        BrokerUnavailable, match=r"no connection within 1 s; the last attempt failed \(no answer within 3"
    ):
        await connection.send("a", message_id)
    await connection.aclose()


async def test_opening_connects_and_closing_waits_for_what_was_written():
    connection = Connection(max_in_flight=1)
    await connection.open()
    link = connection.link
    written, waiting = await begun(connection, "a", "b")
    closing = asyncio.create_task(connection.aclose())
    await asyncio.sleep(1)
    assert link.is_open
    link.answered(1)
    await closing
    assert await outcomes([written, waiting]) == [type(None), BrokerClosed]
    assert not link.is_open
    with pytest.raises(BrokerClosed) as closed:
        await connection.send("c", message_id := uuid4())
    assert closed.value.message_id == message_id
    assert len(connection.links) == 1


async def test_closing_ends_with_the_deadline_of_what_is_not_answered():
    connection = Connection()
    tasks = await begun(connection, "a", "b")
    await asyncio.sleep(1)
    began = now()
    await connection.aclose()
    assert now() - began == pytest.approx(TIMEOUT - 1)
    assert await outcomes(tasks) == [OutcomeUnknown] * 2
    assert not connection.link.is_open


async def test_a_retired_connection_is_closed_when_its_answers_are_in():
    connection = Connection()
    tasks = await begun(connection, "a", "b")
    old = connection.link
    connection.retire(old)
    tasks += await begun(connection, "c")
    await asyncio.sleep(0.1)
    assert old.is_open
    assert connection.link.written == ["c"]
    old.answered(1)
    old.answered(2)
    await asyncio.sleep(0.1)
    assert not old.is_open
    connection.link.answered(1)
    assert await outcomes(tasks) == [type(None)] * 3
    await connection.aclose()


async def test_closing_while_connecting_leaves_no_connection_open():
    connection = Connection()
    connection.may_connect.clear()
    tasks = await begun(connection, "a", "b")
    closing = asyncio.create_task(connection.aclose())
    await asyncio.sleep(0.1)
    connection.may_connect.set()
    await closing
    assert await outcomes(tasks) == [BrokerClosed] * 2
    assert [link.is_open for link in connection.links] == [False]
    assert connection.link.written == []


async def test_subscriptions_may_send_until_they_have_ended():
    connection = Connection()
    await connection.open()

    class Subscription:
        async def aclose(self):
            asyncio.get_running_loop().call_later(1, lambda: connection.link.answered(1, "settled"))
            self.result = await connection.send("ack")

    subscription = Subscription()
    connection.subscriptions.add(subscription)
    await connection.aclose()
    assert subscription.result == "settled"
    assert not connection.link.is_open


async def test_closing_waits_for_connections_that_were_lost():
    connection = Connection()
    await connection.open()
    link, is_closed = connection.link, asyncio.Event()

    async def close():
        await asyncio.sleep(1)
        is_closed.set()

    link.close = close
    link.lose(OutcomeUnknown("lost"))
    link.lose(OutcomeUnknown("lost again"))
    await asyncio.wait_for(link.room(), 1)  # nobody waits for room on a lost connection
    await connection.aclose()
    assert is_closed.is_set()


# -- the table alone -------------------------------------------------------------------------------------------------


async def test_a_connection_is_lost_once():
    retired = []
    link = Link(retired.append)
    answers = [link.write("x", None, now() + TIMEOUT) for _ in range(2)]  # both are overdue at once
    assert await outcomes(answers) == [OutcomeUnknown] * 2
    link.lose(OutcomeUnknown("again"))
    assert retired == [link]


async def test_the_timer_of_a_connection_belongs_to_no_caller():
    """What it logs is about the service, and what it starts outlives the caller."""
    connection, seen = Connection(), []
    with correlated("of-the-caller"):
        tasks = await begun(connection, "a")
    connection.link.overdue = lambda key, *, silent: (
        seen.append(current_correlation_id()) or connection.link.answered(key)
    )
    await asyncio.wait(tasks)

    assert seen == [None]


async def test_an_idle_connection_is_not_silent():
    """A message that is written shortly before its deadline proves nothing, also if nothing was written before."""
    link = Link(lambda _: None)
    link.write("x", None, now() + TIMEOUT)
    link.answered(1)
    await asyncio.sleep(100)
    began = now()
    assert await outcomes([link.write("x", None, began + 0.5)]) == [OutcomeUnknown]
    assert now() - began == pytest.approx(0.5)
    assert not link.is_lost
    assert await outcomes([link.write("x", None, now() + TIMEOUT)]) == [OutcomeUnknown]
    assert link.is_lost


@pytest.mark.real_time
async def test_an_event_loop_that_was_blocked_is_not_a_silent_service():
    link = Link(lambda _: None, silence=0.05)
    late, answered = (link.write("x", None, now() + 0.1) for _ in range(2))
    link.answered(2)
    time.sleep(0.3)  # noqa: ASYNC251  # the timer is due, and so is the message
    assert await outcomes([late, answered]) == [OutcomeUnknown, type(None)]
    assert not link.is_lost


async def test_every_message_that_ends_makes_room():
    link = Link(lambda _: None, silence=100, max_bytes=4)
    link.write("12", None, now() + 5)
    link.write("34", None, now() + TIMEOUT)
    assert not link.has_room
    link.answered(1)
    assert link.has_room
    link.write("56", None, now() + 5)
    assert not link.has_room
    await asyncio.sleep(6)  # it is overdue
    assert link.has_room
    link.write("7", None, now() + TIMEOUT)
    assert link.has_room
    link.write("8", None, now() + TIMEOUT)
    assert not link.has_room
    link.answered(3)  # late
    assert not link.has_room
    link.write("9", None, now() + TIMEOUT)
    link.answered(4)
    assert not link.has_room


async def test_a_call_overtakes_no_earlier_one_that_is_about_to_be_written():
    connection = Connection(max_in_flight=1)
    first, cancelled, second = await begun(connection, "a", "cancelled", "b")
    cancelled.cancel()
    third = asyncio.create_task(connection.send("c"))
    connection.link.answered(1)  # there is room when the third call begins
    for number in (2, 3):
        await asyncio.sleep(0.1)
        connection.link.answered(number)
    assert connection.link.written == ["a", "b", "c"]
    assert await outcomes([first, second, third]) == [type(None)] * 3
    third = asyncio.create_task(connection.send("d"))
    await asyncio.sleep(0)
    assert connection.link.written[3:] == ["d"]  # at once
    connection.link.answered(4)
    await third
    await connection.aclose()


async def test_the_loss_of_a_retired_connection_does_not_concern_the_next_one():
    connection = Connection()
    tasks = await begun(connection, "a")
    old = connection.link
    connection.retire(old)
    tasks += await begun(connection, "b")
    await asyncio.sleep(0.1)
    old.lose(OutcomeUnknown("lost"))
    tasks += await begun(connection, "c")
    assert connection.link.written == ["b", "c"]
    connection.link.answered(1)
    connection.link.answered(2)
    assert await outcomes(tasks) == [OutcomeUnknown, type(None), type(None)]
    await connection.aclose()


async def test_a_pipeline_is_a_context_that_closes_it():
    async with Link(print) as link:
        assert link.is_open
    assert not link.is_open
