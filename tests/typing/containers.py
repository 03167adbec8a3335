"""What may be registered for what: right programs, and wrong lines with the error of each type checker."""

import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Generic, NewType, Protocol, TypeVar, assert_type

import dishka
import rodi

from diator.container import Container
from diator.container.base import Resolver
from diator.container.dishka import DishkaContainer
from diator.container.rodi import RodiContainer

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> int: ...


class Base(ABC):
    @abstractmethod
    def now(self) -> int: ...


class Made(Base):
    def now(self) -> int:
        return 1


class Duck:
    """Has the methods of `Clock` and `Base`, and derives from neither."""

    def now(self) -> int:
        return 1


class Other: ...


class Api:
    def __init__(self, url: str) -> None: ...


class FakeApi(Api): ...


class Repository(Generic[T]):
    def get(self, key: T) -> T:
        return key


class Reads(Protocol[T]):
    def get(self, key: T) -> T: ...


Port = NewType("Port", int)


def instances(container: Container, clock: Clock) -> None:
    """An instance of the class, of a subclass, or of what has the methods of a protocol."""
    container.register_instance(Api, Api("https://api"))
    container.register_instance(Api, FakeApi(""))
    container.register_instance(Base, Made())
    container.register_instance(Clock, Made())
    container.register_instance(Clock, Duck())
    container.register_instance(Clock, clock)
    container.register_instance(Port, Port(1))
    container.register_instance(str, "https://api")
    container.register_instance(float, 1)
    container.register_instance(Repository[int], Repository[int]())
    container.register_instance(Reads[int], Repository[int]())
    container.register_instance(dict[str, int], {"a": 1})

    container.register_instance(Api, Other())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Api, "https://api")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Api, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Api, FakeApi)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(FakeApi, Api(""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Base, Duck())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Base, Made)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Clock, Other())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(str, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Repository[int], Repository[str]())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Reads[int], Repository[str]())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance("Api", Api(""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register_instance(Api)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def make() -> Made:
    return Made()


async def make_later(url: str) -> Made:
    return Made()


def yields() -> Iterator[Made]:
    yield Made()


async def yields_later() -> AsyncIterator[Made]:
    yield Made()


@contextmanager
def opened() -> Generator[Made]:
    yield Made()


@asynccontextmanager
async def opened_later() -> AsyncGenerator[Made]:
    yield Made()


def connect() -> AbstractAsyncContextManager[Made]:
    return opened_later()


def returns_awaitable() -> Awaitable[Made]:
    return make_later("")


class Makes:
    async def __call__(self) -> Made:
        return Made()

    @classmethod
    async def make(cls) -> Made:
        return Made()

    async def method(self) -> Made:
        return Made()

    @staticmethod
    async def static(url: str) -> Made:
        return Made()


def factories(container: Container) -> None:
    """A factory in every form of callable, for the class, a base class or a protocol."""
    container.register(Made)
    container.register(Api, lifetime="singleton")
    container.register(Api, FakeApi)
    container.register(Made, make)
    container.register(Base, Made)
    container.register(Base, make)
    container.register(Base, lambda: Made())
    container.register(Base, lambda: make_later(""))
    container.register(Base, make_later)
    container.register(Base, returns_awaitable, lifetime="singleton")
    container.register(Base, yields)
    container.register(Base, yields_later)
    container.register(Base, opened)
    container.register(Base, opened_later, lifetime="singleton")
    container.register(Base, connect)
    container.register(Base, Makes())
    container.register(Base, Makes.make)
    container.register(Base, Makes().method)
    container.register(Base, Makes.static)
    container.register(Base, functools.partial(make))
    container.register(Base, functools.partial(make_later, "https://api"))
    container.register(Base, functools.partial(Makes()))
    container.register(Clock, Duck)
    container.register(Clock, make)
    container.register(Clock, make_later)
    container.register(Clock, yields_later)
    container.register(Clock, opened_later)
    container.register(Port, lambda: Port(1))
    container.register(Repository[int], Repository[int])

    container.register(Api, Other)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(FakeApi, Api)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, make)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, lambda: make())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, lambda: make_later(""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, make_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, returns_awaitable)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, yields)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, yields_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, opened)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, opened_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, connect)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, Makes())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, Makes.make)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, functools.partial(make))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, functools.partial(make_later, ""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Base, Duck)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Clock, Other)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.register(Api, Api(""))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    container.register(Api, lifetime="request")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    container.register("Api", FakeApi)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


async def resolve(container: Container, with_rodi: RodiContainer, with_dishka: DishkaContainer) -> None:
    """A class gives an object of it, also of a protocol or an abstract class."""
    assert_type(await container.resolve(Api), Api)
    assert_type(await container.resolve(Base), Base)
    assert_type(await container.resolve(Clock), Clock)
    assert_type(await container.resolve(Repository[int]), Repository[int])
    assert_type(await with_rodi.resolve(Base), Base)
    assert_type(await with_dishka.resolve(Clock), Clock)

    resolved: Other = await container.resolve(Api)  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    await container.resolve(Api(""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class OwnContainer:
    async def resolve(self, type_: type[T], /) -> T:
        return type_()


class ResolvesAtOnce:
    def resolve(self, type_: type[T], /) -> T:
        return type_()


def others(external: rodi.Container, provided: dishka.AsyncContainer) -> None:
    """Any object with `async def resolve` is a container."""
    container = RodiContainer()
    container.attach_external_container(external)
    resolver: Resolver = container
    resolver = DishkaContainer(provided)
    resolver = Container()
    resolver = OwnContainer()

    resolver = ResolvesAtOnce()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    resolver = external  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    DishkaContainer(external)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    container.attach_external_container(provided)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
