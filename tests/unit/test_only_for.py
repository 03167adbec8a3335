"""A middleware that is limited to some messages, of a mediator and of a consumer."""

from abc import ABC
from typing import Any, Protocol

import pytest

from diator.consumer import Consumer
from diator.events import Event
from diator.exceptions import ConfigurationError
from diator.mediator import Mediator
from diator.middlewares import BaseMiddleware, Handle, LoggingMiddleware, only_for
from diator.requests import Request, RequestMap
from tests.unit.consumer.helpers import JOIN, consume, on_joined
from tests.unit.doubles import MeetingChanged, Scripted, UserJoined, body_of, events_of


class Command(Request[str]): ...


class Audited(ABC):  # noqa: B024  # a mark
    """A base class beside the tree of requests."""


class Join(Command, Audited): ...


class Leave(Command): ...


class Count(Request[str]): ...


requests = RequestMap()


@requests.handler
async def join(command: Join) -> str:
    return "joined"


@requests.handler
async def leave(command: Leave) -> str:
    return "left"


@requests.handler
async def count(query: Count) -> str:
    return "counted"


class Noting:
    """A middleware that notes its messages."""

    def __init__(self) -> None:
        self.seen: list[type] = []

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        self.seen.append(type(message))
        return await handle(message)


async def seen_of(of):
    noting, around = Noting(), Noting()
    mediator = Mediator(requests, middlewares=[around, only_for(of, noting)])
    assert [await mediator.send(each()) for each in (Join, Leave, Count)] == ["joined", "left", "counted"]
    assert around.seen == [Join, Leave, Count]
    return noting.seen


@pytest.mark.parametrize(
    ("of", "seen"),
    [
        (Join, [Join]),
        (Command, [Join, Leave]),
        (Audited, [Join]),
        (Request, [Join, Leave, Count]),
        (object, [Join, Leave, Count]),
        (Event, []),
        (lambda message: isinstance(message, (Leave, Count)), [Leave, Count]),
        (lambda message: None, []),
    ],
)
async def test_a_mediator_calls_it_for_these_messages_only(of, seen):
    assert await seen_of(of) == seen


@pytest.mark.parametrize(
    ("of", "seen"), [(UserJoined, [UserJoined]), (Event, [UserJoined, MeetingChanged]), (Request, [])]
)
async def test_a_consumer_does_so_too(of, seen):
    async def on_meeting(event: MeetingChanged) -> None: ...

    noting = Noting()
    broker = Scripted(body_of(JOIN), body_of(MeetingChanged()))
    reports = await consume(broker, on_joined, on_meeting, middlewares=[only_for(of, noting)], count=2)

    assert noting.seen == seen
    assert [each.outcome for each in reports] == ["acked"] * 2


async def test_two_limits():
    noting = Noting()
    both = only_for(Command, only_for(Audited, only_for(lambda message: True, noting)))
    mediator = Mediator(requests, middlewares=[both])
    for each in (Join, Leave, Count):
        await mediator.send(each())

    assert noting.seen == [Join]


async def test_other_messages_have_the_path_without_middlewares():
    mediator = Mediator(requests, middlewares=[only_for(Join, Noting())])

    assert mediator._dispatcher[Join].build is mediator._dispatcher[Leave].build is None  # handlers are functions
    assert mediator._dispatcher[Leave].dispatch.__qualname__ == mediator._dispatcher[Count].dispatch.__qualname__
    assert mediator._dispatcher[Leave].dispatch.__qualname__ != mediator._dispatcher[Join].dispatch.__qualname__


async def test_it_can_be_called_like_any_middleware():
    async def handle(message: object) -> str:
        return "handled"

    noting = Noting()
    limited = only_for(Join, noting)

    assert [await limited(each(), handle) for each in (Join, Leave)] == ["handled"] * 2
    assert noting.seen == [Join]


class Unchecked(Protocol):
    user_id: int


async def maybe(message: object) -> bool:
    return True


@pytest.mark.parametrize("of", [None, "Join", (Join, Leave), Join | Leave, Request[int], Unchecked, maybe])
def test_what_cannot_choose_messages_is_refused(of):
    with pytest.raises(ConfigurationError, match="only_for"):
        only_for(of, LoggingMiddleware())


@pytest.mark.parametrize("middleware", [LoggingMiddleware, None, "log"])
def test_what_is_not_a_middleware_is_refused(middleware):
    with pytest.raises(ConfigurationError, match="is not a middleware"):
        only_for(Join, middleware)


@pytest.mark.parametrize("middlewares", [[LoggingMiddleware], [None], BaseMiddleware()])
def test_a_consumer_refuses_what_is_not_a_middleware_as_a_mediator_does(middlewares):
    with pytest.raises(ConfigurationError, match="middleware"):
        Consumer(Scripted(), event_map=events_of(on_joined), middlewares=middlewares)
    with pytest.raises(ConfigurationError, match="middleware"):
        Mediator(requests, middlewares=middlewares)
