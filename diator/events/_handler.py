from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, Protocol, TypeVar

from diator._handlers import Handler, RaisesEvents, check_handler, message_type_of
from diator._hints import name_of
from diator.events._event import message_name_of, travels
from diator.exceptions import BindingError

E_contra = TypeVar("E_contra", contravariant=True)
EventType = TypeVar("EventType")
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class EventHandler(RaisesEvents, ABC, Generic[E_contra]):
    """
    Handles one type of event. A new object is built for each event, by the container.

    A handler of a domain event runs inside the unit of work of the request that raised it, and may raise further
    events, which join those of the request.
    """

    @abstractmethod
    async def handle(self, event: E_contra, /) -> None:
        """Do what follows from *event*."""
        raise NotImplementedError


class HandlesEvent(Protocol[E_contra]):
    """What a handler class has to have. `EventHandler` is the convenient way to have it."""

    async def handle(self, event: E_contra, /) -> Any: ...


class EventMap:
    """Which handlers are for which type of event: any number each, called in the order in which they were bound."""

    def __init__(self) -> None:
        self._handlers: dict[type, list[Handler]] = {}
        self._names: dict[str, type] = {}
        self._settled: set[type] = set()

    def bind(
        self,
        event_type: type[EventType],
        handler: type[HandlesEvent[EventType]] | Callable[Concatenate[EventType, ...], Awaitable[Any]],
    ) -> None:
        """
        Have *handler*, a class or an `async def`, handle each *event_type* beside those that do so already.

        A subclass of *event_type* is another event and has handlers of its own.

        Raises:
            BindingError: *handler* is bound to it already, is abstract, not asynchronous, or declared for another
                event; another event class has this one's name on the wire; or events of this type were handled before.
        """
        check_handler(event_type, handler)
        if event_type in self._settled:
            raise BindingError(f"{name_of(event_type)} is in use; bind its handlers before the mediator is made")
        handlers = self._handlers.get(event_type, [])
        if handler in handlers:
            raise BindingError(f"{name_of(handler)} is bound to {name_of(event_type)} already")
        self._reserve_name(event_type)
        self._handlers[event_type] = [*handlers, handler]

    def handler(self, handler: AnyHandler) -> AnyHandler:
        """
        Bind the decorated class or function to the event that its annotation names.

        Raises:
            BindingError: As `bind`, and if there is no such annotation.
        """
        self.bind(message_type_of(handler), handler)
        return handler

    def get(self, event_type: type) -> Sequence[Handler]:
        """Give the handlers of *event_type*, in the order in which they were bound; none is no error."""
        return tuple(self._handlers.get(event_type, ()))

    def _freeze(self, event_type: type) -> Sequence[Handler]:
        """Give the handlers of *event_type* for good: one that was bound later would be left out in silence."""
        self._settled.add(event_type)
        return self.get(event_type)

    def _reserve_name(self, event_type: type) -> None:
        """
        Keep the wire name of *event_type* for it alone, if it travels. Services differ in whether case counts.

        Raises:
            BindingError: Another event class has this name, or one that differs only in case.
        """
        if not travels(event_type):
            return
        name = message_name_of(event_type)
        owner = self._names.setdefault(name.casefold(), event_type)
        if owner is not event_type:
            raise BindingError(
                f"{owner.__module__}.{name_of(owner)} and {event_type.__module__}.{name_of(event_type)} have one name "
                f"on the wire ({message_name_of(owner)!r}, {name!r}); give one of them another `message_name`"
            )

    def __iter__(self) -> Iterator[type]:
        return iter(self._handlers)
