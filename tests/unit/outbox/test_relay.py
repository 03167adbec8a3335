"""The relay: order, results, outages, leases, and its end."""

import asyncio
import logging
import math
from contextvars import ContextVar
from datetime import timedelta

import pytest

from diator.brokers.cloudevents import CloudEvents
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    MessageRejected,
    MessageTooLarge,
    MessageUnroutable,
    OutcomeUnknown,
    UsageError,
)
from diator.instruments import Instrument
from diator.outbox import Outbox, Relay
from tests.unit.outbox.relaying import Broker, Store, now, relaying, until

pytestmark = pytest.mark.usefixtures("loop_clock")


# -- order -----------------------------------------------------------------------------------------------------------


async def test_messages_with_one_key_are_sent_one_after_the_other_and_keys_beside_each_other():
    store, broker = Store(), Broker()
    await store.fill(*((number, f"key {number % 7}") for number in range(1, 501)))

    async with relaying(store, broker, batch=50):
        await broker.has_sent(500)
        await store.is_empty()

    assert sorted(broker.numbers) == [*range(1, 501)]
    for key in range(7):
        own = [number for number in broker.numbers if number % 7 == key]
        assert own == sorted(own)
    assert broker.most_at_once == 7
    assert broker.beside == []


async def test_messages_without_a_key_are_sent_beside_each_other():
    store, broker = Store(), Broker()
    await store.fill(*range(1, 501))

    async with relaying(store, broker, concurrency=20):
        await broker.has_sent(500)

    assert broker.most_at_once == 20


async def test_without_an_order_keys_do_not_matter():
    store, broker = Store(), Broker()
    await store.fill(*((number, "key") for number in range(1, 21)))

    async with relaying(store, broker, order="none"):
        await broker.has_sent(20)

    assert len(broker.beside) == 19


async def test_the_next_claim_does_not_wait_for_the_last_finish():
    store, broker = Store(takes=0.02), Broker()
    await store.fill(*range(1, 501))

    async with relaying(store, broker):
        await store.is_empty()

    begins, ends = store.times("finish begins"), store.times("finish")
    claims = store.times("claim begins")
    assert any(begin <= claim < end for begin, end in zip(begins, ends, strict=True) for claim in claims)
    assert len(broker.sent) == 500


async def test_it_holds_at_most_two_batches():
    store, broker = Store(), Broker(takes=5.0)
    await store.fill(*range(1, 1_001))

    async with relaying(store, broker, batch=10, concurrency=5) as relay:
        await asyncio.sleep(3)
        assert (await store.status()).leased == 20
        assert relay.health().in_flight == 5
        assert relay.health().oldest_in_flight == pytest.approx(3, abs=0.1)
        assert relay.health().since_last_progress == pytest.approx(3, abs=0.1)
        relay.stop()


async def test_the_message_is_written_with_the_codec_of_the_outbox():
    store, broker, codec = Store(), Broker(), CloudEvents(source="/tests")
    await store.fill(1)

    async with Relay(Outbox(store, broker, codec=codec)):
        await broker.has_sent(1)

    assert broker.messages[0].codec is codec


# -- when it asks the database ---------------------------------------------------------------------------------------


async def test_an_idle_relay_asks_less_than_once_a_second():
    store = Store()
    async with relaying(store, Broker()):
        await asyncio.sleep(600)

    assert len(store.times("claim")) < 300


async def test_what_is_stored_is_sent_at_once():
    store, broker = Store(), Broker(takes=0)
    async with relaying(store, broker):
        for number in range(1, 6):
            await asyncio.sleep(60)
            stored_at = now()
            await store.fill(number)
            await broker.has_sent(number)
            assert broker.sent[-1][0] == stored_at


async def test_a_message_is_sent_when_its_time_has_come():
    store, broker = Store(), Broker(takes=0)
    began = now()
    await store.fill(1, due=timedelta(seconds=100))
    async with relaying(store, broker):
        await broker.has_sent(1)

    assert broker.sent[0][0] - began == pytest.approx(100, abs=0.01)


async def test_few_messages_cost_one_claim_each():
    store, broker = Store(), Broker()
    async with relaying(store, broker):
        await asyncio.sleep(1)
        before = len(store.times("claim"))
        for number in range(1, 201):
            await store.fill(number)
            await asyncio.sleep(0.005)
        assert len(store.times("claim")) - before <= 210


async def test_what_waits_behind_a_message_in_flight_is_claimed_when_that_was_sent():
    store, broker = Store(), Broker(takes=1.0)
    await store.fill((1, "key"))
    async with relaying(store, broker, poll=(100.0, 100.0)):
        await asyncio.sleep(0.5)
        await store.fill((2, "key"))
        await broker.has_sent(2)

    assert broker.sent[1][0] - broker.sent[0][0] < 1.1


async def test_a_slow_send_delays_no_other_key():
    store, broker = Store(), Broker()
    slow = asyncio.Event()
    await store.fill((1, "slow"), (2, "fast"))
    plain = broker.send_message

    async def send_message(message):
        if message.message_id.int == 1:
            await slow.wait()
        await plain(message)

    broker.send_message = send_message
    async with relaying(store, broker):
        for number in range(3, 20):
            await broker.has_sent(number - 2)
            await store.fill((number, "fast"))
        await broker.has_sent(18)
        slow.set()
        await broker.has_sent(19)

    assert broker.numbers == [*range(2, 20), 1]


# -- results --------------------------------------------------------------------------------------------------------


async def test_what_is_behind_a_failure_in_its_key_waits_untried():
    store, broker = Store(), Broker(lambda number, attempt: KeyError() if (number, attempt) == (2, 1) else None)
    await store.fill((1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "a"))
    attempts = {}

    async with relaying(store, broker, on_relayed=lambda relayed: attempts.update({relayed.position: relayed.attempt})):
        await store.is_empty()

    assert [number for number in broker.numbers if number != 4] == [1, 2, 3, 5]
    assert broker.numbers.index(4) < 2
    assert attempts == {1: 1, 2: 2, 3: 1, 4: 1, 5: 1}


@pytest.mark.parametrize("error", [BrokerUnavailable("no"), AccessRefused("no")])
async def test_an_outage_costs_no_attempt_and_one_message_after_the_other_tests_the_destination(error):
    store, broker = Store(), Broker(lambda *_: error)
    attempts = []
    await store.fill(*range(1, 301))

    async with relaying(store, broker, on_relayed=lambda relayed: attempts.append(relayed.attempt)) as relay:
        await asyncio.sleep(3600)
        assert relay.health().unavailable_for == pytest.approx(3600, abs=1)
        first = broker.tried[0][0]
        assert sum(tried > first + 1 for tried, _ in broker.tried) < 500  # one each 15 s, and more at first
        tried = sorted(at for at, _ in broker.tried if at > first + 1)
        assert len({*tried}) == len(tried)
        assert attempts == []
        broker.fails = lambda *_: None
        await store.is_empty()
        assert relay.health().unavailable_for == 0

    assert sorted(broker.numbers) == [*range(1, 301)]
    assert {*attempts} == {1}


async def test_an_outage_is_logged_twice(caplog):
    store, broker = Store(), Broker(lambda *_: BrokerUnavailable("no connection"))
    await store.fill(*range(1, 301))
    caplog.set_level(logging.INFO, "diator.outbox.relay")

    async with relaying(store, broker):
        await asyncio.sleep(100)
        broker.fails = lambda *_: None
        await store.is_empty()

    lines = [record.getMessage() for record in caplog.records if "reached" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0] == (
        "the destination cannot be reached: no connection; the relay pauses, and no attempt is counted meanwhile"
    )
    assert lines[1].startswith("the destination can be reached again, after 1")


async def test_an_unknown_outcome_is_sent_again_with_the_same_id_until_it_is_known():
    store, broker = Store(), Broker(lambda number, attempt: OutcomeUnknown("no") if attempt < 40 else None)
    await store.fill((1, "key"), (2, "key"))

    async with relaying(store, broker, max_attempts=3) as relay:
        await store.is_empty()
        assert relay.health().dead == 0

    assert broker.numbers == [1, 2]
    assert [number for _, number in broker.tried] == [*[1] * 40, *[2] * 40]


async def test_a_service_that_does_not_respond_is_tested_with_one_message_after_the_other():
    store, broker = Store(), Broker(lambda *_: OutcomeUnknown("no answer"), takes=10.0)
    await store.fill(*range(1, 301))

    async with relaying(store, broker, concurrency=50) as relay:
        await asyncio.sleep(600)
        assert relay.health().unavailable_for > 500
        assert len(broker.tried) < 50 + 60
        broker.fails = lambda *_: None
        broker.takes = 0.001
        await store.is_empty()


async def test_some_unknown_outcomes_stop_nothing():
    store, broker = Store(), Broker(lambda number, attempt: OutcomeUnknown("no") if number % 7 == attempt else None)
    await store.fill(*range(1, 701))

    async with relaying(store, broker) as relay:
        await asyncio.sleep(0.002)
        while len(broker.sent) < 600:
            assert relay.health().unavailable_for == 0
            await asyncio.sleep(0.001)
        await store.is_empty()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MessageRejected("no"), "rejected: MessageRejected"),
        (MessageTooLarge(2, 1), "rejected: MessageTooLarge"),
        (EncodingError("a.b", "no"), "rejected: EncodingError"),
    ],
)
async def test_a_rejected_message_is_dead_at_once_and_blocks_its_key(error, reason):
    store, broker = Store(), Broker(lambda number, attempt: error if number == 1 else None)
    await store.fill((1, "a"), (2, "a"), (3, "b"))

    async with relaying(store, broker) as relay:
        await broker.has_sent(1)
        await asyncio.sleep(10)
        (dead,) = await store.dead()
        assert (dead.position, dead.reason, dead.blocked, dead.attempts) == (1, reason, 1, 1)
        assert broker.numbers == [3]
        broker.fails = lambda *_: None
        assert await store.redrive() == 1
        await store.is_empty()
        assert relay.health().dead == 1

    assert broker.numbers == [3, 1, 2]


async def test_a_dead_message_may_be_skipped():
    store, broker = Store(), Broker(lambda number, attempt: MessageRejected("no") if number == 1 else None)
    await store.fill((1, "a"), (2, "a"), (3, "b"))

    async with relaying(store, broker, on_dead="skip"):
        await broker.has_sent(2)

    assert sorted(broker.numbers) == [2, 3]
    assert (await store.status()).dead == 1


@pytest.mark.parametrize("error", [MessageUnroutable("no"), KeyError("secret"), ConnectionError("secret")])
async def test_any_other_error_is_dead_after_max_attempts(error, caplog):
    store, broker = Store(), Broker(lambda *_: error)
    outcomes = []
    await store.fill(1)

    async with relaying(store, broker, max_attempts=4, on_relayed=outcomes.append) as relay:
        await store.has_dead(1)
        assert (relay.health().retried, relay.health().dead) == (3, 1)

    name = type(error).__name__
    assert [(each.outcome, each.reason, each.attempt) for each in outcomes] == [
        *(("retried", f"failed: {name}", attempt) for attempt in (1, 2, 3)),
        ("dead", f"retries-exhausted: {name}", 4),
    ]
    assert outcomes[0].error is error
    pauses = [later - earlier for (earlier, _), (later, _) in zip(broker.tried, broker.tried[1:], strict=False)]
    assert all(limit / 2 < pause < limit + 0.1 for pause, limit in zip(pauses, [1, 2, 4], strict=True))
    assert "secret" not in caplog.text
    last = caplog.records[-1]
    assert last.getMessage() == (
        f"Counted 00000000-0000-0000-0000-000000000001 is dead after attempt 4 (retries-exhausted: {name}); "
        "redrive or discard it"
    )
    assert (last.levelname, last.position, last.attempt, last.reason, last.error_type) == (
        *("ERROR", 1, 4, f"retries-exhausted: {name}"),
        name,
    )


async def test_a_thousand_failures_are_few_lines(caplog):
    store, broker = Store(), Broker(lambda *_: MessageRejected("no"))
    await store.fill(*range(1_000))
    async with relaying(store, broker):
        await store.has_dead(1_000)

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6
    assert lines[-1].startswith("dead messages: and 995 more in ")


async def test_a_send_that_never_ends_is_cut_off():
    class Foreign(Broker):
        timeout = None

    store, broker = Store(), Foreign(takes=0.001)
    plain, stuck = broker.send_message, []

    async def send_message(message):
        if not stuck:
            stuck.append(now())
            await asyncio.Event().wait()
        await plain(message)

    broker.send_message = send_message
    outcomes = []
    await store.fill((1, "key"), (2, "key"))
    async with relaying(store, broker, on_relayed=outcomes.append):
        await store.is_empty()

    assert (outcomes[0].reason, outcomes[0].seconds) == ("unknown: TimeoutError", pytest.approx(11))
    assert broker.numbers == [1, 2]


async def test_a_send_that_its_client_cancels_is_sent_again():
    store, broker = Store(), Broker(lambda number, attempt: asyncio.CancelledError() if attempt == 1 else None)
    await store.fill(1)
    async with relaying(store, broker):
        await store.is_empty()

    assert broker.numbers == [1]


async def test_a_destination_that_comes_and_goes_is_few_lines(caplog):
    caplog.set_level(logging.INFO, "diator.outbox.relay")
    store, broker = Store(), Broker(lambda number, attempt: BrokerUnavailable("no") if attempt == 1 else None)
    await store.fill(*((number, "key") for number in range(200)))
    async with relaying(store, broker):
        await store.is_empty()

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) < 50
    assert lines[-2].startswith("ends of a pause of the relay: and ")


# -- leases ----------------------------------------------------------------------------------------------------------


async def test_no_send_begins_that_may_outlast_the_lease():
    store, broker = Store(takes=1.0), Broker(takes=8.0)
    await store.fill(*((number, "key") for number in range(1, 21)))
    claims = []
    plain = store.claim

    async def claim(**options):
        began = now()
        claimed = await plain(**options)
        if claimed.rows:
            claims.append(began)
        return claimed

    store.claim = claim
    async with relaying(store, broker, lease=30.0) as relay:
        await store.is_empty()
        assert relay.health().lease_lost == 0

    assert broker.numbers == [*range(1, 21)]
    for at, _ in broker.tried:
        assert any(claimed < at <= claimed + 30 - 11 for claimed in claims)


async def test_another_relay_takes_over_when_the_lease_is_over(caplog):
    """A process that slept longer than its lease sends nothing of it any more, and learns that others have done so."""
    store, broker = Store(), Broker(takes=1.0)
    await store.fill((1, "key"), (2, "key"))
    asleep = asyncio.Event()

    async with relaying(store, Broker(takes=60.0), lease=20.0, poll=(1e6, 1e6)) as sleeper:
        await asyncio.sleep(0.1)
        sleeper._deadlines.close()  # the process is not running, and so are its timers
        sleeper._deadlines.timer = asyncio.get_running_loop().call_later(1e9, asleep.set)
        async with relaying(store, broker):
            await store.is_empty()
        await until(lambda: sleeper.health().lease_lost)
        assert sleeper.health().sent == 1
        assert sleeper._broker.numbers == [1]
        assert sleeper.health().lease_lost == 2
        sleeper._deadlines.close()

    assert broker.numbers == [1, 2]
    assert "2 of 2 messages had lost their lease; another relay may have sent them as well" in caplog.text
    assert any(getattr(record, "lease_lost", None) == 2 for record in caplog.records)


async def test_a_finish_that_fails_is_tried_until_the_lease_ends(caplog):
    store, broker = Store(), Broker()
    await store.fill(1)
    store.failing["finish"] = OSError("the database is down")

    async with relaying(store, broker, lease=20.0) as relay:
        await asyncio.sleep(15)
        assert relay.health().database_failing_for == pytest.approx(15, abs=0.1)
        del store.failing["finish"]
        await asyncio.sleep(5)
        assert relay.health().database_failing_for == 0
        await store.is_empty()

    assert broker.numbers == [1]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["the database has failed to finish: OSError: the database is down; the relay tries again"]


async def test_a_finish_whose_answer_is_lost_has_lost_no_lease():
    store, broker = Store(), Broker()
    await store.fill(1)
    plain, failing = store.finish, [OSError("the connection is lost")]

    async def finish(lease, /, **results):
        lost = await plain(lease, **results)
        if failing:
            raise failing.pop()
        return lost

    store.finish = finish
    async with relaying(store, broker) as relay:
        await store.is_empty()
        await until(lambda: not relay._held)
        assert relay.health().lease_lost == 0

    assert broker.numbers == [1]


async def test_what_could_not_be_reported_to_the_database_is_sent_again(caplog):
    store, broker = Store(), Broker()
    await store.fill(1)
    store.failing["finish"] = OSError("the database is down")

    async with relaying(store, broker, lease=20.0):
        await asyncio.sleep(30)
        del store.failing["finish"]
        await store.is_empty()

    assert broker.numbers == [1, 1]
    assert "what became of 1 messages could not be reported to the database" in caplog.text


# -- the database ----------------------------------------------------------------------------------------------------


async def test_a_database_that_fails_does_not_end_the_relay(caplog):
    caplog.set_level(logging.INFO, "diator.outbox.relay")
    store, broker = Store(), Broker()
    await store.fill(1)
    text = "first line with amqp://user:password@host\n[parameters: of-the-payload]"

    store.failing["claim"] = OSError(text)
    async with relaying(store, broker) as relay:
        await asyncio.sleep(600)
        assert relay.health().database_failing_for > 599
        assert len(store.times("claim begins")) < 400
        del store.failing["claim"]
        await store.is_empty()

    lines = [record.getMessage() for record in caplog.records][1:-1]
    assert lines[0] == ("the database has failed to claim: OSError: first line with amqp://host; the relay tries again")
    assert lines[1].startswith("the database answers again, after 60")
    assert len(lines) == 2
    assert "payload" not in caplog.text


async def test_an_error_at_the_start_is_raised():
    store = Store()
    store.failing["check"] = ConfigurationError("a column is missing")
    relay = Relay(Outbox(store, Broker()))
    with pytest.raises(ConfigurationError, match="a column is missing"):
        await relay.run()
    with pytest.raises(ConfigurationError, match="a column is missing"):
        await relay.ready()


async def test_a_store_whose_wait_fails_is_polled(caplog):
    store, broker = Store(), Broker()

    async def wait(timeout):
        raise OSError("no")

    store.wait = wait
    async with relaying(store, broker):
        await asyncio.sleep(60)
        await store.fill(1)
        await broker.has_sent(1)
        assert len(store.times("claim")) < 60
    assert caplog.text.count("failed to wait") == 1


# -- its end ---------------------------------------------------------------------------------------------------------


async def test_stopping_finishes_what_is_in_flight_and_releases_the_rest():
    store, broker = Store(), Broker(takes=5.0)
    await store.fill(*((number, f"key {number % 3}") for number in range(1, 31)))
    relay = Relay(Outbox(store, broker))
    running = asyncio.create_task(relay.run())
    await relay.ready()
    await asyncio.sleep(7)
    assert len(broker.sending) == 3
    relay.stop()
    assert not relay.health().relaying
    await running

    assert len(broker.sent) == 6
    status = await store.status()
    assert (status.pending, status.leased) == (24, 0)
    claim = await store.claim(limit=100, lease=30, order="key", on_dead="block")
    assert {row.attempts for row in claim.rows} == {1}


@pytest.mark.parametrize("how", ["a second call", "the time is over", "cancelled"])
async def test_sends_that_are_cut_off_are_released(how, caplog):
    store, broker = Store(), Broker(takes=9.0)
    await store.fill((1, "key"), (2, "key"), 3)
    relay = Relay(Outbox(store, broker), drain_timeout=3.0)
    running = asyncio.create_task(relay.run())
    await relay.ready()
    await asyncio.sleep(1)
    began = now()
    if how == "cancelled":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        relay.stop()
        if how == "a second call":
            relay.stop()
        await running

    assert now() - began == (3.0 if how == "the time is over" else 0)
    assert broker.sent == []
    claim = await store.claim(limit=100, lease=30, order="key", on_dead="block")
    assert [(row.position, row.attempts) for row in claim.rows] == [(1, 2), (2, 1), (3, 2)]
    assert [call for call, *_ in store.calls if call in ("finish", "close")] == ["finish", "close"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_claim_in_flight_is_released():
    store, broker = Store(takes=2.0), Broker()
    await store.fill(1)
    relay = Relay(Outbox(store, broker))
    running = asyncio.create_task(relay.run())
    await asyncio.sleep(3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert broker.tried == []
    assert (await store.status()).leased == 0


async def test_a_database_that_does_not_answer_delays_the_end_for_a_while_only(caplog):
    store, broker = Store(), Broker(takes=1.0)
    await store.fill(1)
    relay = Relay(Outbox(store, broker), drain_timeout=3.0)
    running = asyncio.create_task(relay.run())
    await until(lambda: broker.sending)
    store.takes = 1e6
    relay.stop()
    began = now()
    await running

    assert now() - began < 20
    assert "stopped before the database knew what became of 1 messages" in caplog.text


async def test_stopping_while_the_tables_are_checked():
    store = Store(takes=1e6)
    relay = Relay(Outbox(store, Broker()))
    running = asyncio.create_task(relay.run())
    await asyncio.sleep(1)
    relay.stop()
    await running
    with pytest.raises(UsageError, match="the relay was stopped before it had begun"):
        await relay.ready()
    with pytest.raises(UsageError, match="a relay runs once; create another Relay"):
        await relay.run()


async def test_a_closed_broker_ends_the_relay_and_its_block():
    store, broker = Store(), Broker()
    await store.fill(*range(1, 31))
    reached = []

    async def program():
        async with relaying(store, broker):
            await broker.has_sent(30)
            broker.fails = lambda *_: BrokerClosed("closed")
            await store.fill(31)
            await asyncio.sleep(100)
            reached.append(True)

    with pytest.raises(BrokerClosed):
        await program()

    assert not reached
    status = await store.status()
    assert (status.pending, status.leased) == (1, 0)


async def test_it_says_when_it_begins_and_ends(caplog):
    caplog.set_level(logging.INFO, "diator.outbox.relay")
    async with relaying(Store(), Broker(), batch=3, concurrency=3):
        pass
    first, last = caplog.records
    assert first.getMessage() == "relaying an outbox to Broker, order key, concurrency 3"
    assert last.getMessage() == "stopped relaying an outbox to Broker, order key, concurrency 3"
    assert (first.broker, first.concurrency, last.error_type) == ("Broker", 3, None)


# -- what others see -------------------------------------------------------------------------------------------------


async def test_what_it_sends_belongs_to_nobody_who_started_it():
    inside = ContextVar("inside", default="nothing")
    seen = []

    class Looking(Broker):
        async def send_message(self, message, /):
            seen.append(inside.get())
            await super().send_message(message)

    store, broker = Store(), Looking()
    await store.fill(1)
    inside.set("the program")
    async with relaying(store, broker):
        await broker.has_sent(1)
    assert seen == ["nothing"]


async def test_an_instrument_sees_the_sends_and_the_state():
    class Noting(Instrument):
        def __init__(self):
            self.seen = []

        def sending(self, messages, broker):
            self.seen.append(([each.message_id.int for each in messages], type(broker)))
            return super().sending(messages, broker)

        def outbox(self, state, broker):
            self.seen.append((state.pending, state.oldest, state.dead, state.blocked_keys, type(broker)))

    store, noting = Store(), Noting()
    broker = Broker(lambda number, attempt: MessageRejected("no") if number == 1 else None)
    await store.fill((1, "a"), (2, "a"))
    await asyncio.sleep(5)
    async with relaying(store, broker, instrument=noting):
        await asyncio.sleep(16)

    assert noting.seen == [(2, 5, 0, 0, Broker), ([1], Broker), (1, 20, 1, 1, Broker)]


async def test_an_error_of_on_relayed_changes_nothing(caplog):
    def on_relayed(relayed):
        raise KeyError

    store, broker = Store(), Broker()
    await store.fill(1, 2)
    async with relaying(store, broker, on_relayed=on_relayed) as relay:
        await store.is_empty()
        assert relay.health().sent == 2
    assert caplog.text.count("on_relayed failed") == 2


async def test_the_state_is_that_of_the_store():
    store = Store()
    await store.fill(1, 2)
    assert await Relay(Outbox(store, Broker())).status() == await store.status()


# -- what it is made of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1, and it is 0"),
        ({"batch": "200"}, "batch must be a whole number of at least 1, and it is an object of str"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1, and it is 0"),
        ({"concurrency": 1.5}, "concurrency must be a whole number"),
        ({"max_attempts": 0}, "max_attempts must be a whole number of at least 1, and it is 0"),
        ({"poll": 5.0}, "poll must be two times in seconds, and it is"),
        ({"poll": (1.0, 2.0, 3.0)}, "poll must be two times in seconds, and it is"),
        ({"poll": (0.0, 5.0)}, "poll must be a number above 0, and it is 0.0"),
        ({"poll": (6.0, 5.0)}, "poll must be a number of at least 6, and it is 5.0"),
        ({"poll": ("1", 5.0)}, "poll must be a number above 0"),
        ({"drain_timeout": math.nan}, "drain_timeout must be a number of at least 0, and it is nan"),
        ({"on_relayed": 3}, "on_relayed must be a function"),
        ({"order": "topic"}, "order must be one of 'key', 'none', and it is 'topic'"),
        ({"on_dead": "wait"}, "on_dead must be one of 'block', 'skip', and it is 'wait'"),
        ({"lease": 11.0}, "a send may take 11 s, and a lease of 11 s would be over before"),
        ({"lease": math.nan}, "lease must be a number above 0, and it is nan"),
        ({"lease": "30"}, "lease must be a number above 0"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(ConfigurationError, match=text):
        Relay(Outbox(Store(), Broker()), **options)


@pytest.mark.parametrize("outbox", [None, Outbox, Broker()])
def test_what_is_not_an_outbox_is_refused(outbox):
    with pytest.raises(ConfigurationError, match="outbox"):
        Relay(outbox)


@pytest.mark.parametrize(("concurrency", "warned"), [(50, False), (34, False), (33, True), (1, True)])
def test_a_batch_that_may_take_longer_than_the_lease_is_warned_of(concurrency, warned, caplog):
    Relay(Outbox(Store(), Broker()), lease=30.0, batch=100, concurrency=concurrency)
    assert ("the sends of one batch may take" in caplog.text) is warned


@pytest.mark.parametrize(("timeout", "lease"), [(5.0, 30.0), (10.0, 30.0), (30.0, 90.0)])
def test_the_lease_fits_the_broker(timeout, lease, caplog):
    class Slow(Broker): ...

    Slow.timeout = timeout
    assert Relay(Outbox(Store(), Slow()))._lease == lease
    assert caplog.text == ""
