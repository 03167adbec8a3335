"""The response of `Mediator.send`: right programs, and wrong lines with the error of each type checker."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, assert_type

from diator.mediator import Mediator
from diator.requests import Request, RequestHandler
from diator.response import Response

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Link(Response):
    url: str


class SecretLink(Link): ...


@dataclass(frozen=True, kw_only=True)
class ReadLink(Request[Link]):
    meeting_id: int


class Count(Request[int]): ...


class CountMore(Count): ...


class ListLinks(Request[list[Link]]): ...


class FindLink(Request[Link | None]): ...


class FindLinks(Request[list[Link] | None]): ...


class ReadTitles(Request[dict[str, str]]): ...


@dataclass
class Join(Request[None]):
    user_id: int


@dataclass
class Repeat(Request[list[T]], Generic[T]):
    item: T


class Bare(Request): ...


class OfNobody: ...


class Sender(Protocol):
    """What a program may declare instead of `Mediator`."""

    async def send(self, request: Request[T], /) -> T: ...


def takes_text(text: str) -> None: ...


def takes_link(link: Link) -> None: ...


def takes_sender(sender: Sender) -> None: ...


def same(value: T) -> T:
    return value


async def known(mediator: Mediator) -> None:
    """The response has the type that the request names."""
    assert_type(await mediator.send(ReadLink(meeting_id=1)), Link)
    assert_type(await mediator.send(Count()), int)
    assert_type(await mediator.send(CountMore()), int)
    assert_type(await mediator.send(ListLinks()), list[Link])
    assert_type(await mediator.send(FindLink()), Link | None)
    assert_type(await mediator.send(Repeat(1)), list[int])
    assert_type(await mediator.send(Bare()), Any)
    assert_type(await mediator.send(OfNobody()), Any)
    assert_type(await mediator.send("any class"), Any)
    # By way of `gather`, because mypy refuses to look at a None that is awaited.
    assert_type(await asyncio.gather(mediator.send(Join(user_id=1)), mediator.send(Count())), tuple[None, int])
    takes_sender(mediator)


async def used(mediator: Mediator, either: Request[int] | Request[str], *, counts: bool) -> int:
    """A type that the program declares may be wider, and the expression around the response may be any."""
    number: float = await mediator.send(Count())
    maybe: int | None = (await mediator.send(Count())) if counts else None
    anything: object = await mediator.send(FindLink())
    links: Sequence[Link] = await mediator.send(ListLinks())
    objects: Iterable[object] = await mediator.send(ListLinks())
    union: int | str = await mediator.send(either)
    untyped: str = await mediator.send(OfNobody())
    bare: str = await mediator.send(Bare())
    wide: Link | int | None = await mediator.send(FindLink())
    optional: list[Link | None] = [await mediator.send(FindLink())]

    default: Link = await mediator.send(FindLink()) or Link(url="")
    defaults: list[Link] = await mediator.send(FindLinks()) or []
    takes_link(await mediator.send(FindLink()) or Link(url=""))
    if (found := await mediator.send(FindLink())) is None:
        raise LookupError
    assert_type(found, Link)

    numbers: dict[str, int] = {"a": await mediator.send(Count())}
    floats: Mapping[str, float] = {"a": await mediator.send(Count())}
    mixed: dict[str, object] = {"n": await mediator.send(Count()), **(await mediator.send(ReadTitles()))}
    titles: list[str] = [each for each in await mediator.send(ReadTitles())]
    more: list[Link] = [*await mediator.send(ListLinks())]
    title: str = (await mediator.send(ReadTitles())).get("a", "") or max(await mediator.send(ReadTitles()), default="")
    text: str = f"{await mediator.send(Count())}" + str(await mediator.send(Count()))
    is_there: bool = await mediator.send(FindLink()) is not None and await mediator.send(Count()) > 1
    total: float = 1.5 + await mediator.send(Count()) + len(await mediator.send(ListLinks()))
    assert_type(sorted(await mediator.send(ListLinks()), key=id), list[Link])
    assert_type(same(await mediator.send(Count())), int)
    for each in await mediator.send(ListLinks()):
        takes_link(each)

    task: asyncio.Task[int] = asyncio.create_task(mediator.send(Count()))
    async with asyncio.TaskGroup() as tasks:
        in_group: asyncio.Task[int] = tasks.create_task(mediator.send(Count()))
    in_time: int = await asyncio.wait_for(mediator.send(Count()), 1)
    both: tuple[int, Link | None] = await asyncio.gather(mediator.send(Count()), mediator.send(FindLink()))
    send_count: Callable[[Count], Awaitable[int]] = mediator.send
    later: Callable[[], Awaitable[int]] = lambda: mediator.send(Count())
    return await mediator.send(Count())


async def generic(mediator: Mediator, request: Request[T]) -> T:
    return await mediator.send(request)


def from_outside(mediator: Mediator) -> int:
    return asyncio.run(mediator.send(Count()))


class CountTwice(RequestHandler[CountMore, int]):
    def __init__(self, mediator: Mediator) -> None:
        self._mediator = mediator

    async def handle(self, request: CountMore) -> int:
        return await self._mediator.send(Count())


async def mistaken(mediator: Mediator, request: Request[int]) -> None:
    """A response of another type is refused wherever it is used."""
    assigned: str = await mediator.send(Count())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    variable: str
    variable = await mediator.send(Count())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    takes_text(await mediator.send(Count()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    in_dict: dict[str, str] = {"a": await mediator.send(Count())}  # type: ignore[dict-item]  # pyright: ignore[reportAssignmentType]
    in_list: list[str] = [await mediator.send(Count())]  # type: ignore[list-item]  # pyright: ignore[reportAssignmentType]
    in_set: set[str] = {await mediator.send(Count())}  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    in_loop: list[str] = [await mediator.send(Count()) for _ in range(3)]  # type: ignore[misc]  # pyright: ignore[reportAssignmentType]
    with_default: str = await mediator.send(Count()) or ""  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    passed_on: str = same(await mediator.send(Count()))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    added: str = "1" + await mediator.send(Count())  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue, reportUnknownVariableType]
    joined: str = ", ".join(await mediator.send(ListLinks()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue, reportUnknownVariableType]
    narrower: SecretLink = await mediator.send(ReadLink(meeting_id=1))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    narrower_items: list[SecretLink] = await mediator.send(ListLinks())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    not_none: Link = await mediator.send(FindLink())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    of_none: str = await mediator.send(Join(user_id=1))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    of_base: str = await mediator.send(request)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    of_subclass: str = await mediator.send(CountMore())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    of_generic: list[str] = await mediator.send(Repeat[int](1))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    of_task: asyncio.Task[str] = asyncio.create_task(mediator.send(Count()))  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    in_time: str = await asyncio.wait_for(mediator.send(Count()), 1)  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    both: tuple[str, int] = await asyncio.gather(mediator.send(Count()), mediator.send(Count()))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    not_awaited: int = mediator.send(Count())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    later: Awaitable[str] = mediator.send(Count())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    function: Callable[[], Awaitable[str]] = lambda: mediator.send(Count())  # type: ignore[assignment, return-value]  # pyright: ignore[reportAssignmentType]
    (await mediator.send(FindLink())).url  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    (await mediator.send(ReadLink(meeting_id=1))).uri  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    (await mediator.send(Join(user_id=1))).url  # type: ignore[attr-defined, func-returns-value]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    for _ in await mediator.send(Count()):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
        pass
    await mediator.send()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await mediator.send(Count(), Count())  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


async def mistaken_by_a_function(mediator: Mediator) -> str:
    return await mediator.send(Count())  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


class MistakenByAHandler(RequestHandler[CountMore, str]):
    def __init__(self, mediator: Mediator) -> None:
        self._mediator = mediator

    async def handle(self, request: CountMore) -> str:
        return await self._mediator.send(Count())  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


def mistaken_from_outside(mediator: Mediator) -> str:
    return asyncio.run(mediator.send(Count()))  # type: ignore[return-value]  # pyright: ignore[reportReturnType]
