from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Concatenate, Generic, Protocol, get_args, get_origin

from diator._handlers import Handler, RaisesEvents, check_handler, message_type_of
from diator._hints import fits, hints_of, name_of
from diator.exceptions import BindingError, HandlerNotFound

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar  # its `default` makes a bare Request a Request[Any]

Res_co = TypeVar("Res_co", covariant=True, default=Any)
Req_contra = TypeVar("Req_contra", contravariant=True)
Response_co = TypeVar("Response_co", covariant=True)
RequestType = TypeVar("RequestType")
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class Request(Generic[Res_co]):
    """
    A command or a query, with the type of its response: `class ReadMeeting(Request[MeetingLink])`.

    It has no fields, so a dataclass, an attrs class, or a pydantic or msgspec model may derive from it. A class that
    does not derive from it can be a request too, but then a type checker does not know the type of the response.
    """

    __slots__ = ()


class RequestHandler(RaisesEvents, ABC, Generic[Req_contra, Response_co]):
    """
    Handles one type of request. The container builds a new handler for each request.

    Append events to `self.events`. The mediator handles or sends them after `handle` has returned, in the order in
    which they were appended. If `handle` raises an error, the mediator discards them.
    """

    @abstractmethod
    async def handle(self, request: Req_contra, /) -> Response_co:
        """Handle *request* and return the response. The caller of `Mediator.send` receives an error unchanged."""
        raise NotImplementedError


class HandlesRequest(Protocol[Req_contra]):
    """The method that every handler class needs. `RequestHandler` is a base class with it."""

    async def handle(self, request: Req_contra, /) -> Any:
        """Handle *request* and return the response."""
        ...


class RequestMap:
    """Maps each type of request to its one handler. Bind all handlers before the mediator is made."""

    def __init__(self) -> None:
        self._handlers: dict[type, Handler] = {}

    def bind(
        self,
        request_type: type[RequestType],
        handler: type[HandlesRequest[RequestType]] | Callable[Concatenate[RequestType, ...], Awaitable[Any]],
    ) -> None:
        """
        Bind *handler*, a class or an `async def`, to *request_type*.

        The binding does not apply to subclasses of *request_type*: each needs a handler of its own.

        Raises:
            BindingError: *request_type* already has a handler; or *handler* is abstract, not asynchronous, or
                annotated with another request or another response.
        """
        if request_type in self._handlers:
            bound = name_of(self._handlers[request_type])
            raise BindingError(f"{name_of(request_type)} is already bound to {bound}; bind one handler to each request")
        check_handler(request_type, handler)
        _check_answer(request_type, handler)
        self._handlers[request_type] = handler

    def handler(self, handler: AnyHandler) -> AnyHandler:
        """
        Bind the decorated class or function to the type of request that its annotation names. A decorator.

        Raises:
            BindingError: As `bind`; or the annotation is missing.
        """
        self.bind(message_type_of(handler), handler)
        return handler

    def get(self, request_type: type) -> Handler:
        """Return the handler of *request_type*. HandlerNotFound if it has none."""
        try:
            return self._handlers[request_type]
        except KeyError:
            raise HandlerNotFound(request_type) from None

    def __iter__(self) -> Iterator[type]:
        return iter(self._handlers)


def _check_answer(request_type: type, handler: Handler) -> None:
    """Compare the response of the request with the return annotation of the handler, where both are plain classes."""
    promised = next(
        (get_args(base)[0] for base in getattr(request_type, "__orig_bases__", ()) if get_origin(base) is Request), None
    )
    try:
        given = hints_of(getattr(handler, "handle", handler)).get("return")
    except TypeError:
        return
    if isinstance(given, type) and not fits(given, promised):
        raise BindingError(
            f"{name_of(handler)} returns {name_of(given)}, but the response of {name_of(request_type)} is "
            f"{name_of(promised)}; change one of the annotations"
        )
