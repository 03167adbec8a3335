"""A database of one process, for the tests of the core: its transactions hold rows of the program, messages, notes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from diator.brokers import Message


class Transaction:
    """What a handler gets: its rows are in the ledger once it was committed."""

    def __init__(self, ledger: "Ledger") -> None:
        self.ledger = ledger
        self.rows: list[Any] = []
        self.messages: list[tuple[Message, Any]] = []
        self.notes: set[tuple[UUID, str, str]] = set()
        self.was_rolled_back = False
        self.is_over = False

    def was_committed(self) -> bool | None:
        return False if self.was_rolled_back else True if self.is_over else None

    def commit(self) -> None:
        if self.ledger.failing:
            self.was_rolled_back = True
            raise self.ledger.failing
        self.ledger.rows += self.rows
        self.ledger.messages += self.messages
        self.ledger.notes |= self.notes
        self.is_over = True


class Ledger:
    """A store without a relay. It counts its transactions, and may fail to commit them."""

    session_type = Transaction

    def __init__(self, *, knows: bool = True) -> None:
        self.knows = knows
        self.rows: list[Any] = []
        self.messages: list[tuple[Message, Any]] = []
        self.notes: set[tuple[UUID, str, str]] = set()
        self.failing: Exception | None = None
        self.begun = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Transaction]:
        self.begun += 1
        transaction = Transaction(self)
        try:
            yield transaction
        except BaseException:
            transaction.was_rolled_back = True
            raise
        transaction.commit()

    async def transaction(self) -> AsyncIterator[Transaction]:
        """Give a transaction to a container, as a resource of a scope."""
        async with self.begin() as transaction:
            yield transaction

    async def uncommitted(self) -> AsyncIterator[Transaction]:
        """As a program that forgets to commit."""
        transaction = Transaction(self)
        yield transaction
        transaction.was_rolled_back = True

    async def add(self, messages: Sequence[Message], due: Sequence[Any], session: Transaction, /):
        await asyncio.sleep(0)
        session.messages += zip(messages, due, strict=True)
        return (lambda: session.was_rolled_back) if self.knows else None

    async def cancel(self, message_id: UUID, session: Transaction, /) -> bool:
        found = [each for each in self.messages if each[0].message_id == message_id]
        self.messages = [each for each in self.messages if each not in found]
        return bool(found)

    async def first_time(self, message_id: UUID, group: str, handler: str, session: Transaction, /) -> bool:
        note = (message_id, group, handler)
        session.notes.add(note)
        return note not in self.notes

    def watch(self, session: Transaction, /):
        return session.was_committed if self.knows else None

    async def prune(self, **_: Any) -> int:
        return 0

    async def check(self) -> None: ...

    @property
    def names(self) -> list[str]:
        return [message.message_name for message, _ in self.messages]
