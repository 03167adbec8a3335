"""The context of a scenario: a database, stores, messages and checks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

from diator.brokers.message import Message
from diator.brokers.sending import Due
from diator.outbox.store import Claim, DeadRow, Failure, OnDead, Order, Row, Store
from diator.testing._suite.checks import Checks, cancelled
from diator.testing._suite.errors import Nonconformance
from diator.testing.outbox._harness import Database, StoreHarness, StoreLimits

T = TypeVar("T")

LONG = 3600.0
"""A lease or a delay that does not end in a scenario, in seconds."""


class _Undone(Exception):
    """The unit of work fails."""


class Context(Checks):
    """
    A scenario's access to the store. Everything that the scenario opens through it is closed at the end.

    Attributes:
        harness: The harness of the run.
        database: The tables of this scenario.
        store: A store of them.
        limits: The limits of the harness.
        random: A generator with the seed of the run.
    """

    def __init__(self, harness: StoreHarness, database: Database, *, seed: int, resources: AsyncExitStack) -> None:
        super().__init__(resources)
        self.harness = harness
        self.database = database
        self.limits: StoreLimits = harness.limits
        self.random: random.Random = random.Random(seed)  # noqa: S311  # a run has to be repeatable
        self._did: Counter[str] = Counter()
        self.store: Store[Any] = self.another()

    def another(self) -> Store[Any]:
        """Return another store of the same tables, as another process has. It is closed at the end."""
        return self.closing(self.database.store())

    def closing(self, store: Store[Any]) -> Store[Any]:
        """Close *store* at the end of the scenario, and return it."""
        self._resources.push_async_callback(store.close)
        return store

    def summary(self) -> str:
        """Say what has happened in the scenario so far."""
        return ", ".join(f"{count} {what}" for what, count in self._did.items())

    # -- messages and transactions -----------------------------------------------------------------------------------

    @staticmethod
    def message(number: int = 0, *, key: str | None = None, headers: Mapping[str, str] | None = None) -> Message:
        """Return a new message with *number* in its payload."""
        return Message.create(message_name="Happened", payload={"number": number}, key=key, headers=headers)

    def messages(self, count: int, *, start: int = 0, key: str | None = None) -> list[Message]:
        """Return *count* messages, numbered from *start* on."""
        return [self.message(number, key=key) for number in range(start, start + count)]

    async def add(self, *messages: Message, due: Due = None, store: Store[Any] | None = None) -> None:
        """Store *messages* in a transaction of their own, and commit it."""
        async with self.database.session() as session:
            await self.store_in(session, *messages, due=due, store=store)

    async def store_in(
        self, session: Any, *messages: Message, due: Due = None, store: Store[Any] | None = None
    ) -> Callable[[], bool] | None:
        """Store *messages* in the open transaction of *session*."""
        self._did["messages stored"] += len(messages)
        return await (store or self.store).add(messages, [due] * len(messages), session)

    async def add_again(self, message: Message) -> None:
        """Store *message* in a transaction of its own, again and again until a connection is not lost any more."""
        until = monotonic() + self.limits.recovery
        while True:
            try:
                return await self.add(message)
            except Exception:
                if monotonic() > until:
                    raise
            await asyncio.sleep(self.limits.brief)

    @asynccontextmanager
    async def undone(self) -> AsyncGenerator[Any, None]:
        """Open a transaction that is rolled back at the end of the block, as if the unit of work had failed."""
        with suppress(_Undone):
            async with self.database.session() as session:
                yield session
                raise _Undone

    async def cancel(self, message: Message) -> bool:
        """Cancel *message* in a transaction of its own, and commit it."""
        async with self.database.session() as session:
            return await self.store.cancel(message.message_id, session)

    async def first_time(self, message: Message, group: str = "group", handler: str = "handler") -> bool:
        """Note *message* in a transaction of its own, and commit it."""
        async with self.database.session() as session:
            return await self.store.first_time(message.message_id, group, handler, session)

    # -- the relay ---------------------------------------------------------------------------------------------------

    async def claim(
        self,
        *,
        limit: int = 1_000,
        lease: float = LONG,
        order: Order = "key",
        on_dead: OnDead = "block",
        store: Store[Any] | None = None,
    ) -> Claim:
        """Claim rows, by default all that may be sent, and for the rest of the scenario."""
        claim = await (store or self.store).claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        self._did["rows claimed"] += len(claim.rows)
        self.check(len(claim.rows) <= limit, f"claim(limit={limit}) returned {len(claim.rows)} rows", rule=CLAIM)
        positions = [row.position for row in claim.rows]
        self.check(positions == sorted({*positions}), f"the rows are not ordered by position: {positions}", rule=ROWS)
        return claim

    async def claim_in_time(self, count: int = 1, **options: Any) -> Claim:
        """Claim again and again until *count* rows come in one claim, which has to happen within `limits.lag`."""
        until = monotonic() + self.limits.lag
        while True:
            claim = await self.claim(**options)
            if len(claim.rows) >= count:
                return claim
            self.check(not claim.rows, f"{len(claim.rows)} of {count} rows were claimed: {numbers(claim.rows)}")
            self.check(monotonic() < until, f"no row was claimed for {self.limits.lag:g} s, and {count} may be sent")
            await asyncio.sleep(self.limits.brief / 10)

    async def claim_one_by_one(self, count: int, **options: Any) -> list[Row]:
        """
        Claim *count* rows with one key, and finish each claim as sent before the next one.

        A store may hand out one row with a key at a time, or several that follow each other.
        """
        rows = list[Row]()
        while len(rows) < count:
            claim = await self.claim_in_time(**options)
            await self.all_sent(claim)
            rows += claim.rows
        return rows

    async def asleep(self) -> asyncio.Task[None]:
        """Return a task that is in `wait`. The first calls may end early, since the store begins to listen."""
        for _ in range(4):
            waiting = self.start(self.store.wait(LONG))
            await asyncio.wait({waiting}, timeout=5 * self.limits.brief)
            if not waiting.done():
                return waiting
            waiting.result()
            await self.claim(limit=1, lease=0)
        raise Nonconformance("wait ended again and again, and nothing was stored")

    async def listening(self) -> None:
        """Wait until the store listens, so that `wait` takes its whole time."""
        await cancelled(await self.asleep())

    async def finish(
        self,
        claim: Claim,
        *,
        sent: Sequence[Row] = (),
        untried: Sequence[Row] = (),
        failed: Sequence[Row] = (),
        retry_after: float | None = None,
        store: Store[Any] | None = None,
    ) -> int:
        """Finish rows of *claim*. The *failed* ones are dead, or sent again *retry_after* so many seconds."""
        return await (store or self.store).finish(
            claim.lease,
            sent=[row.position for row in sent],
            untried=[row.position for row in untried],
            failed=[
                Failure(position=row.position, reason="rejected: ValueError", retry_after=retry_after) for row in failed
            ],
        )

    async def all_sent(self, claim: Claim) -> None:
        """Finish all rows of *claim* as sent. None may have lost its lease."""
        self.same(await self.finish(claim, sent=claim.rows), 0, "rows that had lost a lease which has not ended")

    async def kill(self, *messages: Message) -> list[Row]:
        """Store *messages* and let them die, one after the other. Return their rows. Nothing else may be due."""
        rows = list[Row]()
        for message in messages:
            await self.add(message)
            claim = await self.claim()
            self.same([row.message.message_id for row in claim.rows], [message.message_id], "the claimed messages")
            await self.finish(claim, failed=claim.rows)
            rows += claim.rows
        return rows

    # -- checks ------------------------------------------------------------------------------------------------------

    def same(self, found: object, wanted: object, what: str, *, rule: str = "") -> None:
        """Raise `Nonconformance` unless *found* equals *wanted*. The error begins with *what*."""
        if found != wanted:
            raise Nonconformance(f"{what}: found {found!r:.300}, expected {wanted!r:.300}", rule=rule)

    def is_true(self, found: bool, what: str) -> None:  # noqa: FBT001  # it is the subject
        """Raise `Nonconformance` unless *found* is true."""
        self.same(found, wanted=True, what=what)

    def is_false(self, found: bool, what: str) -> None:  # noqa: FBT001
        """Raise `Nonconformance` unless *found* is false."""
        self.same(found, wanted=False, what=what)

    def same_message(self, found: Message, wanted: Message, what: str) -> None:
        """Raise `Nonconformance` unless *found* is what was stored as *wanted*, byte for byte."""
        for name in ("message_type", "message_name", "message_id", "payload_json", "key", "time"):
            self.same(getattr(found, name), getattr(wanted, name), f"{name} of {what}")
        self.same([*found.headers.items()], [*wanted.headers.items()], f"headers of {what}")
        self.check(found.codec is None, f"{what} has a codec, which only the relay sets")
        self.check(type(found.payload_json) is bytes, f"payload_json of {what} is not of the type bytes")

    async def meanwhile(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """
        Start *doing* while a transaction is open, and let it run for `limits.brief`. Return its task.

        On a database that has one writer at a time it may have to wait for the end of that transaction.
        """
        task = self.start(doing)
        await asyncio.wait({task}, timeout=self.limits.brief)
        return task

    async def ended(self, task: asyncio.Task[T], what: str) -> T:
        """Return the result of *task*, which has to end within `limits.lag`."""
        done, _ = await asyncio.wait({task}, timeout=self.limits.lag)
        self.check(done, f"{what} did not return within {self.limits.lag:g} s")
        return task.result()

    async def until(self, holds: Callable[[], Awaitable[object]], otherwise: str) -> None:
        """Wait until *holds* is true, which has to happen within `limits.lag`."""
        until = monotonic() + self.limits.lag
        while not await holds():
            self.check(monotonic() < until, f"{otherwise}, after {self.limits.lag:g} s")
            await asyncio.sleep(self.limits.brief / 10)


CLAIM = "claim: Lease at most"
ROWS = "Claim: rows:"


def numbers(rows: Sequence[Row | DeadRow]) -> list[object]:
    """Return the numbers of messages, in the order of *rows*."""
    return [row.message.payload.get("number") for row in rows]


def now() -> datetime:
    """Return the time of this process."""
    return datetime.now(UTC)


def unique() -> str:
    """Return a word that appears nowhere else."""
    return uuid4().hex
