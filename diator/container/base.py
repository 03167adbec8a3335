"""The protocol of a container, and the scope of a send."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

T = TypeVar("T")

#: A class, for type checkers: also a protocol or an abstract class, which mypy refuses for `type[T]` alone.
AnyClass: TypeAlias = type[T] | Callable[..., T]
#: The state of one send, shared with its domain event handlers. A container keeps its own state under its own key.
Shared: TypeAlias = dict[object, Any]


class Resolver(Protocol):
    """
    A container: an object that builds objects by their type. This one method is required.

    The caller of `Mediator.send` receives an error of the container unchanged.
    """

    async def resolve(self, type_: type[T], /) -> T:
        """Return an object of *type_* with all of its dependencies."""
        ...


@runtime_checkable
class ScopingResolver(Protocol):
    """A container that also opens a scope for each send. Optional. The handlers of one send share its objects."""

    def scope(self, shared: Shared, /) -> AbstractAsyncContextManager[Resolver]:
        """
        Return a context manager that opens a scope and closes it with the unit of work.

        The unit of work ends after the domain event handlers and inside the middlewares. The context manager receives
        the error of a unit of work that failed, and cannot swallow it. An error that the context manager raises, such
        as a failed commit, reaches the middlewares, and no integration event is sent.
        """
        ...


@runtime_checkable
class CompilingResolver(Protocol):
    """A container that compiles how to build a type, once, when the mediator is made. Optional, for speed."""

    def factory(self, type_: type[T], /) -> Callable[[Shared], T] | None:
        """
        Return a function that builds a *type_*, or None if building one needs a scope or has to wait.

        Raises:
            ResolutionError: The container can never build *type_*.
        """
        ...


class Construction(Generic[T]):
    """
    A function, as `factory` returns it, that needs nothing of the send: it makes the same call each time.

    Attributes:
        call: What it calls.
        arguments: The positional arguments of the call.
        is_new: Whether each object is a new one of just this class, made by its constructor.
    """

    __slots__ = ("arguments", "call", "is_new")

    def __init__(self, call: Callable[..., T], *arguments: Any, is_new: bool = False) -> None:
        self.call: Callable[..., T] = call
        self.arguments: tuple[Any, ...] = arguments
        self.is_new: bool = is_new

    def __call__(self, _: Shared) -> T:
        return self.call(*self.arguments)


Build: TypeAlias = Callable[[Shared], T]
BuildLater: TypeAlias = Callable[[Shared], Awaitable[T]]

_SCOPES = object()


def builder(container: Resolver, type_: type[T]) -> tuple[Build[T] | None, BuildLater[T]]:
    """
    Return two functions that build *type_* with *container*: a plain function, or None, and a coroutine function.

    Call the second one inside `scopes`, which closes the scopes that it opens.
    """
    build = container.factory(type_) if isinstance(container, CompilingResolver) else None
    if build is not None:
        return build, _waiting(build)
    if isinstance(container, ScopingResolver):
        return None, _scoped(container, type_)

    async def resolve(_: Shared) -> T:
        return await container.resolve(type_)

    return None, resolve


def _waiting(build: Build[T]) -> BuildLater[T]:
    if isinstance(build, Construction):
        call: Callable[..., T] = build.call
        arguments = build.arguments

        async def call_at_once(_: Shared) -> T:
            return call(*arguments)

        return call_at_once

    async def build_at_once(shared: Shared) -> T:
        return build(shared)

    return build_at_once


def _scoped(container: ScopingResolver, type_: type[T]) -> BuildLater[T]:
    key = id(container)  # a container may be unhashable; this closure keeps it alive

    async def build_in_scope(shared: Shared) -> T:
        resolver: Resolver | None = shared.get(key)
        if resolver is None:
            opened: Contexts = shared[_SCOPES]
            shared[key] = resolver = await opened.enter(container.scope(shared))
        return await resolver.resolve(type_)

    return build_in_scope


def is_registered(container: Resolver, type_: Any, *, default: bool) -> bool:
    """Return whether *container* can build *type_*; *default* if it has no method `is_registered`."""
    ask: Callable[[Any], bool] | None = getattr(container, "is_registered", None)
    return default if ask is None else ask(type_)


def is_shared(container: Resolver, type_: type) -> bool:
    """Return whether *type_* is a singleton of *container*; False if it has no method `is_shared`."""
    ask: Callable[[type], bool] | None = getattr(container, "is_shared", None)
    return ask is not None and ask(type_)


class Contexts:
    """
    The contexts that are left together, the last entered first; itself a context.

    As `AsyncExitStack`, with two differences. A context receives an error and cannot swallow it: those around it must
    receive it too, because a transaction must not commit after an error that a resource inside of it swallowed. And
    an error is raised unchanged even if its class is frozen.
    """

    __slots__ = ("_entered",)

    def __init__(self) -> None:
        self._entered: list[AbstractAsyncContextManager[Any] | AbstractContextManager[Any]] = []

    async def enter(self, context: AbstractAsyncContextManager[T] | AbstractContextManager[T]) -> T:
        """Enter *context*."""
        if isinstance(context, AbstractAsyncContextManager):
            entered = await context.__aenter__()
        else:
            entered = context.__enter__()
        self._entered.append(context)
        return entered

    async def leave(self, error: BaseException | None = None) -> None:
        """Leave all contexts, and pass *error* to them. The next ones receive the error of one that fails instead."""
        while self._entered:
            try:
                await _leave(self._entered.pop(), error)
            except BaseException as failed:
                await self.leave(failed)
                raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave(error)


async def _leave(
    context: AbstractAsyncContextManager[Any] | AbstractContextManager[Any], error: BaseException | None
) -> None:
    kind, trace = (None, None) if error is None else (type(error), error.__traceback__)
    try:
        if isinstance(context, AbstractAsyncContextManager):
            await context.__aexit__(kind, error, trace)
        else:
            context.__exit__(kind, error, trace)
    except Exception as failed:
        if error is None or failed.__context__ is not error or not _is_frozen(error, type(failed)):
            raise


def _is_frozen(error: BaseException, refusal: type[Exception]) -> bool:
    """Return whether *error* refuses a traceback, which `contextlib` sets, and raises *refusal* instead."""
    try:
        error.__traceback__ = error.__traceback__
    except Exception as refused:  # noqa: BLE001  # a class refuses attributes with any error
        return type(refused) is refusal
    return False


def has_scopes(shared: Shared) -> bool:
    """Return whether `scopes` is open for this send."""
    return _SCOPES in shared


def scopes(shared: Shared) -> Contexts:
    """Return a context that closes all scopes of this send at its end."""
    opened = shared[_SCOPES] = Contexts()
    return opened
