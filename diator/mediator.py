"""A program's first door: what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import NoneType
from typing import Any, TypeVar, overload

from diator._dispatcher import OUTGOING, Dispatcher
from diator.brokers.sending import MessageBroker
from diator.container import Container
from diator.container.base import Resolver, Shared
from diator.events import EventEmitter, EventMap
from diator.events._emitter import Outgoing, check_parts
from diator.exceptions import ConfigurationError, EventsNotSent, MessagesNotSent
from diator.middlewares.base import Middleware
from diator.requests import Request, RequestMap

Res = TypeVar("Res")

logger: logging.Logger = logging.getLogger(__name__)


class Mediator:
    """
    Has requests handled, and sends the events that their handlers raise.

    *middlewares* surround every handler, the first outermost. The events go through *event_emitter*, or through one
    that is made of *event_map* and *message_broker*. Safe to use from several tasks of one event loop at once.

    Raises:
        ResolutionError: A handler that is bound can never be built by *container*.
        ConfigurationError: The arguments contradict each other.
    """

    @overload
    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        event_emitter: EventEmitter | None = None,
        *,
        middlewares: Iterable[Middleware] = (),
    ) -> None: ...
    @overload
    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        *,
        event_map: EventMap | None = None,
        message_broker: MessageBroker | None = None,
        middlewares: Iterable[Middleware] = (),
    ) -> None: ...
    def __init__(  # everything that a program is wired of
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        event_emitter: EventEmitter | None = None,
        *,
        event_map: EventMap | None = None,
        message_broker: MessageBroker | None = None,
        middlewares: Iterable[Middleware] = (),
    ) -> None:
        check_parts(event_map=event_map, container=container, message_broker=message_broker)
        parts: list[tuple[object, Any]] = [(request_map, RequestMap), (event_emitter, (EventEmitter, NoneType))]
        if not all(isinstance(part, kind) for part, kind in parts):
            raise ConfigurationError("a mediator is made of a RequestMap, and perhaps a container and an EventEmitter")
        middlewares = _checked(middlewares)
        if event_emitter is None:
            event_emitter = EventEmitter(event_map=event_map, message_broker=message_broker)
        elif event_map is not None or message_broker is not None:
            raise ConfigurationError(
                "event_map and message_broker belong to the EventEmitter that is given; give them to it"
            )
        container = Container() if container is None else container
        event_emitter._wire(container)
        self._emitter = event_emitter
        self._dispatcher = Dispatcher(request_map, container, event_emitter, middlewares)
        for request_type in request_map:
            self._dispatcher[request_type]

    @overload
    async def send(self, request: Request[Res], /) -> Res: ...
    @overload
    async def send(self, request: object, /) -> Any: ...
    async def send(self, request: object, /) -> Any:
        """
        Have *request* handled, and send the events that its handler raised; give the handler's answer.

        Domain events are handled inside the middlewares; events that travel are sent when these have finished. An
        error of the handler or a middleware comes out as it is, and nothing is sent.

        Raises:
            HandlerNotFound: No handler is bound to the type of *request*.
            EventHandlersFailed: Handlers of domain events failed. All of them ran; nothing was sent.
            EncodingError, BrokerNotConfigured, NotAnEvent: An event cannot travel. Nothing was sent, and the
                middlewares have seen the error: a transaction that they hold is rolled back.
            EventsNotSent: The request is done, and some of its events were not confirmed; the error has them and
                the answer.
        """
        plan = self._dispatcher[type(request)]
        shared: Shared = {}
        if plan.build is None:
            response = await plan.dispatch(request, shared)
            outgoing: Outgoing | None = shared.get(OUTGOING)
        else:
            handler = plan.build(shared)
            try:
                response = await handler.handle(request)
            except BaseException:
                plan.take_events(handler, ())  # what it raised before it failed is not to go out with another request
                raise
            if not (events := plan.pending_events(handler)):
                return response
            outgoing = await self._emitter._handle(plan.take_events(handler, events), shared)
        if outgoing:
            await self._send_events(outgoing, response)
        return response

    async def _send_events(self, outgoing: Outgoing, response: object) -> None:
        try:
            await self._emitter._send(outgoing)
        except MessagesNotSent as error:
            unsent = [(event, message) for event, message in outgoing if message.message_id in error.message_ids]
            raise _not_sent(unsent, response) from error.__cause__
        except Exception as error:
            raise _not_sent(outgoing, response) from error
        except BaseException:
            ids = ", ".join(str(message.message_id) for _, message in outgoing)
            logger.warning("cancelled while sending the events of a request that is done; perhaps not sent: %s", ids)
            raise


def _checked(middlewares: Iterable[Middleware]) -> tuple[Middleware, ...]:
    if not isinstance(middlewares, Iterable):
        raise ConfigurationError("middlewares is a list of them")
    given = tuple(middlewares)
    for middleware in given:
        if isinstance(middleware, type) or not callable(middleware):
            raise ConfigurationError(
                f"{middleware!r} is no middleware: give an object that is called with (message, handle)"
            )
    return given


def _not_sent(outgoing: Outgoing, response: object) -> EventsNotSent:
    return EventsNotSent(response, [event for event, _ in outgoing], [message.message_id for _, message in outgoing])
