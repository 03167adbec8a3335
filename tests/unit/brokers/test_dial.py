"""One attempt to connect at a time, shared by all callers who wait, with growing delays between attempts."""

import asyncio
from itertools import pairwise
from traceback import walk_tb

import pytest

from diator.brokers.connecting import Backoff, ClientConnection
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerClosed
from tests.records import fields

POLICY = ReconnectPolicy(connect_timeout=3.0, first_delay=1.0, max_delay=30.0, reset_after=60.0)


class Link:
    def __init__(self):
        self.is_open = True


class Connection(ClientConnection[Link]):
    """A connection whose service accepts, refuses or does not answer."""

    def __init__(self, *, timeout=10.0, reconnect=POLICY):
        super().__init__("the-service:1", timeout=timeout, reconnect=reconnect)
        self.error = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.began = []
        self.links = []
        self.dialling = self.most = 0

    async def call(self):
        """Return the connection, as a call of a transport gets it."""
        loop = self._bind_to_running_loop()
        attempts = self._attempts
        self._queued += 1
        try:
            async with asyncio.timeout_at(loop.time() + self.timeout), self._lock:
                if self.is_closed:
                    raise BrokerClosed("closed")
                return await self._connected(attempts)
        finally:
            self._queued -= 1

    async def open(self):
        await self.call()

    def lose(self):
        self._link = None

    async def _connect(self):
        self.began.append(asyncio.get_running_loop().time())
        self.dialling += 1
        self.most = max(self.most, self.dialling)
        link = Link()
        try:
            await asyncio.sleep(0.1)
            await self.answers.wait()
            if self.error is not None:
                raise self.error  # noqa: TRY301
        except BaseException:
            link.is_open = False
            raise
        finally:
            self.dialling -= 1
            self.links.append(link)
        return link

    async def _close(self):
        async with self._lock:
            link = await self._take_link()
        if link is not None:
            link.is_open = False

    @property
    def open_links(self):
        return [link for link in self.links if link.is_open]


def calls(connection, count):
    return [asyncio.create_task(connection.call()) for _ in range(count)]


async def kinds(tasks):
    return [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)]


@pytest.fixture(autouse=True)
def longest_delays(monkeypatch):
    """Every delay is as long as it can be."""
    monkeypatch.setattr("random.uniform", lambda _, most: most)


async def test_all_callers_share_one_attempt():
    connection = Connection()
    links = await asyncio.gather(*calls(connection, 200))
    assert len(set(links)) == len(connection.began) == 1


async def test_callers_keep_their_order():
    connection, order = Connection(), []

    async def call(number):
        await connection.call()
        order.append(number)

    first = [asyncio.create_task(call(number)) for number in range(100)]
    await asyncio.sleep(0.05)
    await asyncio.gather(*first, *(call(number) for number in range(100, 200)))
    assert order == [*range(200)]


async def test_a_failed_attempt_fails_everybody_who_came_before_it_and_nobody_else():
    connection = Connection()
    connection.error = OSError("refused")
    waiting = calls(connection, 50)
    await asyncio.sleep(0.05)
    assert await kinds(waiting) == [OSError] * 50
    assert len(connection.began) == 1

    connection.error = None
    assert await connection.call() is connection.open_links[0]  # it waits for an attempt of its own
    assert len(connection.began) == 2


async def test_a_caller_who_comes_during_an_attempt_that_fails_waits_for_the_next():
    """A network that heals during an attempt may have lost what the attempt has sent."""
    connection = Connection()
    connection.error = OSError("the answer was lost")
    before = calls(connection, 1)
    await asyncio.sleep(0.05)
    after = calls(connection, 20)
    assert await kinds(before) == [OSError]

    connection.error = None
    assert await kinds(after) == [Link] * 20
    assert len(connection.began) == 2


async def test_the_error_of_many_callers_does_not_grow_with_their_number():
    connection = Connection()
    connection.error = OSError("refused")
    errors = await asyncio.gather(*calls(connection, 50), return_exceptions=True)
    where = [frame.f_code.co_name for frame, _ in walk_tb(errors[-1].__traceback__)]
    assert where == ["call", "_connected", "_make_attempt", "_connect"]


async def test_the_delays_between_attempts_grow_up_to_half_of_the_time_limit():
    connection = Connection(timeout=10.0)
    connection.error = OSError("refused")
    while len(connection.began) < 6:
        with pytest.raises(OSError, match="refused"):
            await connection.call()
    delays = [later - earlier - 0.1 for earlier, later in pairwise(connection.began)]
    assert delays == pytest.approx([1.0, 2.0, 4.0, 5.0, 5.0])


async def test_the_first_attempt_after_a_long_time_is_not_delayed():
    connection = Connection()
    connection.error = OSError("refused")
    for _ in range(3):
        await kinds(calls(connection, 1))
    connection.error = None
    await connection.call()
    await asyncio.sleep(POLICY.reset_after + 1)
    connection.lose()
    now = asyncio.get_running_loop().time()
    await connection.call()
    assert connection.began[-1] == now

    connection.lose()
    await connection.call()
    assert connection.began[-1] - now == pytest.approx(0.1 + POLICY.first_delay)


async def test_a_connection_that_is_lost_again_and_again_is_made_ever_less_often():
    connection = Connection()
    for _ in range(4):
        await connection.call()
        connection.lose()
    delays = [later - earlier - 0.1 for earlier, later in pairwise(connection.began)]
    assert delays == pytest.approx([1.0, 2.0, 4.0])


async def test_a_reset_lets_the_delays_begin_again():
    connection = Connection()
    for _ in range(4):
        await connection.call()
        connection.lose()
        connection._backoff.reset()
    delays = [later - earlier - 0.1 for earlier, later in pairwise(connection.began)]
    assert delays == pytest.approx([1.0, 1.0, 1.0])


async def test_a_caller_that_is_cancelled_leaves_the_attempt_to_the_others():
    connection = Connection()
    first, second = calls(connection, 2)
    await asyncio.sleep(0.05)
    first.cancel()
    assert await second is connection.open_links[0]
    assert len(connection.began) == 1


async def test_callers_end_by_their_own_deadline_and_the_attempt_by_its_own():
    connection = Connection(timeout=1.0)
    connection.answers.clear()
    loop = asyncio.get_running_loop()
    began = loop.time()
    first = calls(connection, 1)
    await asyncio.sleep(0.5)
    later = calls(connection, 20)
    assert await kinds(first) == [TimeoutError]
    assert loop.time() - began == pytest.approx(1.0)
    assert await kinds(later) == [TimeoutError] * 20
    assert loop.time() - began == pytest.approx(1.5)
    assert len(connection.began) == connection.dialling == 1

    await asyncio.sleep(POLICY.connect_timeout)
    assert connection.dialling == 0
    assert connection.open_links == []
    assert "no answer within 3 s" in connection._no_connection()


async def test_an_attempt_that_succeeds_after_everybody_has_left_serves_the_next_caller():
    connection = Connection(timeout=1.0)
    connection.answers.clear()
    assert await kinds(calls(connection, 3)) == [TimeoutError] * 3
    connection.answers.set()
    await asyncio.sleep(0.1)
    assert await connection.call() is connection.open_links[0]
    assert len(connection.began) == 1


async def test_on_a_link_that_stalls_there_is_one_attempt_at_a_time():
    connection = Connection(timeout=10.0)
    connection.answers.clear()
    loop = asyncio.get_running_loop()
    until, waiting = loop.time() + 60, []
    while loop.time() < until:
        waiting += calls(connection, 1)
        await asyncio.sleep(0.1)
    await kinds(waiting)
    assert connection.most == 1
    assert len(connection.began) <= 60 / POLICY.connect_timeout


async def test_closing_ends_an_attempt_that_nobody_waits_for():
    connection = Connection(timeout=1.0)
    connection.answers.clear()
    assert await kinds(calls(connection, 1)) == [TimeoutError]
    assert connection.dialling == 1
    await connection.aclose()
    assert connection.dialling == 0
    assert connection.open_links == []


async def test_closing_waits_for_the_callers_that_wait_for_an_attempt():
    connection = Connection()
    waiting = calls(connection, 3)
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(connection.aclose())
    assert await kinds(waiting) == [Link, BrokerClosed, BrokerClosed]
    await closing
    assert connection.open_links == []


async def test_closing_during_a_delay_ends_it():
    connection = Connection(timeout=1.0)
    connection.error = OSError("refused")
    connection._backoff._attempts = 10
    assert await kinds(calls(connection, 1)) == [OSError]
    waiting = calls(connection, 1)
    await asyncio.sleep(0.1)
    waiting[0].cancel()
    await connection.aclose()
    assert await kinds(waiting) == [asyncio.CancelledError]
    assert len(connection.began) == 1


def test_a_new_event_loop_has_attempts_of_its_own():
    connection = Connection(timeout=1.0)

    async def wait_for_nothing():
        connection.answers = asyncio.Event()
        return await kinds(calls(connection, 2))

    async def connect():
        connection.answers = asyncio.Event()
        connection.answers.set()
        return await connection.call()

    assert asyncio.run(wait_for_nothing()) == [TimeoutError] * 2
    assert connection.open_links == []
    links = {asyncio.run(connect()) for _ in range(2)}
    assert len(links) == 2
    assert len(connection.began) == 3


def test_closing_is_begun_again_if_its_event_loop_ended_before():
    connection = Connection(timeout=1.0)

    async def begin_to_close():
        connection.answers = asyncio.Event()
        waiting = calls(connection, 1)  # the closing waits for it
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(connection.aclose())
        await asyncio.sleep(0.05)
        assert not closing.done()
        return waiting

    asyncio.run(begin_to_close())
    asyncio.run(connection.aclose())
    assert connection.is_closed
    with pytest.raises(BrokerClosed):
        asyncio.run(connection.call())


async def test_an_outage_is_logged_once_and_its_end_once(caplog):
    caplog.set_level("INFO")
    connection = Connection()
    connection.error = OSError("not started yet")
    await kinds(calls(connection, 10))
    assert caplog.messages == []  # the callers have the error
    connection.error = None
    await connection.call()
    connection.lose()
    connection.error = OSError("refused")
    for _ in range(5):
        await kinds(calls(connection, 10))
    assert caplog.messages == ["no connection to the-service:1 (OSError: refused); the next calls try again"]
    connection.error = None
    await connection.call()
    connection.lose()
    await connection.call()
    assert caplog.messages[1:] == ["connected to the-service:1 again"]
    of_all = {"broker": None, "where": "the-service:1"}
    lost = {**of_all, "reason": "OSError: refused", "error_type": "OSError"}
    assert [*map(fields, caplog.records)] == [lost, of_all]


async def test_a_cancellation_by_the_client_library_is_a_failure():
    connection = Connection()
    connection.error = asyncio.CancelledError()
    assert await kinds(calls(connection, 2)) == [ConnectionError] * 2


async def test_attempts_of_one_backoff_do_not_overlap():
    backoff, running = Backoff(POLICY), []

    async def attempt():
        async with backoff.attempt():
            running.append(True)
            assert len(running) == 1
            await asyncio.sleep(0.5)
            running.pop()

    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(attempt() for _ in range(3)))
    assert asyncio.get_running_loop().time() - began == pytest.approx(3 * 0.5 + 1.0 + 2.0)
