"""From a request to its handler, through the middlewares: found out once per type of request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from diator._handlers import Prepared
from diator.container.base import Resolver, Shared, scopes
from diator.events._emitter import EventEmitter, Outgoing
from diator.middlewares.base import Middleware, chain
from diator.requests import RequestMap

Dispatch: TypeAlias = Callable[[Any, Outgoing], Awaitable[Any]]
"""Has a request handled, and leaves in the list what is to be sent once it is."""


class Dispatcher(dict[type, Dispatch]):
    """How each type of request is handled: looked up by the type, compiled when it is first needed."""

    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver,
        event_emitter: EventEmitter,
        middlewares: Sequence[Middleware],
    ) -> None:
        super().__init__()
        self._request_map = request_map
        self._container = container
        self._emitter = event_emitter
        self._middlewares = tuple(middlewares)

    def __missing__(self, request_type: type) -> Dispatch:
        handler = Prepared(self._request_map.get(request_type), self._container)
        unit_of_work = _scoped(handler, self._emitter) if handler.needs_scope else _plain(handler, self._emitter)
        dispatch = self[request_type] = chain(self._middlewares, unit_of_work)
        return dispatch


# The unit of work: build the handler, call it, have its domain events handled. It starts with nothing to send, so
# that a middleware which calls it again does not send the events of the first, failed attempt.


def _scoped(handler: Prepared, emitter: EventEmitter) -> Dispatch:
    async def handle(request: Any, outgoing: Outgoing) -> Any:
        outgoing.clear()
        shared: Shared = {}
        async with scopes(shared):
            raised: list[Any] = []
            response = await handler.call(request, shared, raised)
            events = await emitter.handle(raised, shared) if raised else []
        outgoing += events
        return response

    return handle


def _plain(handler: Prepared, emitter: EventEmitter) -> Dispatch:
    build, take, call = handler.build, handler.take, handler.call
    if build is None:

        async def handle(request: Any, outgoing: Outgoing) -> Any:
            outgoing.clear()
            shared: Shared = {}
            raised: list[Any] = []
            response = await call(request, shared, raised)
            if raised:
                outgoing += await emitter.handle(raised, shared)
            return response

        return handle

    # The common case, a class that is built without waiting, written out: one coroutine fewer is a tenth of a send.
    async def handle_by_class(request: Any, outgoing: Outgoing) -> Any:
        outgoing.clear()
        shared: Shared = {}
        handler = build(shared)
        response = await handler.handle(request)
        if take is not None and (raised := take(handler)):
            outgoing += await emitter.handle([*raised], shared)
        return response

    return handle_by_class
