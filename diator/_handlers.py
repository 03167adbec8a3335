"""What a handler may be, which message it handles, and how to call it: the same for requests and events."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, TypeAlias, cast, get_args, get_origin

from diator._hints import Parameter, UnresolvedName, fits, function_of, name_of, parameters_of
from diator.container.base import BuildLater, Construction, Resolver, Shared, builder, is_registered, is_shared
from diator.context import MessageContext, current_message, needed_message
from diator.exceptions import BindingError, NotAnEvent, ResolutionError, SharedHandler

#: A class with `async def handle(self, message)`, or an `async def` function whose first parameter is the message.
Handler: TypeAlias = type[Any] | Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class WithHeaders:
    """
    An integration event that is raised with *headers*: `self.events.append(WithHeaders(event, {"region": "eu"}))`.

    It can be raised, and passed to `EventEmitter.emit`, instead of the event. The headers take precedence over all
    others.
    """

    event: Any
    headers: Mapping[str, str] = field(repr=False)


#: A database refuses a time that is too far away.
_LATEST = timedelta(days=100 * 365)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """
    An integration event that is raised now and sent later: `self.events.append(Scheduled(event, after=3600))`.

    It can be raised, and passed to `EventEmitter.emit`, instead of the event; *event* may be a `WithHeaders`. It needs
    an outbox, which keeps the message until then. The clock of the database decides when that is.

    Attributes:
        event: The event.
        at: When it may be sent, with a time zone. A time that is over means now.
        after: How long after it is stored it may be sent, in seconds or as a `timedelta`. Pass either this or *at*.

    Raises:
        NotAnEvent: Both or none of *at* and *after* are passed, or one that is no such time.
    """

    event: Any
    at: datetime | None = None
    after: timedelta | float | None = None

    def __post_init__(self) -> None:
        if (self.at is None) == (self.after is None):
            raise NotAnEvent("a scheduled event needs either at or after")
        at: object = self.at
        if at is not None and (not isinstance(at, datetime) or at.utcoffset() is None):
            raise NotAnEvent("the time `at` of a scheduled event must be a datetime with a time zone")
        try:
            is_too_late = isinstance(self.due, timedelta) and self.due > _LATEST
        except (TypeError, ValueError, OverflowError):
            raise NotAnEvent("the time `after` of a scheduled event must be seconds or a timedelta") from None
        if is_too_late:
            raise NotAnEvent(f"the time `after` of a scheduled event must be at most {_LATEST.days:,} days")

    @property
    def due(self) -> datetime | timedelta:
        """When it may be sent: *at*, or *after* as a `timedelta`, at least 0."""
        if self.at is not None:
            return self.at
        assert self.after is not None  # noqa: S101  # for type checkers: one of them is passed
        after = self.after if isinstance(self.after, timedelta) else timedelta(seconds=self.after)
        return max(after, timedelta(0))


class Events(list[Any]):
    """
    The list of events that a handler raises. They are handled or sent in this order.

    A handler that is a function receives the list as a parameter: `async def join(command: Join, events: Events)`.
    """

    __slots__ = ()

    def append(
        self,
        event: Any,
        /,
        *,
        headers: Mapping[str, str] | None = None,
        at: datetime | None = None,
        after: timedelta | float | None = None,
    ) -> None:
        """
        Raise *event*; an integration event with *headers* as `WithHeaders`, and later as `Scheduled`.

        Raises:
            NotAnEvent: As `Scheduled`.
        """
        raised = event if headers is None else WithHeaders(event, headers)
        super().append(raised if at is None and after is None else Scheduled(raised, at, after))


class RaisesEvents:
    """The common part of the handler base classes: a list of events, made when it is first used."""

    # Set per object. Without an annotation, because a container may take the annotations of a class for dependencies.
    _raised = cast("Events | None", None)
    _diator_events_taken = False

    @property
    def events(self) -> list[Any]:
        """The events raised so far; add one with `self.events.append(event)`. A handler may define its own property."""
        if self._raised is None:
            object.__setattr__(self, "_raised", Events())  # a handler may be a frozen dataclass
        return cast("Events", self._raised)


def _set_events(handler: RaisesEvents, events: list[Any]) -> None:
    """Raise these events instead. `self.events += [event]` extends the list, and then sets it."""
    if events is not handler._raised:  # noqa: SLF001
        object.__setattr__(handler, "_raised", Events(events))


# Not for type checkers: they would refuse a property without a setter in a subclass, as handlers of 0.0.3 have it.
RaisesEvents.events = RaisesEvents.events.setter(_set_events)  # type: ignore[attr-defined, method-assign]


# -- binding -----------------------------------------------------------------------------------------------------


def message_type_of(handler: Handler) -> type:
    """
    Return the type of message that *handler* is annotated with.

    Raises:
        BindingError: The annotation is missing or is not a class.
    """
    try:
        parameter = _message_parameter(handler)
    except UnresolvedName as error:
        raise BindingError(str(error)) from error
    if not isinstance(parameter.hint, type) or parameter.hint is Any:
        raise BindingError(
            f"the message of {name_of(handler)} has no usable type: annotate {parameter.name!r} with one class"
        )
    return parameter.hint


def check_handler(message_type: type, handler: Handler) -> None:
    """
    Check that *handler* can handle a *message_type*.

    Raises:
        BindingError: *handler* is abstract, is not asynchronous, or is annotated with another type.
    """
    if not isinstance(message_type, type):
        raise BindingError(f"{message_type!r} is not a class; bind handlers to the class of a request or an event")
    try:
        parameter = _message_parameter(handler)
    except UnresolvedName:
        return  # the annotation cannot be evaluated, but the program named *message_type* in `bind`
    if not fits(message_type, parameter.hint):
        raise BindingError(
            f"{name_of(handler)} handles {name_of(parameter.hint)} and cannot be bound to {name_of(message_type)}"
        )


def _message_parameter(handler: Handler) -> Parameter:
    if isinstance(handler, type):
        return _parameter_of_class(handler)
    function: Any = handler
    if not callable(function) or hasattr(function, "handle"):
        raise BindingError(
            f"an object of {name_of(type(handler))} is neither a handler class nor a function; bind the class, not an "
            "instance"
        )
    if isinstance(function_of(handler), type):
        raise BindingError(
            f"a partial of the class {name_of(handler)} is not a handler; bind the class, and let the container pass "
            "the arguments"
        )
    if not _is_async(handler):
        raise BindingError(f"{name_of(handler)} is not asynchronous; define it with `async def`")
    return _first(handler, _parameters(handler))


def _parameter_of_class(handler: type) -> Parameter:
    handle = getattr(handler, "handle", None)
    if handle is None:
        raise BindingError(
            f"{name_of(handler)} has no method `handle`; bind a class with `async def handle(self, message)`"
        )
    if inspect.isabstract(handler):
        missing = ", ".join(sorted(getattr(handler, "__abstractmethods__", ())))
        raise BindingError(f"{name_of(handler)} is abstract; define {missing}")
    if not _is_async(handle):
        raise BindingError(f"{name_of(handle)} is not asynchronous; define it with `async def`")
    if isinstance(inspect.getattr_static(handler, "events", None), list):
        raise BindingError(
            f"{name_of(handler)}.events is one list for all objects of the class, so events would be sent twice; make "
            "it in the constructor"
        )
    bound = isinstance(inspect.getattr_static(handler, "handle"), (staticmethod, classmethod))
    parameters = _parameters(handle)[0 if bound else 1 :]
    parameter = _first(handle, parameters)
    if too_much := [other.name for other in parameters[1:] if not other.has_default]:
        raise BindingError(
            f"{name_of(handle)} is called with the message alone, but also needs {', '.join(too_much)}; let the "
            "constructor take dependencies"
        )
    return parameter if isinstance(parameter.hint, type) else replace(parameter, hint=_named_by_base(handler))


def _named_by_base(handler: type) -> type | None:
    """Return `Join` for `class JoinHandler(RequestHandler[Join, None])` whose `handle` has no annotation."""
    for base in (base for class_ in handler.__mro__ for base in getattr(class_, "__orig_bases__", ())):
        arguments = get_args(base)
        if arguments and hasattr(get_origin(base), "handle") and isinstance(arguments[0], type):
            return arguments[0]
    return None


def _parameters(call: Callable[..., Any]) -> list[Parameter]:
    try:
        return parameters_of(call)
    except UnresolvedName:
        raise
    except TypeError as error:
        raise BindingError(str(error)) from error


def _first(call: Callable[..., Any], parameters: Sequence[Parameter]) -> Parameter:
    if not parameters or not parameters[0].by_position:
        raise BindingError(f"{name_of(call)} takes no message; its first parameter must be the message")
    return parameters[0]


def _is_async(call: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function_of(call))


# -- calling -----------------------------------------------------------------------------------------------------

#: Returns the events that a handler raised. Most handlers raise none, so this is the cheaper half.
PendingEvents: TypeAlias = Callable[[Any], Sequence[Any] | None]
#: Takes the events found by `PendingEvents` from a handler. Called with none after an error, it discards the events:
#: they must not be sent with the next message if the container returns the same object again.
TakeEvents: TypeAlias = Callable[[Any, Sequence[Any]], list[Any]]


class Call(Protocol):
    """Builds and calls a handler, with a message, the state of the send, and the list to add its events to."""

    async def __call__(self, message: Any, shared: Shared, raised: list[Any], /) -> Any: ...


class PreparedHandler:
    """
    How to build and call one handler. Computed once.

    Attributes:
        name: The name of the handler, for notes and logs.
        may_raise_events: Whether the handler may raise events, as far as its class or its parameters tell.
        call: Builds and calls the handler.
        needs_scope: Whether `call` must run inside `scopes`.
        build: Builds the handler without waiting; None for a function, or if the container has to wait.
        arguments: The arguments of `build`; None: the state of the send is its only argument.
        pending_events: Returns the events that the handler raised.
        take_events: Takes these events from the handler.

    Four places repeat the code of `call` for a handler with `build`, to save a coroutine: `Mediator.send`, the
    dispatcher, the loop of the emitter, and `_handling`. A comment at each states what that saves. Keep them alike.
    """

    __slots__ = (
        *("arguments", "build", "call", "may_raise_events", "name", "needs_scope", "pending_events", "take_events"),
    )

    def __init__(self, handler: Handler, container: Resolver) -> None:
        self.name = name_of(handler)
        self.build: Callable[..., Any] | None = None
        self.arguments: tuple[Any, ...] | None = None
        self.pending_events: PendingEvents = _no_events
        self.take_events: TakeEvents = _copied
        if isinstance(handler, type):
            if hasattr(handler, "events") and is_shared(container, handler):
                problem = f"{self.name} raises events, so it must be transient; it is registered as a singleton"
                raise ResolutionError([self.name], problem)
            self.may_raise_events = hasattr(handler, "events")
            self.build, build_later = builder(container, handler)
            self.needs_scope = self.build is None
            is_new = False
            if isinstance(self.build, Construction):
                is_new, self.arguments, self.build = self.build.is_new, self.build.arguments, self.build.call
            self.pending_events, self.take_events = _events_of(handler, is_new=is_new)
            self.call: Call = _calling_class(build_later, self.pending_events, self.take_events)
        else:
            needs = _dependencies(handler, container)
            self.may_raise_events = any(build is None for _, build, _ in needs)
            self.needs_scope = any(needs_scope for _, _, needs_scope in needs)
            self.call = _calling_function(handler, [(name, build) for name, build, _ in needs])

    def note(self, error: Exception, message: object) -> None:
        """Add a note with the name of this handler to the *error* that it raised for *message*."""
        note = f"raised by {self.name}, which handles {name_of(type(message))}"
        try:
            error.add_note(note)
        except Exception:  # noqa: BLE001  # a frozen dataclass refuses it, and a class may have its own `add_note`
            with suppress(Exception):  # without a note, the error is still the error
                object.__setattr__(error, "__notes__", [*getattr(error, "__notes__", ()), note])


def _calling_class(build: BuildLater[Any], pending_events: PendingEvents, take_events: TakeEvents) -> Call:
    async def call(message: Any, shared: Shared, raised: list[Any], /) -> Any:
        handler = await build(shared)
        try:
            response = await handler.handle(message)
        except BaseException:
            take_events(handler, ())
            raise
        if events := pending_events(handler):
            raised += take_events(handler, events)
        return response

    return call


def _calling_function(function: Callable[..., Awaitable[Any]], needs: Sequence[tuple[str, Any]]) -> Call:
    if not needs:

        async def call(message: Any, shared: Shared, raised: list[Any], /) -> Any:  # noqa: ARG001
            return await function(message)

        return call

    async def call_with_needs(message: Any, shared: Shared, raised: list[Any], /) -> Any:
        events = Events()
        arguments = {name: events if build is None else await build(shared) for name, build in needs}
        response = await function(message, **arguments)
        raised += events
        return response

    return call_with_needs


def _dependencies(function: Callable[..., Any], container: Resolver) -> list[tuple[str, Any, bool]]:
    """Return the dependencies of *function*: the name, how to build it (None: the events), and if it needs a scope."""
    dependencies: list[tuple[str, Any, bool]] = []
    try:
        parameters = _parameters(function)[1:]
    except UnresolvedName as error:
        raise ResolutionError([name_of(function)], str(error)) from error
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ResolutionError(
                [name_of(function)], f"parameter {parameter.name!r} is positional-only; remove the `/`"
            )
        if parameter.hint is Events:
            dependencies.append((parameter.name, None, False))
        elif parameter.hint is MessageContext and not is_registered(container, MessageContext, default=False):
            ask = current_message if parameter.may_be_none else partial(needed_message, function)
            dependencies.append((parameter.name, _asking(ask), False))
        elif parameter.has_default and not is_registered(container, parameter.hint, default=False):
            continue
        elif parameter.hint is None:
            hint = "; annotate it as `events: Events`" if parameter.name == "events" else ""
            problem = f"parameter {parameter.name!r} of {name_of(function)} has no type hint{hint}"
            raise ResolutionError([name_of(function)], problem)
        elif not is_registered(container, parameter.hint, default=True):
            needed = name_of(parameter.hint)
            problem = f"{needed} is not registered; call register({needed}, …) or register_instance"
            raise ResolutionError([name_of(function), needed], problem)
        else:
            build, build_later = builder(container, parameter.hint)
            dependencies.append((parameter.name, build_later, build is None))
    return dependencies


def _asking(ask: Callable[[], MessageContext | None]) -> BuildLater[MessageContext | None]:
    async def ask_at_once(_: Shared) -> MessageContext | None:
        return ask()

    return ask_at_once


_EVENTS = RaisesEvents.__dict__["events"]
_raised: PendingEvents = attrgetter("_raised")


def _events_of(handler: type, *, is_new: bool) -> tuple[PendingEvents, TakeEvents]:
    """
    Return how to find and to take the events of a handler class.

    *is_new*: as `Construction.is_new`. Otherwise a container may return one object for several messages, or an object
    of a subclass, whose property is another one.
    """
    declared = inspect.getattr_static(handler, "events", None)
    if declared is None:
        return _events_if_any, _copied if is_new else _take_declared  # its constructor may set them
    if declared is _EVENTS:
        return (_raised, _copied) if is_new else (_pending_of_base(handler), _take_of_base)
    if is_new and type(declared) is property and declared.fget is not None:
        return declared.fget, _copied  # the function of the property takes half of the time of the property
    return attrgetter("events"), _copied if is_new else _take_declared


def _no_events(_: Any) -> None:
    """Return the events of a handler that is a function: `PreparedHandler.call` takes those from its parameter."""


def _events_if_any(handler: Any) -> Sequence[Any] | None:
    return getattr(handler, "events", None)


def _pending_of_base(handler: Any) -> PendingEvents:
    def pending(built: RaisesEvents) -> Sequence[Any] | None:
        return built._raised if type(built) is handler else built.events  # noqa: SLF001

    return pending


def _copied(_: Any, events: Sequence[Any]) -> list[Any]:
    return [*events]


def _take_of_base(handler: Any, events: Sequence[Any]) -> list[Any]:
    if type(handler).events is not _EVENTS:
        return _take_declared(handler, events)
    # Reset, so that an object that handles several messages never sends the events of one with the next.
    object.__setattr__(handler, "_raised", None)
    return [*events]


def _take_declared(handler: Any, events: Sequence[Any]) -> list[Any]:
    if events and getattr(handler, "_diator_events_taken", False):
        raise SharedHandler(type(handler))
    try:  # noqa: SIM105  # `suppress` costs more than the rest of the function
        object.__setattr__(handler, "_diator_events_taken", True)
    except AttributeError:
        pass  # a class with `__slots__` cannot hold the mark
    return [*events]
