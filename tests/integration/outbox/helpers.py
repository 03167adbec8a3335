"""Short words for what these tests do with a store."""

import asyncio
from contextlib import asynccontextmanager
from uuid import uuid4

import sqlalchemy as sa

from diator.brokers import Message
from diator.outbox.store import Failure


def message(name="Happened", key=None, **options):
    options.setdefault("payload_json", b'{"n":1}')
    options.setdefault("message_id", uuid4())
    return Message(message_type="notification_event", message_name=name, key=key, **options)


async def add(store, sessions, *messages, due=None):
    """Store messages in a transaction of their own."""
    async with sessions.begin() as session:
        await store.add(messages, [due] * len(messages), session)


async def claim(store, *, limit=100, lease=30.0, order="key", on_dead="block"):
    return await store.claim(limit=limit, lease=lease, order=order, on_dead=on_dead)


async def names(store, **options):
    return [row.message.message_name for row in (await claim(store, **options)).rows]


async def fail(store, claimed, *rows, retry_after=None, reason="rejected: Refused"):
    failures = [Failure(position=row.position, reason=reason, retry_after=retry_after) for row in rows]
    return await store.finish(claimed.lease, sent=[], untried=[], failed=failures)


async def until(condition):
    """Wait until *condition* returns something true, and return that."""
    async with asyncio.timeout(30):
        while not (found := await condition()):  # noqa: ASYNC110  # the database decides
            await asyncio.sleep(0.01)
    return found


@asynccontextmanager
async def transaction(engine):
    """Keep a transaction open that has written something."""
    async with engine.connect() as connection:
        await connection.execute(sa.text("SELECT pg_current_xact_id()"))
        yield connection
        await connection.rollback()
