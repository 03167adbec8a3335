"""Brokers with few capabilities, and brokers that fail."""

import asyncio
from dataclasses import dataclass

import pytest

from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES
from diator.brokers.memory import _Subscription
from diator.consumer import DEFAULT_GROUP
from diator.events import NotificationEvent
from diator.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    ResolutionError,
    UnsupportedCapability,
)
from diator.retrying import PermanentError, RetryPolicy
from tests.unit.consumer.helpers import CANARY, JOIN, consume, consumer_of, on_joined, outcomes, quick
from tests.unit.doubles import (
    FULL,
    WEAK,
    Api,
    MeetingChanged,
    Noticed,
    Scripted,
    Unencodable,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


async def test_without_redelivery_it_is_retried_in_place_only_and_the_loss_is_told_and_logged(caplog):
    runs = 0

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise LookupError(CANARY)

    broker = Scripted(body_of(JOIN), b"garbage", capabilities=WEAK)
    told = await consume(broker, failing, count=2)

    assert runs == RetryPolicy().immediate_retries + 1
    assert outcomes(told) == ["given_up", "given_up"]
    assert broker.log == [("ack",), ("ack",)]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"UserJoined {JOIN.event_id} was not handled and is lost: this transport cannot")
    assert "undecodable" in second
    assert CANARY not in caplog.text


@pytest.mark.parametrize(("count", "outcome"), [("none", "dead_lettered"), ("retries", "retried")])
async def test_where_attempts_are_not_counted_it_does_not_give_back_for_ever(count, outcome):
    """Every delivery is the first one there, so nothing would end it."""

    async def failing(event: UserJoined) -> None:
        raise LookupError

    promised = Capabilities(
        delayed_retry=True, dead_letter=True, delivery_count=count, max_message_bytes=MAX_MESSAGE_BYTES
    )
    [handled] = await consume(Scripted(body_of(JOIN), capabilities=promised), failing)

    assert handled.outcome == outcome


@pytest.mark.parametrize(
    ("options", "capabilities", "lacks", "remedy"),
    [
        ({"group": "billing"}, WEAK, "distribution", "leave the group out"),
        ({"retry": RetryPolicy()}, WEAK, "delayed_retry", r"set RetryPolicy\(delayed_retries=0\)"),
        ({"requires": Capabilities(durability="crash")}, FULL, "durability", "use a transport that does"),
        ({"requires": Capabilities(ordering="key")}, WEAK, "ordering", "or ask for less"),
    ],
)
def test_what_the_transport_cannot_do_is_refused_when_wiring(options, capabilities, lacks, remedy):
    with pytest.raises(UnsupportedCapability, match=rf"^Scripted does not promise {lacks} .*{remedy}"):
        consumer_of(Scripted(capabilities=capabilities), on_joined, **options)


def test_what_the_transport_can_do_is_not():
    consumer_of(Scripted(), on_joined, group="billing", retry=RetryPolicy(), requires=FULL)
    consumer_of(Scripted(capabilities=WEAK), on_joined, retry=RetryPolicy(delayed_retries=0), requires=WEAK)


@pytest.mark.parametrize(("capabilities", "group"), [(FULL, DEFAULT_GROUP), (WEAK, None)])
async def test_without_a_group_it_has_one_where_there_are_any(capabilities, group):
    consumer, _ = consumer_of(broker := Scripted(capabilities=capabilities), on_joined)
    async with running(consumer):
        pass

    assert broker.group == group


@pytest.mark.parametrize("option", [{"concurrency": 0}, {"handler_timeout": 0}, {"drain_timeout": -1}])
def test_options_without_sense_are_refused(option):
    with pytest.raises(ConfigurationError, match="concurrency must be at least 1"):
        consumer_of(Scripted(), on_joined, **option)


def test_what_can_never_work_is_refused_when_wiring():
    async def on_noticed(event: Noticed) -> None: ...

    async def needy(event: UserJoined, api: Api) -> None: ...

    async def on_unencodable(event: Unencodable) -> None: ...

    @dataclass(frozen=True, kw_only=True)
    class Either(NotificationEvent):
        one: UserJoined | MeetingChanged

    async def on_either(event: Either) -> None: ...

    with pytest.raises(ConfigurationError, match="nothing to consume"):
        consumer_of(Scripted(), on_noticed)
    with pytest.raises(ResolutionError, match="Api is not registered"):
        consumer_of(Scripted(), needy)
    with pytest.raises(EncodingError, match="cannot be read back"):
        consumer_of(Scripted(), on_either)


@pytest.mark.parametrize("failing", ["ack", "retry", "dead_letter"])
async def test_what_cannot_be_settled_is_told_and_the_next_one_handled(failing, caplog):
    async def on_user(event: UserJoined) -> None:
        if event.user_id:
            raise LookupError if failing == "retry" else PermanentError

    bad = body_of(UserJoined(user_id=int(failing != "ack")))
    broker = Scripted(bad, body_of(MeetingChanged()), failing={failing: BrokerUnavailable("it is away")})
    told = await consume(broker, on_user, count=2, retry=quick(delayed_retries=1))

    assert (outcomes(told)[0], len(told)) == ("unsettled", 2)
    assert "could not be settled: BrokerUnavailable('it is away')" in caplog.text
    assert told[0].reason is not None


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("failing", ["ack", "retry", "dead_letter"])
async def test_what_could_not_be_settled_does_not_stop_the_queue(failing, concurrency, monkeypatch):
    """It holds its place among those that are given out, until somebody settles it or gives it back."""
    settle, failures = getattr(_Subscription, failing), [BrokerUnavailable("it is away")] * concurrency

    async def failing_first(self, delivery, *details):
        if failures:
            raise failures.pop()
        await settle(self, delivery, *details)

    async def on_user(event: UserJoined) -> None:
        if failing != "ack":
            raise LookupError if failing == "retry" else PermanentError

    monkeypatch.setattr(_Subscription, failing, failing_first)
    broker = await holding(*[UserJoined() for _ in range(3)])
    consumer, told = consumer_of(broker, on_user, concurrency=concurrency, retry=quick(delayed_retries=1))
    async with running(consumer), asyncio.timeout(0.3):
        await until(lambda: outcomes(told).count("acked" if failing == "ack" else "dead_lettered") >= 3 - concurrency)
