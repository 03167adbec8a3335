"""Requests, what handles them, and which handler is for which."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Concatenate, Generic, Protocol, get_args, get_origin

from diator._handlers import Events, Handler, RaisesEvents, check_handler, message_type_of
from diator._hints import fits, hints_of, name_of
from diator.exceptions import BindingError, HandlerNotFound

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar  # for the default: a bare Request is a Request[Any]

Res_co = TypeVar("Res_co", covariant=True, default=Any)
Req_contra = TypeVar("Req_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)
RequestType = TypeVar("RequestType")
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class Request(Generic[Res_co]):
    """
    A command or a query, and the type of its answer: `class ReadMeeting(Request[MeetingLink])`.

    It holds nothing, so a dataclass, an attrs class or a model of pydantic or msgspec may derive from it. A class
    that does not derive from it can be a request too; only the type of its answer is then not known to checkers.
    """

    __slots__ = ()


class RequestHandler(RaisesEvents, ABC, Generic[Req_contra, Answer_co]):
    """
    Handles one type of request. A new object is built for each request, by the container.

    The events that it raises go out when it is done, in their order; if it fails, none of them does.
    """

    @abstractmethod
    async def handle(self, request: Req_contra, /) -> Answer_co:
        """Do what *request* asks and answer it. An error reaches the caller of `Mediator.send` as it is."""
        raise NotImplementedError


class HandlesRequest(Protocol[Req_contra]):
    """What a handler class has to have. `RequestHandler` is the convenient way to have it."""

    async def handle(self, request: Req_contra, /) -> Any: ...


class RequestMap:
    """Which handler is for which type of request: exactly one each."""

    def __init__(self) -> None:
        self._handlers: dict[type, Handler] = {}

    def bind(
        self,
        request_type: type[RequestType],
        handler: type[HandlesRequest[RequestType]] | Callable[Concatenate[RequestType, ...], Awaitable[Any]],
    ) -> None:
        """
        Have *handler*, a class or an `async def`, handle each *request_type*.

        A subclass of *request_type* is another request and has a handler of its own.

        Raises:
            BindingError: *request_type* has a handler, or *handler* is abstract, not asynchronous, or declared for
                another request or another answer.
        """
        if request_type in self._handlers:
            bound = name_of(self._handlers[request_type])
            raise BindingError(f"{name_of(request_type)} is handled by {bound}; a request has one handler")
        check_handler(request_type, handler)
        _check_answer(request_type, handler)
        self._handlers[request_type] = handler

    def handler(self, handler: AnyHandler) -> AnyHandler:
        """
        Bind the decorated class or function to the request that its annotation names.

        Raises:
            BindingError: As `bind`, and if there is no such annotation.
        """
        self.bind(message_type_of(handler), handler)
        return handler

    def get(self, request_type: type) -> Handler:
        """Give the handler of *request_type*. HandlerNotFound if there is none."""
        try:
            return self._handlers[request_type]
        except KeyError:
            raise HandlerNotFound(request_type) from None

    def __iter__(self) -> Iterator[type]:
        return iter(self._handlers)


def _check_answer(request_type: type, handler: Handler) -> None:
    """Compare what the request promises with what the handler says it returns, where both are plain classes."""
    promised = next(
        (get_args(base)[0] for base in getattr(request_type, "__orig_bases__", ()) if get_origin(base) is Request), None
    )
    try:
        given = hints_of(getattr(handler, "handle", handler)).get("return")
    except TypeError:
        return
    if isinstance(given, type) and not fits(given, promised):
        raise BindingError(
            f"{name_of(request_type)} promises {name_of(promised)}, and {name_of(handler)} answers {name_of(given)}"
        )


__all__ = ["Events", "HandlesRequest", "Request", "RequestHandler", "RequestMap"]
