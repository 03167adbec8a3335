"""Several handlers of one event: what one of them comes to does not change what the others do."""

import asyncio
import logging

import pytest

from diator.container import Container
from diator.events import EventHandler, Events
from diator.exceptions import EventHandlersFailed
from diator.middlewares import LoggingMiddleware
from diator.retrying import PermanentError
from tests.unit.consumer.helpers import JOIN, ONCE, consume, outcomes, quick, reason_of
from tests.unit.doubles import Api, MeetingChanged, Noticed, Scripted, UserJoined, body_of, holding


class Handlers:
    """Handlers that succeed, or fail with the errors that a test scripts, and count their calls."""

    def __init__(self, **errors):
        self.calls = []
        self.handlers = [self._handler(name, [*script]) for name, script in errors.items()]

    def _handler(self, name, script):
        async def handler(event: UserJoined, events: Events) -> None:
            self.calls.append(name)
            if script and (error := script.pop(0) if len(script) > 1 else script[0]):
                raise error

        handler.__qualname__ = name
        return handler


@pytest.mark.parametrize("middlewares", [[], [LoggingMiddleware()]], ids=["alone", "with a middleware"])
async def test_an_immediate_retry_calls_only_the_handlers_that_failed(middlewares):
    several = Handlers(mail=[], books=[LookupError(), LookupError(), None], stock=[OSError(), None])
    [handled] = await consume(
        Scripted(body_of(JOIN)), *several.handlers, middlewares=middlewares, retry=quick(immediate_retries=3)
    )

    assert several.calls == ["mail", "books", "stock", "books", "stock", "books"]
    assert (handled.outcome, handled.error, handled.retries) == ("acked", None, 2)
    assert [type(error) for error in handled.errors] == [LookupError, OSError, LookupError]


async def test_no_line_says_that_a_message_succeeded_of_which_only_one_handler_did(caplog):
    caplog.set_level("INFO")
    several = Handlers(books=[LookupError(), None], limit=[PermanentError()])

    [handled] = await consume(Scripted(body_of(JOIN)), *several.handlers, retry=quick(immediate_retries=1))

    assert (handled.outcome, [type(error) for error in handled.errors]) == (
        "dead_lettered",
        [LookupError, PermanentError],
    )
    assert [line.levelname for line in caplog.records if str(JOIN.event_id) in line.getMessage()] == ["ERROR"]


async def test_a_handler_that_succeeded_keeps_its_work_if_another_one_fails():
    """Its scope has committed, so it need not run again; one transaction for all of them would have rolled back."""
    log, gone = [], [LookupError(), None]

    async def make_api():
        log.append("begin")
        try:
            yield Api()
        except LookupError:
            log.append("rollback")
            raise
        log.append("commit")

    async def mail(event: UserJoined, api: Api) -> None:
        log.append("mail")

    async def books(event: UserJoined, api: Api) -> None:
        log.append("books")
        if error := gone.pop(0):
            raise error

    container = Container()
    container.register(Api, make_api, lifetime="scoped")
    broker = Scripted(body_of(JOIN))
    await consume(broker, mail, books, container=container, retry=quick(immediate_retries=1))

    assert log == [*("begin", "mail", "commit"), *("begin", "books", "rollback"), *("begin", "books", "commit")]
    assert broker.log == [("ack",)]


class Telling(EventHandler[UserJoined]):
    async def handle(self, event: UserJoined) -> None:
        self.events.append(MeetingChanged())


async def test_the_events_of_a_handler_that_succeeded_are_sent_once_although_another_one_fails():
    async def also_telling(event: UserJoined, events: Events) -> None:
        events.append(Noticed())
        events.append(MeetingChanged())

    several = Handlers(books=[LookupError()])
    broker = Scripted(body_of(JOIN))
    await consume(broker, Telling, *several.handlers, also_telling, retry=quick(immediate_retries=2))

    assert broker.log[:2] == [("send", "MeetingChanged")] * 2
    assert [what for what, *_ in broker.log] == ["send", "send", "dead_letter"]


@pytest.mark.parametrize("order", [1, -1])
async def test_a_permanent_error_of_one_handler_does_not_end_the_retries_of_another(order):
    several = Handlers(books=[ConnectionError()], mail=[PermanentError()])
    broker = await holding(JOIN)
    reports = await consume(broker, *several.handlers[::order], retry=quick(2, 5), count=6)

    assert (several.calls.count("books"), several.calls.count("mail")) == (18, 6)
    assert outcomes(reports) == ["retried"] * 5 + ["dead_lettered"]
    both = ["ConnectionError in books", "PermanentError in mail"][::order]
    assert reports[0].reason == f"failed: {', '.join(both)}"
    assert broker.dead_letters[0].reason == f"retries-exhausted: {', '.join(both)}"
    assert isinstance(reports[-1].error, EventHandlersFailed)


async def test_a_message_whose_other_handlers_succeed_at_last_is_dead_lettered_as_permanent():
    several = Handlers(books=[ConnectionError(), None], mail=[PermanentError()])
    [handled] = await consume(Scripted(body_of(JOIN)), *several.handlers, retry=quick(2, 5))

    assert several.calls == ["books", "mail", "books"]
    assert handled.reason == "permanent: PermanentError in mail"
    assert [type(error) for error in handled.error.exceptions] == [PermanentError]
    assert (handled.retries, len(handled.errors)) == (1, 2)


async def test_a_message_is_permanent_at_once_if_every_failing_handler_is():
    several = Handlers(books=[PermanentError()], mail=[], stock=[KeyError()])
    [handled] = await consume(
        Scripted(body_of(JOIN)), *several.handlers, retry=quick(2, 5, permanent=(PermanentError, KeyError))
    )

    assert several.calls == ["books", "mail", "stock"]
    assert handled.reason == "permanent: PermanentError in books, KeyError in stock"


@pytest.mark.usefixtures("loop_clock")
async def test_a_handler_that_hangs_takes_no_time_of_another():
    async def hanging(event: UserJoined) -> None:
        await asyncio.Event().wait()

    async def slow(event: UserJoined) -> None:
        await asyncio.sleep(0.8)

    [handled] = await consume(Scripted(body_of(JOIN)), hanging, slow, retry=ONCE, handler_timeout=1)

    assert reason_of(handled) == "retries-exhausted: TimeoutError"
    assert "hanging" in handled.reason
    assert "slow" not in handled.reason


async def test_the_log_names_the_handlers_that_failed(caplog):
    caplog.set_level(logging.INFO)
    several = Handlers(books=[ConnectionError("secret")], mail=[])
    await consume(await holding(JOIN), *several.handlers, retry=quick(delayed_retries=1), count=2)

    retried, dead = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        retried.getMessage()
        == f"UserJoined {JOIN.event_id} failed (ConnectionError in books); requeued for attempt 2 of 2"
    )
    assert dead.getMessage().endswith("dead-lettered (retries-exhausted: ConnectionError in books)")
    assert {retried.name, dead.name} == {"diator.consumer"}
    assert "secret" not in caplog.text


async def test_the_errors_in_a_group_are_named_too():
    several = Handlers(books=[ExceptionGroup("several", [OSError(), ExceptionGroup("", [KeyError(), OSError()])])])
    [handled] = await consume(Scripted(body_of(JOIN)), *several.handlers, retry=ONCE)

    assert handled.reason == "retries-exhausted: ExceptionGroup (OSError, ExceptionGroup (KeyError, OSError)) in books"
