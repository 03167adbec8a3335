from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, Protocol, TypeVar

from diator._handlers import Handler, RaisesEvents, check_handler, message_type_of
from diator._hints import name_of
from diator.events._event import is_integration_event, message_name_of
from diator.exceptions import BindingError

E_contra = TypeVar("E_contra", contravariant=True)
EventType = TypeVar("EventType")
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class EventHandler(RaisesEvents, ABC, Generic[E_contra]):
    """
    Handles one type of event. The container builds a new handler for each event.

    The handler of a domain event runs inside the unit of work of the request whose handler raised the event. A handler
    may append further events to `self.events`; they are handled or sent with the events of the request.
    """

    @abstractmethod
    async def handle(self, event: E_contra, /) -> None:
        """Handle *event*. After an error, `Mediator.send` raises `EventHandlersFailed`, and a consumer retries."""
        raise NotImplementedError


class HandlesEvent(Protocol[E_contra]):
    """The method that every handler class needs. `EventHandler` is a base class with it."""

    async def handle(self, event: E_contra, /) -> Any:
        """Handle *event*."""
        ...


class EventMap:
    """Maps each type of event to its handlers, which are called in the order in which they were bound."""

    def __init__(self) -> None:
        self._handlers: dict[type, list[Handler]] = {}
        self._names: dict[str, type] = {}
        self._frozen: set[type] = set()

    def bind(
        self,
        event_type: type[EventType],
        handler: type[HandlesEvent[EventType]] | Callable[Concatenate[EventType, ...], Awaitable[Any]],
    ) -> None:
        """
        Bind *handler*, a class or an `async def`, to *event_type*. An event may have any number of handlers.

        The binding does not apply to subclasses of *event_type*: each needs handlers of its own.

        Raises:
            BindingError: *handler* is already bound to *event_type*, is abstract, not asynchronous, or annotated with
                another event; another event class has the same wire name; or events of this type were already handled.
        """
        check_handler(event_type, handler)
        if event_type in self._frozen:
            raise BindingError(
                f"{name_of(event_type)} is already in use; bind its handlers before the mediator is made"
            )
        handlers = self._handlers.get(event_type, [])
        if handler in handlers:
            raise BindingError(
                f"{name_of(handler)} is already bound to {name_of(event_type)}; remove one of the bindings"
            )
        self._reserve_name(event_type)
        self._handlers[event_type] = [*handlers, handler]

    def handler(self, handler: AnyHandler) -> AnyHandler:
        """
        Bind the decorated class or function to the type of event that its annotation names. A decorator.

        Raises:
            BindingError: As `bind`; or the annotation is missing.
        """
        self.bind(message_type_of(handler), handler)
        return handler

    def get(self, event_type: type) -> Sequence[Handler]:
        """Return the handlers of *event_type* in the order in which they were bound; empty if it has none."""
        return tuple(self._handlers.get(event_type, ()))

    def _freeze(self, event_type: type) -> Sequence[Handler]:
        """Return the handlers of *event_type*, and refuse later ones: they would be ignored silently."""
        self._frozen.add(event_type)
        return self.get(event_type)

    def _reserve_name(self, event_type: type) -> None:
        """
        Reserve the wire name of *event_type* for this class, if it is an integration event.

        Some services ignore case, so two names must differ in more than case.

        Raises:
            BindingError: Another event class has this name, or a name that differs only in case.
        """
        if not is_integration_event(event_type):
            return
        name = message_name_of(event_type)
        owner = self._names.setdefault(name.casefold(), event_type)
        if owner is not event_type:
            raise BindingError(
                f"{owner.__module__}.{name_of(owner)} and {event_type.__module__}.{name_of(event_type)} have the same "
                f"wire name ({message_name_of(owner)!r}, {name!r}); set `message_name` in one of them"
            )

    def __iter__(self) -> Iterator[type]:
        return iter(self._handlers)
