"""The one shape of a middleware, and how several surround a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

State = TypeVar("State")

Handle: TypeAlias = Callable[[Any], Awaitable[Any]]
"""The rest of the way: the next middleware, or the handler."""


class Middleware(Protocol):
    """
    Surrounds handling: `async (message, handle) -> result`. A function or an object with `__call__` will do.

    It may do something before and after `await handle(message)`, hand on another message of the same type, answer by
    itself, or call `handle` again after an error. The handler is built inside it. Only what the last call of `handle`
    raised goes out, and only after every middleware has finished.
    """

    async def __call__(self, message: Any, handle: Handle, /) -> Any: ...


class BaseMiddleware:
    """A middleware of two hooks: one before the handler, one after it if it succeeded. Override either."""

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Call the hooks around *handle*."""
        await self.process_request(message)
        response = await handle(message)
        await self.process_response(response)
        return response

    async def process_request(self, request: Any) -> None:
        """Do something before *request* is handled. An error refuses it."""

    async def process_response(self, response: Any) -> None:
        """Do something with *response*. An error is the error of the request; its events are then not sent."""


Innermost: TypeAlias = Callable[[Any, State], Awaitable[Any]]


def chain(middlewares: Sequence[Middleware], innermost: Innermost[State]) -> Innermost[State]:
    """Put *middlewares* around *innermost*, the first outermost; what belongs to one call goes through as state."""
    calls = [getattr(middleware, "__call__", middleware) for middleware in middlewares]  # noqa: B004  # bound: faster
    while calls:
        innermost = _link(calls[-3:], innermost)
        del calls[-3:]
    return innermost


def _link(calls: Sequence[Middleware], following: Innermost[State]) -> Innermost[State]:
    # Up to three at a time, written out: a fold over single ones costs a third more with every middleware.
    *outer, inner = calls

    def call_one(message: Any, state: State) -> Awaitable[Any]:
        return inner(message, lambda message: following(message, state))

    if not outer:
        return call_one
    *outermost, middle = outer

    def call_two(message: Any, state: State) -> Awaitable[Any]:
        def handle(message: Any) -> Awaitable[Any]:
            return following(message, state)

        return middle(message, lambda message: inner(message, handle))

    if not outermost:
        return call_two
    (first,) = outermost

    def call_three(message: Any, state: State) -> Awaitable[Any]:
        def handle(message: Any) -> Awaitable[Any]:
            return following(message, state)

        def handle_inner(message: Any) -> Awaitable[Any]:
            return inner(message, handle)

        return first(message, lambda message: middle(message, handle_inner))

    return call_three
