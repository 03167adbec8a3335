"""What a consumer does with what reaches it: handle it, settle it, go on, and stop."""

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

import diator
from diator.brokers import Message
from diator.brokers.base import Gap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES
from diator.brokers.memory import MemoryMessageBroker, _Subscription
from diator.consumer import DEFAULT_GROUP, Consumer
from diator.container import Container
from diator.events import EventEmitter, Events, NotificationEvent
from diator.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    EventHandlersFailed,
    ResolutionError,
    UnsupportedCapability,
    UsageError,
)
from diator.middlewares import BaseMiddleware
from diator.retrying import PermanentError, RetryPolicy
from tests.unit.doubles import (
    FULL,
    WEAK,
    Api,
    Greeted,
    MeetingChanged,
    Moved,
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

JOINED = Topic("notification_event", "UserJoined")
CANARY = "canary-4711"
ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)


def quick(immediate_retries=0, delayed_retries=0, **options):
    """A policy without any waiting."""
    return RetryPolicy(
        immediate_retries=immediate_retries,
        immediate_pause=0,
        delayed_retries=delayed_retries,
        first_delay=0,
        **options,
    )


async def on_joined(event: UserJoined) -> None: ...


def consumer_of(broker, *handlers, **options):
    """A consumer, and the list of what it tells of each delivery."""
    told = []
    consumer = Consumer(broker, event_map=events_of(*handlers), **{"on_handled": told.append, **options})
    return consumer, told


async def consume(broker, *handlers, count=1, **options):
    """Run a consumer until *count* deliveries were handled; what it told of them."""
    consumer, told = consumer_of(broker, *handlers, **options)
    async with running(consumer) as run:
        await until(lambda: len(told) >= count or run.done())
    return told


def outcomes(told):
    return [handled.outcome for handled in told]


async def left_in(broker, count, group=DEFAULT_GROUP, topic=JOINED):
    """What *group* has not settled: numbers of attempts."""
    async with broker.subscribe({topic}, group=group) as deliveries, asyncio.timeout(1):
        return [(await anext(deliveries)).attempt for _ in range(count)]


async def is_drained(broker, group=DEFAULT_GROUP):
    with pytest.raises(TimeoutError):
        async with broker.subscribe({JOINED}, group=group) as deliveries, asyncio.timeout(0.01):
            await anext(deliveries)
    return True


# -- to the handlers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_handlers_get_the_very_events(concurrency):
    sent, got = [UserJoined(user_id=1), MeetingChanged(title="Retro"), UserJoined(user_id=2)], []

    async def on_user(event: UserJoined) -> None:
        got.append(("first", event))

    async def also_on_user(event: UserJoined) -> None:
        got.append(("second", event))

    async def on_meeting(event: MeetingChanged) -> None:
        got.append(("first", event))

    broker = await holding(*sent)
    told = await consume(broker, on_user, also_on_user, on_meeting, count=3, concurrency=concurrency)

    assert got == [
        ("first", sent[0]),
        ("second", sent[0]),
        ("first", sent[1]),
        ("first", sent[2]),
        ("second", sent[2]),
    ]
    assert [(each.topic.message_name, each.message_id, each.attempt, each.outcome) for each in told] == [
        (type(event).__name__, event.event_id, 1, "acked") for event in sent
    ]
    assert {(each.reason, each.error) for each in told} == {(None, None)}
    assert all(0 <= each.seconds < 1 for each in told)
    assert await is_drained(broker)


async def test_subscribes_to_what_travels_and_has_a_handler():
    async def on_meeting(event: MeetingChanged) -> None: ...

    async def on_noticed(event: Noticed) -> None: ...

    consumer, _ = consumer_of(broker := Scripted(), on_joined, on_meeting, on_noticed, group="billing", concurrency=7)
    async with running(consumer):
        pass

    assert broker.topics == {JOINED, Topic("ecst_event", "MeetingChanged")}
    assert (broker.group, broker.prefetch) == ("billing", 7)


async def test_is_ready_for_what_is_sent_once_it_runs():
    broker = MemoryMessageBroker()
    consumer, told = consumer_of(broker, on_joined)
    async with running(consumer):
        await asyncio.sleep(0)
        await EventEmitter(message_broker=broker).emit(UserJoined())
        await until(lambda: told)

    assert outcomes(told) == ["acked"]


async def test_handlers_of_one_delivery_share_a_scope_that_is_closed_before_the_next():
    opened, log = 0, []

    async def make_api():
        nonlocal opened
        opened += 1
        log.append(f"open {opened}")
        yield Api()
        log.append("close")

    async def first(event: UserJoined, api: Api) -> None:
        log.append(api)

    async def second(event: UserJoined, api: Api) -> None:
        log.append(api)

    container = Container()
    container.register(Api, make_api, lifetime="scoped")
    broker = Scripted(body_of(UserJoined()), body_of(UserJoined()))
    broker.note = log.append

    await consume(broker, first, second, container=container, count=2)

    _, one, also_one, _, _, _, other, also_other, _, _ = log
    assert one is also_one is not other is also_other
    assert [each for each in log if isinstance(each, str)] == ["open 1", "close", "ack", "open 2", "close", "ack"]


async def test_middlewares_surround_the_handlers():
    log = []

    def named(name):
        async def middleware(message, handle):
            log.append(f"{name} {type(message).__name__}")
            await handle(message)
            log.append(f"{name} done")

        return middleware

    async def first(event: UserJoined) -> None:
        log.append("first")

    async def second(event: UserJoined) -> None:
        log.append("second")

    await consume(Scripted(body_of(UserJoined())), first, second, middlewares=[named("outer"), named("inner")])

    assert log == ["outer UserJoined", "inner UserJoined", "first", "second", "inner done", "outer done"]


async def test_a_middleware_that_handles_again_gets_another_scope():
    apis, closed = [], []

    async def make_api():
        try:
            yield (api := Api())
        finally:
            closed.append(api)

    async def failing_once(event: UserJoined, api: Api) -> None:
        assert api not in closed
        apis.append(api)
        if len(apis) == 1:
            raise LookupError

    async def again(message, handle):
        try:
            await handle(message)
        except LookupError:
            await handle(message)

    container = Container()
    container.register(Api, make_api, lifetime="scoped")
    broker = Scripted(body_of(JOIN))
    told = await consume(broker, failing_once, container=container, middlewares=[again], retry=ONCE)

    assert (outcomes(told), len({*apis}), closed) == (["acked"], 2, apis)


async def test_an_error_of_a_middleware_is_one_of_handling():
    class Refusing(BaseMiddleware):
        async def process_request(self, request):
            raise LookupError

    told = await consume(Scripted(body_of(UserJoined())), on_joined, middlewares=[Refusing()], retry=ONCE)

    assert told[0].reason == "retries-exhausted: LookupError"


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_acknowledges_only_when_all_handlers_are_done(concurrency):
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(event: UserJoined) -> None:
        begun.set()
        await gate.wait()

    consumer, told = consumer_of(broker := Scripted(body_of(UserJoined())), on_joined, slow, concurrency=concurrency)
    async with running(consumer):
        await begun.wait()
        await asyncio.sleep(0.005)
        assert (broker.log, told) == ([], [])
        gate.set()
        await until(lambda: told)

    assert broker.log == [("ack",)]


async def test_each_run_gets_an_event_of_its_own():
    seen = []

    @dataclass(kw_only=True)
    class Listed:
        message_type = "notification_event"
        event_id: str = "5d3a8c1e-3c4f-4e9c-9f5c-111111111111"
        items: list[int]

    async def spoiling(event: Listed) -> None:
        event.items.append(2)
        seen.append([*event.items])
        raise LookupError

    await consume(Scripted(body_of(Listed(items=[1]))), spoiling, retry=quick(immediate_retries=2))

    assert seen == [[1, 2]] * 3


# -- retrying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consumers", [1, 3])
@pytest.mark.parametrize(("immediate", "delayed"), [(0, 0), (2, 0), (0, 3), (1, 2), (2, 5)])
async def test_a_failing_message_is_handled_exactly_so_often_and_then_put_aside_once(immediate, delayed, consumers):
    runs, told = 0, []

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise LookupError(CANARY)

    broker, retry = await holding(UserJoined()), quick(immediate, delayed)
    several = [consumer_of(broker, failing, retry=retry, on_handled=told.append)[0] for _ in range(consumers)]
    tasks = [asyncio.create_task(consumer.run(signals=False)) for consumer in several]
    await until(lambda: broker.dead_letters)
    for consumer in several:
        consumer.stop()
    await asyncio.gather(*tasks)

    assert runs == (immediate + 1) * (delayed + 1)
    assert [each.attempt for each in told] == [*range(1, delayed + 2)]
    assert outcomes(told) == ["retried"] * delayed + ["dead_lettered"]
    assert {each.reason for each in told} == {"retries-exhausted: LookupError"}
    assert {type(each.error) for each in told} == {LookupError}
    [letter] = broker.dead_letters
    assert (letter.reason, letter.attempts) == ("retries-exhausted: LookupError", delayed + 1)
    assert await is_drained(broker)


async def test_what_succeeds_in_the_end_is_acknowledged():
    runs = 0

    async def failing_thrice(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        if runs <= 3:
            raise LookupError

    broker = await holding(UserJoined())
    told = await consume(broker, failing_thrice, retry=quick(immediate_retries=1, delayed_retries=5), count=2)

    assert (runs, outcomes(told), broker.dead_letters) == (4, ["retried", "acked"], [])


async def test_delays_are_the_policys():
    class Timed(Scripted):
        async def retry(self, delivery, after, /):
            self.log.append(after)

    async def failing(event: UserJoined) -> None:
        raise LookupError

    broker = Timed()
    broker.script += [broker.delivery(body_of(UserJoined()), attempt=attempt) for attempt in (1, 2)]
    await consume(broker, failing, retry=RetryPolicy(immediate_retries=0, first_delay=8, backoff_factor=4), count=2)

    first, second = broker.log
    assert 4 <= first <= 8
    assert 16 <= second <= 32


async def test_pauses_before_handling_again_in_place():
    runs = []

    async def failing(event: UserJoined) -> None:
        runs.append(asyncio.get_running_loop().time())
        raise LookupError

    await consume(
        Scripted(body_of(UserJoined())),
        failing,
        retry=RetryPolicy(immediate_retries=1, immediate_pause=0.04, delayed_retries=0),
    )

    assert 0.019 <= runs[1] - runs[0] < 0.5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermanentError(), "permanent: PermanentError"),
        (KeyError(), "permanent: KeyError"),
        (EventHandlersFailed("", [OSError(), PermanentError()]), "permanent: EventHandlersFailed"),
    ],
)
async def test_a_permanent_error_puts_aside_at_once(error, reason):
    runs = 0

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise error

    policy = quick(immediate_retries=3, delayed_retries=3, permanent=(PermanentError, LookupError))
    told = await consume(broker := await holding(UserJoined()), failing, retry=policy)

    assert (runs, outcomes(told), told[0].error) == (1, ["dead_lettered"], error)
    assert [letter.reason for letter in broker.dead_letters] == [reason]


async def test_all_handlers_run_although_one_fails_and_the_errors_name_theirs():
    runs = []

    async def first(event: UserJoined) -> None:
        runs.append("first")
        raise LookupError

    async def second(event: UserJoined) -> None:
        runs.append("second")
        raise PermanentError

    [handled] = await consume(Scripted(body_of(UserJoined())), first, second)

    assert runs == ["first", "second"]
    assert handled.reason == "permanent: EventHandlersFailed"
    one, other = handled.error.exceptions
    assert "first, which handles UserJoined" in one.__notes__[0]
    assert "second, which handles UserJoined" in other.__notes__[0]


async def cancelling(*_):
    """Wait for something that somebody cancels: a handler, or a middleware."""
    something = asyncio.get_running_loop().create_future()
    something.cancel()
    await something


@pytest.mark.parametrize("where", ["handler", "one of two", "middleware"])
async def test_a_cancellation_of_the_handlers_own_is_a_failure(where):
    runs = []

    async def on_user(event: UserJoined) -> None:
        runs.append("one")
        await cancelling()

    async def other(event: UserJoined) -> None:
        runs.append("other")

    told = await consume(
        Scripted(body_of(JOIN), body_of(JOIN)),
        *[on_user, other][: 2 if where == "one of two" else 1],
        middlewares=[cancelling] if where == "middleware" else [],
        retry=quick(immediate_retries=1),
        count=2,
    )

    assert outcomes(told) == ["dead_lettered"] * 2
    assert runs == {"handler": ["one"], "one of two": ["one", "other"], "middleware": []}[where] * 4


async def test_a_handler_that_hangs_fails_after_its_time():
    cancelled = []

    async def hanging(event: UserJoined) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(event)
            raise

    told = await consume(
        broker := await holding(UserJoined()), hanging, retry=quick(1, 1), handler_timeout=0.01, count=2
    )

    assert len(cancelled) == 4
    assert outcomes(told) == ["retried", "dead_lettered"]
    assert broker.dead_letters[0].reason == "retries-exhausted: TimeoutError"


@pytest.mark.parametrize(("attempt", "outcome"), [(4, "acked"), (5, "dead_lettered")])
async def test_a_message_that_ends_the_process_again_and_again_is_put_aside(attempt, outcome):
    runs = []

    async def counting(event: UserJoined) -> None:
        runs.append(event)

    broker = await holding(UserJoined())
    for _ in range(attempt - 1):  # a process that died
        await left_in(broker, 1)

    told = await consume(broker, counting, retry=quick(delayed_retries=1, max_crashes=2))

    assert (outcomes(told), told[0].attempt) == ([outcome], attempt)
    assert len(runs) == (outcome == "acked")
    assert all(letter.reason.startswith("poison-message: ") for letter in broker.dead_letters)


# -- what cannot be read ---------------------------------------------------------------------------------------------


class Several(Exception):
    """As some libraries for validation have it."""

    def __init__(self, text):
        super().__init__(text)
        self.errors = [text]


REFUSALS = {"lookup": LookupError, "value": ValueError, "several": Several}


@dataclass(frozen=True, kw_only=True)
class Checked(NotificationEvent):
    """An event with a mind of its own."""

    name: str

    def __post_init__(self):
        kind, _, rest = self.name.partition(" ")
        raise REFUSALS[kind](rest)


JOIN = UserJoined()
PAYLOAD = json.loads(body_of(JOIN))["payload"]
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
POISON = {
    "garbage": b"\xff\xfe\x00\x01" + CANARY.encode(),
    "text": CANARY.encode(),
    "empty": b"",
    "spaces": b"  \n",
    "cut off": body_of(JOIN, payload=PAYLOAD | {"note": CANARY})[:-9],
    "another charset": body_of(JOIN, payload=PAYLOAD | {"note": f"é {CANARY}"}).decode().encode("latin-1"),
    "UTF-16": body_of(JOIN, payload=PAYLOAD | {"note": CANARY}).decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + body_of(JOIN, payload=PAYLOAD | {"note": CANARY}),
    "deep": b"[" * 100_000,
    "deep in the payload": body_of(JOIN, payload={}).replace(b"{}", DEEP),
    "too large": body_of(JOIN, payload=PAYLOAD | {"note": CANARY * (MAX_MESSAGE_BYTES // len(CANARY))}),
    "a list": b"[]",
    "null": b"null",
    "no payload": b'{"message_type": "notification_event", "message_name": "UserJoined"}',
    "payload of text": body_of(JOIN, payload=CANARY),
    "payload is a list": body_of(JOIN, payload=[CANARY]),
    "payload is null": body_of(JOIN, payload=None),
    "no UUID": body_of(JOIN, message_id=CANARY),
    "name of another type": body_of(JOIN, message_name=[CANARY]),
    "a field is missing": body_of(Moved(), message_name="Checked", payload=PAYLOAD),
    "a field is wrong": body_of(JOIN, payload=PAYLOAD | {"user_id": CANARY}),
    "a field is null": body_of(JOIN, payload=PAYLOAD | {"user_id": None}),
    "a number is no number": body_of(JOIN, payload=PAYLOAD | {"user_id": float("nan")}),
    **{
        f"its class refuses it: {how}": body_of(JOIN, message_name="Checked", payload=PAYLOAD | {"name": how})
        for how in (
            f"lookup {CANARY}",
            f"value {CANARY}",
            f"value Expected something else, got {CANARY}",
            f"value Wrong - at {CANARY}",
            f"several {CANARY}",
        )
    },
}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("body", POISON.values(), ids=POISON)
async def test_what_cannot_be_read_is_put_aside_with_a_reason_and_shown_nowhere(body, concurrency, caplog):
    runs = []

    async def counting(event: UserJoined) -> None:
        runs.append(event)

    async def on_checked(event: Checked) -> None:
        runs.append(event)

    caplog.set_level(logging.DEBUG)
    broker = Scripted(body, body_of(JOIN))
    told = await consume(broker, counting, on_checked, count=2, concurrency=concurrency)

    (*poisoned, reason), acked = broker.log
    assert (poisoned, acked) == (["dead_letter"], ("ack",))
    assert (told[0].outcome, told[0].reason, runs) == ("dead_lettered", reason, [JOIN])
    assert reason.startswith("undecodable: ")
    assert CANARY not in reason + caplog.text
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert reason in record.getMessage()


async def test_how_large_a_message_may_be_is_the_transports_to_say():
    body = body_of(JOIN)
    small, smaller = (Capabilities(max_message_bytes=len(body) - less, dead_letter=True) for less in (0, 1))

    assert outcomes(await consume(Scripted(body, capabilities=small), on_joined)) == ["acked"]
    assert outcomes(await consume(Scripted(body, capabilities=smaller), on_joined)) == ["dead_lettered"]


@pytest.mark.parametrize(
    "envelope",
    [
        {"message_name": "UserLeft"},
        {"message_name": "userjoined"},
        {"message_type": "ecst_event"},
        {"message_name": ""},
    ],
)
async def test_a_type_that_nobody_handles_is_put_aside(envelope, caplog):
    broker = Scripted(body_of(JOIN, payload=PAYLOAD | {"note": CANARY}, **envelope), body_of(JOIN))
    told = await consume(broker, on_joined, count=2)

    (_, reason), acked = broker.log
    assert (reason.partition(":")[0], acked) == ("unknown-type", ("ack",))
    assert told[0].message_id == JOIN.event_id
    assert CANARY not in caplog.text + reason


@pytest.mark.parametrize("part", ["message_name", "message_type"])
async def test_a_strange_name_neither_breaks_nor_floods_a_log(part, caplog):
    """It is the sender's text: a line of its own would forge an entry, and a long one fills it."""
    strange = "\nERROR all is lost\x1b[2J" + "x" * 3_000

    [handled] = await consume(Scripted(body_of(JOIN, **{part: strange})), on_joined)

    assert handled.outcome == "dead_lettered"
    [record] = caplog.records
    for text in (handled.reason, record.getMessage()):
        assert not {"\n", "\x1b"} & {*text}
        assert len(text) < 1_000


async def test_a_newer_version_with_more_fields_is_read():
    broker = Scripted(body_of(JOIN, payload=PAYLOAD | {"title": "new", "more": [{}]}, version=2))

    assert outcomes(await consume(broker, on_joined)) == ["acked"]


# -- a service that can do little, or fails --------------------------------------------------------------------------


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


# -- several at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_back", [True, False])
@pytest.mark.parametrize("concurrency", [1, 5])
async def test_as_many_are_handled_at_once_as_is_allowed(concurrency, held_back):
    running_now, most = 0, 0

    async def slow(event: UserJoined) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        running_now -= 1

    broker = await holding(*[JOIN] * 40) if held_back else Scripted(*[body_of(JOIN)] * 40)
    told = await consume(broker, slow, concurrency=concurrency, count=40)

    assert (most, outcomes(told)) == (concurrency, ["acked"] * 40)


async def test_those_of_one_key_are_handled_in_order_one_after_the_other():
    now, most, handled = [], 0, []

    async def slow(event: Moved) -> None:
        nonlocal most
        assert event.room not in now
        now.append(event.room)
        most = max(most, len(now))
        for _ in range(1 + event.number % 3):
            await asyncio.sleep(0)
        now.remove(event.room)
        handled.append((event.room, event.number))

    broker = await holding(*[Moved(room="ABC"[number % 3], number=number) for number in range(60)])
    told = await consume(broker, slow, concurrency=8, count=60, retry=ONCE)

    assert outcomes(told) == ["acked"] * 60
    for room in "ABC":
        assert [number for of, number in handled if of == room] == [*range("ABC".index(room), 60, 3)]
    assert most > 1


async def test_one_key_that_waits_does_not_hold_the_others():
    gate, handled = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            await gate.wait()
        handled.append(event.number)

    rooms = "AAABBB"
    broker = await holding(*[Moved(room=room, number=number) for number, room in enumerate(rooms)])
    consumer, told = consumer_of(broker, on_moved, concurrency=4)
    async with running(consumer):
        await until(lambda: len(handled) == 3)
        assert handled == [3, 4, 5]
        gate.set()
        await until(lambda: len(told) == 6)

    assert handled == [3, 4, 5, 0, 1, 2]


async def test_the_lane_goes_on_after_a_failure():
    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            raise LookupError

    broker = await holding(*[Moved(number=number) for number in range(3)])
    told = await consume(broker, on_moved, concurrency=2, count=3, retry=ONCE)

    assert outcomes(told) == ["dead_lettered", "acked", "acked"]


async def test_messages_without_a_key_are_in_nobodys_way():
    gate, handled = asyncio.Event(), []

    async def on_user(event: UserJoined) -> None:
        if not event.user_id:
            await gate.wait()
        handled.append(event.user_id)

    broker = await holding(*[UserJoined(user_id=number) for number in range(4)])
    consumer, _ = consumer_of(broker, on_user, concurrency=2)
    async with running(consumer):
        await until(lambda: handled == [1, 2, 3])
        gate.set()


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_it_takes_no_more_than_it_can_handle_where_the_transport_does_not_hold_back(concurrency):
    """A hundred thousand messages that wait in here are memory, and lost when the process dies."""
    gate = asyncio.Event()

    async def slow(event: UserJoined) -> None:
        await gate.wait()

    broker = Scripted(*[body_of(JOIN)] * 500, capabilities=WEAK)
    consumer, _ = consumer_of(broker, slow, concurrency=concurrency)
    async with running(consumer):
        await asyncio.sleep(0.01)
        given = broker.given
        gate.set()

    assert given <= 2 * concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_backlog_does_not_keep_the_loop_from_the_rest_of_the_program(concurrency):
    """Neither handler nor transport wait here, and yet signals, health checks and timers have their turn."""
    broker = await holding(*[UserJoined() for _ in range(3_000)])
    consumer, told = consumer_of(broker, on_joined, concurrency=concurrency)
    asyncio.get_running_loop().call_later(0.005, consumer.stop)

    async with asyncio.timeout(3):
        await consumer.run(signals=False)

    assert len(told) < 3_000


@pytest.mark.parametrize(
    ("groups", "each"), [((None, None), 1), (("billing", "mailing"), 2), (("billing", "billing"), 1)]
)
async def test_several_consumers_in_one_process(groups, each):
    """Those of one group share; other groups get everything too."""
    broker, told = MemoryMessageBroker(), []
    consumers = [consumer_of(broker, on_joined, group=group, on_handled=told.append)[0] for group in groups]
    async with running(consumers[0]), running(consumers[1]):
        await asyncio.sleep(0)
        for _ in range(10):
            await EventEmitter(message_broker=broker).emit(UserJoined())
        await until(lambda: len(told) == 10 * each)

    assert outcomes(told) == ["acked"] * 10 * each


# -- what handlers raise ---------------------------------------------------------------------------------------------


async def raising(event: UserJoined, events: Events) -> None:
    events += [Noticed(), MeetingChanged()]


async def test_what_handlers_raise_is_handled_and_sent_before_the_acknowledgement():
    async def on_noticed(event: Noticed, events: Events) -> None:
        broker.log.append("noticed")
        events.append(Greeted())

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising, on_noticed)

    assert broker.log == ["noticed", ("send", "MeetingChanged"), ("ack",)]


async def test_what_handlers_raise_goes_by_the_emitter_that_is_given():
    async def on_noticed(event: Noticed) -> None: ...

    elsewhere, broker = Scripted(), Scripted(body_of(JOIN))
    await consume(broker, raising, event_emitter=EventEmitter(events_of(on_noticed), message_broker=elsewhere))

    assert (elsewhere.log, broker.log) == ([("send", "MeetingChanged")], [("ack",)])


async def test_if_sending_fails_the_delivery_is_retried():
    broker = Scripted(body_of(JOIN), failing={"send": BrokerUnavailable("it is away")})
    [handled] = await consume(broker, raising, retry=quick(immediate_retries=1, delayed_retries=1))

    assert (broker.log, handled.reason) == ([("retry",)], "retries-exhausted: BrokerUnavailable")


async def test_a_failed_handler_sends_nothing():
    async def failing(event: UserJoined) -> None:
        raise LookupError

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising, failing, retry=ONCE)

    assert [what for what, *_ in broker.log] == ["dead_letter"]


async def swallowing(message, handle):
    with contextlib.suppress(Exception):
        await handle(message)


@pytest.mark.parametrize(("middlewares", "outcome"), [([], "dead_letter"), ([swallowing], "ack")])
async def test_what_a_commit_that_failed_would_have_announced_is_not_sent(middlewares, outcome):
    """Else others act on what never happened, once more with every retry."""

    async def make_api():
        yield Api()
        raise OSError("the commit failed")

    async def storing(event: UserJoined, api: Api, events: Events) -> None:
        events.append(MeetingChanged())

    container = Container()
    container.register(Api, make_api, lifetime="scoped")
    broker = Scripted(body_of(JOIN))
    await consume(broker, storing, container=container, middlewares=middlewares, retry=ONCE)

    assert [what for what, *_ in broker.log] == [outcome]


async def test_a_middleware_that_fails_after_the_handler_keeps_its_events_back():
    class Failing(BaseMiddleware):
        async def process_response(self, response):
            raise LookupError

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising, middlewares=[Failing()], retry=ONCE)

    assert [what for what, *_ in broker.log] == ["dead_letter"]


# -- stopping --------------------------------------------------------------------------------------------------------


class Slow:
    """A handler that waits in the middle, and can be let go."""

    def __init__(self):
        self.gate, self.begun, self.done, self.cancelled = asyncio.Event(), [], [], []

    async def __call__(self, event: UserJoined) -> None:
        self.begun.append(event.user_id)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.005)  # it cleans up
            self.cancelled.append(event.user_id)
            raise
        self.done.append(event.user_id)


class Instant(Slow):
    """One that has nothing to clean up."""

    async def __call__(self, event: UserJoined) -> None:
        self.begun.append(event.user_id)
        await self.gate.wait()


async def waiting_at(slow, concurrency=1, messages=1, **options):
    """A consumer that runs, and has come to wait in *slow* with as many messages as it may."""
    broker = await holding(*[UserJoined(user_id=number) for number in range(messages)])
    consumer, told = consumer_of(broker, slow, concurrency=concurrency, **options)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: len(slow.begun) == min(concurrency, messages))
    return broker, consumer, told, run


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_stopping_lets_finish_what_runs_and_begins_nothing_new(concurrency):
    before = asyncio.all_tasks()
    broker, consumer, told, run = await waiting_at(slow := Slow(), concurrency, messages=5)

    consumer.stop()
    await asyncio.sleep(0.005)
    assert not run.done()
    slow.gate.set()
    await run

    assert asyncio.all_tasks() == before
    assert slow.begun == slow.done == [*range(concurrency)]
    assert outcomes(told) == ["acked"] * concurrency
    assert await left_in(broker, 5 - concurrency) == [1] * (5 - concurrency)


async def test_what_was_prefetched_and_not_begun_goes_back():
    gate, begun = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        begun.append(event.number)
        await gate.wait()

    broker = await holding(*[Moved(number=number) for number in range(4)])
    consumer, told = consumer_of(broker, on_moved, concurrency=3)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: begun)

    consumer.stop()
    await asyncio.sleep(0.005)
    gate.set()
    await run

    assert (begun, outcomes(told)) == ([0], ["acked"])
    assert await left_in(broker, 3, topic=Topic("notification_event", "Moved")) == [2, 2, 1]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_stops_the_consumer_is_the_last_one(concurrency):
    handled = []

    async def stopping(event: Moved) -> None:
        handled.append(event.number)
        consumer.stop()

    broker = await holding(*[Moved(number=number) for number in range(3)])
    consumer, told = consumer_of(broker, stopping, concurrency=concurrency)
    await consumer.run(signals=False)

    assert (handled, outcomes(told)) == ([0], ["acked"])


@pytest.mark.parametrize("how", ["time is over", "no time at all", "second stop"])
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_in_the_end_what_still_runs_is_cancelled_and_not_settled(concurrency, how):
    timeout = {"time is over": 0.01, "no time at all": 0.0, "second stop": 20.0}[how]
    broker, consumer, told, run = await waiting_at(slow := Slow(), concurrency, messages=2, drain_timeout=timeout)

    consumer.stop()
    if how == "second stop":
        await asyncio.sleep(0.005)
        assert not slow.cancelled
        consumer.stop()
    async with asyncio.timeout(1):
        await run

    assert sorted(slow.cancelled) == slow.begun
    assert outcomes(told) == ["unsettled"] * concurrency
    assert {each.reason for each in told} == {"cancelled"}
    assert sorted(await left_in(broker, 2)) == ([1, 2] if concurrency == 1 else [2, 2])


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_is_left_when_it_ends_is_logged(concurrency, caplog):
    _, consumer, _, run = await waiting_at(Slow(), concurrency, messages=2, drain_timeout=0)

    consumer.stop()
    await run

    assert f"stopped before {concurrency} deliver" in caplog.text


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_cancelled_from_outside_it_leaves_what_runs_unsettled(concurrency):
    before = asyncio.all_tasks()
    broker, _, told, run = await waiting_at(slow := Slow(), concurrency, messages=2)

    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    assert asyncio.all_tasks() == before
    assert sorted(slow.cancelled) == slow.begun
    assert outcomes(told) == ["unsettled"] * concurrency
    assert sorted(await left_in(broker, 2)) == ([1, 2] if concurrency == 1 else [2, 2])


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_loop_that_cancels_everything_leaves_what_runs_unsettled(concurrency):
    """As `asyncio.run` does in the end, in any order: the handlers may be cancelled before the run is."""
    before = asyncio.all_tasks()
    broker, _, told, run = await waiting_at(Instant(), concurrency, messages=2, retry=ONCE)

    for task in [*(asyncio.all_tasks() - before - {run}), run]:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    assert (outcomes(told), broker.dead_letters) == (["unsettled"] * concurrency, [])


@pytest.mark.parametrize("swallows", [False, True], ids=["turns it into an error", "swallows it"])
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_hides_the_cancellation_neither_failed_nor_keeps_it_running(concurrency, swallows):
    before, begun = asyncio.all_tasks(), []

    async def hiding(event: UserJoined) -> None:
        begun.append(event)
        if len(begun) <= concurrency:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not swallows:
                    raise LookupError from None

    broker = await holding(*[UserJoined() for _ in range(4)])
    consumer, told = consumer_of(
        broker, hiding, concurrency=concurrency, retry=quick(immediate_retries=2, delayed_retries=2)
    )
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: len(begun) == concurrency)

    run.cancel()
    ended, _ = await asyncio.wait({run}, timeout=0.2)
    for task in (left := asyncio.all_tasks() - before):
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)

    assert ended
    assert len(begun) == concurrency
    assert outcomes(told) == ["unsettled"] * concurrency or swallows


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_cancellation_that_a_handler_leaves_behind_does_not_end_the_run(concurrency):
    """Some libraries cancel the task that they run in, to have a timeout, and never take it back."""

    async def untidy(event: UserJoined) -> None:
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)

    consumer, told = consumer_of(
        broker := await holding(*[UserJoined() for _ in range(8)]), untidy, concurrency=concurrency
    )
    async with running(consumer) as run:
        await until(lambda: len(told) == 8 or run.done())
        assert not run.done()

    assert outcomes(told) == ["acked"] * 8
    assert await is_drained(broker)


async def test_a_subscription_that_is_cancelled_inside_does_not_look_like_a_stop():
    class Cancelled(Scripted):
        async def __anext__(self):
            await cancelling()

    run = asyncio.create_task(consumer_of(Cancelled(), on_joined)[0].run(signals=False))
    await asyncio.wait({run}, timeout=1)

    assert run.done()
    assert run.cancelled() or run.exception() is not None


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_what_comes_although_the_wait_was_cancelled_is_not_begun(concurrency):
    """As `asyncio.wait_for` does on Python 3.11: it has a result already, and forgets the cancellation."""

    class Late(Scripted):
        async def __anext__(self):
            if not self.script:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                self.script.append(body_of(JOIN))
            return await super().__anext__()

    consumer, told = consumer_of(broker := Late(body_of(JOIN)), on_joined, concurrency=concurrency)
    async with running(consumer):
        await until(lambda: told)

    assert (outcomes(told), broker.log, broker.given) == (["acked"], [("ack",)], 2)


class Fatal(BaseException):
    """What no handler's `except Exception` catches."""


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("when", ["running", "stopping"])
async def test_an_error_that_is_no_exception_ends_the_run_and_settles_nothing(when, concurrency):
    gate = asyncio.Event()

    async def dying(event: UserJoined) -> None:
        await gate.wait()
        raise Fatal

    broker = await holding(UserJoined())
    consumer, told = consumer_of(broker, dying, concurrency=concurrency)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: consumer.health().in_flight)
    if when == "stopping":
        consumer.stop()
        await asyncio.sleep(0.005)
    gate.set()

    with pytest.raises(Fatal):
        await run

    assert outcomes(told) == ["unsettled"]
    assert await left_in(broker, 1) == [2]


async def test_what_ended_the_run_is_told_and_is_no_cancellation():
    async def dying(event: UserJoined) -> None:
        raise Fatal

    consumer, told = consumer_of(Scripted(body_of(JOIN)), dying)
    with pytest.raises(Fatal):
        await consumer.run(signals=False)

    assert told[0].reason != "cancelled"
    assert isinstance(told[0].error, Fatal)


async def test_an_error_of_the_subscription_ends_the_run():
    class Broken(Scripted):
        async def __anext__(self):
            raise BrokerUnavailable("it is away for good")

    with pytest.raises(BrokerUnavailable, match="away for good"):
        await consumer_of(Broken(), on_joined)[0].run(signals=False)


async def test_stopped_before_it_runs_it_handles_nothing():
    consumer, told = consumer_of(broker := await holding(UserJoined()), on_joined)
    consumer.stop()

    async with asyncio.timeout(1):
        await consumer.run(signals=False)

    assert (told, await left_in(broker, 1)) == ([], [1])


async def test_stopping_ends_a_run_that_still_connects():
    class Away(Scripted):
        @contextlib.asynccontextmanager
        async def subscribe(self, topics, /, **_):
            await asyncio.Event().wait()
            yield self

    consumer, _ = consumer_of(Away(), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0.005)

    consumer.stop()
    ended, _ = await asyncio.wait({run}, timeout=0.2)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)

    assert ended


async def test_it_runs_once():
    consumer, _ = consumer_of(MemoryMessageBroker(), on_joined)
    async with running(consumer):
        with pytest.raises(UsageError, match="runs once"):
            await consumer.run(signals=False)
    with pytest.raises(UsageError, match="runs once"):
        await consumer.run(signals=False)


async def test_stopping_at_any_moment_neither_loses_nor_repeats():
    """Many runs, each stopped a little later, on one queue; every message is acknowledged by exactly one."""
    handled = []

    async def on_user(event: UserJoined) -> None:
        await asyncio.sleep(0)
        handled.append(event.user_id)

    broker = await holding(*[UserJoined(user_id=number) for number in range(200)])
    moment = 0
    while len(handled) < 200:
        moment += 1
        consumer, told = consumer_of(broker, on_user, concurrency=1 + moment % 3)
        run = asyncio.create_task(consumer.run(signals=False))
        for _ in range(moment % 40):
            await asyncio.sleep(0)
        consumer.stop()
        await run
        assert {*outcomes(told)} <= {"acked"}

    assert sorted(handled) == [*range(200)]
    assert broker.dead_letters == []


# -- in a process of its own -----------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from diator.brokers.base import Topic
from diator.consumer import Consumer
from tests.unit.doubles import UserJoined, events_of, holding

JOINED = Topic("notification_event", "UserJoined")

async def on_joined(event: UserJoined) -> None:
    print("begun", flush=True)
    await asyncio.sleep({seconds})
    {then}
    print("done", flush=True)

async def consume(broker):
    consumers = [Consumer(broker, event_map=events_of(on_joined), group=group) for group in {groups}]
    await asyncio.gather(*[consumer.run() for consumer in consumers])
    print("ended", flush=True)

async def attempts(broker):
    async with broker.subscribe({{JOINED}}, group="diator") as deliveries:
        print("attempts", [(await anext(deliveries)).attempt for _ in range(2)], flush=True)

broker = asyncio.run(holding(UserJoined(), UserJoined()))
try:
    asyncio.run(consume(broker))
finally:
    asyncio.run(attempts(broker)) if {look} else None
"""


def program(*signals, seconds=0.3, then="", groups=("diator",), look=False):
    """Run it, send it *signals* once handlers have begun; what it said, and how it ended."""
    source = PROGRAM.format(seconds=seconds, then=then, groups=groups, look=look)
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(diator.__file__).parents[1],
    ) as process:
        watchdog = threading.Timer(5, process.kill)
        watchdog.start()
        said = [process.stdout.readline()]
        for number in signals:
            process.send_signal(number)
        said += process.stdout
        errors = process.stderr.read()
        watchdog.cancel()
    return [line.strip() for line in said], errors, process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_what_runs(number):
    assert program(number) == (["begun", "done", "ended"], "", 0)


def test_a_second_signal_stops_at_once():
    said, _, code = program(signal.SIGTERM, signal.SIGINT, seconds=60, look=True)

    assert (said, code) == (["begun", "ended", "attempts [2, 1]"], 0)


def test_a_signal_stops_all_consumers_of_the_process():
    said, errors, code = program(signal.SIGTERM, groups=("diator", "other"))

    assert (said[-1], errors, code) == ("ended", "", 0)


def test_a_handler_that_exits_ends_the_process_and_its_message_comes_again():
    said, _, code = program(seconds=0, then="sys.exit(3)", look=True)

    assert (said, code) == (["begun", "attempts [2, 1]"], 3)


@pytest.mark.parametrize("in_a_thread", [False, True])
async def test_it_runs_where_there_are_no_signals_too(in_a_thread, monkeypatch):
    """On Windows a loop has none; elsewhere only that of the main thread has."""

    def no_signals(*_):
        raise NotImplementedError

    async def run():
        if not in_a_thread:
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(loop, "add_signal_handler", no_signals)
            monkeypatch.setattr(loop, "remove_signal_handler", no_signals)
        told = []
        consumer = Consumer(Scripted(body_of(JOIN)), event_map=events_of(on_joined), on_handled=told.append)
        asyncio.get_running_loop().call_later(0.01, consumer.stop)
        await consumer.run()
        return outcomes(told)

    assert await (asyncio.to_thread(asyncio.run, run()) if in_a_thread else run()) == ["acked"]


async def test_afterwards_a_signal_does_what_it_did_before():
    """However many consumers there were, and in whatever order they ended."""

    def ours(*_): ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        consumers = [consumer_of(Scripted(), on_joined)[0] for _ in range(2)]
        running = [asyncio.create_task(consumer.run()) for consumer in consumers]
        for consumer, run in zip(consumers, running, strict=True):
            await asyncio.sleep(0.01)
            assert signal.getsignal(signal.SIGTERM) is not ours
            consumer.stop()
            await run
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_without_signals_those_of_the_program_stay():
    called = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, called.set)
    try:
        async with running(consumer_of(Scripted(), on_joined)[0]):
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(1):
                await called.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


# -- what a program is told ------------------------------------------------------------------------------------------


async def test_health_tells_how_it_gets_on():
    broker = await holding(UserJoined())
    slow = Slow()
    consumer, told = consumer_of(broker, slow)
    idle = consumer.health()
    assert (idle.receiving, idle.in_flight, idle.oldest_in_flight, idle.gaps) == (False, 0, 0, 0)

    async with running(consumer):
        await until(lambda: slow.begun)
        await asyncio.sleep(0.02)
        busy = consumer.health()
        slow.gate.set()
        await until(lambda: told)
        after = consumer.health()

    assert (busy.receiving, busy.in_flight) == (True, 1)
    assert 0.02 <= busy.oldest_in_flight <= busy.since_last_progress
    assert (after.in_flight, after.oldest_in_flight) == (0, 0)
    assert after.since_last_progress < busy.since_last_progress
    assert not consumer.health().receiving


@pytest.mark.parametrize("end", ["cancelled", "failed"])
async def test_a_run_that_ended_receives_no_more(end):
    """However it ended: a probe that goes on saying yes keeps a dead process alive."""

    class Broken(Scripted):
        async def __anext__(self):
            if end == "failed":
                raise BrokerUnavailable("away")
            return await super().__anext__()

    consumer, _ = consumer_of(Broken(), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0.005)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)

    assert not consumer.health().receiving


async def test_errors_in_on_handled_are_logged_and_harmless(caplog):
    def broken(handled):
        calls.append(handled)
        raise LookupError("a metric is missing")

    calls = []
    consumer, _ = consumer_of(broker := Scripted(body_of(JOIN), body_of(JOIN)), on_joined, on_handled=broken)
    async with running(consumer):
        await until(lambda: len(calls) == 2)

    assert broker.log == [("ack",), ("ack",)]
    assert [record.getMessage() for record in caplog.records] == ["on_handled failed"] * 2
    assert "a metric is missing" in caplog.text


@pytest.mark.parametrize("breaks", [False, True])
async def test_gaps_are_counted_logged_and_told(breaks, caplog):
    def on_gap(gap):
        gaps.append(gap)
        if breaks:
            raise LookupError("a metric is missing")

    gaps, gap = [], Gap(since=datetime(2026, 1, 1, tzinfo=UTC), until=datetime.now(UTC), reason="connection lost")
    consumer, _ = consumer_of(broker := Scripted(), on_joined, on_gap=on_gap)
    async with running(consumer):
        await asyncio.sleep(0)
        broker.on_gap(gap)

    assert (gaps, consumer.health().gaps) == ([gap], 1)
    assert "messages may have been missed between 2026-01-01" in caplog.text
    assert ("on_gap failed" in caplog.text) == breaks


async def test_a_message_without_an_event_class_is_handled_too():
    """What another program sends by hand has the same wire format."""
    got = []

    async def on_user(event: UserJoined) -> None:
        got.append(event.user_id)

    broker = MemoryMessageBroker()
    consumer, told = consumer_of(broker, on_user)
    async with running(consumer):
        await asyncio.sleep(0)
        await broker.send_message(Message.create(message_name="UserJoined", payload={"user_id": 9}))
        await until(lambda: told)

    assert got == [9]
