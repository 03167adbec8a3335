"""What a handler may be, which message it is for, and how it is called. The same for requests and events."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, ClassVar, Protocol, TypeAlias, cast, get_args, get_origin

from diator._hints import Parameter, UnresolvedName, fits, name_of, parameters_of
from diator.container.base import Build, BuildLater, Resolver, Shared, builder, is_registered, is_shared
from diator.exceptions import BindingError, ResolutionError, SharedHandler

Handler: TypeAlias = type[Any] | Callable[..., Awaitable[Any]]
"""A class with `async def handle(self, message)`, or a plain `async def` whose first parameter is the message."""


class Events(list[Any]):
    """
    The events that a handler raises, in the order in which they are to go out.

    A handler that is a function asks for it with a parameter: `async def join(command: Join, events: Events)`.
    """

    __slots__ = ()


class RaisesEvents:
    """What the handler base classes have in common: a list of events that is made when the first one is raised."""

    _raised: ClassVar[Events | None] = None  # of each object, but containers take a plain annotation for a dependency
    _diator_events_taken = False

    @property
    def events(self) -> list[Any]:
        """What was raised so far: `self.events.append(event)`. A handler may define a property of its own instead."""
        if self._raised is None:
            object.__setattr__(self, "_raised", Events())  # a handler may be a frozen dataclass
        return cast("Events", self._raised)


# -- binding -----------------------------------------------------------------------------------------------------


def message_type_of(handler: Handler) -> type:
    """
    Read from the annotation of *handler* which message it is for.

    Raises:
        BindingError: There is no such annotation, or it is no class.
    """
    try:
        parameter = _message_parameter(handler)
    except UnresolvedName as error:
        raise BindingError(str(error)) from error
    if not isinstance(parameter.hint, type) or parameter.hint is Any:
        raise BindingError(
            f"{name_of(handler)} does not say which message it handles: annotate {parameter.name!r} with one class"
        )
    return parameter.hint


def check_handler(message_type: type, handler: Handler) -> None:
    """
    Refuse what can never handle a *message_type*.

    Raises:
        BindingError: *handler* is abstract, is not asynchronous, or is annotated for another type.
    """
    if not isinstance(message_type, type):
        raise BindingError(f"{message_type!r} is no class that a handler can be bound to")
    try:
        parameter = _message_parameter(handler)
    except UnresolvedName:
        return  # what it is annotated for cannot be told; that it is for *message_type* was said
    if not fits(message_type, parameter.hint):
        raise BindingError(
            f"{name_of(handler)} handles {name_of(parameter.hint)} and cannot be bound to {name_of(message_type)}"
        )


def _message_parameter(handler: Handler) -> Parameter:
    if isinstance(handler, type):
        return _parameter_of_class(handler)
    given: Any = handler
    if not callable(given) or hasattr(given, "handle"):
        raise BindingError(
            f"{handler!r} is neither a handler class nor a function; bind the class, not an object of it"
        )
    if not _is_async(handler):
        raise BindingError(f"{name_of(handler)} is not asynchronous; write it as `async def`")
    return _first(handler, _parameters(handler))


def _parameter_of_class(handler: type) -> Parameter:
    handle = getattr(handler, "handle", None)
    if handle is None:
        raise BindingError(f"{name_of(handler)} is no handler: it has no method `handle` (@handler stands above one)")
    if inspect.isabstract(handler):
        missing = ", ".join(sorted(getattr(handler, "__abstractmethods__", ())))
        raise BindingError(f"{name_of(handler)} is abstract: it does not define {missing}")
    if not _is_async(handle):
        raise BindingError(f"{name_of(handle)} is not asynchronous; write it as `async def`")
    bound = isinstance(inspect.getattr_static(handler, "handle"), (staticmethod, classmethod))
    parameters = _parameters(handle)[0 if bound else 1 :]
    parameter = _first(handle, parameters)
    if too_much := [other.name for other in parameters[1:] if not other.has_default]:
        raise BindingError(f"{name_of(handle)} is called with the message alone, and also needs {', '.join(too_much)}")
    return parameter if isinstance(parameter.hint, type) else replace(parameter, hint=_named_by_base(handler))


def _named_by_base(handler: type) -> type | None:
    """Find `Join` in `class JoinHandler(RequestHandler[Join, None])`, for a `handle` without an annotation."""
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
        raise BindingError(f"{name_of(call)} takes no message")
    return parameters[0]


def _is_async(call: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


# -- calling -----------------------------------------------------------------------------------------------------

PendingEvents: TypeAlias = Callable[[Any], Sequence[Any] | None]
"""Return the events that a handler raised. Most handlers raise none, so the check is as cheap as can be."""
TakeEvents: TypeAlias = Callable[[Any, Sequence[Any]], list[Any]]
"""
Takes the events that were found from the handler. With none, after an error: makes sure that those which it raised
before it failed cannot go out with the next message, should the container give out the same object again.
"""


class Call(Protocol):
    """A handler made ready: called with a message, what its send shares, and the list that its events go to."""

    async def __call__(self, message: Any, shared: Shared, raised: list[Any], /) -> Any: ...


class Prepared:
    """
    How one handler is built and called, found out once.

    Attributes:
        name: For notes and logs.
        call: Builds and calls it.
        needs_scope: Whether `call` has to be inside `scopes`.
        build: Builds a handler class without waiting, if the container can; `call` is then also written out where
            each coroutine counts: build it, await its `handle`, check `pending_events` and `take_events`.
    """

    __slots__ = ("build", "call", "name", "needs_scope", "pending_events", "take_events")

    def __init__(self, handler: Handler, container: Resolver) -> None:
        self.name = name_of(handler)
        self.build: Build[Any] | None = None
        self.pending_events, self.take_events = _events_of(handler)
        if isinstance(handler, type):
            if hasattr(handler, "events") and is_shared(container, handler):
                problem = f"{self.name} is registered as one object for all, and what raises events has to be made anew"
                raise ResolutionError([self.name], problem)
            self.build, build_later = builder(container, handler)
            self.needs_scope = self.build is None
            self.call: Call = _calling_class(build_later, self.pending_events, self.take_events)
        else:
            needs = _dependencies(handler, container)
            self.needs_scope = any(needs_scope for _, _, needs_scope in needs)
            self.call = _calling_function(handler, [(name, build) for name, build, _ in needs])


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
        given = {name: events if build is None else await build(shared) for name, build in needs}
        response = await function(message, **given)
        raised += events
        return response

    return call_with_needs


def _dependencies(function: Callable[..., Any], container: Resolver) -> list[tuple[str, Any, bool]]:
    """List what *function* takes beside the message: its name, how it is built (None: the events), if in a scope."""
    dependencies: list[tuple[str, Any, bool]] = []
    try:
        parameters = _parameters(function)[1:]
    except UnresolvedName as error:
        raise ResolutionError([name_of(function)], str(error)) from error
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ResolutionError([name_of(function)], f"parameter {parameter.name!r} can only be given by position")
        if parameter.hint is Events:
            dependencies.append((parameter.name, None, False))
        elif parameter.has_default and not is_registered(container, parameter.hint, unless_told=False):
            continue
        elif parameter.hint is None:
            hint = "; for the events it is `events: Events`" if parameter.name == "events" else ""
            problem = f"parameter {parameter.name!r} of {name_of(function)} has no type hint{hint}"
            raise ResolutionError([name_of(function)], problem)
        elif not is_registered(container, parameter.hint, unless_told=True):
            needed = name_of(parameter.hint)
            problem = f"{needed} is not registered; call register({needed}, …) or register_instance"
            raise ResolutionError([name_of(function), needed], problem)
        else:
            build, build_later = builder(container, parameter.hint)
            dependencies.append((parameter.name, build_later, build is None))
    return dependencies


def _events_of(handler: Handler) -> tuple[PendingEvents, TakeEvents]:
    declared = inspect.getattr_static(handler, "events", None)
    if declared is None:
        return (lambda handler: getattr(handler, "events", None)), _take_declared  # perhaps made by its constructor
    if declared is RaisesEvents.__dict__["events"]:
        return attrgetter("_raised"), _take_raised
    return attrgetter("events"), _take_declared


def _take_raised(handler: RaisesEvents, events: Sequence[Any]) -> list[Any]:
    # Taken away, so that an object which handles several messages never sends the events of one with the next.
    object.__setattr__(handler, "_raised", None)
    return [*events]


def _take_declared(handler: Any, events: Sequence[Any]) -> list[Any]:
    if events and getattr(handler, "_diator_events_taken", False):
        raise SharedHandler(type(handler))
    try:  # noqa: SIM105  # `suppress` costs more than all the rest
        object.__setattr__(handler, "_diator_events_taken", True)
    except AttributeError:
        pass  # a class with `__slots__` has no place for the mark
    return [*events]
