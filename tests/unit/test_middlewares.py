"""Middlewares: their order, retries, responses of their own, the two hooks, the log."""

import asyncio
import logging

import pytest

from diator.events import Events
from diator.middlewares import BaseMiddleware, LoggingMiddleware
from diator.requests import RequestHandler
from tests.records import handle_once
from tests.unit.doubles import Join, Noticed, Recorder, UserJoined, mediator_of


async def join(command: Join, raised: Events) -> str:
    raised.append(UserJoined(user_id=command.user_id))
    return f"user {command.user_id}"


@pytest.mark.parametrize("count", range(9))
async def test_the_first_is_outermost(count):
    steps = []

    def middleware(number):
        async def call(message, handle):
            steps.append(number)
            response = await handle(message)
            steps.append(-number)
            return f"{response} {number}"

        return call

    numbers = [*range(1, count + 1)]
    mediator = mediator_of(join, message_broker=Recorder(), middlewares=map(middleware, numbers))

    answer = await mediator.send(Join())

    assert steps == [*numbers, *(-number for number in reversed(numbers))]
    assert answer == " ".join(["user 1", *map(str, reversed(numbers))])


async def test_middlewares_may_be_none():
    """As older programs may pass it."""
    broker = Recorder()

    assert await mediator_of(join, message_broker=broker, middlewares=None).send(Join(user_id=7)) == "user 7"


async def test_the_handler_is_built_inside_the_middlewares():
    steps = []

    class JoinHandler(RequestHandler[Join, str]):
        def __init__(self):
            steps.append("built")

        async def handle(self, request: Join) -> str:
            return ""

    async def look(message, handle):
        steps.append("middleware")
        return await handle(message)

    await mediator_of(JoinHandler, middlewares=[look]).send(Join())

    assert steps == ["middleware", "built"]


async def test_a_middleware_may_pass_on_another_message():
    async def rename(message, handle):
        return await handle(Join(user_id=message.user_id + 1))

    mediator = mediator_of(join, message_broker=Recorder(), middlewares=[rename])

    assert await mediator.send(Join(user_id=7)) == "user 8"


async def test_a_middleware_may_return_its_own_response():
    broker = Recorder()

    async def cached(message, handle):
        return "cached"

    answer = await mediator_of(join, message_broker=broker, middlewares=[cached]).send(Join())

    assert (answer, broker.sent) == ("cached", [])


class Flaky:
    """A handler that raises an event in each call; the event handler fails in the calls in *failures*."""

    def __init__(self, failures):
        self.attempts = 0
        self.failures = failures

    def attempt(self):
        self.attempts += 1
        return [UserJoined(user_id=self.attempts), Noticed()]

    async def on_noticed(self, event: Noticed) -> None:
        if self.attempts in self.failures:
            raise TimeoutError


def as_function(flaky):
    async def join(command: Join, raised: Events) -> str:
        raised += flaky.attempt()
        return ""

    return join


def as_class(flaky):
    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.extend(flaky.attempt())
            return ""

    return JoinHandler


@pytest.fixture(params=[as_function, as_class], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


async def twice(message, handle):
    try:
        return await handle(message)
    except* TimeoutError:
        pass
    return await handle(message)


async def test_a_retry_does_not_send_the_events_of_the_first_attempt(kind):
    flaky, broker = Flaky(failures={1}), Recorder()
    mediator = mediator_of(kind(flaky), on_events=[flaky.on_noticed], message_broker=broker, middlewares=[twice])

    await mediator.send(Join())

    assert [message.payload["user_id"] for message in broker.sent] == [2]


async def test_only_the_events_of_the_last_call_are_sent(kind):
    """A handler that is called twice, with success both times, sends its events once."""
    flaky, broker = Flaky(failures=()), Recorder()

    async def again(message, handle):
        await handle(message)
        return await handle(message)

    await mediator_of(kind(flaky), message_broker=broker, middlewares=[again]).send(Join())

    assert [message.payload["user_id"] for message in broker.sent] == [2]


async def test_after_a_swallowed_error_nothing_is_sent(kind):
    """The second attempt fails, and a middleware returns a response: the events of the first are not sent."""
    flaky, broker = Flaky(failures={2}), Recorder()

    async def apologise(message, handle):
        await handle(message)
        try:
            return await handle(message)
        except* TimeoutError:
            pass
        return "sorry"

    mediator = mediator_of(kind(flaky), on_events=[flaky.on_noticed], message_broker=broker, middlewares=[apologise])

    assert (await mediator.send(Join()), broker.sent) == ("sorry", [])


async def test_an_error_after_the_handler_sends_nothing():
    broker, boom = Recorder(), RuntimeError("the commit failed")

    async def commit(message, handle):
        await handle(message)
        raise boom

    with pytest.raises(RuntimeError) as caught:
        await mediator_of(join, message_broker=broker, middlewares=[commit]).send(Join())

    assert caught.value is boom
    assert broker.sent == []


# -- two hooks -------------------------------------------------------------------------------------------------------


class Hooks(BaseMiddleware):
    def __init__(self):
        self.seen = []

    async def process_request(self, request):
        self.seen.append(request)

    async def process_response(self, response):
        self.seen.append(response)


async def test_the_hooks_see_the_request_and_the_response():
    hooks = Hooks()

    await mediator_of(join, message_broker=Recorder(), middlewares=[hooks]).send(Join(user_id=7))

    assert hooks.seen == [Join(user_id=7), "user 7"]


async def test_a_hook_that_is_not_overridden_does_nothing():
    mediator = mediator_of(join, message_broker=Recorder(), middlewares=[BaseMiddleware()])

    assert await mediator.send(Join(user_id=7)) == "user 7"


async def test_after_an_error_of_the_first_hook_the_handler_is_not_called():
    class Refusing(BaseMiddleware):
        async def process_request(self, request):
            raise PermissionError

    broker = Recorder()

    with pytest.raises(PermissionError):
        await mediator_of(join, message_broker=broker, middlewares=[Refusing()]).send(Join())

    assert broker.sent == []


async def test_the_second_hook_is_not_called_after_an_error():
    async def refuse(command: Join) -> str:
        raise PermissionError

    hooks = Hooks()

    with pytest.raises(PermissionError):
        await mediator_of(refuse, middlewares=[hooks]).send(Join())

    assert hooks.seen == [Join()]


# -- the log ---------------------------------------------------------------------------------------------------------


async def test_logs_success_without_the_content(caplog):
    caplog.set_level(logging.DEBUG, "diator")
    mediator = mediator_of(join, message_broker=Recorder(), middlewares=[LoggingMiddleware()])

    await mediator.send(Join(user_id=4711))

    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage().startswith("Join handled in ")
    assert (record.type_name, record.error_type) == ("Join", None)
    assert record.message_id is record.correlation_id is None
    assert "4711" not in caplog.text


@pytest.mark.parametrize("error", [ValueError("password"), asyncio.CancelledError("password")])
async def test_logs_failure_without_the_content(caplog, error):
    async def fail(command: Join) -> str:
        raise error

    logger = logging.getLogger("program")

    with pytest.raises(type(error)):
        await mediator_of(fail, middlewares=[LoggingMiddleware(logger)]).send(Join(user_id=4711))

    [record] = caplog.records
    assert (record.name, record.levelno) == ("program", logging.WARNING)
    assert record.getMessage().startswith(f"Join failed with {type(error).__name__} after ")
    assert (record.type_name, record.error_type) == ("Join", type(error).__name__)
    assert 0 <= record.seconds < 60
    assert "4711" not in caplog.text
    assert "password" not in caplog.text


@pytest.mark.parametrize("fails", [False, True])
async def test_a_line_about_a_message_of_a_consumer_says_which_one(caplog, fails):
    async def welcome(event: UserJoined) -> None:
        if fails:
            raise ValueError

    caplog.set_level(logging.DEBUG, "diator.middlewares")
    await handle_once(event := UserJoined(user_id=7), welcome)

    [record] = [each for each in caplog.records if each.name == "diator.middlewares.logging"]
    assert (record.message_id, record.correlation_id) == (str(event.event_id), "order-7")
    assert (record.attempt, record.group) == (1, "greeters")
