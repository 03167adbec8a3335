"""Send requests to their handlers, and the events of the handlers to other handlers or a message broker."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

from diator._dispatcher import Dispatcher, Plan
from diator._options import check_type
from diator.brokers.message import Codec
from diator.brokers.sending import MessageBroker
from diator.container import Container
from diator.container.base import Resolver, Shared
from diator.context import log_fields
from diator.events import EventEmitter, EventMap
from diator.events._emitter import OUTGOING, Outgoing, check_parts, unwrapped
from diator.events._headers import HeaderSource
from diator.exceptions import ConfigurationError, EventsNotSent, MessagesNotSent, NotCommitted
from diator.instruments import Instrument, observer_of
from diator.middlewares.base import Middleware, checked_middlewares
from diator.requests import Request, RequestMap

Res = TypeVar("Res")

logger: logging.Logger = logging.getLogger(__name__)


class Mediator:
    """
    Sends each request to its handler, and then handles or sends the events that the handler raised.

    Bind all handlers before the mediator is made. Several tasks of one event loop may use it at once. It has nothing to
    close.

    Args:
        request_map: The handlers of requests.
        container: Builds the handlers. Default: diator's own `Container`.
        event_emitter: Handles and sends the events. Default: an emitter with *event_map* and *message_broker*.
        event_map: The handlers of domain events, if *event_emitter* is not passed.
        message_broker: Sends the integration events, if *event_emitter* is not passed. The mediator does not close it.
        headers: Header sources for the integration events, if *event_emitter* is not passed; see `EventEmitter`.
        codec: The envelope of the integration events, if *event_emitter* is not passed. Default: diator's own.
        instrument: Observes the handling of requests, for telemetry, and the sends; an *event_emitter* that is passed
            needs it too.
        middlewares: Surround the handler of each request; the first is the outermost.

    Raises:
        ResolutionError: *container* can never build one of the handlers.
        ConfigurationError: An argument has the wrong type, or arguments contradict each other.
    """

    @overload
    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        event_emitter: EventEmitter | None = None,
        *,
        instrument: Instrument | None = None,
        middlewares: Iterable[Middleware] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        *,
        event_map: EventMap | None = None,
        message_broker: MessageBroker | None = None,
        headers: Sequence[HeaderSource] = (),
        codec: Codec | None = None,
        instrument: Instrument | None = None,
        middlewares: Iterable[Middleware] | None = None,
    ) -> None: ...
    def __init__(
        self,
        request_map: RequestMap,
        container: Resolver | None = None,
        event_emitter: EventEmitter | None = None,
        *,
        event_map: EventMap | None = None,
        message_broker: MessageBroker | None = None,
        headers: Sequence[HeaderSource] = (),
        codec: Codec | None = None,
        instrument: Instrument | None = None,
        middlewares: Iterable[Middleware] | None = None,
    ) -> None:
        check_parts(event_map=event_map, container=container, message_broker=message_broker)
        check_type("request_map", request_map, RequestMap, is_needed=True)
        check_type("event_emitter", event_emitter, EventEmitter)
        middlewares = checked_middlewares(middlewares)
        if event_emitter is None:
            event_emitter = EventEmitter(
                event_map, None, message_broker, headers=headers, codec=codec, instrument=instrument
            )
        elif headers or any(part is not None for part in (event_map, message_broker, codec)):
            raise ConfigurationError(
                "event_emitter was passed together with event_map, message_broker, headers or codec; pass these to the "
                "EventEmitter instead"
            )
        container = Container() if container is None else container
        event_emitter._wire(container)
        self._observer = observer_of(instrument)
        self._emitter = event_emitter
        self._dispatcher = Dispatcher(request_map, container, event_emitter, middlewares)
        for request_type in request_map:
            self._dispatcher[request_type]

    # mypy derives `Res` from the place where the response is used, and tries the next overload if that contradicts the
    # request. The Any of the last overload would hide the mistake, so the third takes every other `Request`, and is an
    # error at that place. The second is for `link: Link = await mediator.send(FindLink()) or default`.
    @overload
    async def send(self, request: Request[Res], /) -> Res: ...
    @overload
    async def send(self, request: Request[Res | None], /) -> Res | None: ...  # type: ignore[overload-cannot-match]
    @overload
    async def send(self, request: Request[Any], /) -> object: ...
    @overload
    async def send(self, request: object, /) -> Any: ...
    async def send(self, request: object, /) -> Any:
        """
        Return the response of the handler of *request*, after the events that it raised were handled or sent.

        Domain events are handled inside the middlewares, in the order in which they were raised. Integration events
        are sent in their order when the middlewares have finished. The caller receives an error of the handler or of
        a middleware unchanged, and then no integration event is sent. The middlewares see every error below except
        `HandlerNotFound`, `EventsNotSent` and `NotCommitted`, so that a transaction in a middleware is rolled back.

        Raises:
            HandlerNotFound: No handler is bound to the type of *request*.
            EventHandlersFailed: Handlers of domain events failed. All handlers ran; nothing was sent.
            EncodingError: A value of an integration event would not come back as it is. Nothing was sent.
            ConfigurationError: The class of an integration event cannot travel. Nothing was sent.
            MessageRejected: An integration event is too large, or its name or key too long. Nothing was sent.
            BrokerNotConfigured: An integration event was raised without a message broker. Nothing was sent.
            NotAnEvent: An object cannot be an event, or its class is incomplete. Nothing was sent.
            UnsupportedCapability: An event was scheduled, and the broker is not an outbox. Nothing was sent.
            EventsNotSent: The request was handled, but the broker did not confirm all integration events. The error
                contains these events and the response.
            NotCommitted: The broker is an outbox, and the transaction of the unit of work was not committed.
        """
        plan = self._dispatcher[type(request)]
        if self._observer is not None:
            with self._observer.handling(request):
                return await self._send_by(plan, request)
        shared: Shared | None = None
        if plan.build is None:
            shared = {}
            response = await plan.dispatch(request, shared)
            outgoing: Outgoing | None = shared.get(OUTGOING)
        else:  # what `plan.dispatch` would do: without this copy, a send takes 1.5 times as long
            handler = plan.build(shared := {}) if plan.arguments is None else plan.build(*plan.arguments)
            try:
                response = await handler.handle(request)
            except BaseException:
                plan.take_events(handler, ())  # discard its events, see `TakeEvents`
                raise
            if not (events := plan.pending_events(handler)):
                return response
            raised = plan.take_events(handler, events)
            outgoing = await self._emitter._handle(raised, {} if shared is None else shared)
        if outgoing:
            await self._send_events(outgoing, response)
        return response

    async def _send_by(self, plan: Plan, request: object) -> Any:
        """Do what `send` does, with a *plan* of any kind."""
        shared: Shared = {}
        response = await plan.dispatch(request, shared)
        if outgoing := shared.get(OUTGOING):
            await self._send_events(outgoing, response)
        return response

    async def _send_events(self, outgoing: Outgoing, response: object) -> None:
        try:
            await self._emitter._send(outgoing)
        except NotCommitted:  # nothing of the unit of work remains, so there is nothing that could be sent again
            raise
        except MessagesNotSent as error:
            unsent = [(event, message) for event, message in outgoing if message.message_id in error.message_ids]
            raise _not_sent(unsent, response) from error.__cause__
        except Exception as error:
            raise _not_sent(outgoing, response) from error
        except BaseException:
            ids = [str(message.message_id) for _, message in outgoing]
            logger.warning(
                "cancelled while sending the events of a handled request; messages may not be sent: %s",
                ", ".join(ids),
                extra={
                    **log_fields(),
                    "message_ids": ids,
                    "message_names": sorted({message.message_name for _, message in outgoing}),
                },
            )
            raise


def _not_sent(outgoing: Outgoing, response: object) -> EventsNotSent:
    events = [unwrapped(raised) for raised, _ in outgoing]
    return EventsNotSent(response, events, [message.message_id for _, message in outgoing])
