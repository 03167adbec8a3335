"""The harness: how the suite gets a store and a database, and what it can do to the database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from diator.outbox.store import Store
from diator.testing._suite.environment import Environment, Pace

Spoiled: TypeAlias = Literal["outbox missing", "inbox missing", "column missing"]


@dataclass(frozen=True, kw_only=True)
class StoreLimits(Pace):
    """
    How fast an environment is. All times are in seconds.

    Attributes:
        scale: The factor for the timeout of every scenario. `DIATOR_CONFORMANCE_SCALE` sets the default.
        standstill: The longest time that the event loop may stand still. The suite interrupts what blocks it longer.
        lag: How late something may be on a busy machine. Only a failure takes that long.
        brief: How long something that must not happen is waited for. It is also the time of short leases and delays.
        recovery: The longest time until `wait` notices commits again after its connection was lost.
    """

    lag: float = 10.0
    brief: float = 0.2
    recovery: float = 30.0


class Database(ABC):
    """
    A database with the empty tables of one scenario, which nobody else uses.

    Leave a method that the environment does not support as it is here.

    Attributes:
        name: `processes`: Lets another process reach the same tables, see `StoreHarness.reach`.
    """

    name: str = ""

    @abstractmethod
    def store(self) -> Store[Any]:
        """
        Return a new store of these tables, as another process of the program has one, with connections of its own.

        A scenario makes several and uses them beside each other. It also calls this outside of an event loop. The suite
        calls `Store.close`; release what else the store needs at the end of `StoreHarness.database`.
        """

    @abstractmethod
    def session(self) -> AbstractAsyncContextManager[Any]:
        """
        Return a context with an object of `Store.session_type` in an open transaction, as a unit of work has it.

        The end of the block commits. An error in the block rolls back and leaves it.
        """

    # -- optional ----------------------------------------------------------------------------------------------------

    def savepoint(self, session: Any) -> AbstractAsyncContextManager[object]:
        """`savepoints`: Return a context with a savepoint of *session*. An error in the block rolls back to it."""
        raise NotImplementedError

    async def disconnect(self) -> None:
        """`connections`: Make the database close every connection to it, as an operator does or as a restart does."""
        raise NotImplementedError

    async def transactions(self) -> int:
        """`transactions`: Return how many transactions are open, and connections in use, by the stores and sessions."""
        raise NotImplementedError

    async def pid(self, session: Any) -> int:
        """`pids`: Return the process id of *session* in the database."""
        raise NotImplementedError

    async def spoil(self, how: Spoiled) -> None:
        """`tables`: Drop a table, or a column that the outbox needs, as if another version had made the tables."""
        raise NotImplementedError

    async def cost(self, doing: Callable[[Store[Any]], Awaitable[object]]) -> int:
        """
        `cost`: Make a store, await *doing* with it twice, and return the work of the database for the second time.

        The first time, a store may look at what other processes have left. Any measure does that grows with the rows
        that the database looks at: rows, pages, or steps of its machine. Time does not, since it depends on everything
        else.
        """
        raise NotImplementedError


class StoreHarness(Environment):
    """
    How the suite gets a database, and what the suite can do to it.

    The suite makes a harness without arguments. The scenarios that need a facility which the harness has not are not
    run, and the report lists them.

    Attributes:
        name: The name of the store in the report.
        facilities: What the database and the harness can do. `savepoints`, `connections`, `transactions`, `pids`,
            `tables` and `cost` are the optional methods of `Database`; their docstrings begin with the name.
            `processes` is `reach`. The others have no method: `writers` means that two transactions can write at the
            same time, `wakes` that the database tells a waiting relay of a commit, and `clock` that it has a clock of
            its own, which is not that of the process.
        limits: How fast the environment is.
        deviations: The scenarios that are known to fail, by id.
    """

    limits: StoreLimits = StoreLimits()

    @abstractmethod
    def database(self) -> AbstractAsyncContextManager[Database]:
        """Return a context with new, empty tables. They, and every connection to them, are gone at its end."""

    def reach(self, name: str) -> AbstractAsyncContextManager[Database]:
        """
        `processes`: Return a context with the tables that another process has made, by its `Database.name`.

        The harness is a new one, which was started in this process. The other process removes the tables.
        """
        raise NotImplementedError
