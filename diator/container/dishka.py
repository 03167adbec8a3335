"""Build handlers with a dishka container. Needs the extra `dishka`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar, cast

from diator._extras import importing
from diator._options import check_type
from diator.container.base import AnyClass, Resolver, Shared
from diator.context import MessageContext, current_message

with importing(__name__, "dishka", "dishka"):
    from dishka import AsyncContainer

T = TypeVar("T")


class DishkaContainer:
    """
    Resolves handlers from a dishka container, in one request scope for each send.

    The handlers must be provided there. The program owns *container*, and diator never closes it.

    Inside of a consumer, the context of a request scope contains the `MessageContext`: a provider that declares
    `from_context(MessageContext, scope=Scope.REQUEST)` passes it to handlers and to what they depend on.

    Raises:
        ConfigurationError: *container* is not an asynchronous container of dishka.
    """

    def __init__(self, container: AsyncContainer) -> None:
        check_type("container", container, AsyncContainer, is_needed=True)
        self._container = container

    async def resolve(self, type_: AnyClass[T], /) -> T:
        """Return a *type_* from the container's own scope, with dishka's errors."""
        return cast("T", await self._container.get(type_))

    def scope(self, shared: Shared, /) -> AbstractAsyncContextManager[Resolver]:  # dishka keeps its own state
        """See `ScopingResolver.scope`. dishka's request scope is closed with the error that ended it, if one did."""
        return self._request_scope()

    @asynccontextmanager
    async def _request_scope(self) -> AsyncGenerator[Resolver, None]:
        message = current_message()
        async with self._container(None if message is None else {MessageContext: message}) as request_container:
            yield DishkaContainer(request_container)
