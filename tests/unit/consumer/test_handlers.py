"""Which handlers run for a message, and which event they receive."""

import asyncio
from dataclasses import dataclass

import pytest

from diator.brokers.base import Topic
from diator.brokers.memory import MemoryMessageBroker
from diator.container import Container
from diator.events import EventEmitter
from diator.middlewares import BaseMiddleware
from tests.unit.consumer.helpers import (
    JOIN,
    JOINED,
    ONCE,
    consume,
    consumer_of,
    is_drained,
    on_joined,
    outcomes,
    quick,
    reason_of,
)
from tests.unit.doubles import (
    Api,
    MeetingChanged,
    Noticed,
    Scripted,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_handlers_receive_equal_events(concurrency):
    sent, got = [UserJoined(user_id=1), MeetingChanged(title="Retro"), UserJoined(user_id=2)], []

    async def on_user(event: UserJoined) -> None:
        got.append(("first", event))

    async def also_on_user(event: UserJoined) -> None:
        got.append(("second", event))

    async def on_meeting(event: MeetingChanged) -> None:
        got.append(("first", event))

    broker = await holding(*sent)
    reports = await consume(broker, on_user, also_on_user, on_meeting, count=3, concurrency=concurrency)

    assert got == [
        ("first", sent[0]),
        ("second", sent[0]),
        ("first", sent[1]),
        ("first", sent[2]),
        ("second", sent[2]),
    ]
    assert [(each.topic.message_name, each.message_id, each.attempt, each.outcome) for each in reports] == [
        (type(event).__name__, event.event_id, 1, "acked") for event in sent
    ]
    assert {(each.reason, each.error) for each in reports} == {(None, None)}
    assert all(0 <= each.seconds < 1 for each in reports)
    assert await is_drained(broker)


async def test_subscribes_to_integration_events_that_have_a_handler():
    async def on_meeting(event: MeetingChanged) -> None: ...

    async def on_noticed(event: Noticed) -> None: ...

    consumer, _ = consumer_of(broker := Scripted(), on_joined, on_meeting, on_noticed, group="billing", concurrency=7)
    async with running(consumer):
        pass

    assert broker.topics == {JOINED, Topic("ecst_event", "MeetingChanged")}
    assert (broker.group, broker.prefetch) == ("billing", 7)


async def test_receives_messages_that_are_sent_once_it_runs():
    broker = MemoryMessageBroker()
    consumer, reports = consumer_of(broker, on_joined)
    async with running(consumer):
        await asyncio.sleep(0)
        await EventEmitter(message_broker=broker).emit(UserJoined())
        await until(lambda: reports)

    assert outcomes(reports) == ["acked"]


async def test_each_handler_has_a_scope_of_its_own_that_is_closed_before_the_next():
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

    apis = [each for each in log if isinstance(each, Api)]
    assert len({*map(id, apis)}) == 4
    pair = ["open 1", "close", "open 2", "close", "ack"]
    assert [each for each in log if isinstance(each, str)] == pair + [
        each.replace("1", "3").replace("2", "4") for each in pair
    ]


async def test_middlewares_surround_each_handler():
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

    before, after = ["outer UserJoined", "inner UserJoined"], ["inner done", "outer done"]
    assert log == [*before, "first", *after, *before, "second", *after]


async def test_a_middleware_that_retries_gets_another_scope():
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
    reports = await consume(broker, failing_once, container=container, middlewares=[again], retry=ONCE)

    assert (outcomes(reports), len({*apis}), closed) == (["acked"], 2, apis)


async def test_an_error_of_a_middleware_fails_the_delivery():
    class Refusing(BaseMiddleware):
        async def process_request(self, request):
            raise LookupError

    reports = await consume(Scripted(body_of(UserJoined())), on_joined, middlewares=[Refusing()], retry=ONCE)

    assert reason_of(reports[0]) == "retries-exhausted: LookupError"


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_acknowledges_only_after_the_last_handler(concurrency):
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(event: UserJoined) -> None:
        begun.set()
        await gate.wait()

    consumer, reports = consumer_of(broker := Scripted(body_of(UserJoined())), on_joined, slow, concurrency=concurrency)
    async with running(consumer):
        await begun.wait()
        await asyncio.sleep(0.005)
        assert (broker.log, reports) == ([], [])
        gate.set()
        await until(lambda: reports)

    assert broker.log == [("ack",)]


async def test_each_attempt_receives_a_new_event():
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
