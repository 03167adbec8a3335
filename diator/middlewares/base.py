"""The protocol of a middleware, and the chain of several around a handler."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol, TypeAlias, TypeVar, get_origin, overload

from diator._hints import described, name_of
from diator.exceptions import ConfigurationError

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)
State = TypeVar("State")

#: Calls the next middleware, or the handler.
Handle: TypeAlias = Callable[[Any], Awaitable[Any]]


class Middleware(Protocol):
    """
    Surrounds handlers: a function, or an object with `__call__`, as `async (message, handle) -> response`.

    A middleware may act before and after `await handle(message)`, pass on another message of the same type, return a
    response of its own, or call `handle` again after an error. Each call of `handle` builds a new handler. diator
    sends only the integration events of the last call, and only after every middleware has finished.

    A consumer calls the middlewares for each handler of an event, because each is a unit of work of its own.
    """

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Handle *message*, usually with `await handle(message)`, and return the response."""
        ...


class MiddlewareOf(Protocol[M_contra]):
    """A middleware for messages of one class, to be limited by `only_for`."""

    async def __call__(self, message: M_contra, handle: Handle, /) -> Any:
        """As `Middleware.__call__`."""
        ...


@overload
def only_for(of: Callable[[Any], bool], middleware: Middleware, /) -> Middleware: ...
@overload
def only_for(of: Callable[..., M], middleware: MiddlewareOf[M], /) -> Middleware: ...  # type[M] cannot be abstract
def only_for(of: Any, middleware: Any, /) -> Middleware:
    """
    Limit *middleware* to some messages: those of the class *of* and its subclasses, or those for which *of* is true.

    A class costs the other messages nothing: which middlewares surround a handler is decided when it is prepared. A
    function is called with each message.

    Raises:
        ConfigurationError: *of* is neither a class nor a function, or *middleware* cannot be called.
    """
    [checked] = checked_middlewares([middleware])
    if isinstance(of, type):
        try:
            issubclass(object, of)
        except TypeError as error:
            raise ConfigurationError(f"only_for cannot use {name_of(of)}: {error}; pass a function") from error
        return _OnlyFor(of, lambda message: isinstance(message, of), checked)
    if get_origin(of) is not None or not callable(of) or inspect.iscoroutinefunction(of):
        raise ConfigurationError(
            f"only_for needs a class without type arguments, or a function (message) -> bool, and it is {of!r}"
        )
    return _OnlyFor(None, of, checked)


class _OnlyFor:
    def __init__(self, of: type | None, wants: Callable[[Any], object], middleware: Middleware) -> None:
        self.of = of
        self.middleware = middleware
        self._wants = wants

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        return await (self.middleware(message, handle) if self._wants(message) else handle(message))


def middlewares_for(middlewares: Iterable[Middleware], message_type: type) -> list[Middleware]:
    """Return those of *middlewares* that may surround handlers of *message_type*."""
    found: list[Middleware] = []
    for middleware in middlewares:
        if not isinstance(middleware, _OnlyFor) or middleware.of is None:
            found.append(middleware)
        elif issubclass(message_type, middleware.of):
            found += middlewares_for([middleware.middleware], message_type)
    return found


def checked_middlewares(middlewares: Any) -> tuple[Middleware, ...]:
    """
    Return *middlewares* as a tuple; None: there are none.

    Raises:
        ConfigurationError: They are not a list, or one of them cannot be called.
    """
    if middlewares is None:
        return ()
    if not isinstance(middlewares, Iterable) or isinstance(middlewares, (str, Mapping)):
        raise ConfigurationError(f"middlewares must be a list of middlewares, and it is {described(middlewares)}")
    checked = tuple(middlewares)
    for middleware in checked:
        if isinstance(middleware, type) or not callable(middleware):
            raise ConfigurationError(
                f"{described(middleware)} is not a middleware; pass an object that can be called with (message, handle)"
            )
    return checked


class BaseMiddleware:
    """A middleware with two hooks: before the handler, and after a handler that succeeded. Override either one."""

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Call `process_request`, then *handle*, then `process_response`."""
        await self.process_request(message)
        response = await handle(message)
        await self.process_response(response)
        return response

    async def process_request(self, request: Any) -> None:
        """Act before *request* is handled. If this raises an error, the handler is not called."""

    async def process_response(self, response: Any) -> None:
        """Act on *response*. If this raises an error, the request fails, and its integration events are not sent."""


Innermost: TypeAlias = Callable[[Any, State], Awaitable[Any]]


def chain(middlewares: Sequence[Middleware], innermost: Innermost[State]) -> Innermost[State]:
    """Return *innermost* surrounded by *middlewares*, the first outermost. Each call passes its state through."""
    if not middlewares:
        return innermost
    # A bound `__call__` is faster to call than the object.
    outermost, *others = [getattr(middleware, "__call__", middleware) for middleware in middlewares]  # noqa: B004
    steps = [_step(middleware) for middleware in reversed(others)]

    def handled(state: State, message: Any) -> Awaitable[Any]:
        return innermost(message, state)

    def call(message: Any, state: State) -> Awaitable[Any]:
        handle: Handle = MethodType(handled, state)  # binds an argument at half of the cost of a closure
        for step in steps:
            handle = MethodType(step, handle)
        return outermost(message, handle)

    return call


def _step(middleware: Middleware) -> Callable[[Handle, Any], Awaitable[Any]]:
    def step(handle: Handle, message: Any) -> Awaitable[Any]:
        return middleware(message, handle)

    return step
