"""
Stores with exactly one mistake each, which prove that the suite finds the mistake.

Each saboteur is the store in memory with one mistake, and names the scenarios that fail because of it. The tests of
diator run all of them. Every new scenario needs a saboteur that it catches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeAlias, TypeVar
from uuid import UUID, uuid4

from diator.brokers.message import Message
from diator.brokers.sending import Due
from diator.exceptions import ConfigurationError, UsageError
from diator.outbox.memory import MemorySession, MemoryStore
from diator.outbox.store import Claim, DeadRow, Failure, OnDead, Order, Row, Status
from diator.testing.outbox._harness import Spoiled

Messages: TypeAlias = Sequence[Message]
Dues: TypeAlias = Sequence[Due]
Undone: TypeAlias = Callable[[], bool]
Positions: TypeAlias = Collection[int]
Failures: TypeAlias = Collection[Failure]

S = TypeVar("S", bound="type[Saboteur]")

SABOTEURS: list[type[Saboteur]] = []
"""All saboteurs, in the order in which they are registered."""


def caught_by(*ids: str) -> Callable[[S], S]:
    """Register a saboteur that the scenarios *ids* catch, and no others."""

    def register(saboteur: S) -> S:
        saboteur.caught_by = ids
        SABOTEURS.append(saboteur)
        return saboteur

    return register


class Saboteur(MemoryStore):
    """
    The store in memory without a mistake, with methods that a subclass overrides to add one.

    Attributes:
        caught_by: The ids of the scenarios that fail because of the mistake.
        spoiled: What is wrong with its tables.
        looked_at: How many rows its claims have looked at.
    """

    caught_by: ClassVar[tuple[str, ...]] = ()
    spoiled: Spoiled | None = None
    looked_at: int = 0

    # -- methods for mistakes ----------------------------------------------------------------------------------------

    def may_be_sent(self, row: Any, now: datetime) -> bool:
        """Return whether *row* may be sent, as far as it is concerned itself."""
        return bool(row.may_be_sent(now))

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        """Return whether later rows with the key of *row* wait for it, although it may not be sent itself."""
        return bool(row.blocks(now, on_dead))

    def is_held_back(self, row: Any) -> bool:
        """Return whether an open transaction may still store an earlier row than *row*."""
        return self._database.is_held_back(row)

    def key_of(self, row: Any, order: Order) -> object:
        """Return what orders *row*; None for nothing."""
        return row.message.key if order == "key" else None

    def candidates(self) -> Sequence[Any]:
        """Return the rows, in the order in which they are claimed."""
        return [*self._database.rows.values()]

    def found(self, limit: int, order: Order, on_dead: OnDead) -> list[Any]:
        """Return the rows to claim."""
        if self.spoiled == "outbox missing":
            raise LookupError("no such table")
        now, claimed, blocked = self._database.clock(), list[Any](), set[object]()
        for row in self.candidates():
            if (key := self.key_of(row, order)) is not None and (
                key in blocked or self.blocks(row, now, on_dead) or self.is_held_back(row)
            ):
                blocked.add(key)
            elif self.may_be_sent(row, now) and len(claimed) < limit:
                claimed.append(row)
        self.look_at(len(claimed))
        return claimed

    def look_at(self, count: int) -> None:
        """Count rows that a claim looks at."""
        self.looked_at += count

    def lease(self, rows: list[Any], token: UUID, seconds: float) -> None:
        """Lease *rows*, and count an attempt."""
        for row in rows:
            row.lease, row.leased_until = token, self._database.clock() + timedelta(seconds=seconds)
            row.attempts += 1

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        """See `Store.claim`."""
        self._database.news.clear()
        claimed, token = self.found(limit, order, on_dead), uuid4()
        self.lease(claimed, token, lease)
        rows = [
            Row(position=each.position, message=each.message, attempts=each.attempts, stored_at=each.stored_at)
            for each in claimed
        ]
        return Claim(lease=token, rows=rows, next_due=None if rows else self._next_due(self._database.clock()))

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        """See `Store.add`."""
        if self.spoiled == "outbox missing":
            raise LookupError("no such table")
        return await super().add(messages, due, session)

    async def status(self) -> Status:
        """See `Store.status`. Here `held_back_by` is the identity of a transaction."""
        if self.spoiled == "outbox missing":
            raise LookupError("no such table")
        found = await super().status()
        return replace(found, held_back_by=self.writers()[0] if found.held_back else None)

    def writers(self) -> list[int]:
        """Return the identities of the open transactions that have stored something, the oldest first."""
        return [id(each) for each in self._database.transactions if each.rows]

    async def check(self) -> None:
        """See `Store.check`."""
        if self.spoiled is not None:
            raise ConfigurationError(f"the tables are not those of this version: {self.spoiled}")

    @asynccontextmanager
    async def savepoint(self, session: MemorySession) -> AsyncGenerator[None, None]:
        """Undo at the end of a block that fails what was stored in it."""
        transaction: Any = session.transaction
        rows = [*transaction.rows]
        try:
            yield
        except BaseException:
            transaction.rows = rows
            raise

    def rows_of(self, session: MemorySession) -> list[Any]:
        """Return the rows that the transaction of *session* has stored."""
        transaction: Any = session.transaction
        rows: list[Any] = transaction.rows
        return rows

    def changed(self, messages: Sequence[Message], **changes: Callable[[Message], Any]) -> list[Message]:
        """Return *messages* with *changes*."""
        return [replace(each, **{name: change(each) for name, change in changes.items()}) for each in messages]


# -- what is stored --------------------------------------------------------------------------------------------------


@caught_by("STO-CLM-03", "STO-TXN-01")
class LosesTheLast(Saboteur):
    """Loses the last of many messages."""

    _many = 30

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        count = len(messages) - (len(messages) > self._many)
        return await super().add(messages[:count], due[:count], session)


@caught_by(
    "STO-LNG-01",
    "STO-LNG-02",
    "STO-LNG-03",
    "STO-LNG-04",
    "STO-LNG-06",
    "STO-STA-02",
    "STO-TXN-02",
    "STO-TXN-03",
    "STO-TXN-04",
    "STO-TXN-05",
    "STO-TXN-07",
    "STO-WKE-03",
)
class AddsInItsOwnTransaction(Saboteur):
    """Commits what it adds."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        async with self.begin() as own:
            return await super().add(messages, due, own)


@caught_by("STO-TXN-04")
class ForgetsSavepoints(Saboteur):
    """Keeps the messages in a list until the commit, also those of a savepoint that was rolled back."""

    @asynccontextmanager
    async def savepoint(self, session: MemorySession) -> AsyncGenerator[None, None]:
        yield


@caught_by("STO-TXN-05")
class NeverSaysRolledBack(Saboteur):
    """Says that no transaction was rolled back."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        await super().add(messages, due, session)
        return lambda: False


@caught_by("STO-TXN-05")
class SaysRolledBackTooEarly(Saboteur):
    """Says that a transaction was rolled back while it is open."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        undone = await super().add(messages, due, session)
        return lambda: undone() or session.transaction is not None


@caught_by("STO-TXN-06")
class RefusesNoMessages(Saboteur):
    """Fails if there is nothing to store."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        if not messages:
            raise ValueError("INSERT without VALUES")
        return await super().add(messages, due, session)


@caught_by("STO-LNG-02", "STO-LNG-03", "STO-LNG-04", "STO-LNG-06", "STO-TXN-07")
class MixesTransactions(Saboteur):
    """Keeps what it adds for the whole process: the transaction that ends first gets it."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        first = next(iter(self._database.transactions))
        other = self.session()
        other.transaction = first
        return await super().add(messages, due, other)


# -- its content -----------------------------------------------------------------------------------------------------


@caught_by(
    "STO-DAT-01", "STO-DAT-02", "STO-DAT-03", "STO-DAT-04", "STO-DAT-05", "STO-DAT-06", "STO-DAT-07", "STO-DAT-08"
)
class ParsesPayloads(Saboteur):
    """Stores the payload as JSON that is parsed, and written again."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        parsed = self.changed(messages, payload_json=lambda each: json.dumps(each.payload).encode())
        return await super().add(parsed, due, session)


@caught_by("STO-DAT-02", "STO-KEY-07")
class TrimsKeys(Saboteur):
    """Removes spaces at the end of keys."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(
            self.changed(messages, key=lambda each: each.key and each.key.rstrip(" ")), due, session
        )


@caught_by("STO-DAT-02", "STO-KEY-07")
class TakesEmptyForNone(Saboteur):
    """Takes an empty key for no key."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(self.changed(messages, key=lambda each: each.key or None), due, session)


@caught_by("STO-DAT-03")
class SortsHeaders(Saboteur):
    """Sorts headers, as some kinds of JSON columns do."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(
            self.changed(messages, headers=lambda each: dict(sorted(each.headers.items()))), due, session
        )


@caught_by("STO-DAT-04")
class ForgetsTime(Saboteur):
    """Does not store the time of the event."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(self.changed(messages, time=lambda _: None), due, session)


@caught_by("STO-DAT-04")
class CutsTime(Saboteur):
    """Stores times without their offset."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        cut = self.changed(messages, time=lambda each: each.time and each.time.replace(tzinfo=UTC))
        return await super().add(cut, due, session)


@caught_by("STO-DAT-05")
class RaisesTheErrorOfTheDriver(Saboteur):
    """Lets the error of the driver escape for a text that the database cannot hold."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        if any("\0" in (each.key or "") for each in messages):
            raise ValueError("A string literal cannot contain NUL (0x00) characters.")
        return await super().add(messages, due, session)


@caught_by("STO-DAT-05")
class CutsTexts(Saboteur):
    """Cuts what is longer than its column."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(self.changed(messages, key=lambda each: each.key and each.key[:2_000]), due, session)


@caught_by("STO-DAT-06")
class CutsPayloads(Saboteur):
    """Cuts payloads of more than a megabyte."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(
            self.changed(messages, payload_json=lambda each: each.payload_json[: 2**20]), due, session
        )


@caught_by("STO-DAT-07")
class KeepsTheCodec(Saboteur):
    """Stores the codec."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        result = await super().add(messages, due, session)
        for row, message in zip(self.rows_of(session)[-len(messages) :], messages, strict=False):
            row.message = message
        return result


@caught_by("STO-DAT-08")
class ShowsDeadMessagesParsed(Saboteur):
    """Parses the payload of dead rows."""

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        rows = await super().dead(limit=limit, after=after)
        messages = self.changed(
            [row.message for row in rows], payload_json=lambda each: json.dumps(each.payload).encode()
        )
        return [replace(row, message=message) for row, message in zip(rows, messages, strict=True)]


@caught_by("STO-DAT-09", "STO-DUE-05")
class RefusesTheSameId(Saboteur):
    """Has a unique index of the message ids."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        ids = {row.message.message_id for row in [*self._database.rows.values(), *self.rows_of(session)]}
        for message in messages:
            if message.message_id in ids:
                raise ValueError("duplicate key value violates unique constraint")
            ids.add(message.message_id)
        return await super().add(messages, due, session)


# -- claims and leases -----------------------------------------------------------------------------------------------


@caught_by(
    "STO-CLM-01",
    "STO-CLM-02",
    "STO-CLM-03",
    "STO-CLM-06",
    "STO-CLM-08",
    "STO-CLM-09",
    "STO-CLM-10",
    "STO-CLM-13",
    "STO-CLM-14",
    "STO-DAT-01",
    "STO-DED-07",
    "STO-DUE-03",
    "STO-DUE-07",
    "STO-KEY-02",
    "STO-KEY-05",
    "STO-KEY-06",
    "STO-KEY-07",
    "STO-KEY-09",
    "STO-KEY-10",
    "STO-STA-02",
    "STO-WKE-04",
)
class IgnoresLeases(Saboteur):
    """Claims what is leased."""

    def may_be_sent(self, row: Any, now: datetime) -> bool:
        return row.reason is None and row.due_at <= now and row.cancelled_in is None

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) and not row.is_leased(now)


@caught_by(
    "STO-CLM-02",
    "STO-CLM-03",
    "STO-CLM-10",
    "STO-CLM-11",
    "STO-CLM-14",
    "STO-DED-07",
    "STO-KEY-01",
    "STO-KEY-02",
    "STO-KEY-06",
    "STO-KEY-07",
    "STO-KEY-08",
    "STO-KEY-09",
    "STO-KEY-10",
    "STO-USE-04",
    "STO-USE-05",
)
class IgnoresTheLimit(Saboteur):
    """Claims one row more than asked for."""

    def found(self, limit: int, order: Order, on_dead: OnDead) -> list[Any]:
        return super().found(limit + 1, order, on_dead)


@caught_by("STO-CLM-02", "STO-CLM-10", "STO-CLM-14", "STO-DED-07", "STO-KEY-09")
class TakesTheLatest(Saboteur):
    """Claims rows without a key from the end."""

    def candidates(self) -> Sequence[Any]:
        rows = self._database.rows.values()
        return [
            *(row for row in rows if row.message.key is not None),
            *reversed([r for r in rows if r.message.key is None]),
        ]

    def found(self, limit: int, order: Order, on_dead: OnDead) -> list[Any]:
        return sorted(super().found(limit, order, on_dead), key=lambda row: row.position)


@caught_by("STO-CLM-03", "STO-KEY-10", "STO-USE-02")
class ReadsThenLeases(Saboteur):
    """Reads rows, and leases them in another statement."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        self._database.news.clear()
        claimed, token = self.found(limit, order, on_dead), uuid4()
        await asyncio.sleep(0.001)
        self.lease(claimed, token, lease)
        rows = [
            Row(position=each.position, message=each.message, attempts=each.attempts, stored_at=each.stored_at)
            for each in claimed
        ]
        return Claim(lease=token, rows=rows, next_due=None if rows else self._next_due(self._database.clock()))


@caught_by(
    "STO-CLM-04", "STO-CLM-05", "STO-CLM-06", "STO-CLM-09", "STO-CLM-12", "STO-CLM-14", "STO-KEY-08", "STO-STA-03"
)
class NeverEndsLeases(Saboteur):
    """Leases rows for ever."""

    def lease(self, rows: list[Any], token: UUID, seconds: float) -> None:
        super().lease(rows, token, 1e6)


@caught_by("STO-CLM-06")
class EndsLeasesEarly(Saboteur):
    """Leases rows for half of the time."""

    def lease(self, rows: list[Any], token: UUID, seconds: float) -> None:
        super().lease(rows, token, seconds / 2)


@caught_by("STO-CLM-05", "STO-DED-01", "STO-DED-08")
class CountsWhenItFinishes(Saboteur):
    """Counts an attempt when it is finished, so that a crash does not count."""

    def lease(self, rows: list[Any], token: UUID, seconds: float) -> None:
        counted = [(row, row.attempts) for row in rows]
        super().lease(rows, token, seconds)
        for row, attempts in counted:
            row.attempts = max(attempts, 1)

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        result = await super().finish(lease, sent=sent, untried=untried, failed=failed)
        for each in failed:
            if (row := self._database.rows.get(each.position)) is not None:
                row.attempts += 1
        return result


@caught_by("STO-CLM-07", "STO-KEY-04")
class KeepsTheAttempt(Saboteur):
    """Counts an attempt for rows that nobody has tried to send."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        for position in untried:
            if (row := self._database.rows.get(position)) is not None:
                row.attempts += 1
        return await super().finish(lease, sent=sent, untried=untried, failed=failed)


@caught_by(
    "STO-CLM-04",
    "STO-CLM-09",
    "STO-CLM-10",
    "STO-CLM-11",
    "STO-KEY-01",
    "STO-KEY-02",
    "STO-KEY-10",
    "STO-LNG-05",
    "STO-STA-02",
)
class KeepsWhatWasSent(Saboteur):
    """Keeps rows that were sent, and lets their lease end."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        return await super().finish(lease, sent=[], untried=untried, failed=failed)


@caught_by("STO-CLM-08", "STO-CLM-13", "STO-CLM-14", "STO-KEY-03", "STO-KEY-06", "STO-KEY-09", "STO-STA-02")
class RetriesAtOnce(Saboteur):
    """Does not wait before a retry."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        at_once = [replace(each, retry_after=each.retry_after and 0) for each in failed]
        return await super().finish(lease, sent=sent, untried=untried, failed=at_once)


@caught_by("STO-CLM-08", "STO-CLM-13", "STO-KEY-04", "STO-KEY-10")
class WaitsAtLeastASecond(Saboteur):
    """Rounds the delay of a retry up to an hour."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        later = [replace(each, retry_after=each.retry_after and 3_600) for each in failed]
        return await super().finish(lease, sent=sent, untried=untried, failed=later)


@caught_by("STO-CLM-09", "STO-CLM-10", "STO-CLM-11")
class FinishesByPosition(Saboteur):
    """Finishes rows without a look at the lease."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        for position in [*sent, *untried, *(each.position for each in failed)]:
            if (row := self._database.rows.get(position)) is not None:
                row.lease = lease
        return await super().finish(lease, sent=sent, untried=untried, failed=failed)


@caught_by("STO-CLM-10")
class FinishesAllOrNothing(Saboteur):
    """Finishes nothing if one row has lost its lease."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        positions = [*sent, *untried, *(each.position for each in failed)]
        rows = [self._database.rows.get(position) for position in positions]
        if any(row is None or row.lease != lease for row in rows):
            return sum(row is None or row.lease != lease for row in rows)
        return await super().finish(lease, sent=sent, untried=untried, failed=failed)


@caught_by("STO-CLM-09", "STO-CLM-10", "STO-CLM-11")
class CountsNoLostLeases(Saboteur):
    """Says that no lease was lost."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        await super().finish(lease, sent=sent, untried=untried, failed=failed)
        return 0


@caught_by("STO-CLM-09", "STO-CLM-10", "STO-CLM-11")
class HasOneToken(Saboteur):
    """Uses one token for all its claims."""

    _token = UUID(int=7)

    def lease(self, rows: list[Any], token: UUID, seconds: float) -> None:
        super().lease(rows, self._token, seconds)

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        return replace(await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead), lease=self._token)


@caught_by("STO-CLM-14")
class UsesTheClockOfTheRelay(Saboteur):
    """Writes the end of a lease, and compares it, by the clock of the process."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        before = self._database.clock
        self._database.clock = lambda: datetime.now(UTC)
        try:
            return await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        finally:
            self._database.clock = before


@caught_by("STO-CLM-12", "STO-DED-01")
class StampsNaiveTimes(Saboteur):
    """Returns times without a time zone."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        claim = await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        return replace(claim, rows=[replace(row, stored_at=row.stored_at.replace(tzinfo=None)) for row in claim.rows])


@caught_by("STO-CLM-12", "STO-DED-01")
class StampsTheClaim(Saboteur):
    """Takes the time of the claim for that of storing."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        claim = await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        return replace(claim, rows=[replace(row, stored_at=self._database.clock()) for row in claim.rows])


@caught_by("STO-CLM-13")
class KnowsNotWhatIsDue(Saboteur):
    """Does not say when a retry becomes due."""

    def _next_due(self, now: datetime) -> float | None:
        waiting = [row.due_at for row in self._database.rows.values() if now < row.due_at and row.attempts == 0]
        return (min(waiting) - now).total_seconds() if waiting else None


@caught_by("STO-TXN-01", "STO-USE-05")
class OrdersNothing(Saboteur):
    """Returns many rows in the reverse order."""

    _many = 30

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        claim = await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        return replace(claim, rows=claim.rows[::-1]) if len(claim.rows) > self._many else claim


# -- keys ------------------------------------------------------------------------------------------------------------


@caught_by("STO-DAT-02", "STO-DAT-03", "STO-DAT-04", "STO-KEY-01", "STO-TXN-01")
class ReversesATransaction(Saboteur):
    """Numbers many messages of one call in the reverse order."""

    _many = 15

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        step = -1 if len(messages) > self._many else 1
        return await super().add(messages[::step], due[::step], session)


@caught_by("STO-KEY-02", "STO-KEY-07", "STO-KEY-08", "STO-KEY-10")
class OvertakesLeases(Saboteur):
    """Claims a row while an earlier one with its key is leased."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) and not row.is_leased(now)


@caught_by("STO-KEY-03", "STO-KEY-04", "STO-KEY-10")
class OvertakesRetries(Saboteur):
    """Claims a row while an earlier one with its key waits for its retry."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) and (
            row.reason is not None or row.is_leased(now) or row.cancelled_in is not None
        )


@caught_by("STO-KEY-11")
class OvertakesCancels(Saboteur):
    """Claims a row while an earlier one with its key may be cancelled."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) and row.cancelled_in is None


@caught_by("STO-DED-04", "STO-DUE-01", "STO-KEY-04", "STO-KEY-10")
class OrdersByDue(Saboteur):
    """Orders rows by the time at which they become due."""

    def found(self, limit: int, order: Order, on_dead: OnDead) -> list[Any]:
        return sorted(super().found(limit, order, on_dead), key=lambda row: row.due_at)


@caught_by("STO-DED-06", "STO-KEY-05", "STO-STA-02")
class SkipsDeadRows(Saboteur):
    """Never lets a dead row block its key."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, "skip")


@caught_by("STO-KEY-05")
class IsBlockedByDeadRows(Saboteur):
    """Always lets a dead row block its key."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, "block")


@caught_by("STO-KEY-06", "STO-LNG-03")
class AlwaysKeepsAnOrder(Saboteur):
    """Orders rows by their key, whether asked for it or not."""

    def key_of(self, row: Any, order: Order) -> object:
        return row.message.key


@caught_by("STO-KEY-07")
class FoldsKeys(Saboteur):
    """Compares keys without case."""

    def key_of(self, row: Any, order: Order) -> object:
        key = super().key_of(row, order)
        return key.casefold() if isinstance(key, str) else None


@caught_by(
    "STO-CLM-02",
    "STO-CLM-08",
    "STO-CLM-10",
    "STO-CLM-14",
    "STO-DAT-01",
    "STO-DAT-08",
    "STO-DED-07",
    "STO-DUE-03",
    "STO-KEY-03",
    "STO-KEY-05",
    "STO-KEY-09",
    "STO-STA-02",
    "STO-USE-02",
    "STO-USE-04",
    "STO-USE-05",
    "STO-USE-06",
    "STO-WKE-04",
)
class TakesNoKeyForAKey(Saboteur):
    """Orders rows without a key after one another."""

    def key_of(self, row: Any, order: Order) -> object:
        return (row.message.key or "") if order == "key" else None


# -- open transactions -----------------------------------------------------------------------------------------------


@caught_by("STO-LNG-01", "STO-LNG-02", "STO-LNG-05")
class HasNoWatermark(Saboteur):
    """Does not wait for open transactions."""

    def is_held_back(self, row: Any) -> bool:
        return False


@caught_by("STO-DUE-09", "STO-LNG-02")
class WaitsForGaps(Saboteur):
    """Waits for ever for the position of a message that was rolled back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen = {0}

    def candidates(self) -> Sequence[Any]:
        self._seen.update(self._database.rows)
        return super().candidates()

    def is_held_back(self, row: Any) -> bool:
        return super().is_held_back(row) or not self._seen.issuperset(range(row.position))


@caught_by("STO-LNG-03")
class HoldsBackEverything(Saboteur):
    """Waits for open transactions although the order does not matter."""

    def may_be_sent(self, row: Any, now: datetime) -> bool:
        return super().may_be_sent(row, now) and not self.is_held_back(row)


@caught_by("STO-LNG-04")
class HidesWhatIsHeldBack(Saboteur):
    """Says that nothing is held back."""

    async def status(self) -> Status:
        return replace(await super().status(), held_back=0, held_back_for=0.0)


@caught_by("STO-LNG-06")
class NamesALaterTransaction(Saboteur):
    """Names the latest transaction as the one that holds back."""

    def writers(self) -> list[int]:
        return super().writers()[::-1]


# -- scheduled messages ----------------------------------------------------------------------------------------------


@caught_by(
    "STO-CLM-13",
    "STO-CLM-14",
    "STO-DED-07",
    "STO-DUE-02",
    "STO-DUE-03",
    "STO-DUE-04",
    "STO-STA-02",
    "STO-STA-04",
    "STO-WKE-09",
)
class IgnoresDue(Saboteur):
    """Sends scheduled messages at once."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        return await super().add(messages, [None] * len(due), session)


@caught_by("STO-DUE-01")
class RefusesThePast(Saboteur):
    """Refuses a time in the past."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        for each in due:
            if isinstance(each, datetime) and each < self._database.clock():
                raise ValueError("the time is over")
        return await super().add(messages, due, session)


@caught_by("STO-DUE-01", "STO-DUE-02")
class IgnoresOffsets(Saboteur):
    """Takes a time with an offset for UTC."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        plain = [each.replace(tzinfo=UTC) if isinstance(each, datetime) else each for each in due]
        return await super().add(messages, plain, session)


@caught_by("STO-CLM-13", "STO-CLM-14", "STO-DUE-03", "STO-STA-04")
class NeverBecomesDue(Saboteur):
    """Never sends what was scheduled."""

    async def add(self, messages: Messages, due: Dues, session: MemorySession, /) -> Undone:
        never = timedelta(days=1)
        return await super().add(messages, [never if each and _later(each) else each for each in due], session)


def _later(due: Any) -> bool:
    return bool(due > timedelta(0) if isinstance(due, timedelta) else due > datetime.now(UTC))


@caught_by("STO-DUE-04")
class LetsScheduledRowsBlock(Saboteur):
    """Lets a scheduled row block its key."""

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) or (row.reason is None and now < row.due_at)


@caught_by("STO-DUE-05", "STO-DUE-07", "STO-DUE-08", "STO-DUE-09")
class CancelsNothing(Saboteur):
    """Cancels nothing."""

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        return False


@caught_by("STO-DUE-05")
class CancelsOneRow(Saboteur):
    """Cancels one of several rows with the id."""

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        kept = list[Any]()
        for row in [*self._database.rows.values()][::-1]:
            same = [each for each in self._database.rows.values() if each.message.message_id == row.message.message_id]
            if row.message.message_id == message_id and len(same) > 1 and len(kept) + 1 < len(same):
                kept.append(row)
                del self._database.rows[row.position]
        try:
            return await super().cancel(message_id, session)
        finally:
            self._database.rows.update((row.position, row) for row in kept)


@caught_by("STO-DUE-06")
class CancelsWhatIsSent(Saboteur):
    """Cancels rows that a relay has claimed."""

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        if await super().cancel(message_id, session):
            return True
        found = [row.position for row in self._database.rows.values() if row.message.message_id == message_id]
        found = [each for each in found if self._database.rows[each].cancelled_in is None]
        for position in found:
            del self._database.rows[position]
        return bool(found)


@caught_by("STO-DUE-07", "STO-KEY-11")
class CancelsAtOnce(Saboteur):
    """Cancels in a transaction of its own."""

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        own = [row for row in self.rows_of(session) if row.message.message_id == message_id]
        if own:
            return await super().cancel(message_id, session)
        async with self.begin() as other:
            return await super().cancel(message_id, other)


@caught_by("STO-DUE-08")
class CancelsOnlyTheCommitted(Saboteur):
    """Does not find what the same transaction has stored."""

    async def cancel(self, message_id: UUID, session: MemorySession, /) -> bool:
        rows = self.rows_of(session)
        own = [*rows]
        rows.clear()
        try:
            return await super().cancel(message_id, session)
        finally:
            self.rows_of(session).extend(own)


# -- the inbox -------------------------------------------------------------------------------------------------------


@caught_by("STO-INB-01", "STO-INB-02", "STO-INB-03", "STO-INB-04", "STO-INB-05", "STO-INB-07")
class Forgets(Saboteur):
    """Takes each message for a new one."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        return await super().first_time(uuid4(), group, handler, session)


@caught_by("STO-INB-01")
class IgnoresGroups(Saboteur):
    """Takes one group for another."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        return await super().first_time(message_id, "", handler, session)


@caught_by("STO-INB-01")
class IgnoresHandlers(Saboteur):
    """Takes one handler for another."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        return await super().first_time(message_id, group, "", session)


@caught_by("STO-INB-02", "STO-INB-04")
class NotesAtOnce(Saboteur):
    """Notes a message in a transaction of its own."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        async with self.begin() as own:
            return await super().first_time(message_id, group, handler, own)


@caught_by("STO-INB-03")
class OverlooksItsOwnNote(Saboteur):
    """Does not see what the same transaction has noted."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        transaction: Any = session.transaction
        transaction.noted.pop((group, handler, message_id), None)
        return await super().first_time(message_id, group, handler, session)


@caught_by("STO-INB-04")
class TakesAnOpenOneForNothing(Saboteur):
    """Does not wait for the transaction that handles the same message just now."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        note = (group, handler, message_id)
        transaction: Any = session.transaction
        others = [each for each in self._database.transactions if each is not transaction and note in each.noted]
        if others:
            return note not in self._database.noted
        return await super().first_time(message_id, group, handler, session)


@caught_by("STO-INB-04")
class TakesAnOpenOneForHandled(Saboteur):
    """Takes a message for handled while another transaction handles it, which may still fail."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        if any((group, handler, message_id) in each.noted for each in self._database.transactions):
            return False
        return await super().first_time(message_id, group, handler, session)


@caught_by("STO-INB-06")
class LocksTheInbox(Saboteur):
    """Lets each message wait for all others."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        transaction: Any = session.transaction
        for other in [*self._database.transactions]:
            if other is not transaction and other.noted:
                await other.ended.wait()
        return await super().first_time(message_id, group, handler, session)


@caught_by("STO-INB-07")
class PrunesEverything(Saboteur):
    """Prunes ids that are younger."""

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        return await super().prune(keep=timedelta(0), limit=limit)


@caught_by("STO-INB-07", "STO-INB-08", "STO-INB-09")
class PrunesNothing(Saboteur):
    """Prunes nothing."""

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        return 0


@caught_by("STO-INB-08")
class PrunesWithoutALimit(Saboteur):
    """Prunes all at once."""

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        return await super().prune(keep=keep)


@caught_by("STO-INB-07")
class PrunesTheOutbox(Saboteur):
    """Deletes rows of the outbox as well."""

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        if pruned := await super().prune(keep=keep, limit=limit):
            self._database.rows.clear()
        return pruned


@caught_by("STO-INB-09")
class CountsWhatOthersPrune(Saboteur):
    """Counts the ids before it deletes them."""

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        until = self._database.clock() - keep
        count = min(limit, sum(noted_at < until for noted_at in self._database.noted.values()))
        await asyncio.sleep(0.001)
        await super().prune(keep=keep, limit=limit)
        return count


# -- wait ------------------------------------------------------------------------------------------------------------


@caught_by("STO-USE-02", "STO-WKE-01", "STO-WKE-06", "STO-WKE-09")
class WaitsTooLong(Saboteur):
    """Waits until something is stored, however long that takes."""

    async def wait(self, timeout: float, /) -> None:
        await super().wait(timeout + 1_000)


@caught_by("STO-WKE-01", "STO-WKE-02", "STO-WKE-03", "STO-WKE-04", "STO-WKE-06", "STO-WKE-07", "STO-WKE-09")
class DoesNotWait(Saboteur):
    """Does not wait."""

    async def wait(self, timeout: float, /) -> None:
        await asyncio.sleep(0)


@caught_by("STO-USE-02", "STO-WKE-01", "STO-WKE-06", "STO-WKE-09")
class RaisesATimeout(Saboteur):
    """Raises a TimeoutError when the time is over."""

    async def wait(self, timeout: float, /) -> None:
        async with asyncio.timeout(timeout):
            await self._database.news.wait()


@caught_by("STO-WKE-02", "STO-WKE-03", "STO-WKE-04", "STO-WKE-05", "STO-WKE-06", "STO-WKE-07")
class Sleeps(Saboteur):
    """Notices nothing."""

    async def wait(self, timeout: float, /) -> None:
        await asyncio.sleep(timeout)


@caught_by("STO-WKE-03")
class WakesTooEarly(Saboteur):
    """Ends `wait` before the commit."""

    async def wait(self, timeout: float, /) -> None:
        if not any(transaction.rows for transaction in self._database.transactions):
            await super().wait(timeout)


@caught_by("STO-WKE-04", "STO-WKE-05")
class ListensOnlyWhileItWaits(Saboteur):
    """Forgets what was stored between a claim and `wait`."""

    async def wait(self, timeout: float, /) -> None:
        self._database.news.clear()
        await super().wait(timeout)


@caught_by("STO-WKE-05")
class ListensFromTheFirstWaitOn(Saboteur):
    """Forgets what was stored before the first `wait`."""

    _listens = False

    async def wait(self, timeout: float, /) -> None:
        if not self._listens:
            self._listens = True
            self._database.news.clear()
        await super().wait(timeout)


@caught_by("STO-WKE-06")
class CannotBeUsedAgain(Saboteur):
    """Refuses to wait after `close`."""

    _closed = False

    async def wait(self, timeout: float, /) -> None:
        if self._closed:
            raise RuntimeError("closed")
        await super().wait(timeout)

    async def close(self) -> None:
        self._closed = True
        await super().close()


@caught_by("STO-WKE-01", "STO-WKE-03", "STO-WKE-04", "STO-WKE-07", "STO-WKE-09")
class WaitsOnce(Saboteur):
    """Cannot wait again after a `wait` that was cancelled."""

    _waiting = False

    async def wait(self, timeout: float, /) -> None:
        if self._waiting:
            raise RuntimeError("another task waits already")
        self._waiting = True
        await super().wait(timeout)
        self._waiting = False


@caught_by("STO-WKE-09")
class TakesScheduledRowsForNews(Saboteur):
    """Ends `wait` at once while there are scheduled rows."""

    async def wait(self, timeout: float, /) -> None:
        if not any(row.due_at > self._database.clock() and not row.attempts for row in self._database.rows.values()):
            await super().wait(timeout)


# -- the status, and dead rows ---------------------------------------------------------------------------------------


@caught_by("STO-CLM-10", "STO-STA-02", "STO-STA-03", "STO-TXN-03")
class CountsOnlyFreeRows(Saboteur):
    """Does not count leased rows as pending."""

    async def status(self) -> Status:
        found = await super().status()
        return replace(found, pending=found.pending - found.leased)


@caught_by("STO-STA-02")
class CountsRetriesAsPending(Saboteur):
    """Counts rows that wait for their retry as pending."""

    async def status(self) -> Status:
        found, now = await super().status(), self._database.clock()
        waiting = sum(row.attempts > 0 and row.due_at > now and not row.reason for row in self._database.rows.values())
        return replace(found, pending=found.pending + waiting, scheduled=found.scheduled - waiting)


@caught_by("STO-STA-03")
class CountsEndedLeases(Saboteur):
    """Counts rows as leased whose lease has ended."""

    async def status(self) -> Status:
        leased = sum(row.lease is not None and not row.reason for row in self._database.rows.values())
        return replace(await super().status(), leased=leased)


@caught_by("STO-STA-02")
class CountsUnkeyedRowsAsKeys(Saboteur):
    """Counts a dead row without a key as a blocked key."""

    async def status(self) -> Status:
        found = await super().status()
        keys = {row.message.key for row in self._database.rows.values() if row.reason is not None}
        return replace(found, blocked_keys=len(keys))


@caught_by("STO-DED-04", "STO-STA-02")
class CountsDeadRowsAsBlocked(Saboteur):
    """Counts the dead rows themselves as blocked."""

    async def status(self) -> Status:
        found = await super().status()
        return replace(found, blocked=found.blocked + found.dead)


@caught_by("STO-STA-04")
class TakesDeadRowsForOld(Saboteur):
    """Says how old the oldest row is, also if it is dead."""

    async def status(self) -> Status:
        found, now = await super().status(), self._database.clock()
        oldest = max([(now - row.stored_at).total_seconds() for row in self._database.rows.values()], default=0.0)
        return replace(found, oldest=oldest)


@caught_by("STO-STA-04")
class CountsFromTheStoring(Saboteur):
    """Says for how long the oldest pending row was stored, not for how long it has been due."""

    async def status(self) -> Status:
        found, now = await super().status(), self._database.clock()
        rows = [row for row in self._database.rows.values() if row.reason is None and row.due_at <= now]
        return replace(found, oldest=max([(now - row.stored_at).total_seconds() for row in rows], default=0.0))


@caught_by("STO-CLM-09", "STO-LNG-04", "STO-STA-01")
class NeverHasAnEmptyStatus(Saboteur):
    """Fails without rows."""

    async def status(self) -> Status:
        if not self._database.rows:
            raise TypeError("'NoneType' object is not subscriptable")
        return await super().status()


@caught_by("STO-STA-05")
class RefusesItsTables(Saboteur):
    """Refuses tables that are right."""

    async def check(self) -> None:
        raise ConfigurationError("the tables were made by another version; migrate them")


@caught_by("STO-STA-06")
class ChecksNothing(Saboteur):
    """Accepts any tables."""

    async def check(self) -> None:
        return


@caught_by("STO-STA-07")
class WrapsErrors(Saboteur):
    """Raises an error of its own for one of the database."""

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        try:
            return await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)
        except LookupError as error:
            raise UsageError("the database failed") from error


@caught_by("STO-DED-01", "STO-DED-08")
class HidesAttempts(Saboteur):
    """Does not say how often a dead row was tried."""

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        return [replace(row, attempts=0) for row in await super().dead(limit=limit, after=after)]


@caught_by("STO-DED-01")
class CountsBlockedForUnkeyed(Saboteur):
    """Says that dead rows without a key block others."""

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        found = await super().dead(limit=limit, after=after)
        others = sum(row.reason is None for row in self._database.rows.values())
        return [replace(row, blocked=row.blocked if row.message.key is not None else others) for row in found]


@caught_by("STO-DED-02")
class IncludesTheRowItself(Saboteur):
    """Lists dead rows from the position on, with the one at it."""

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        return await super().dead(limit=limit, after=max(after - 1, 0))


@caught_by(
    "STO-DAT-08",
    "STO-DED-01",
    "STO-DED-03",
    "STO-DED-04",
    "STO-DED-05",
    "STO-DED-06",
    "STO-KEY-05",
    "STO-KEY-06",
    "STO-KEY-09",
    "STO-STA-02",
    "STO-USE-02",
)
class SendsDeadRows(Saboteur):
    """Claims dead rows if they do not block."""

    def may_be_sent(self, row: Any, now: datetime) -> bool:
        is_dead = row.reason is not None and not row.is_leased(now)
        return super().may_be_sent(row, now) or is_dead

    def blocks(self, row: Any, now: datetime, on_dead: OnDead) -> bool:
        return super().blocks(row, now, on_dead) and row.reason is None


@caught_by("STO-DED-04", "STO-DED-08")
class KeepsAttempts(Saboteur):
    """Redrives rows with the attempts that they had."""

    async def redrive(self, positions: Positions | None = None, /) -> int:
        before = {row.position: row.attempts for row in self._database.rows.values()}
        result = await super().redrive(positions)
        for position, attempts in before.items():
            self._database.rows[position].attempts = attempts
        return result


@caught_by("STO-DED-04")
class AppendsRedrivenRows(Saboteur):
    """Redrives rows by storing them again, behind all others."""

    async def redrive(self, positions: Positions | None = None, /) -> int:
        wanted = None if positions is None else {*positions}
        dead = [row for row in await self.dead() if wanted is None or row.position in wanted]
        await self.discard([row.position for row in dead])
        async with self.begin() as session:
            await self.add([row.message for row in dead], [None] * len(dead), session)
        return len(dead)


@caught_by("STO-DED-05")
class TakesNoneForAll(Saboteur):
    """Redrives all rows if it gets an empty list."""

    async def redrive(self, positions: Positions | None = None, /) -> int:
        return await super().redrive(positions or None)


@caught_by("STO-DED-06")
class DiscardsNothing(Saboteur):
    """Discards nothing."""

    async def discard(self, positions: Positions, /) -> int:
        return 0


@caught_by("STO-DED-07")
class DiscardsAnything(Saboteur):
    """Deletes any row."""

    async def discard(self, positions: Positions, /) -> int:
        found = [each for each in positions if self._database.rows.pop(each, None) is not None]
        return len(found)


@caught_by("STO-DED-07")
class RedrivesAnything(Saboteur):
    """Takes any row for a dead one."""

    async def redrive(self, positions: Positions | None = None, /) -> int:
        rows = [self._database.rows[each] for each in positions or () if each in self._database.rows]
        for row in rows:
            if row.reason is None:
                row.lease, row.due_at = None, self._database.clock()
        return max(await super().redrive(positions), len(rows))


@caught_by("STO-DED-08")
class KeepsTheFirstDeath(Saboteur):
    """Shows when a row died first."""

    async def finish(self, lease: UUID, /, *, sent: Positions, untried: Positions, failed: Failures) -> int:
        first = {row.position: row.died_at for row in self._database.rows.values() if row.died_at.year > 1}
        result = await super().finish(lease, sent=sent, untried=untried, failed=failed)
        for position in {*first} & {*self._database.rows}:
            self._database.rows[position].died_at = first[position]
        return result


# -- its use ---------------------------------------------------------------------------------------------------------


@caught_by("STO-USE-01")
class NeedsALoop(Saboteur):
    """Can be made only inside an event loop."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        asyncio.get_running_loop()


@caught_by("STO-USE-02")
class HasOneConnection(Saboteur):
    """Has one connection for all calls, which refuses a second one at the same time."""

    _busy = False

    async def status(self) -> Status:
        if self._busy:
            raise RuntimeError("another operation is in progress")
        self._busy = True
        try:
            await asyncio.sleep(0)
            return await super().status()
        finally:
            self._busy = False

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        if self._busy:
            raise RuntimeError("another operation is in progress")
        return await super().claim(limit=limit, lease=lease, order=order, on_dead=on_dead)


@caught_by("STO-INB-02", "STO-INB-04")
class Commits(Saboteur):
    """Commits the transaction of the program when it has noted a message."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        result = await super().first_time(message_id, group, handler, session)
        await session.commit()
        await session.begin()
        return result


@caught_by("STO-USE-03")
class RollsBackADuplicate(Saboteur):
    """Rolls back the transaction of the program if a message is a duplicate."""

    async def first_time(self, message_id: UUID, group: str, handler: str, session: MemorySession, /) -> bool:
        if await super().first_time(message_id, group, handler, session):
            return True
        await session.rollback()
        await session.begin()
        return False


@caught_by("STO-USE-04")
class LeavesTransactionsOpen(Saboteur):
    """Leaves a transaction open if a call is cancelled."""

    async def status(self) -> Status:
        transaction = self._database.begin()
        await asyncio.sleep(0)
        self._database.roll_back(transaction)
        return await super().status()


@caught_by("STO-USE-05", "STO-USE-06")
class LooksAtEveryRow(Saboteur):
    """Looks at every row."""

    def found(self, limit: int, order: Order, on_dead: OnDead) -> list[Any]:
        self.look_at(len(self._database.rows))
        return super().found(limit, order, on_dead)
