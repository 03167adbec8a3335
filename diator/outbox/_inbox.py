from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from random import uniform
from typing import Generic, Self, TypeVar
from uuid import UUID

from diator._hints import name_of
from diator._options import check_type
from diator.exceptions import ConfigurationError
from diator.outbox._outbox import check_session, check_store
from diator.outbox.store import Store

Session = TypeVar("Session")

logger: logging.Logger = logging.getLogger("diator.outbox")

#: How many ids are deleted in one transaction.
_PRUNED_AT_ONCE = 5_000
#: How often old ids are looked for, in seconds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0


class Inbox(Generic[Session]):
    """
    Notes which messages a handler has handled, in the transaction of the handler, so that a duplicate has no effect.

    Pass it as `inbox` to a `Consumer`. The note is the first statement of the transaction; it is there if and only if
    the transaction was committed. A second delivery of the message waits while the first one is being handled. Then the
    consumer acknowledges it without a call, if the first one was committed, and handles it otherwise.

    A note belongs to the consumer group, the name of the handler and the id of the message. A handler that is renamed
    may get a message again that it handled before.

    What a handler does outside of its transaction, such as a call of another service, may still happen twice.

    A consumer starts only if the tables are there. While it runs, old notes are deleted. One inbox may serve several
    consumers.

    Args:
        store: Keeps the notes. Use the store of the outbox, if there is one.
        group: Takes the place of the consumer group. Needed on a transport without groups, where the programs with one
            name then share the messages between them.
        keep: How long a note is kept. A duplicate that comes later is handled like a new message.

    Attributes:
        session_type: The class of the sessions of *store*.
        group, keep: As passed.

    Raises:
        ConfigurationError: An argument has the wrong type, *group* is empty, or *keep* is not longer than an hour: a
            message may wait that long for a retry.
    """

    def __init__(self, store: Store[Session], *, group: str | None = None, keep: timedelta = timedelta(days=7)) -> None:
        check_store(store)
        check_type("group", group, str)
        check_type("keep", keep, timedelta, is_needed=True)
        if group == "":
            raise ConfigurationError("group must not be empty")
        if keep <= timedelta(hours=1):
            raise ConfigurationError("keep must be a timedelta of more than one hour")
        self._store = store
        self._watch: Callable[[Session], Callable[[], bool | None]] | None = getattr(store, "watch", None)
        self.session_type: type = store.session_type
        self.group: str | None = group
        self.keep: timedelta = keep
        self._users = 0
        self._pruning: asyncio.Task[None] | None = None

    async def first_time(self, message_id: UUID, group: str, handler: str, session: Session, /) -> bool:
        """
        Note in the open transaction of *session* that *handler* of *group* handles a message; false if it did before.

        Raises:
            ConfigurationError: *session* is not of the type that the store needs.
        """
        check_session(session, self.session_type, "the inbox")
        return await self._store.first_time(message_id, group, handler, session)

    def watch(self, session: Session, /) -> Callable[[], bool | None] | None:
        """Return what tells whether the open transaction of *session* was committed; None if the store cannot know."""
        return None if self._watch is None else self._watch(session)

    async def prune(self) -> int:
        """Delete all notes that are older than *keep*. Return how many. A consumer calls it by itself."""
        total = 0
        while pruned := await self._store.prune(keep=self.keep, limit=_PRUNED_AT_ONCE):
            total += pruned
        return total

    async def __aenter__(self) -> Self:
        await self._check()
        self._users += 1
        if self._pruning is None:
            self._pruning = asyncio.create_task(self._prune_now_and_then(), name="diator: inbox")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._users -= 1
        if self._users == 0 and self._pruning is not None:
            pruning, self._pruning = self._pruning, None
            pruning.cancel()
            await asyncio.wait({pruning})  # not `await pruning`: that would hide a cancellation of this task

    async def _check(self) -> None:
        """Check the tables: without them, every message would fail until it is dead-lettered."""
        try:
            await self._store.check()
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001  # the database may come back before the first message does
            name = name_of(type(error))
            logger.warning(
                "the tables of the inbox were not checked: %s; the consumer starts", name, extra={"error_type": name}
            )

    async def _prune_now_and_then(self) -> None:
        pause = min(max(self.keep.total_seconds() / 100, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        while True:
            await asyncio.sleep(uniform(0.5, 1.5) * pause)  # noqa: S311  # so that several processes take turns
            try:
                await self.prune()
            except Exception as error:  # noqa: BLE001  # old notes do no harm; it tries again
                name = name_of(type(error))
                logger.warning(
                    "old notes of the inbox were not deleted: %s; it is tried again", name, extra={"error_type": name}
                )
