"""What diator asks of a container, and how the scope of a send is opened and closed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

T = TypeVar("T")

Shared: TypeAlias = dict[object, Any]
"""What one send shares with its domain event handlers. A container keeps what it needs under a key of its own."""


class Resolver(Protocol):
    """
    Anything that can give an object of a type. This is all that a container must be.

    An error that it raises reaches the caller of `Mediator.send` as it is.
    """

    async def resolve(self, type_: type[T], /) -> T:
        """Give an object of *type_*, with everything it depends on."""
        ...


@runtime_checkable
class ScopingResolver(Protocol):
    """A container that can also open a scope for each send: what is resolved in it is shared, and closed at its end."""

    def scope(self, shared: Shared, /) -> AbstractAsyncContextManager[Resolver]:
        """
        Open a scope. It ends with the unit of work: after the domain event handlers, inside the middlewares.

        An error that ends the unit of work is handed to the context manager. One that the context manager raises
        itself, such as a commit that failed, reaches the middlewares, and no integration event is sent.
        """
        ...


@runtime_checkable
class CompilingResolver(Protocol):
    """A container that says once, when a program is wired, how a type is built, instead of finding out each time."""

    def factory(self, type_: type[T], /) -> Callable[[Shared], T] | None:
        """
        Give a plain function that builds one *type_*, or None if that needs a scope or has to wait.

        Raises:
            ResolutionError: *type_* can never be built.
        """
        ...


Build: TypeAlias = Callable[[Shared], T]
BuildLater: TypeAlias = Callable[[Shared], Awaitable[T]]

_SCOPES = object()


def builder(container: Resolver, type_: type[T]) -> tuple[Build[T] | None, BuildLater[T]]:
    """
    Find out how *container* builds *type_*: as a plain function where it can, and as one that may wait.

    The second is to be called inside `scopes`, which closes what it opens.
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
    async def build_at_once(shared: Shared) -> T:
        return build(shared)

    return build_at_once


def _scoped(container: ScopingResolver, type_: type[T]) -> BuildLater[T]:
    key = id(container)  # it may be unhashable; this function keeps it alive

    async def build_in_scope(shared: Shared) -> T:
        resolver: Resolver | None = shared.get(key)
        if resolver is None:
            shared[key] = resolver = await enter(shared[_SCOPES], container.scope(shared))
        return await resolver.resolve(type_)

    return build_in_scope


def is_registered(container: Resolver, type_: Any, *, unless_told: bool) -> bool:
    """Ask *container* whether it can give a *type_*; one that has no `is_registered` cannot tell."""
    ask: Callable[[Any], bool] | None = getattr(container, "is_registered", None)
    return unless_told if ask is None else ask(type_)


def is_shared(container: Resolver, type_: type) -> bool:
    """Ask *container* whether it gives one *type_* to everybody; one that has no `is_shared` cannot tell."""
    ask: Callable[[type], bool] | None = getattr(container, "is_shared", None)
    return ask is not None and ask(type_)


async def enter(stack: AsyncExitStack, context: AbstractAsyncContextManager[T] | AbstractContextManager[T]) -> T:
    """
    Enter *context*, to be left with *stack*. It is told of an error and cannot swallow it.

    What was opened before it has to hear of the error too: a transaction must not commit because a resource inside it
    keeps silent about what failed.
    """
    if isinstance(context, AbstractAsyncContextManager):
        entered = await context.__aenter__()
    else:
        entered = context.__enter__()

    async def leave(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(context, AbstractAsyncContextManager):
            await context.__aexit__(kind, error, trace)
        else:
            context.__exit__(kind, error, trace)

    stack.push_async_exit(leave)
    return entered


def has_scopes(shared: Shared) -> bool:
    """Tell whether `scopes` is open for this send."""
    return _SCOPES in shared


@asynccontextmanager
async def scopes(shared: Shared) -> AsyncGenerator[None, None]:
    """Close at the end what builders opened for this send."""
    stack = shared[_SCOPES] = AsyncExitStack()
    try:
        yield
    except BaseException as error:
        await stack.__aexit__(type(error), error, error.__traceback__)
        raise  # a scope is told of an error and cannot swallow it: what failed has no answer to go on with
    await stack.aclose()
