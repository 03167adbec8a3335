from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from diator._hints import name_of
from diator.exceptions import UsageError

Session = TypeVar("Session")


class UnitOfWork(Generic[Session]):
    """
    A middleware that opens a session for each unit of work: for a container without scopes, or for a web framework.

    The session is committed when the unit of work succeeds, and rolled back when it fails. The container gives it to
    handlers and to the outbox:

        unit_of_work = UnitOfWork(sessions.begin)
        container.register(AsyncSession, unit_of_work.session)
        mediator = Mediator(requests, container, message_broker=outbox, middlewares=[unit_of_work])

    A request that a handler sends has a session of its own.

    Args:
        begin: Opens a session: returns an async context manager that gives it, and commits it at the end.
    """

    def __init__(self, begin: Callable[[], AbstractAsyncContextManager[Session]]) -> None:
        self._begin = begin
        self._current: ContextVar[Session | None] = ContextVar("diator.outbox.UnitOfWork", default=None)

    def session(self) -> Session:
        """
        Return the session of the unit of work.

        Raises:
            UsageError: There is none: this was called outside of `begin` and of the middleware.
        """
        session = self._current.get()
        if session is None:
            raise UsageError(
                f"no unit of work has begun here; pass the {name_of(type(self))} to middlewares, or call it inside of "
                "`async with unit_of_work.begin()`"
            )
        return session

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[Session]:
        """Open a session, as the middleware does: for the edge of a program, such as a dependency of FastAPI."""
        async with self._begin() as session:
            token = self._current.set(session)
            try:
                yield session
            finally:
                self._current.reset(token)

    async def __call__(self, message: Any, handle: Callable[[Any], Awaitable[Any]], /) -> Any:
        """Handle *message* with a session of its own."""
        async with self.begin():
            return await handle(message)
