from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import NoneType
from typing import Any, TypeAlias
from uuid import UUID

from diator._handlers import Prepared
from diator._hints import name_of
from diator.brokers.message import Message
from diator.brokers.sending import MessageBroker, transactional
from diator.container import Container
from diator.container.base import Resolver, Shared, has_scopes, scopes
from diator.events._event import Event, check_travels_whole, message_key_of, message_name_of, travels
from diator.events._handler import EventMap
from diator.exceptions import (
    BrokerNotConfigured,
    ConfigurationError,
    DiatorError,
    EncodingError,
    EventHandlersFailed,
    MessagesNotSent,
    NotAnEvent,
)

Outgoing: TypeAlias = list[tuple[Any, Message]]
"""Events that travel, and what they became."""

_Progress: TypeAlias = tuple[Iterator[Any], Outgoing, list[Exception], list[DiatorError]]


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
        check_parts(event_map=event_map, container=container, message_broker=message_broker)
        self._event_map = EventMap() if event_map is None else event_map
        self._container = container
        self._adopted: Resolver | None = None
        self._broker = message_broker
        self._send_messages: Callable[[Sequence[Message]], Awaitable[None]] | None = getattr(
            message_broker, "send_messages", None
        )
        self._plans: dict[type, _Plan] = {}

    async def emit(self, event: object) -> None:
        """
        Have *event* handled here, or send it, and then what its handlers raised.

        Raises:
            EventHandlersFailed: Handlers of a domain event failed; all of them ran, and nothing was sent.
            EncodingError, BrokerNotConfigured, NotAnEvent: It cannot travel; nothing was sent.
            BrokerError: The verdict on the message, or `MessagesNotSent` if there were several.
        """
        plan = self._plans.get(type(event)) or self._plan(type(event))
        if plan.message is not None and self._broker is not None:
            await self._broker.send_message(plan.message(event))
        else:
            await self._send(await self._handle([event], {}))

    # -- the two halves of `emit`, for the mediator: inside the unit of work, and after it -----------------------

    async def _handle(  # noqa: C901, PLR0912  # one loop, written out: every domain event goes through it
        self, raised: list[Any], shared: Shared, progress: _Progress | None = None
    ) -> Outgoing:
        """
        Run the handlers of the domain events, in the order raised, and encode the events that travel.

        What the handlers raise joins at the end of *raised*. Gives what is left to send after the unit of work:
        nothing, if the broker is part of the unit of work.

        Raises:
            EventHandlersFailed: Handlers failed. All handlers of all events ran.
        """
        remaining, outgoing, failures, refused = progress or (iter(raised), [], [], [])
        for event in remaining:
            try:
                plan = self._plans.get(type(event)) or self._plan(type(event))
                if plan.message is not None:
                    outgoing.append((event, plan.message(event)))
            except DiatorError as error:  # it cannot travel; the handlers of the others run all the same
                refused.append(error)
                continue
            if plan.needs_scope and not has_scopes(shared):
                async with scopes(shared):
                    remaining = itertools.chain((event,), remaining)
                    return await self._handle(raised, shared, (remaining, outgoing, failures, refused))
            for build, pending_events, handler in plan.steps:
                try:
                    if build is None:
                        await handler.call(event, shared, raised)
                    else:
                        built = build(shared)
                        try:
                            await built.handle(event)
                        except BaseException:
                            handler.take_events(built, ())
                            raise
                        if events := pending_events(built):
                            raised += handler.take_events(built, events)
                except Exception as error:  # noqa: BLE001  # all handlers run, then all errors are raised
                    error.add_note(f"raised by {handler.name}, which handles {name_of(type(event))}")
                    failures.append(error)
        if failures:
            raise EventHandlersFailed("handlers of domain events failed", [*failures, *refused])
        if refused:
            raise refused[0]
        if outgoing and transactional(self._broker):
            await self._send(outgoing)
            return []
        return outgoing

    async def _send(self, outgoing: Outgoing) -> None:
        """
        Send what `_handle` gave, in its order. It stops at the first message that is not confirmed.

        Raises:
            BrokerError: The verdict on the message, if there was one.
            MessagesNotSent: Of several messages, some were not confirmed.
        """
        broker, messages = self._broker, [message for _, message in outgoing]
        if not messages or broker is None:  # without a broker `_handle` has refused what travels
            return
        if len(messages) == 1:
            await broker.send_message(messages[0])
        elif self._send_messages is not None:
            await self._send_messages(messages)
        else:
            for position, message in enumerate(messages):
                try:
                    await broker.send_message(message)
                except Exception as error:
                    raise MessagesNotSent([each.message_id for each in messages[position:]]) from error

    # -- wiring --------------------------------------------------------------------------------------------------

    def _wire(self, container: Resolver) -> None:
        """
        Use *container* unless this emitter has one, and find out how every handler that is bound so far is built.

        Raises:
            ResolutionError: A handler can never be built.
            ConfigurationError: This emitter has no container, and already works with another mediator's.
        """
        if self._container is None:
            if self._adopted not in (None, container):
                raise ConfigurationError(
                    "two mediators with different containers share this EventEmitter; give it a container"
                )
            self._adopted = container
        for event_type in self._event_map:
            if not travels(
                event_type
            ):  # those are for a consumer; to send them a broker is needed, and it may be elsewhere
                self._plan(event_type)

    def _plan(self, event_type: type) -> _Plan:
        """Find out once what to do with events of this type."""
        if travels(event_type):
            if self._broker is None:
                raise BrokerNotConfigured(event_type)
            self._event_map._reserve_name(event_type)
            plan = _Plan((), message=_maker_of_messages(event_type))
        else:
            handlers = self._event_map._freeze(event_type)
            if not handlers and not issubclass(event_type, Event):
                raise NotAnEvent(f"{name_of(event_type)} was raised, and is neither an Event nor bound to a handler")
            container = next((each for each in (self._container, self._adopted) if each is not None), None)
            container = Container() if container is None else container
            plan = _Plan([Prepared(handler, container) for handler in handlers])
        self._plans[event_type] = plan
        return plan


def check_parts(*, event_map: object, container: object, message_broker: object) -> None:
    """Refuse what was mixed up, when a program is wired and not when its work is done. None is what was left out."""
    if not isinstance(event_map, (EventMap, NoneType)):
        raise ConfigurationError(f"event_map is {_what(event_map)}, and no EventMap")
    for name, part, method in (("container", container, "resolve"), ("message_broker", message_broker, "send_message")):
        if part is not None and (isinstance(part, type) or not callable(getattr(part, method, None))):
            raise ConfigurationError(f"{name} is {_what(part)}, and no object with `async def {method}`")


def _what(part: object) -> str:
    return f"the class {name_of(part)}" if isinstance(part, type) else f"a {name_of(type(part))}"


class _Plan:
    """What to do with events of one type: call these handlers, or make this message."""

    __slots__ = ("message", "needs_scope", "steps")

    def __init__(self, handlers: Sequence[Prepared], message: Callable[[Any], Message] | None = None) -> None:
        self.steps = [(handler.build, handler.pending_events, handler) for handler in handlers]
        self.needs_scope = any(handler.needs_scope for handler in handlers)
        self.message = message


def _maker_of_messages(event_type: Any) -> Callable[[Any], Message]:
    """Make the function that makes messages of such events: at once, so that a later change cannot reach them."""
    # Not at the top: a program whose events stay here never needs it, and it is half of the time to import diator.
    from diator.brokers.codec import payload_encoder  # noqa: PLC0415

    check_travels_whole(event_type)
    message_type: str = event_type.message_type
    message_name = message_name_of(event_type)
    key_field = message_key_of(event_type)
    encode = payload_encoder(event_type)

    def message(event: Any) -> Message:
        if event.event_timestamp.tzinfo is None or not isinstance(event.event_id, UUID):
            problem = "event_id is a UUID, and event_timestamp has a time zone: nobody could tell what is meant else"
            raise EncodingError(name_of(event_type), problem)
        key = None if key_field is None else getattr(event, key_field)
        return Message._of_fields(
            {
                "message_type": message_type,
                "message_name": message_name,
                "message_id": event.event_id,
                "payload_json": encode(event),
                "key": None if key is None else str(key),
                "headers": {},
            }
        )

    return message
