"""Errors of handlers whose classes refuse attributes or have broken methods: none is replaced, none stops a handler."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from traceback import extract_tb

import attrs
import pydantic
import pytest

from diator.container import Container
from diator.events import EventHandler, Events
from diator.exceptions import EventHandlersFailed
from diator.retrying import RetryPolicy
from tests.unit.consumer.helpers import consume
from tests.unit.doubles import Api, Join, Noticed, Scripted, UserJoined, body_of, mediator_of


@dataclass(frozen=True)
class Frozen(Exception):
    code: int = 3


@dataclass(frozen=True, slots=True)
class FrozenWithSlots(Exception):
    code: int = 3


@attrs.frozen
class FrozenByAttrs(Exception):
    code: int = 3


class Slots(Exception):
    __slots__ = ("code",)


class Sealed(Exception):
    def __setattr__(self, name, value):
        raise TypeError("sealed")


class SealedNotes(Exception):
    def add_note(self, note):
        raise RuntimeError("no notes, please")


class NotesOfAnotherType(Exception):
    def __init__(self):
        self.__notes__ = ("earlier",)


class NoNotes(Exception):
    add_note = None
    __notes__ = property(lambda self: [])


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Incomparable(Exception):
    def __eq__(self, other):
        raise RuntimeError("not comparable")

    __hash__ = None


class Untrue(Exception):
    def __bool__(self):
        raise RuntimeError("neither true nor false")


class Empty(Exception):
    def __len__(self):
        return 0


class Invalid(pydantic.BaseModel):
    number: int


def invalid():
    with pytest.raises(pydantic.ValidationError) as caught:
        Invalid(number="x")
    return caught.value


MAKE = {
    **{
        each.__name__: each
        for each in (Frozen, FrozenWithSlots, FrozenByAttrs, Slots, Sealed, SealedNotes, NotesOfAnotherType, NoNotes)
    },
    **{each.__name__: each for each in (Unprintable, Incomparable, Untrue, Empty)},
    "group": lambda: ExceptionGroup("several", [Frozen(), Unprintable()]),
    "pydantic": invalid,
}


@pytest.fixture(params=MAKE)
def error(request):
    return MAKE[request.param]()


def has_note(error, name):
    return type(error) is NoNotes or any(name in note for note in error.__notes__)


async def test_handlers_of_domain_events_all_run(error):
    ran = []

    class Fails(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None:
            raise error

    async def fails(event: Noticed) -> None:
        raise error

    async def succeeds(event: Noticed) -> None:
        ran.append(event)

    async def join(command: Join, events: Events) -> str:
        events.append(Noticed())
        return "joined"

    with pytest.raises(EventHandlersFailed) as caught:
        await mediator_of(join, on_events=[Fails, fails, succeeds]).send(Join())

    first, second = caught.value.exceptions
    assert first is error
    assert second is error
    assert has_note(error, "Fails")
    assert has_note(error, "fails")
    assert len(ran) == 1


async def test_handlers_of_a_message_all_run_and_permanent_matches(error):
    ran = []

    async def fails(event: UserJoined) -> None:
        raise error

    async def succeeds(event: UserJoined) -> None:
        ran.append(event)

    [handled] = await consume(
        Scripted(body_of(UserJoined())),
        *(fails, succeeds),
        retry=RetryPolicy(permanent=(type(error), Frozen, Unprintable)),
    )

    assert (handled.outcome, len(ran)) == ("dead_lettered", 1)
    assert handled.reason.startswith("permanent: ")
    assert handled.error.exceptions[0] is error
    assert has_note(error, "fails")


@pytest.mark.parametrize("kind", ["class", "function"])
async def test_the_error_of_the_only_handler_of_a_message_is_judged(error, kind):
    class Fails(EventHandler[UserJoined]):
        async def handle(self, event: UserJoined) -> None:
            raise error

    async def fails(event: UserJoined) -> None:
        raise error

    [handled] = await consume(
        Scripted(body_of(UserJoined())),
        Fails if kind == "class" else fails,
        retry=RetryPolicy(permanent=(type(error), Frozen, Unprintable)),
    )

    assert handled.outcome == "dead_lettered"
    assert handled.error is error
    assert has_note(error, "ails")


# -- in a unit of work with resources ----------------------------------------------------------------------------


def resources_of(closed):
    """Return one resource of each form. Each records the error that it received at its end."""

    async def agen() -> AsyncIterator[Api]:
        try:
            yield Api()
        except BaseException as received:
            closed.append(received)
            raise

    def gen() -> Iterator[Api]:
        try:
            yield Api()
        except BaseException as received:
            closed.append(received)
            raise

    async def nested() -> AsyncIterator[Api]:
        async with asynccontextmanager(agen)() as api:
            yield api

    return {
        "async generator": agen,
        "generator": gen,
        "async context manager": asynccontextmanager(agen),
        "context manager": contextmanager(gen),
        "nested": nested,
    }


@pytest.mark.parametrize("form", resources_of([]))
async def test_a_request_fails_with_the_error_of_its_handler(error, form):
    closed = []
    container = Container()
    container.register(Api, resources_of(closed)[form])

    async def join(command: Join, api: Api) -> str:
        raise error

    with pytest.raises(type(error)) as caught:
        await mediator_of(join, container=container).send(Join())

    assert caught.value is error
    assert len(closed) == 1
    assert closed[0] is error


@pytest.mark.parametrize("form", resources_of([]))
async def test_an_error_at_the_end_of_the_unit_of_work_reaches_the_other_resources_and_the_caller(error, form):
    closed = []
    container = Container()
    container.register(Api, resources_of(closed)[form])

    async def session(api: Api) -> AsyncIterator[list[int]]:
        yield []
        raise error  # as a commit that fails

    container.register(list, session)

    async def join(command: Join, session: list) -> str:
        return "joined"

    with pytest.raises(type(error)) as caught:
        await mediator_of(join, container=container).send(Join())

    assert caught.value is error
    assert len(closed) == 1
    assert closed[0] is error


async def test_an_error_of_closing_is_raised_and_the_one_before_keeps_its_traceback():
    container = Container()

    async def session() -> AsyncIterator[Api]:
        try:
            yield Api()
        finally:
            raise OSError("the connection is lost")

    container.register(Api, session)

    async def join(command: Join, api: Api) -> str:
        raise LookupError

    with pytest.raises(OSError, match="lost") as caught:
        await mediator_of(join, container=container).send(Join())

    before = caught.value.__context__
    assert type(before) is LookupError
    assert extract_tb(before.__traceback__)[-1].name == "join"


async def test_an_error_of_closing_is_raised_even_after_a_frozen_one():
    """Only what `contextlib` raises because the first error is frozen is left out."""
    container = Container()

    async def session() -> AsyncIterator[Api]:
        try:
            yield Api()
        finally:
            raise AttributeError("the session has no method rolback")

    container.register(Api, session)

    async def join(command: Join, api: Api) -> str:
        raise Frozen

    with pytest.raises(AttributeError, match="rolback") as caught:
        await mediator_of(join, container=container).send(Join())

    assert type(caught.value.__context__) is Frozen
