from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from diator._handlers import Handler, Prepared
from diator._hints import name_of
from diator.brokers.base import BatchMessageBroker, MessageBroker, enlists
from diator.brokers.message import Message
from diator.container import Container
from diator.container.base import Resolver, Shared, has_scopes, scopes
from diator.events._event import Event, check_travels_whole, message_key_of, message_name_of, travels
from diator.events._handler import EventMap
from diator.exceptions import BrokerNotConfigured, EventHandlersFailed, MessagesNotSent, NotAnEvent, WiringError

Outgoing: TypeAlias = list[tuple[Any, Message]]
"""Events that travel, and what they became."""

_Progress: TypeAlias = tuple[int, Outgoing, list[Exception]]


class EventEmitter:
    """
    Sends each event on its way: a domain event to its handlers, here; an event that travels to the message broker.

    Safe to use from several tasks at once. *container* builds the handlers; without one it is that of the mediator
    which this emitter is given to, else diator's own. The broker stays its owner's and is not closed here.
    """

    def __init__(
        self,
        event_map: EventMap | None = None,
        container: Resolver | None = None,
        message_broker: MessageBroker | None = None,
    ) -> None:
        self._event_map = EventMap() if event_map is None else event_map
        self._container = container
        self._adopted: Resolver | None = None
        self._broker = message_broker
        self._plans: dict[type, _Domain | _Travelling] = {}

    async def emit(self, event: object) -> None:
        """
        Have *event* handled here, or send it, and then what its handlers raised.

        Raises:
            EventHandlersFailed: Handlers of a domain event failed; all of them ran, and nothing was sent.
            EncodingError, BrokerNotConfigured, NotAnEvent: It cannot travel; nothing was sent.
            BrokerError: The verdict on the message, or `MessagesNotSent` if there were several.
        """
        await self.send(await self.handle([event], {}))

    # -- the two halves of `emit`, for the mediator: inside the unit of work, and after it -----------------------

    async def handle(self, raised: list[Any], shared: Shared, progress: _Progress | None = None) -> Outgoing:
        """
        Run the handlers of the domain events, in the order raised, and encode the events that travel.

        What the handlers raise joins at the end of *raised*. Gives what is left to send after the unit of work:
        nothing, if the broker is part of the unit of work.

        Raises:
            EventHandlersFailed: Handlers failed. All handlers of all events ran.
        """
        position, outgoing, failures = progress or (0, [], [])
        while position < len(raised):
            event = raised[position]
            plan = self._plans.get(type(event)) or self._plan(type(event))
            if isinstance(plan, _Travelling):
                outgoing.append((event, plan.message(event)))
            elif plan.needs_scope and not has_scopes(shared):
                async with scopes(shared):
                    return await self.handle(raised, shared, (position, outgoing, failures))
            else:
                for handler in plan.handlers:
                    try:
                        if handler.build is None:
                            await handler.call(event, shared, raised)
                        else:
                            built = handler.build(shared)
                            await built.handle(event)
                            if handler.take is not None and (more := handler.take(built)):
                                raised += more
                    except Exception as error:  # noqa: BLE001  # all handlers run, then all errors are raised
                        error.add_note(f"raised by {handler.name}, which handles {name_of(type(event))}")
                        failures.append(error)
            position += 1
        if failures:
            raise EventHandlersFailed("handlers of domain events failed", failures)
        if outgoing and enlists(self._broker):
            await self.send(outgoing)
            return []
        return outgoing

    async def send(self, outgoing: Outgoing) -> None:
        """
        Send what `handle` gave, in its order. It stops at the first message that is not confirmed.

        Raises:
            BrokerError: The verdict on the message, if there was one.
            MessagesNotSent: Of several messages, some were not confirmed.
        """
        broker, messages = self._broker, [message for _, message in outgoing]
        if not messages or broker is None:  # without a broker `handle` has refused what travels
            return
        if len(messages) == 1:
            await broker.send_message(messages[0])
        elif isinstance(broker, BatchMessageBroker):
            await broker.send_messages(messages)
        else:
            for position, message in enumerate(messages):
                try:
                    await broker.send_message(message)
                except Exception as error:
                    raise MessagesNotSent([each.message_id for each in messages[position:]]) from error

    # -- wiring --------------------------------------------------------------------------------------------------

    def wire(self, container: Resolver) -> None:
        """
        Use *container* unless this emitter has one, and find out how every handler that is bound so far is built.

        Raises:
            ResolutionError: A handler can never be built.
            WiringError: This emitter has no container of its own, and works with that of another mediator already.
        """
        if self._container is None:
            if self._adopted not in (None, container):
                raise WiringError(
                    "two mediators with different containers share this EventEmitter; give it a container"
                )
            self._adopted = container
        for event_type in self._event_map:
            self._plan(event_type)

    def _plan(self, event_type: type) -> _Domain | _Travelling:
        """Find out once what to do with events of this type."""
        plan: _Domain | _Travelling
        if travels(event_type):
            if self._broker is None:
                raise BrokerNotConfigured(event_type)
            self._event_map.claim_name(event_type)
            plan = _Travelling(event_type)
        else:
            handlers = self._event_map.get(event_type)
            if not handlers and not issubclass(event_type, Event):
                raise NotAnEvent(f"{name_of(event_type)} was raised, and is neither an Event nor bound to a handler")
            container = self._container or self._adopted or Container()
            plan = _Domain(handlers, container)
        self._plans[event_type] = plan
        return plan


class _Domain:
    """What to do with a domain event: its handlers."""

    __slots__ = ("handlers", "needs_scope")

    def __init__(self, handlers: Sequence[Handler], container: Resolver) -> None:
        self.handlers = [Prepared(handler, container) for handler in handlers]
        self.needs_scope = any(handler.needs_scope for handler in self.handlers)


class _Travelling:
    """What to do with an event that travels: make its message, at once, so that a later change cannot reach it."""

    __slots__ = ("_encode", "_key", "_name", "_type")

    def __init__(self, event_type: Any) -> None:
        # Not at the top: a program whose events stay here never needs it, and it costs half of the import time.
        from diator.brokers.codec import payload_encoder  # noqa: PLC0415

        check_travels_whole(event_type)
        self._type: str = event_type.message_type
        self._name = message_name_of(event_type)
        self._key = message_key_of(event_type)
        self._encode = payload_encoder(event_type)

    def message(self, event: Any) -> Message:
        key = None if self._key is None else getattr(event, self._key)
        return Message(
            message_type=self._type,
            message_name=self._name,
            message_id=event.event_id,
            payload_json=self._encode(event),
            key=None if key is None else str(key),
        )
