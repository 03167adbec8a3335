"""Brokers with few capabilities, and brokers that fail."""

import asyncio
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from diator._hints import described
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES
from diator.brokers.memory import MemoryMessageBroker, _Subscription
from diator.consumer import DEFAULT_GROUP, Consumer
from diator.events import EventEmitter, NotificationEvent
from diator.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    ResolutionError,
    UnsupportedCapability,
)
from diator.retrying import PermanentError, RetryPolicy
from diator.testing import Recorder
from tests.unit.consumer.helpers import CANARY, JOIN, consume, consumer_of, on_joined, outcomes, quick, reason_of
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
    events_of,
    holding,
    running,
    until,
)


async def test_without_redelivery_retries_are_immediate_and_the_loss_is_reported_and_logged(caplog):
    runs = 0

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise LookupError(CANARY)

    broker = Scripted(body_of(JOIN), b"garbage", capabilities=WEAK)
    reports = await consume(broker, failing, count=2)

    assert runs == RetryPolicy().immediate_retries + 1
    assert outcomes(reports) == ["given_up", "given_up"]
    assert broker.log == [("ack",), ("ack",)]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"UserJoined {JOIN.event_id} was not handled and is lost: this transport cannot")
    assert "undecodable" in second
    assert CANARY not in caplog.text


@pytest.mark.parametrize(("count", "outcome"), [("none", "dead_lettered"), ("retries", "retried")])
async def test_without_a_delivery_count_a_message_is_not_requeued_for_ever(count, outcome):
    """Every delivery counts as the first one there, so the retries would never end."""

    async def failing(event: UserJoined) -> None:
        raise LookupError

    promised = Capabilities(
        delayed_retry=True, dead_letter=True, delivery_count=count, max_message_bytes=MAX_MESSAGE_BYTES
    )
    [handled] = await consume(Scripted(body_of(JOIN), capabilities=promised), failing)

    assert handled.outcome == outcome


@pytest.mark.parametrize("retry", [None, RetryPolicy(delayed_retries=0)])
async def test_without_delayed_retries_a_message_has_one_attempt_and_those_of_crashes(retry):
    broker = Scripted(capabilities=replace(FULL, delayed_retry=False))
    attempts = [1, 2, 1 + RetryPolicy().max_crashes, 2 + RetryPolicy().max_crashes, 10]
    broker.script.extend(broker.delivery(body_of(JOIN), attempt=attempt) for attempt in attempts)
    reports = await consume(broker, on_joined, count=len(attempts), retry=retry)

    assert {each.attempt: each.outcome for each in reports} == dict(
        zip(attempts, ["acked"] * 3 + ["dead_lettered"] * 2, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "capabilities", "lacks", "needs"),
    [
        (
            {"group": "billing"},
            WEAK,
            "distribution",
            (
                "Consumer(group='billing') needs; leave the group out, then every consumer receives every message, or "
                "use a transport with consumer groups"
            ),
        ),
        (
            {"retry": RetryPolicy()},
            WEAK,
            "delayed_retry",
            (
                "RetryPolicy(delayed_retries=…) needs; set RetryPolicy(delayed_retries=0), or use a transport that can "
                "requeue a message with a delay"
            ),
        ),
        (
            {"requires": Capabilities(durability="crash")},
            FULL,
            "durability",
            "Consumer(requires=…) needs; use a transport that does, or ask for less",
        ),
    ],
)
def test_an_option_that_the_transport_cannot_support_is_refused_at_construction(options, capabilities, lacks, needs):
    with pytest.raises(UnsupportedCapability) as refused:
        consumer_of(Scripted(capabilities=capabilities), on_joined, **options)

    assert str(refused.value).startswith(f"Scripted does not promise {lacks} (")
    assert str(refused.value).endswith(f"), which {needs}")


def test_options_that_the_transport_supports_are_accepted():
    consumer_of(Scripted(), on_joined, group="billing", retry=RetryPolicy(), requires=FULL)
    consumer_of(Scripted(capabilities=WEAK), on_joined, retry=RetryPolicy(delayed_retries=0), requires=WEAK)


@pytest.mark.parametrize(("capabilities", "group"), [(FULL, DEFAULT_GROUP), (WEAK, None)])
async def test_there_is_a_default_group_where_the_transport_has_groups(capabilities, group):
    consumer, _ = consumer_of(broker := Scripted(capabilities=capabilities), on_joined)
    async with running(consumer):
        pass

    assert broker.group == group


def test_options_at_their_limits_are_accepted():
    consumer_of(Scripted(), on_joined, concurrency=1, prefetch=1, handler_timeout=0.001, drain_timeout=0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("broker", "redis://localhost"),
        ("broker", Recorder()),
        ("broker", SimpleNamespace(subscribe=MemoryMessageBroker().subscribe)),
        ("broker", MemoryMessageBroker),
        ("event_map", None),
        ("event_map", [on_joined]),
        ("container", UserJoined()),
        ("event_emitter", Recorder()),
        ("event_emitter", []),
        ("retry", "3"),
        ("requires", {"at_least_once"}),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(name, wrong):
    arguments = {"broker": Scripted(), "event_map": events_of(on_joined), "event_emitter": EventEmitter(), name: wrong}

    with pytest.raises(ConfigurationError, match=f"^{name} must be .* {described(wrong)}"):
        Consumer(**arguments)


def test_handlers_that_can_never_work_are_refused_at_construction():
    async def on_noticed(event: Noticed) -> None: ...

    async def needy(event: UserJoined, api: Api) -> None: ...

    async def needy_inside(event: Noticed, api: Api) -> None: ...

    async def on_unencodable(event: Unencodable) -> None: ...

    @dataclass(frozen=True, kw_only=True)
    class Either(NotificationEvent):
        one: UserJoined | MeetingChanged

    async def on_either(event: Either) -> None: ...

    with pytest.raises(ConfigurationError, match="nothing to consume"):
        consumer_of(Scripted(), on_noticed)
    with pytest.raises(ResolutionError, match="Api is not registered"):
        consumer_of(Scripted(), needy)
    with pytest.raises(ResolutionError, match="Api is not registered"):
        consumer_of(Scripted(), on_joined, needy_inside)
    with pytest.raises(ConfigurationError, match=r"Either\.one cannot travel: it cannot be read back"):
        consumer_of(Scripted(), on_either)


@pytest.mark.parametrize("failing", ["ack", "retry", "dead_letter"])
async def test_a_failure_to_settle_is_reported_and_the_next_delivery_is_handled(failing, caplog):
    async def on_user(event: UserJoined) -> None:
        if event.user_id:
            raise LookupError if failing == "retry" else PermanentError

    bad = body_of(UserJoined(user_id=int(failing != "ack")))
    broker = Scripted(bad, body_of(MeetingChanged()), failing={failing: BrokerUnavailable("it is away")})
    reports = await consume(broker, on_user, count=2, retry=quick(delayed_retries=1))

    assert (outcomes(reports)[0], len(reports)) == ("unsettled", 2)
    assert "could not be settled: BrokerUnavailable('it is away')" in caplog.text
    why = {"retry": " (failed: LookupError)", "dead_letter": " (permanent: PermanentError)"}.get(failing, "")
    assert reason_of(reports[0]) == f"not settled: BrokerUnavailable{why}"


async def test_the_pauses_between_attempts_to_settle_grow():
    """A short failure of the service costs no redelivery."""
    attempts = []

    class Away(Scripted):
        async def ack(self, delivery, /):
            attempts.append(asyncio.get_running_loop().time())
            if len(attempts) < 3:
                raise BrokerUnavailable("it is away")

    reports = await consume(Away(body_of(UserJoined())), on_joined)

    assert outcomes(reports) == ["acked"]
    assert [later - earlier for earlier, later in pairwise(attempts)] == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("failing", ["ack", "retry", "dead_letter"])
async def test_an_unsettled_delivery_does_not_stop_the_queue(failing, concurrency, monkeypatch):
    """It counts as in flight until it is settled or requeued."""
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
    consumer, reports = consumer_of(broker, on_user, concurrency=concurrency, retry=quick(delayed_retries=1))
    async with running(consumer), asyncio.timeout(0.3):
        await until(
            lambda: outcomes(reports).count("acked" if failing == "ack" else "dead_lettered") >= 3 - concurrency
        )
