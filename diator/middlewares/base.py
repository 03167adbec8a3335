"""The protocol of a middleware, and the chain of several around a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import MethodType
from typing import Any, Protocol, TypeAlias, TypeVar

State = TypeVar("State")

#: Calls the next middleware, or the handler.
Handle: TypeAlias = Callable[[Any], Awaitable[Any]]


class Middleware(Protocol):
    """
    Surrounds handlers: a function, or an object with `__call__`, as `async (message, handle) -> response`.

    A middleware may act before and after `await handle(message)`, pass on another message of the same type, return a
    response of its own, or call `handle` again after an error. Each call of `handle` builds a new handler. diator
    sends only the integration events of the last call, and only after every middleware has finished.
    """

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Handle *message*, usually with `await handle(message)`, and return the response."""
        ...


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
