"""The transport on the page about writing one passes the suite, except for the scenarios that need a proxy."""

import asyncio
import os
import re
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from uuid import uuid4

import pytest

from diator.brokers.codec import decode
from diator.exceptions import BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown
from diator.testing.conformance import SCENARIOS, run_suite

pytestmark = pytest.mark.timeout(300)

FOLDER = "DIATOR_TEST_TABLE"
PAGE = Path(__file__).parents[2] / "docs" / "writing-a-transport.md"


def program_of(path):
    """Return the Python blocks of a page as one module."""
    module = ModuleType("program_of_the_page")
    sys.modules[module.__name__] = module
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), path, "exec"), vars(module))  # as a reader would run them
    return module


page = program_of(PAGE)
TestTable = page.TestTable
TestTable.required = True


class TableOfProcesses(page.TableHarness):
    """Several processes open one file."""

    facilities = page.TableHarness.facilities | {"processes"}

    def start(self):
        self.folder = os.environ.get(FOLDER)
        if self.folder is None:
            super().start()
            os.environ[FOLDER] = self._folder.name

    def stop(self):
        if self.folder is None:  # otherwise the folder belongs to another process
            del os.environ[FOLDER]
            super().stop()

    def transport(self):
        return page.TableMessageBroker(f"{os.environ[FOLDER]}/messages", lease=1.0)


class TableWithoutFence(TableOfProcesses):
    """Deletes an acknowledged message whoever holds it."""

    def transport(self):
        page.DELETE = "DELETE FROM messages WHERE id = :id"
        return super().transport()


@pytest.mark.parametrize(("harness", "outcome"), [(TableOfProcesses, "PASS"), (TableWithoutFence, "FAIL")])
def test_a_late_acknowledgement_is_caught(monkeypatch, harness, outcome):
    monkeypatch.setattr(page, "DELETE", page.DELETE)

    [result] = run_suite(harness(), [SCENARIOS["ACK-28"]], seed=1)

    assert result.outcome == outcome, result.reason
    assert outcome == "PASS" or "what the other consumer had not settled" in result.reason


def test_names_never_collide_and_headers_come_back():
    parts = ["a", "a.b", "a=2E", "Å.b:*", "", "a" * 300, "a" * 301, "=" * 300]
    names = {page.subject(first, second) for first in parts for second in parts}
    assert len(names) == len(parts) ** 2
    assert all(all(name.split(".")) for name in names)  # no part is empty
    assert all(re.fullmatch(r"[A-Za-z0-9_=.]{1,200}", name) for name in names)

    headers = {"key": "Å: b", "": "", "a: b\r\n%41": "100 %\0\x7f", "%": "\N{PILE OF POO}"}
    lines = page.to_lines(headers)
    assert all(re.fullmatch("[!-9;-~]*: [!-9;-~]*", line) for line in lines)
    assert page.from_lines(lines) == headers


async def test_a_process_that_slept_past_its_lease_settles_nothing(monkeypatch):
    now, deleted, renewed = 0.0, [], []
    monkeypatch.setattr("diator.brokers.leases.monotonic", lambda: now)

    async def delete(receipts):
        deleted.append(receipts)

    async def renew(receipt):
        renewed.append(receipt)

    service = page.UnfencedService(delete, renew)
    over, leased = page.Lent("over", leased_until=1.0), page.Lent("leased", leased_until=3.0)
    now = 2.0
    await service.send_acks([over, leased])

    assert await service.renew([over, leased]) == [over]
    assert (deleted, renewed) == ([["leased"]], ["leased"])


async def test_a_subscription_receives_what_a_client_has_pushed():
    """Of two topics, with one place for both; a probe is answered after the messages."""
    probed = asyncio.Event()

    async def flush():
        probed.set()

    class Subscription(page.ResilientSubscription):
        @asynccontextmanager
        async def connect(self):
            self.source = page.PushedSource(self, self, flush)
            for number in range(5):
                self.source.on_message(topics[number % 2], b"%d" % number, page.Lent("receipt"))
            yield self.source

        async def ack(self, delivery, /):
            self.unsettled -= 1
            self.notify_settled()

    topics, handed_out = [page.Topic("event", "first"), page.Topic("event", "second")], []
    policy = page.ReconnectPolicy(idle_timeout=0.05, probe_timeout=20.0, max_delay=0.0)
    settings = page.SubscriptionSettings(
        topics=topics, group="g", broker="B", prefetch=1, on_gap=None, reconnect=policy, registry=set()
    )
    subscription = Subscription(settings, lossy=False)
    async with subscription as deliveries, asyncio.timeout(20):
        for _ in range(5):
            handed_out.append(delivery := await anext(deliveries))
            await delivery.ack()
        await probed.wait()
        subscription.source.arrivals.fail(ConnectionError("lost"))
        handed_out.append(await anext(deliveries))

    assert [delivery.body for delivery in handed_out] == [b"0", b"1", b"2", b"3", b"4", b"0"]
    assert subscription.reconnects == 1


async def test_a_cancelled_call_of_a_client_that_waits_loses_nothing():
    begun, answered, subscription = threading.Event(), threading.Event(), SimpleNamespace(unsettled=0)

    def claim(limit):
        begun.set()
        answered.wait(60)
        return [object() for _ in range(limit)]

    thread = page.ClientThread(timeout=60.0)
    source = page.PolledSource(subscription, thread, claim)
    waiting = asyncio.create_task(source.receive(3))
    await asyncio.to_thread(begun.wait, 60)
    waiting.cancel()
    await asyncio.wait([waiting])
    answered.set()
    await thread.run(lambda: None)  # after the call that goes on

    assert (waiting.cancelled(), len(source.taken)) == (True, 3)
    taken = [*source.taken]
    assert [*await source.receive(2), *await source.receive(2)] == taken
    assert subscription.unsettled == 3
    await thread.aclose()
    assert not thread._thread._threads.pop().is_alive()


async def test_a_call_of_a_client_that_waits_has_a_time_limit():
    answered, thread = threading.Event(), page.ClientThread(timeout=0.05)
    with pytest.raises(TimeoutError):
        await thread.run(answered.wait)
    answered.set()
    await thread.aclose()


@asynccontextmanager
async def connection():
    yield "a connection"


@asynccontextmanager
async def no_connection():
    raise ConnectionRefusedError
    yield


@asynccontextmanager
async def slow_connection():
    await asyncio.sleep(5)
    yield


class Refused(Exception):
    pass


@pytest.mark.parametrize(
    ("connect", "failure", "send_error"),
    [
        (no_connection, None, BrokerUnavailable),
        (slow_connection, None, BrokerUnavailable),
        (connection, Refused("hunter2"), MessageRejected),
        (connection, ConnectionResetError(), OutcomeUnknown),
        (connection, TimeoutError(), OutcomeUnknown),
    ],
)
async def test_a_failure_between_request_and_answer_decides_the_send_error(connect, failure, send_error):
    message_id = uuid4()

    with pytest.raises(send_error) as caught:
        async with page.confirmed(connect, timeout=0.05, message_id=message_id, refusals=(Refused,)):
            raise failure

    assert type(caught.value) is send_error
    assert caught.value.message_id == message_id
    assert "hunter2" not in str(caught.value)


async def test_concurrent_sends_share_a_request_and_have_errors_of_their_own():
    batches, ids, begun = [], [uuid4() for _ in range(4)], asyncio.Event()

    class Client:
        async def insert(self, bodies):
            batches.append(list(bodies))
            begun.set()
            await asyncio.sleep(0)
            if b"3" in bodies:
                raise ConnectionResetError

    @asynccontextmanager
    async def connect():
        yield Client()

    inserter = page.Inserter(connect, timeout=60.0)
    calls = [inserter.send(b"%d" % number, each) for number, each in enumerate(ids)]
    first = asyncio.create_task(calls[0])
    await begun.wait()
    results = await asyncio.gather(*calls[1:], return_exceptions=True)
    await first
    await inserter.aclose()

    assert batches == [[b"0"], [b"1", b"2", b"3"]]
    assert [(type(each), each.message_id) for each in results] == [(OutcomeUnknown, each) for each in ids[1:]]


async def test_a_broker_sends_through_its_connection_and_closes_it():
    bodies = []

    async def serve(reader, writer):
        async for line in reader:
            number, body = line.split(b" ", 1)
            bodies.append(decode(body))
            writer.write(b"%b ok\n" % number)
        writer.close()

    class Broker(page.LineMessageBroker):
        def _subscription(self, settings):
            raise NotImplementedError

    message = page.Message.create(message_name="UserJoined", payload={"user_id": 7}, headers={"tenant": "42"})
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        async with Broker(*server.sockets[0].getsockname(), timeout=60.0) as broker:
            await broker.send_message(message)
        with pytest.raises(BrokerClosed):
            await broker.send_message(message)

    [sent] = bodies
    assert (sent.message_id, sent.headers) == (message.message_id, {"tenant": "42"})


async def test_a_service_that_answers_later_gives_each_message_its_result():
    """It answers in pairs, the later message first; it refuses `bad`, never answers `mute`, and `leave` ends it."""
    lines = []

    async def serve(reader, writer):
        waiting = []
        async for line in reader:
            number, body = line.split()
            lines.append(body)
            if body == b"leave":
                break
            if body != b"mute":
                waiting.insert(0, b"%b %b\n" % (number, b"no" if body == b"bad" else b"ok"))
            if len(waiting) == 2:
                writer.writelines(waiting)
                waiting = []
        writer.close()

    async def outcomes(*bodies):
        ids = [uuid4() for _ in bodies]
        results = await asyncio.gather(*map(sender.send, bodies, ids), return_exceptions=True)
        assert [getattr(each, "message_id", own) for each, own in zip(results, ids, strict=True)] == ids
        return [type(each) for each in results]

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        sender = page.LineSender(*server.sockets[0].getsockname(), timeout=60.0)
        await sender.open()
        assert await outcomes(b"a", b"bad", b"c", b"d") == [type(None), MessageRejected, type(None), type(None)]
        assert await outcomes(b"mute", b"leave") == [OutcomeUnknown] * 2
        assert await outcomes(b"e", b"f") == [type(None)] * 2
        sender.timeout = 0.1
        assert await outcomes(b"mute", b"g") == [OutcomeUnknown] * 2
        assert lines == [b"a", b"bad", b"c", b"d", b"mute", b"leave", b"e", b"f", b"mute", b"g"]
        await sender.aclose()
        assert await outcomes(b"h") == [BrokerClosed]


async def test_nonsense_from_the_service_loses_the_connection():
    async def serve(reader, writer):
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        sender = page.LineSender(*server.sockets[0].getsockname(), timeout=60.0)
        with pytest.raises(OutcomeUnknown) as caught:
            await sender.send(b"a", uuid4())
        await sender.aclose()

    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_second_proxy_stands_before_the_service_and_not_before_the_first_proxy():
    async def answer(reader, writer):
        writer.write(await reader.read(1))
        writer.close()

    async def connected(address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"x")
        answered = await reader.read(1)
        writer.close()
        return answered

    class Proxied(page.NetworkHarness):
        def transport(self):
            raise NotImplementedError

    harness = Proxied()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        harness.service_address = harness.address = server.sockets[0].getsockname()
        async with harness.proxied() as first:
            through_first = harness.address
            async with harness.proxied() as second:
                assert await connected(harness.address) == b"x"
                assert (first.accepted, second.accepted) == (0, 1)
                await second.heal()
            assert harness.address == through_first
            assert await connected(harness.address) == b"x"
        assert harness.address == harness.service_address


async def test_a_private_service_is_repaired_after_each_scenario():
    class Private(page.NetworkHarness):
        def transport(self):
            raise NotImplementedError

    harness = Private()
    harness.start()
    shared = harness.address
    harness.prepare("outages")
    harness.prepare("security")
    try:
        trusted = [harness.ssl_context(access).get_ca_certs() for access in ("granted", "unknown authority")]
        assert [subject for [each] in trusted for [[subject]] in [each["subject"]]] == [
            ("commonName", "ca"),
            ("commonName", "other"),
        ]
        async with harness.private() as server:
            assert harness.address == harness.service_address == server.address != shared
            await server.kill()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*server.address)
        assert harness.address == harness.service_address == shared
        _, writer = await asyncio.open_connection(*server.address)
        writer.close()
    finally:
        harness.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*server.address)
