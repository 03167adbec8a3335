"""The contract of a store: the tables of an outbox and an inbox in the database of the program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

from diator.brokers.message import Message
from diator.brokers.sending import Due

Session_contra = TypeVar("Session_contra", contravariant=True)

#: What becomes of later rows with the key of a dead row: they wait, or they are sent.
OnDead: TypeAlias = Literal["block", "skip"]
#: In which order rows are sent: those with one key one after the other, or without an order.
Order: TypeAlias = Literal["key", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """
    A message in the outbox.

    Attributes:
        position: The number of the row. It grows with each row that is stored, also within one transaction.
        message: The message, without its codec: the relay sets that of the outbox.
        attempts: How often the row was claimed and then tried, this claim included.
        stored_at: When it was stored, by the clock of the database.
    """

    position: int
    message: Message = field(repr=False)
    attempts: int
    stored_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """
    The rows that a relay may send until its lease ends.

    Attributes:
        lease: A new random token; `Store.finish` changes only rows that still have it.
        rows: The rows, ordered by position.
        next_due: In how many seconds the next row becomes due that waits for its time or for its retry; None if there
            is none, or if *rows* is not empty.
    """

    lease: UUID
    rows: Sequence[Row]
    next_due: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """
    A row that was not sent.

    Attributes:
        position: The number of the row.
        reason: The type of the error, and a word before it: `rejected: MessageTooLarge`. Never the text of the error,
            which may quote the message.
        retry_after: In how many seconds it is sent again; None: the row is dead.
    """

    position: int
    reason: str
    retry_after: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadRow:
    """
    A row that no relay sends any more. It stays in the table until somebody redrives or discards it.

    Attributes:
        position, message, attempts, stored_at: As in `Row`.
        reason: As `Failure.reason`.
        died_at: When it died, by the clock of the database.
        blocked: How many rows with its key wait behind it, if dead rows block their key.
    """

    position: int
    message: Message = field(repr=False)
    attempts: int
    stored_at: datetime
    reason: str
    died_at: datetime
    blocked: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """
    The state of an outbox.

    Attributes:
        pending: How many rows are due and not sent yet, without the dead ones. Those that are leased are included.
        oldest: For how many seconds the oldest of them has been due; 0 if there are none.
        scheduled: How many rows wait for their time.
        leased: How many rows a relay has claimed.
        dead: How many rows are dead.
        blocked: How many rows wait behind a dead row with their key.
        blocked_keys: How many keys have a dead row.
        held_back: How many rows wait for an older transaction of the database that is still open: that one may store a
            message which has to be sent before them. Always 0 on a database that has one writer at a time.
        held_back_by: The process id of the oldest such transaction in the database; None if nothing is held back, or
            the user of the relay may not see it.
        held_back_for: For how many seconds that transaction has been open; 0 without one.
    """

    pending: int
    oldest: float
    scheduled: int
    leased: int
    dead: int
    blocked: int
    blocked_keys: int
    held_back: int
    held_back_by: int | None
    held_back_for: float


class Store(Protocol[Session_contra]):
    """
    Keeps the messages of an outbox, and the ids of an inbox, in the database of the program.

    `add`, `cancel` and `first_time` work in the open transaction of the program. They never commit and never roll back.
    Every other method uses a connection and a transaction of its own, and has committed when it returns.

    A store keeps these promises, which `diator.testing.outbox` proves for any store:

    - A row exists if and only if the transaction that added it was committed. Its body, key and headers come back byte
      for byte.
    - Of several relays, each row is leased to at most one at a time. A lease ends by the clock of the database, so that
      the clock of a relay does not matter. A row whose lease has ended may be claimed again.
    - With the order `key`, rows with one key are handed out in the order of their positions, one after the other if one
      of them fails: no row is claimed while an earlier row with its key is leased to another claim, waits for a retry,
      or is dead (if dead rows block). This holds for several relays as well, and for transactions that commit in
      another order than they added: a row is claimed only when no transaction is open that could still commit an
      earlier one. A scheduled row blocks nothing while it waits, and has no order among other scheduled rows.
    - What is not due costs nothing: the time of `claim` does not grow with the number of rows.
    - Any error of the database is raised as it is. A cancelled call leaves no transaction open.

    It can be made without a running event loop, and several tasks of one event loop may use it at the same time.

    Attributes:
        session_type: The class of the objects in whose transaction messages are stored, such as SQLAlchemy's
            `AsyncSession`. The container of the program gives such an object for each unit of work.
    """

    session_type: type

    # -- in the transaction of the program ---------------------------------------------------------------------------

    async def add(
        self, messages: Sequence[Message], due: Sequence[Due], session: Session_contra, /
    ) -> Callable[[], bool] | None:
        """
        Store *messages* in the open transaction of *session*, in their order.

        *due* says for each message when it may be sent: at a time, some time after now, or at once (None). The clock of
        the database decides what is now.

        Return a function that says whether this transaction was rolled back, so that the messages are gone; false also
        while it is open. None if the store cannot know.

        Raises:
            EncodingError: The database cannot hold a message, such as a key with a NUL character on PostgreSQL.
        """
        ...

    async def cancel(self, message_id: UUID, session: Session_contra, /) -> bool:
        """
        Delete the rows with *message_id* which no relay has claimed, in the open transaction of *session*.

        Return whether there was one. False: it was sent, is just being sent, or never existed.
        """
        ...

    async def first_time(self, message_id: UUID, group: str, handler: str, session: Session_contra, /) -> bool:
        """
        Note in the open transaction of *session* that *handler* of *group* handles a message; false if it did before.

        While another transaction that noted the same is open, the call waits for its end: false if it was committed,
        true if it was rolled back.

        A store that can know what becomes of a transaction also has a method `watch(session)`. It returns a function
        that says whether the open transaction of *session* was committed: None while it is open, False after a
        rollback. So a program that forgets to commit, or commits too early, gets an error. Without it, the message
        would be acknowledged, and the work or its events lost.
        """
        ...

    # -- for the relay -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """
        Check the tables, once, when a relay starts.

        Raises:
            ConfigurationError: A table or a column is missing, or the table was made by another version. The text says
                what to do.
        """
        ...

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        """
        Lease at most *limit* rows that may be sent now, for *lease* seconds, and count an attempt for each.

        One call after the other by one relay; several relays may call it at the same time.
        """
        ...

    async def finish(
        self, lease: UUID, /, *, sent: Collection[int], untried: Collection[int], failed: Collection[Failure]
    ) -> int:
        """
        Delete the rows that were *sent*, release those that are *untried*, and note those that *failed*.

        A row that is released loses the attempt that `claim` has counted. All happens in one transaction, and only to
        rows that still have this *lease*. Return how many had lost it: another relay may have sent them as well.
        """
        ...

    async def wait(self, timeout: float, /) -> None:
        """
        Wait until messages were stored, by this or another process, but at most *timeout* seconds.

        The database may not tell: then it takes the whole time. After an error of the database it also takes the whole
        time, and raises nothing. A message that was stored between the last `claim` and this call ends it at once.
        """
        ...

    async def close(self) -> None:
        """Release what `wait` keeps open, such as a connection that listens. The store can be used again."""
        ...

    # -- for people --------------------------------------------------------------------------------------------------

    async def status(self) -> Status:
        """Return the state of the outbox."""
        ...

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        """Return the dead rows behind the position *after*, ordered by position, at most *limit*."""
        ...

    async def redrive(self, positions: Collection[int] | None = None, /) -> int:
        """Let dead rows be sent again, with no attempts; all of them without *positions*. Return how many."""
        ...

    async def discard(self, positions: Collection[int], /) -> int:
        """Delete dead rows, and let those behind them be sent. Return how many were deleted."""
        ...

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        """
        Delete at most *limit* ids of the inbox that were noted more than *keep* ago. Return how many.

        Of several processes that call it at the same time, one works and the others return 0.
        """
        ...
