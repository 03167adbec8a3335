"""A factory in every form of callable: what it returns is awaited or opened, never injected as it is."""

# ruff: noqa: PLW0108  # lambdas are what is tested

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncContextDecorator,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Protocol

import pytest

from diator.container import Container
from diator.exceptions import ResolutionError
from diator.mediator import Mediator
from tests.unit.doubles import Join, requests_of


class Connection:
    def __init__(self) -> None:
        self.open = True


class IsOpen(Protocol):
    """What cannot be asked with `isinstance`."""

    open: bool


def passes_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that copies the annotations, and returns what the function returned: a coroutine."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


async def connect() -> Connection:
    await asyncio.sleep(0)
    return Connection()


async def connect_to(url: str) -> Connection:
    return await connect()


def without_annotation():
    return connect()


def annotated_as_any() -> Any:
    return connect()


def annotated_as_awaitable() -> Awaitable[Connection]:
    return asyncio.ensure_future(connect())


def annotated_as_coroutine() -> Coroutine[Any, Any, Connection]:
    return connect()


class Pending:
    def __await__(self) -> Generator[Any, None, Connection]:
        return connect().__await__()


class Connects:
    async def __call__(self) -> Connection:
        return await connect()

    async def method(self) -> Connection:
        return await connect()

    @classmethod
    async def of_class(cls) -> Connection:
        return await connect()

    @staticmethod
    async def static() -> Connection:
        return await connect()


AWAITED = {
    "async def": connect,
    "lambda": lambda: connect(),
    "lambda that returns a task": lambda: asyncio.ensure_future(connect()),
    "lambda that returns an awaitable": lambda: Pending(),
    "without an annotation": without_annotation,
    "annotated as Any": annotated_as_any,
    "annotated as an awaitable": annotated_as_awaitable,
    "annotated as a coroutine": annotated_as_coroutine,
    "partial": functools.partial(connect_to, "url"),
    "partial with a keyword": functools.partial(connect_to, url="url"),
    "partial of a lambda": functools.partial(lambda: connect()),
    "object": Connects(),
    "partial of an object": functools.partial(Connects()),
    "method": Connects().method,
    "partial of a method": functools.partial(Connects().method),
    "class method": Connects.of_class,
    "static method": Connects.static,
    "decorated": passes_on(connect),
    "decorated lambda": passes_on(lambda: connect()),
}
PLAIN = {
    "class": Connection,
    "lambda that makes": lambda: Connection(),
    "partial of a class": functools.partial(Connection),
}


def opened() -> Iterator[Connection]:
    connection = Connection()
    yield connection
    connection.open = False


async def opened_later() -> AsyncIterator[Connection]:
    connection = await connect()
    yield connection
    connection.open = False


as_context, as_async_context = contextmanager(opened), asynccontextmanager(opened_later)


def annotated_as_iterator() -> AsyncIterator[Connection]:
    return opened_later()


def annotated_as_generator() -> AsyncGenerator[Connection, None]:
    return opened_later()


def annotated_as_context() -> AbstractContextManager[Connection]:
    return as_context()


class Opens:
    async def __call__(self) -> AsyncIterator[Connection]:
        async for connection in opened_later():
            yield connection

    @classmethod
    def of_class(cls) -> AbstractAsyncContextManager[Connection]:
        return as_async_context()


RESOURCES = {
    "generator": opened,
    "async generator": opened_later,
    "context manager": as_context,
    "async context manager": as_async_context,
    "annotated as an iterator": annotated_as_iterator,
    "annotated as a generator": annotated_as_generator,
    "annotated as a context manager": annotated_as_context,
    "object with a generator": Opens(),
    "partial of an object with a generator": functools.partial(Opens()),
    "partial of a generator": functools.partial(opened_later),
    "class method with a context manager": Opens.of_class,
    "decorated generator": passes_on(opened_later),
    "decorated context manager": passes_on(as_async_context),
    "lambda that returns a generator": lambda: opened(),
    "lambda that returns an async generator": lambda: opened_later(),
    "lambda that returns a context manager": lambda: as_context(),
    "lambda that returns an async context manager": lambda: as_async_context(),
}


async def two_of_each(command: Join, one: Connection, other: Connection):
    assert one.open
    return one, other


async def one_of_a_protocol(command: Join, connection: IsOpen):
    assert connection.open
    return connection, connection


@pytest.fixture(params=[Connection, IsOpen])
def type_(request):
    return request.param


def mediator_of(container: Container, type_: type) -> Mediator:
    return Mediator(requests_of(two_of_each if type_ is Connection else one_of_a_protocol), container)


@pytest.mark.parametrize("factory", (AWAITED | PLAIN).values(), ids=AWAITED | PLAIN)
@pytest.mark.parametrize("lifetime", [None, "transient", "scoped", "singleton"])
async def test_what_a_factory_returns_is_awaited(factory, lifetime, type_):
    container = Container()
    container.register(type_, factory, lifetime=lifetime)
    mediator = mediator_of(container, type_)

    first, second = await mediator.send(Join()), await mediator.send(Join())

    assert {type(made) for made in (*first, *second)} == {Connection}
    if type_ is Connection:
        assert (first[0] is first[1]) == (lifetime in ("scoped", "singleton"))
    assert (first[0] is second[0]) == (lifetime == "singleton")


@pytest.mark.parametrize("factory", RESOURCES.values(), ids=RESOURCES)
@pytest.mark.parametrize("lifetime", [None, "scoped", "singleton"])
async def test_a_resource_is_opened_once_and_closed(factory, lifetime, type_):
    async with Container() as container:
        container.register(type_, factory, lifetime=lifetime)
        mediator = mediator_of(container, type_)

        first, second = await mediator.send(Join()), await mediator.send(Join())

        assert first[0] is first[1]
        assert (first[0] is second[0]) == (lifetime == "singleton")
        assert first[0].open == second[0].open == (lifetime == "singleton")
    assert not first[0].open


async def test_a_resource_that_only_the_call_shows_needs_a_scope():
    container = Container()
    container.register(Connection, lambda: as_async_context())

    with pytest.raises(ResolutionError, match="Connection is scoped, and no scope is open"):
        await container.resolve(Connection)


async def test_an_object_of_the_type_is_not_awaited():
    """A pool of asyncpg, for example, can be awaited, and is what the program asks for."""
    container = Container()
    container.register(Pending, lambda: Pending())

    assert type(await container.resolve(Pending)) is Pending


async def test_an_object_that_is_its_own_context_is_not_opened():
    """A session, for example: whoever receives it decides when to open it."""

    class Session:
        open = False

        async def __aenter__(self):
            raise AssertionError

        async def __aexit__(self, *_: object):
            raise AssertionError

    container = Container()
    container.register(IsOpen, lambda: Session())

    assert type(await container.resolve(IsOpen)) is Session


@pytest.mark.parametrize("hides", [lambda make: make, lambda make: lambda: make()], ids=["plain", "hidden"])
@pytest.mark.parametrize("later", [False, True])
async def test_an_object_of_the_type_is_not_opened_even_if_contextlib_could(hides, later):
    class Lock(AsyncContextDecorator):
        async def __aenter__(self):
            raise AssertionError

        async def __aexit__(self, *_: object):
            raise AssertionError

    async def make_later():
        return Lock()

    container = Container()
    container.register(Lock, hides(make_later if later else Lock))
    async with container.scope({}) as scope:
        assert type(await scope.resolve(Lock)) is Lock


async def test_an_argument_of_a_partial_is_kept():
    """It looks like a default to `inspect`. A registered type would replace a default."""

    def make(url: str) -> list[str]:
        return [url]

    container = Container()
    container.register_instance(str, "registered")
    container.register(list, functools.partial(make, url="bound"))

    assert await container.resolve(list) == ["bound"]


async def test_a_partial_of_a_class_receives_its_other_dependencies():
    class Api:
        def __init__(self, url: str, connection: Connection) -> None:
            self.connection = connection

    container = Container()
    container.register(Connection)
    container.register(Api, functools.partial(Api, "url"))

    assert type((await container.resolve(Api)).connection) is Connection


@pytest.mark.parametrize("lifetime", [None, "singleton"])
@pytest.mark.parametrize(
    "opens", [asynccontextmanager(lambda: closing()), lambda: closing()], ids=["context", "generator"]
)
async def test_a_resource_that_a_coroutine_returns_is_opened_each_time_and_closed(opens, lifetime):
    async def opens_later():
        await asyncio.sleep(0)
        return opens()

    async with Container() as container:
        container.register(Connection, opens_later, lifetime=lifetime)
        made = []
        for _ in range(2):
            async with container.scope({}) as scope:
                made.append(await scope.resolve(Connection))
                assert made[-1].open
                assert await scope.resolve(Connection) is made[-1]
        assert (made[0] is made[1]) is (lifetime == "singleton")

    assert not any(each.open for each in made)


async def closing() -> AsyncGenerator[Connection]:
    connection = Connection()
    try:
        yield connection
    finally:
        connection.open = False


async def test_a_singleton_whose_factory_resolves_it_is_refused_and_does_not_wait_for_itself():
    class Other:
        pass

    async def connection() -> Connection:
        await container.resolve(Other)
        return Connection()

    async def other() -> Other:
        await container.resolve(Connection)
        return Other()

    container = Container()
    container.register(Connection, connection, lifetime="singleton")
    container.register(Other, other, lifetime="singleton")

    with pytest.raises(ResolutionError, match="Connection depends on itself; break the cycle"):
        await container.resolve(Connection)
