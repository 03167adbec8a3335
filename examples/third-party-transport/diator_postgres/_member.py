"""One subscription: what it receives, holds and settles. It outlives its connections."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, cast
from uuid import uuid4

from diator.brokers.base import Delivery, Topic
from diator.brokers.settling import Acknowledgements, dead_letter_headers
from diator.brokers.supervisor import ResilientSubscription, Source
from diator.exceptions import BrokerClosed, BrokerError
from diator_postgres._link import Link

logger: logging.Logger = logging.getLogger(__name__)

Token: TypeAlias = tuple[int, int]
"""The id of a row and the attempt: no two deliveries have the same, so none settles what another one holds."""

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
# What was not given out ($2, $3) was no attempt. What was is given back, too, by a member that leaves ($5).
_GIVE_BACK = """
WITH ours AS (SELECT * FROM unnest($2::text[]::bigint[], $3::text[]::int[])), back AS (
    UPDATE messages SET holder = NULL, due = '-infinity', attempt = attempt - ((id, attempt) NOT IN (TABLE ours))::int
    WHERE grp = $4 AND due > '-infinity' AND holder = $1 AND ($5 OR (id, attempt) NOT IN (TABLE ours)) RETURNING grp
)
SELECT pg_notify(current_schema, grp) FROM back LIMIT 1
"""


@dataclass(eq=False, kw_only=True)
class Member:
    """One member of a group; of a group of its own, where it subscribed without one."""

    link: Link
    group: str
    written: str
    topics: Mapping[str, Topic]
    lease: timedelta
    kept: timedelta | None
    supervised: ResilientSubscription = field(init=False)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    held: set[Token] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._name = uuid4()
        self._known: set[Token] = set()
        """What is held, and what is settled and not told yet, or in vain: that comes again when its lease is over."""
        self._acknowledgements = Acknowledgements[Token](self._tell)
        self._renewing: asyncio.Task[None] | None = None
        self._has_left = False
        self._connection: Any = None
        self._emptied = datetime.now(UTC)
        self._complete_until: datetime | None = None

    # -- the source ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[Source, None]:
        """Have the group, and nothing claimed that nobody knows of, since the answer was lost."""
        if self.link.is_closed:
            raise BrokerClosed("this broker is closed")
        await self._join()
        self._renewing = self._renewing or asyncio.create_task(self._keep_renewing(), name="diator: renewing")
        await self._give_back()
        self._connection = self.link.connection
        yield self

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        if self._connection is None or self._connection.is_closed():
            raise ConnectionError("the connection is lost, and perhaps the answer to a claim with it")
        self.woken.clear()
        began = datetime.now(UTC)
        claim = self.link.run(_CLAIM, self._name, self.written, [*self.topics], most, self.lease)
        rows = sorted(map(tuple, await claim))  # RETURNING keeps no order
        tokens = {(id_, attempt) for id_, attempt, *_ in rows}
        self.held |= tokens
        self._known |= tokens
        if not rows:
            self._emptied = began
            await self._wait()
        return [self._delivery(*row) for row in rows]

    async def probe(self) -> None:
        """`receive` asks the service more often than that."""

    async def _wait(self) -> None:
        """Wait until there may be something: a notification, something that is due, or one that was lost."""
        [(due,)] = await self.link.run(_NEXT_DUE, self.written, [*self.topics])
        longest = self.link.timeout / 2
        with suppress(TimeoutError):
            async with asyncio.timeout(longest if due is None else min(longest, due.total_seconds())):
                await self.woken.wait()

    def _delivery(self, id_: int, attempt: int, written: str, body: bytes, headers: str) -> Delivery:
        texts = {name: str(value) for name, value in json.loads(headers).items()}
        topic, token = self.topics[written], (id_, attempt)
        return Delivery(topic=topic, body=body, headers=texts, attempt=attempt, settler=self, token=token)

    # -- the settler ---------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        self._acknowledgements.add(self._let_go(delivery))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        await self._tell([self._let_go(delivery)], _LATER, timedelta(seconds=after))

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        said = dead_letter_headers(delivery, reason, source=delivery.topic.message_name, group=self.group)
        await self._tell([self._let_go(delivery)], _ASIDE, json.dumps({**delivery.headers, **said}))

    def _let_go(self, delivery: Delivery) -> Token:
        """From now on it is renewed no more, so that it comes again if this fails."""
        token = cast(Token, delivery.token)
        self.held.discard(token)
        self.supervised.notify_settled()
        return token

    async def _tell(self, tokens: Sequence[Token], statement: str = _DONE, *values: object) -> None:
        if not self._has_left:  # else it comes too late
            await self.link.run(statement, self._name, *_columns(tokens), *values)
            self._known.difference_update(tokens)

    # -- the group, and the end ----------------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 3)
            try:
                await self.link.run(_RENEW, self._name, *_columns(self.held), self.lease)
                await self._join()
            except Exception as error:  # noqa: BLE001  # whatever it is, there is time for another try
                logger.warning("a lease could not be renewed: %r", error)

    async def _join(self) -> None:
        emptied = self._emptied
        [(was_there,)] = await self.link.run("SELECT join_group($1, $2, $3)", self.written, [*self.topics], self.kept)
        if not was_there and self._complete_until is not None:
            self.supervised.tell_gap(self._complete_until, "the group was gone")
        self._complete_until = emptied  # not before: a group that is gone is empty, too

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """Tell what is left to tell, and give back what is held. Should that fail, the lease ends by itself."""
        if self._renewing is None:
            return  # it never was a member
        until = asyncio.get_running_loop().time() + self.link.timeout
        self._renewing.cancel()
        await asyncio.wait([self._renewing])
        await self._acknowledgements.flush()
        self._has_left = True
        with suppress(BrokerError):
            if self.kept is not None:
                await self.link.run("SELECT drop_groups($1)", [self.written], until=until)
            else:
                await self._give_back({cast(Token, delivery.token) for delivery in not_given_out}, until)

    async def _give_back(self, unseen: Collection[Token] = (), until: float | None = None) -> None:
        given_out = _columns(self._known.difference(unseen))
        await self.link.run(_GIVE_BACK, self._name, *given_out, self.written, self._has_left, until=until)


def _columns(tokens: Collection[Token]) -> tuple[list[str], list[str]]:
    """As text: what an array of numbers is, asyncpg would ask the service first, for each connection."""
    return [str(id_) for id_, _ in tokens], [str(attempt) for _, attempt in tokens]
