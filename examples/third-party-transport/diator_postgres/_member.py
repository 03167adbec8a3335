"""One subscription: what it receives, holds and settles. It outlives its connections."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias, cast
from uuid import UUID, uuid4

from diator.brokers.base import Delivery, Gap, OnGap, Topic
from diator.brokers.settling import Acknowledgements, provenance
from diator.exceptions import BrokerError
from diator_postgres._link import Link

Token: TypeAlias = tuple[int, int]
"""The id of a row and the attempt: no two deliveries have the same, so none settles what another one holds."""

Run: TypeAlias = Callable[..., Awaitable[Sequence[Any]]]
"""Has a statement run: by a connection that is being prepared, or by a link."""

_AT_ONCE = 32
"""How many are claimed at once, so that other members have work, too."""

# What waits again comes first, lest the new ones never let it. `ANY (ARRAY (…))` is always an index scan.
_CLAIM = """
WITH again AS (
    SELECT id FROM messages WHERE grp = $2 AND topic = ANY ($3) AND due > '-infinity' AND due <= now()
    ORDER BY due LIMIT $4 FOR UPDATE SKIP LOCKED
), fresh AS (
    SELECT id FROM messages WHERE grp = $2 AND topic = ANY ($3) AND due = '-infinity'
    ORDER BY id LIMIT $4 - (SELECT count(*) FROM again) FOR UPDATE SKIP LOCKED
)
UPDATE messages SET holder = $1, due = now() + $5, attempt = attempt + 1
WHERE id = ANY (ARRAY (SELECT id FROM again UNION ALL SELECT id FROM fresh))
RETURNING id, attempt, topic, body, headers
"""
_NEXT_DUE = "SELECT min(due) - now() FROM messages WHERE grp = $1 AND topic = ANY ($2) AND due > '-infinity'"

_OURS = """
unnest($2::text[]::bigint[], $3::text[]::int[]) AS ours (id, n) WHERE holder = $1 AND m.id = ours.id AND attempt = n
"""
_DONE = f"DELETE FROM messages AS m USING {_OURS}"
_RENEW = f"UPDATE messages AS m SET due = now() + $4 FROM {_OURS}"
_LATER = f"""
WITH later AS (UPDATE messages AS m SET holder = NULL, due = now() + $4 FROM {_OURS} RETURNING grp)
SELECT pg_notify(current_schema, grp) FROM later
"""
_ASIDE = f"""
WITH gone AS ({_DONE} RETURNING m.id, topic, grp, body)
INSERT INTO dead_letters SELECT id, topic, grp, body, $4::text::json FROM gone
"""
# All that is held but for the first $2 and $3. What is none of $4 and $5 was not given out: that was no attempt.
_GIVE_BACK = """
WITH back AS (
    UPDATE messages SET holder = NULL, due = '-infinity',
        attempt = attempt - ((id, attempt) NOT IN (SELECT * FROM unnest($4::text[]::bigint[], $5::text[]::int[])))::int
    WHERE grp = $6 AND due > '-infinity' AND holder = $1
        AND (id, attempt) NOT IN (SELECT * FROM unnest($2::text[]::bigint[], $3::text[]::int[])) RETURNING grp
)
SELECT pg_notify(current_schema, grp) FROM back LIMIT 1
"""

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Member:
    """One member of a group; of a group of its own, where it subscribed without one."""

    link: Link
    group: str
    written: str
    topics: Mapping[str, Topic]
    lease: timedelta
    kept: timedelta | None
    timeout: float
    on_gap: OnGap | None
    on_settled: Callable[[], None] = lambda: None
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    held: set[Token] = field(default_factory=set)
    _let_go: set[Token] = field(default_factory=set)
    _name: UUID = field(default_factory=uuid4)
    _claiming: asyncio.Task[Sequence[Any]] | None = None
    _complete_until: datetime | None = None
    _has_left: bool = False

    def __post_init__(self) -> None:
        self._acknowledgements = Acknowledgements[Token](self._tell)
        self._renewing: asyncio.Task[None] | None = None

    # -- the source ----------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Have a connection, and with it the group."""
        self.link.prepare_by(self.prepare)
        await self.link.run("SELECT")
        self._renewing = self._renewing or asyncio.create_task(self._keep_renewing(), name="diator: renewing")

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        self.woken.clear()
        began = datetime.now(UTC)
        about = (self._name, self.written, [*self.topics], min(most, _AT_ONCE), self.lease)
        self._claiming = claiming = self._claiming or self.link.begin(_CLAIM, *about)
        try:
            rows = await asyncio.shield(claiming)  # if this is cancelled, the next call has the answer
        finally:
            if claiming.done():
                self._claiming = None
        self.held.update((row["id"], row["attempt"]) for row in rows)
        if not rows:
            self._complete_until = began
            await self._wait()
        return [self._delivery(row) for row in sorted(rows, key=itemgetter("id"))]  # RETURNING keeps no order

    async def probe(self) -> None:
        """`receive` asks the service more often than that."""

    async def _wait(self) -> None:
        """Wait until there may be something: a notification, something that is due, or one that was lost."""
        [(due,)] = await self.link.run(_NEXT_DUE, self.written, [*self.topics])
        longest = self.timeout / 2
        with suppress(TimeoutError):
            async with asyncio.timeout(longest if due is None else min(longest, due.total_seconds())):
                await self.woken.wait()

    def _delivery(self, row: Any) -> Delivery:
        return Delivery(
            topic=self.topics[row["topic"]],
            body=row["body"],
            headers={name: str(value) for name, value in json.loads(row["headers"]).items()},
            attempt=row["attempt"],
            settler=self,
            token=(row["id"], row["attempt"]),
        )

    # -- the settler ---------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        token = self._taken_from(delivery)
        if not self._has_left:
            self._acknowledgements.add(token)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        await self._settle(_LATER, delivery, timedelta(seconds=after))

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        said = provenance(delivery, reason, source=delivery.topic.message_name, group=self.group)
        await self._settle(_ASIDE, delivery, json.dumps({**delivery.headers, **said}))

    async def _settle(self, statement: str, delivery: Delivery, value: object) -> None:
        token = self._taken_from(delivery)
        if not self._has_left:
            await self.link.run(statement, self._name, *_columns([token]), value)
            self._let_go.discard(token)

    async def _tell(self, tokens: Sequence[Token]) -> None:
        try:
            await self.link.run(_DONE, self._name, *_columns(tokens))
            self._let_go.difference_update(tokens)
        except BrokerError as error:
            logger.warning("%d acknowledgements did not arrive, and these messages come again: %s", len(tokens), error)

    def _taken_from(self, delivery: Delivery) -> Token:
        """From now on it is renewed no more, so that it comes again if this fails."""
        token = cast(Token, delivery.token)
        self.held.discard(token)
        self._let_go.add(token)
        self.on_settled()
        return token

    # -- the group, and the end ----------------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 3)
            with suppress(BrokerError):
                await self.link.run(_RENEW, self._name, *_columns(self.held), self.lease)
                await self._join(self.link.run)

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """Tell what is left to tell, and give back what is held. Should that fail, the lease ends by itself."""
        self._has_left = True
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        unseen = {cast(Token, delivery.token) for delivery in not_given_out}
        run = partial(self.link.run, until=asyncio.get_running_loop().time() + self.timeout)
        self.link.forget(self.prepare)
        with suppress(BrokerError):
            await self._acknowledgements.flush()
            if self.kept is not None:
                await run("SELECT drop_groups($1)", [self.written])
            elif self._complete_until is not None:  # it had a connection once
                await self._give_back(run, keeping=(), given_out=(self.held | self._let_go) - unseen)

    async def prepare(self, connection: Any) -> None:
        """Have the group, and nothing claimed that nobody knows of, since the answer was lost."""
        await self._join(connection.fetch)
        if self._claiming is not None and self._claiming.done():
            self._claiming = None  # it came, and was not fetched
        known = self.held | self._let_go
        await self._give_back(connection.fetch, keeping=known, given_out=known)

    async def _join(self, run: Run) -> None:
        [(was_there,)] = await run("SELECT join_group($1, $2, $3)", self.written, [*self.topics], self.kept)
        if not was_there and self._complete_until is not None and self.on_gap is not None:
            gap = Gap(since=self._complete_until, until=datetime.now(UTC), reason="the group was gone")
            try:
                self.on_gap(gap)
            except Exception:
                logger.exception("on_gap failed")
        self._complete_until = self._complete_until or datetime.now(UTC)

    async def _give_back(self, run: Run, *, keeping: Collection[Token], given_out: Collection[Token]) -> None:
        await run(_GIVE_BACK, self._name, *_columns(keeping), *_columns(given_out), self.written)


def _columns(tokens: Collection[Token]) -> tuple[list[str], list[str]]:
    """As text: what an array of numbers is, asyncpg would ask the service first, for each connection."""
    return [str(id_) for id_, _ in tokens], [str(attempt) for _, attempt in tokens]
