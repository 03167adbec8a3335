"""What is left open: tasks and files."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Self

from diator.testing._suite.runner import open_files
from diator.testing.conformance._context import Context
from diator.testing.conformance._rules import NOTHING_REMAINS


@dataclass(frozen=True)
class Open:
    """
    What is open at one moment.

    Attributes:
        tasks: How many tasks run each coroutine function.
        files: The open sockets, pipes and so on, as `open_files` names them. Files in a folder are compared only at the
            end of the scenario: SQLite keeps one open for as long as another connection has it locked.
    """

    tasks: Counter[str]
    files: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        """Return what is open now."""
        coroutines = (task.get_coro() for task in asyncio.all_tasks())
        names = Counter(getattr(each, "__qualname__", str(each)) for each in coroutines)
        return cls(names, frozenset(each for each in open_files() if " /" not in each))


async def nothing_is_left(ctx: Context, before: Open, what: str) -> None:
    """
    Raise `Nonconformance` if more is open than *before*. *what* has ended.

    What ends in the background may take a moment on a busy machine; what is left behind stays.
    """
    until = monotonic() + ctx.limits.quiet + ctx.limits.lag
    while True:
        await asyncio.sleep(ctx.limits.quiet)
        now = Open.now()
        tasks, files = now.tasks.total() - before.tasks.total(), len(now.files) - len(before.files)
        if max(tasks, files) <= 0:
            return
        names = ", ".join([*(now.tasks - before.tasks), *sorted(now.files - before.files)])
        left = f"{tasks} tasks and {files} open files are left of {what}: {names:.300}"
        ctx.check(monotonic() < until, left, rule=NOTHING_REMAINS)
