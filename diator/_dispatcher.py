"""From a request to its handler, through the middlewares: found out once per type of request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from diator._handlers import Prepared
from diator.container.base import Resolver, Shared, scopes
from diator.events._emitter import EventEmitter
from diator.middlewares.base import Middleware, chain
from diator.requests import RequestMap

Dispatch: TypeAlias = Callable[[Any, Shared], Awaitable[Any]]
"""Has a request handled, and leaves under `OUTGOING` what is to be sent once it is."""

OUTGOING = object()
"""Where the events that travel wait in what a send shares, until the middlewares have finished."""


class Plan:
    """
    How one type of request is handled.

    Attributes:
        dispatch: Handles it, through the middlewares.
        build, pending_events, take_events: The handler, if there are no middlewares and it is a class that is built
            without waiting; else `build` is None. `Mediator.send` contains this common case itself, at
            two thirds of the cost.
    """

    __slots__ = ("build", "dispatch", "pending_events", "take_events")

    def __init__(self, handler: Prepared, emitter: EventEmitter, middlewares: Sequence[Middleware]) -> None:
        self.build = None if middlewares else handler.build
        self.pending_events = handler.pending_events
        self.take_events = handler.take_events
        unit_of_work = _scoped(handler, emitter) if handler.needs_scope else _plain(handler, emitter)
        self.dispatch = chain(middlewares, unit_of_work)


class Dispatcher(dict[type, Plan]):
    """How each type of request is handled: looked up by the type, found out when it is first needed."""

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
        self._middlewares = middlewares

    def __missing__(self, request_type: type) -> Plan:
        handler = Prepared(self._request_map.get(request_type), self._container)
        plan = self[request_type] = Plan(handler, self._emitter, self._middlewares)
        return plan


# The unit of work: build the handler, call it, have its domain events handled. It starts with nothing shared, so that
# a middleware which calls it again does not send the events of the first, failed attempt.


def _scoped(handler: Prepared, emitter: EventEmitter) -> Dispatch:
    async def handle(request: Any, shared: Shared) -> Any:
        shared.clear()
        async with scopes(shared):
            raised: list[Any] = []
            response = await handler.call(request, shared, raised)
            outgoing = await emitter._handle(raised, shared) if raised else []
        shared[OUTGOING] = outgoing
        return response

    return handle


def _plain(handler: Prepared, emitter: EventEmitter) -> Dispatch:
    build, pending_events, take_events, call = handler.build, handler.pending_events, handler.take_events, handler.call

    async def handle(request: Any, shared: Shared) -> Any:
        shared.clear()
        raised: list[Any] = []
        response = await call(request, shared, raised)
        if raised:
            shared[OUTGOING] = await emitter._handle(raised, shared)
        return response

    if build is None:
        return handle

    async def handle_by_class(request: Any, shared: Shared) -> Any:  # the same, without a coroutine to build and call
        shared.clear()
        built = build(shared)
        try:
            response = await built.handle(request)
        except BaseException:
            take_events(built, ())
            raise
        if events := pending_events(built):
            shared[OUTGOING] = await emitter._handle(take_events(built, events), shared)
        return response

    return handle_by_class
