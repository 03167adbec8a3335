"""
The store of an outbox and an inbox in memory.

It is the shortest implementation of the whole contract, and the reference for the other stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from typing import TypeAlias
from uuid import UUID, uuid4

from diator._hints import described
from diator.brokers.message import Message
from diator.brokers.sending import Due
from diator.exceptions import UsageError
from diator.outbox.store import Claim, DeadRow, Failure, OnDead, Order, Row, Status

#: What an inbox notes: a group, a handler, and the id of a message.
_Note: TypeAlias = tuple[str, str, UUID]


_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(kw_only=True, eq=False, slots=True)
class _Stored:
    """A row of the outbox. If it is not due, it waits for a retry, or for its scheduled time if it was not tried."""

    position: int
    message: Message
    stored_at: datetime
    due_at: datetime
    attempts: int = 0
    lease: UUID | None = None
    leased_until: datetime = _NEVER
    reason: str | None = None
    died_at: datetime = _NEVER
    cancelled_in: _Transaction | None = None

    def is_leased(self, now: datetime) -> bool:
        return self.lease is not None and now < self.leased_until

    def may_be_sent(self, now: datetime) -> bool:
        return self.reason is None and self.due_at <= now and not self.is_leased(now) and self.cancelled_in is None

    def blocks(self, now: datetime, on_dead: OnDead) -> bool:
        """Return whether later rows with its key wait for it, although it may not be sent itself."""
        if self.reason is not None:
            return on_dead == "block"
        is_retried = self.attempts > 0 and now < self.due_at
        return is_retried or self.is_leased(now) or self.cancelled_in is not None


@dataclass(kw_only=True, eq=False, slots=True)
class _Transaction:
    """What an open transaction has written. Nobody else sees it before the commit."""

    began_at: datetime
    rows: list[_Stored] = field(default_factory=list)
    cancelled: list[_Stored] = field(default_factory=list)
    noted: dict[_Note, datetime] = field(default_factory=dict)
    was_rolled_back: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class _Database:
    """The tables, and the transactions that are open."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self.clock = clock
        self.rows: dict[int, _Stored] = {}  # ordered by position
        self.noted: dict[_Note, datetime] = {}
        self.transactions: dict[_Transaction, None] = {}  # the oldest first
        self.news: asyncio.Event = asyncio.Event()

    def begin(self) -> _Transaction:
        transaction = _Transaction(began_at=self.clock())
        self.transactions[transaction] = None
        return transaction

    def commit(self, transaction: _Transaction) -> None:
        for row in transaction.cancelled:
            self.rows.pop(row.position, None)
        self.noted.update(transaction.noted)
        if rows := transaction.rows:
            is_ordered = not self.rows or next(reversed(self.rows)) < rows[0].position
            self.rows.update((row.position, row) for row in rows)
            if not is_ordered:  # a transaction that has stored later was committed before
                self.rows = dict(sorted(self.rows.items()))
        self._end(transaction)

    def roll_back(self, transaction: _Transaction) -> None:
        for row in transaction.cancelled:
            row.cancelled_in = None
        transaction.was_rolled_back = True
        self._end(transaction)

    def _end(self, transaction: _Transaction) -> None:
        del self.transactions[transaction]
        transaction.ended.set()
        if transaction.rows or transaction.cancelled:
            self.news.set()

    def is_held_back(self, row: _Stored) -> bool:
        """Return whether an open transaction has stored an earlier message with the key of *row*."""
        return row.message.key is not None and any(
            earlier.position < row.position and earlier.message.key == row.message.key
            for transaction in self.transactions
            for earlier in transaction.rows
        )

    def behind(self, dead: _Stored) -> list[_Stored]:
        """Return the rows that wait for a *dead* row, if dead rows block their key."""
        key = dead.message.key
        return [
            row
            for row in self.rows.values()
            if key is not None and row.message.key == key and row.position > dead.position and row.reason is None
        ]

    def dead_at(self, positions: Collection[int]) -> list[_Stored]:
        found = [self.rows[position] for position in {*positions} if position in self.rows]
        return [row for row in found if row.reason is not None]


class MemorySession:
    """
    One transaction after the other of a `MemoryStore`, which makes it with `session` or `begin`.

    What was stored in a transaction exists after its `commit`, and never after its `rollback`.

    Attributes:
        transaction: The open transaction, for the store; None if none is open.
    """

    def __init__(self, database: _Database) -> None:
        self.database = database
        self.transaction: _Transaction | None = None

    async def begin(self) -> None:
        """
        Begin a transaction.

        Raises:
            UsageError: The one before is still open.
        """
        if self.transaction is not None:
            raise UsageError("a transaction is open in this session; commit it or roll it back")
        self.transaction = self.database.begin()

    async def commit(self) -> None:
        """
        Let everybody see what was stored.

        Raises:
            UsageError: No transaction is open.
        """
        if self.transaction is None:
            raise UsageError("no transaction is open in this session, so there is nothing to commit")
        self.database.commit(self.transaction)
        self.transaction = None

    async def rollback(self) -> None:
        """Undo what was stored. Without an open transaction there is nothing to do."""
        if self.transaction is not None:
            self.database.roll_back(self.transaction)
            self.transaction = None


class MemoryStore:
    """
    Keeps an outbox and an inbox in memory, for tests, examples and programs that have no database.

    It keeps the promises of `diator.outbox.store.Store`. Several transactions may be open at the same time; one that
    waits for another one waits for ever if that waits for it. The messages are lost with the object.

    Args:
        clock: Returns the time of the database, with a time zone. Default: that of this machine.
    """

    session_type = MemorySession

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = _Database(clock)
        self._positions = count(1)

    def session(self) -> MemorySession:
        """Return a session, in which no transaction is open."""
        return MemorySession(self._database)

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[MemorySession]:
        """Return a context with a session in a transaction. Its end commits; an error rolls back."""
        session = self.session()
        await session.begin()
        try:
            yield session
        except BaseException:
            await session.rollback()
            raise
        await session.commit()

    # -- in the transaction of the program ---------------------------------------------------------------------------

    async def add(
        self, messages: Sequence[Message], due: Sequence[Due], session: MemorySession, /
    ) -> Callable[[], bool]:
        """See `Store.add`."""
        transaction, now = self._transaction_of(session), self._database.clock()
        for message, each in zip(messages, due, strict=True):
            row = _Stored(
                position=next(self._positions),
                message=replace(message, codec=None),
                stored_at=now,
                due_at=now if each is None else each if isinstance(each, datetime) else now + each,
            )
            transaction.rows.append(row)
        return lambda: transaction.was_rolled_back

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        """See `Store.cancel`. It waits for the end of another open transaction that has cancelled the same message."""
        transaction = self._transaction_of(session)
        own = [row for row in transaction.rows if row.message.message_id == message_id]
        transaction.rows = [row for row in transaction.rows if row not in own]
        while True:
            found = [
                row
                for row in self._database.rows.values()
                if row.message.message_id == message_id and row.attempts == 0 and row.reason is None
            ]
            found = [row for row in found if row.cancelled_in is not transaction]
            other = next((row.cancelled_in for row in found if row.cancelled_in is not None), None)
            if other is None:
                break
            await other.ended.wait()
        for row in found:
            row.cancelled_in = transaction
        transaction.cancelled += found
        return bool(own or found)

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        """See `Store.first_time`."""
        transaction, note = self._transaction_of(session), (group, handler, message_id)
        while other := next((each for each in self._database.transactions if note in each.noted), None):
            if other is transaction:
                return False
            await other.ended.wait()
        if note in self._database.noted:
            return False
        transaction.noted[note] = self._database.clock()
        return True

    def watch(self, session: MemorySession, /) -> Callable[[], bool | None]:
        """Return what tells whether the open transaction of *session* was committed; see `Store.first_time`."""
        transaction = self._transaction_of(session)
        return lambda: not transaction.was_rolled_back if transaction.ended.is_set() else None

    def _transaction_of(self, session: object) -> _Transaction:
        if not isinstance(session, MemorySession) or session.database is not self._database:
            raise UsageError(f"the session must be a MemorySession of this store, and it is {described(session)}")
        if session.transaction is None:
            raise UsageError("no transaction is open in this session; begin one, such as by `async with store.begin()`")
        return session.transaction

    # -- for the relay -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """See `Store.check`. There is nothing to check."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        """See `Store.claim`."""
        self._database.news.clear()
        now, token = self._database.clock(), uuid4()
        claimed: list[_Stored] = []
        blocked: set[str] = set()
        for row in self._database.rows.values():
            key = row.message.key if order == "key" else None
            if key is not None and (key in blocked or row.blocks(now, on_dead) or self._database.is_held_back(row)):
                blocked.add(key)
            elif row.may_be_sent(now):
                claimed.append(row)
                if len(claimed) == limit:
                    break
        for row in claimed:
            row.lease, row.leased_until = token, now + timedelta(seconds=lease)
            row.attempts += 1
        return Claim(
            lease=token,
            rows=[
                Row(position=row.position, message=row.message, attempts=row.attempts, stored_at=row.stored_at)
                for row in claimed
            ],
            next_due=None if claimed else self._next_due(now),
        )

    def _next_due(self, now: datetime) -> float | None:
        waiting = [row.due_at for row in self._database.rows.values() if now < row.due_at and row.reason is None]
        return (min(waiting) - now).total_seconds() if waiting else None

    async def finish(
        self, lease: UUID, /, *, sent: Collection[int], untried: Collection[int], failed: Collection[Failure]
    ) -> int:
        """See `Store.finish`."""
        now, rows = self._database.clock(), self._database.rows
        failures = {each.position: each for each in failed}
        positions = [*sent, *untried, *failures]
        held = [row for row in map(rows.get, positions) if row is not None and row.lease == lease]
        gone, back = {*sent}, {*untried}
        for row in held:
            row.lease = None
            if row.position in gone:
                del rows[row.position]
            elif row.position in back:
                row.attempts -= 1
            elif (after := failures[row.position].retry_after) is not None:
                row.due_at = now + timedelta(seconds=after)
            else:
                row.reason, row.died_at = failures[row.position].reason, now
        return len(positions) - len(held)

    async def wait(self, timeout: float, /) -> None:
        """See `Store.wait`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._database.news.wait()

    async def close(self) -> None:
        """See `Store.close`. Another event loop may use the store now."""
        self._database.news.set()
        self._database.news = asyncio.Event()

    # -- for people --------------------------------------------------------------------------------------------------

    async def status(self) -> Status:
        """See `Store.status`. `held_back_by` is None: all transactions are of this process."""
        database, now = self._database, self._database.clock()
        rows = [*database.rows.values()]
        dead = [row for row in rows if row.reason is not None]
        pending = [row for row in rows if row.reason is None and row.due_at <= now]
        held_back = [row for row in rows if database.is_held_back(row)]
        since = next((each.began_at for each in database.transactions if each.rows), now) if held_back else now
        return Status(
            pending=len(pending),
            oldest=max([(now - max(row.stored_at, row.due_at)).total_seconds() for row in pending], default=0.0),
            scheduled=len(rows) - len(dead) - len(pending),
            leased=sum(row.is_leased(now) for row in rows),
            dead=len(dead),
            blocked=len({behind.position for row in dead for behind in database.behind(row)}),
            blocked_keys=len({row.message.key for row in dead} - {None}),
            held_back=len(held_back),
            held_back_by=None,
            held_back_for=(now - since).total_seconds(),
        )

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        """See `Store.dead`."""
        dead = (row for row in self._database.rows.values() if row.reason is not None and row.position > after)
        return [
            DeadRow(
                position=row.position,
                message=row.message,
                attempts=row.attempts,
                stored_at=row.stored_at,
                reason=row.reason or "",
                died_at=row.died_at,
                blocked=len(self._database.behind(row)),
            )
            for row in islice(dead, limit)
        ]

    async def redrive(self, positions: Collection[int] | None = None, /) -> int:
        """See `Store.redrive`."""
        dead = self._database.dead_at(self._database.rows if positions is None else positions)
        for row in dead:
            row.reason, row.attempts, row.due_at = None, 0, self._database.clock()
        self._database.news.set()
        return len(dead)

    async def discard(self, positions: Collection[int], /) -> int:
        """See `Store.discard`."""
        dead = self._database.dead_at(positions)
        for row in dead:
            del self._database.rows[row.position]
        self._database.news.set()
        return len(dead)

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        """See `Store.prune`."""
        until = self._database.clock() - keep
        old = [*islice((note for note, noted_at in self._database.noted.items() if noted_at < until), limit)]
        for note in old:
            del self._database.noted[note]
        return len(old)
