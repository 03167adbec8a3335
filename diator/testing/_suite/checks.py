"""The checks of a scenario, and the tasks that it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from diator.testing._suite.errors import Nonconformance, NotApplicable

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class Checks:
    """The base of the context of a scenario. What the scenario starts through it ends with *resources*."""

    def __init__(self, resources: AsyncExitStack) -> None:
        self._resources = resources

    def check(self, holds: object, otherwise: str, *, rule: str = "") -> None:
        """
        Raise `Nonconformance` unless *holds* is true. An `assert` statement could be switched off.

        *rule* is the rule that is broken, if it is not the one that the scenario proves.
        """
        if not holds:
            raise Nonconformance(otherwise, rule=rule)

    def applies(self, holds: object, otherwise: str) -> None:
        """End the scenario as not run unless *holds* is true: there would be nothing to prove."""
        if not holds:
            raise NotApplicable(otherwise)

    async def raises(self, error: type[E], doing: Awaitable[object], what: str) -> E:
        """Return the *error* that *doing* raises. Raise `Nonconformance` if it raises none or another one."""
        try:
            await doing
        except error as caught:
            return caught
        except Exception as other:
            raise Nonconformance(f"{what} raised {other!r}, expected {error.__name__}") from other
        raise Nonconformance(f"{what} raised nothing, expected {error.__name__}")

    async def within(self, seconds: float, doing: Coroutine[Any, Any, T], what: str, *, rule: str = "") -> T:
        """
        Return the result of *doing*. Raise `Nonconformance` if that takes longer than *seconds*.

        *rule* is as in `check`.
        """
        task = asyncio.create_task(doing)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                raise Nonconformance(f"{what} took longer than {seconds:g} s", rule=rule)
            return task.result()
        finally:
            await cancelled(task)

    def start(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run *doing* as a task beside the scenario, and return the task. It is cancelled at the end."""
        task = asyncio.create_task(doing)
        self._resources.push_async_callback(cancelled, task)
        return task


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel *task* and wait for its end."""
    task.cancel()
    await asyncio.wait({task})
