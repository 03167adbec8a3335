"""What the suite does not test: the rows that remain in the tables, and the gap of an expired subscription."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from diator_postgres import PostgresMessageBroker

from diator.brokers import Message
from diator.brokers.base import Gap, Topic
from diator.exceptions import ConfigurationError

pytestmark = pytest.mark.skipif("DIATOR_TEST_POSTGRES_URL" not in os.environ, reason="no PostgreSQL")


@pytest.fixture
async def database() -> AsyncIterator[tuple[Any, str]]:
    """Return a connection and the schema of this test alone."""
    schema = f"diator_{uuid4().hex}"
    connection = await asyncpg.connect(
        os.environ["DIATOR_TEST_POSTGRES_URL"], server_settings={"search_path": schema}, statement_cache_size=0
    )
    yield connection, schema
    await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    await connection.close()


def new_broker(schema: str, **options: Any) -> PostgresMessageBroker:
    return PostgresMessageBroker(os.environ["DIATOR_TEST_POSTGRES_URL"], schema=schema, **options)


def new_message(number: int) -> Message:
    return Message.create(message_name="Happened", payload={"number": number})


HAPPENED = Topic("notification_event", "Happened")


async def test_a_message_that_every_group_has_settled_is_deleted(database: tuple[Any, str]) -> None:
    connection, schema = database
    async with new_broker(schema) as broker:
        for group in ("first", "second"):
            async with broker.subscribe([HAPPENED], group=group):
                pass
        await broker.send_message(new_message(1))
        left = [await connection.fetchval("SELECT count(*) FROM messages")]
        for group in ("first", "second"):
            async with broker.subscribe([HAPPENED], group=group) as deliveries:
                await (await anext(deliveries)).ack()
            left.append(await connection.fetchval("SELECT count(*) FROM messages"))
    assert left == [2, 1, 0]


async def test_a_subscription_without_a_group_leaves_nothing_behind(database: tuple[Any, str]) -> None:
    connection, schema = database
    async with new_broker(schema) as broker:
        async with broker.subscribe([HAPPENED]) as deliveries:
            await broker.send_messages([new_message(1), new_message(2)])
            await anext(deliveries)
        tables = "SELECT (SELECT count(*) FROM groups), (SELECT count(*) FROM messages)"
        assert tuple(await connection.fetchrow(tables)) == (0, 0)


async def test_an_expired_subscription_reports_its_gap(database: tuple[Any, str]) -> None:
    connection, schema = database
    gaps: asyncio.Queue[Gap] = asyncio.Queue()
    async with (
        new_broker(schema, lease=0.3) as broker,
        broker.subscribe([HAPPENED], on_gap=gaps.put_nowait) as deliveries,
    ):
        await broker.send_message(new_message(1))
        await (await anext(deliveries)).ack()
        await asyncio.sleep(0.1)
        # As if the reader had been away for longer than `absence`: its group expires, and it misses a message.
        expired_at = datetime.now(UTC)
        await connection.execute("UPDATE groups SET expires = now() - interval '1 s'")
        await broker.send_message(new_message(2))
        gap = await gaps.get()
        await broker.send_message(new_message(3))
        delivery = await anext(deliveries)
    assert b'"number":3' in delivery.body
    assert gap.since < expired_at < gap.until


async def test_a_subscription_whose_process_died_stops_collecting_messages(database: tuple[Any, str]) -> None:
    connection, schema = database
    async with new_broker(schema) as broker:
        async with broker.subscribe([HAPPENED], group="others"):
            await connection.execute("INSERT INTO groups SELECT topic, 'dead', now() - interval '1 s' FROM groups")
            await broker.send_message(new_message(1))
            kept = await connection.fetch("SELECT grp FROM messages")
        async with broker.subscribe([HAPPENED]):
            groups = await connection.fetch("SELECT grp FROM groups WHERE grp = 'dead'")
    assert [row["grp"] for row in kept] == ['["others"]']
    assert groups == []


async def test_a_group_has_separate_rows_for_each_topic(database: tuple[Any, str]) -> None:
    """Two services may share a group name and read different topics. The rows of one never wake the other."""
    _, schema = database
    other = Topic("notification_event", "Other")
    async with new_broker(schema) as broker:
        async with broker.subscribe([HAPPENED], group="group"):
            pass
        async with broker.subscribe([other], group="group") as deliveries:
            await broker.send_message(new_message(1))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(deliveries), 0.1)
        async with broker.subscribe([HAPPENED], group="group") as deliveries:
            assert (await anext(deliveries)).attempt == 1


async def test_a_new_group_waits_for_the_sends_in_progress(database: tuple[Any, str]) -> None:
    """They looked up the groups before the new one existed, and may be confirmed after it."""
    connection, schema = database
    async with new_broker(schema) as broker:
        sending = connection.transaction()
        await sending.start()
        await connection.execute("SELECT send(ARRAY['topic'], ARRAY['{}'::bytea], ARRAY['{}'])")
        subscription = broker.subscribe([HAPPENED], group="group")
        entering = asyncio.create_task(subscription.__aenter__())
        waits = not (await asyncio.wait([entering], timeout=0.3))[0]
        await sending.commit()
        await entering
        await subscription.__aexit__(None, None, None)
    assert waits


async def test_a_claim_whose_answer_was_lost_is_released_at_once_without_an_attempt(database: tuple[Any, str]) -> None:
    connection, schema = database
    async with (
        new_broker(schema, lease=60) as broker,
        broker.subscribe([HAPPENED], group="group") as deliveries,
    ):
        [subscription] = broker._service.subscriptions
        # The service claims a message for the subscription, and its connection breaks before it answers.
        await connection.execute(
            "INSERT INTO messages (topic, grp, body, headers, attempt, due, holder) "
            "SELECT topic, grp, '{}', '{}', 1, now() + interval '1 min', $1 FROM groups",
            subscription.consumer,
        )
        await connection.execute("SELECT pg_terminate_backend($1)", broker._reader.raw.get_server_pid())
        delivery = await asyncio.wait_for(anext(deliveries), 5)
    assert delivery.attempt == 1


async def test_a_commit_waits_for_the_disk_whatever_the_default_of_the_database(database: tuple[Any, str]) -> None:
    _, schema = database
    async with new_broker(schema, server_settings={"synchronous_commit": "off"}) as broker:
        [(found,)] = await broker._service.run("SELECT current_setting('synchronous_commit')")
    assert found == "on"


def test_a_schema_name_cannot_inject_sql() -> None:
    with pytest.raises(ConfigurationError, match="is not a valid schema name"):
        new_broker('x"; DROP TABLE messages')


async def test_headers_of_another_program_are_kept_as_they_are(database: tuple[Any, str]) -> None:
    """A dead letter has them byte for byte. Those that Python cannot decode stop no message behind them."""
    connection, schema = database
    sent = [
        '{"n": 1.50, "no": null, "list": [1, "\\u0000"], "o": {}}',
        '{"deep": ' + "[" * 3_000 + "]" * 3_000 + "}",
        "{ }",
    ]
    key, body = json.dumps([*HAPPENED]), b"{}"
    async with new_broker(schema) as broker, broker.subscribe([HAPPENED], group="g") as deliveries:
        await connection.execute("SELECT send($1, $2, $3)", [key] * len(sent), [body] * len(sent), sent)
        async with asyncio.timeout(20):
            taken = [await anext(deliveries) for _ in sent]
            for each in taken:
                await each.dead_letter("no")
    assert taken[0].headers == {"n": "1.5", "list": '[1, "\\u0000"]', "o": "{}"}
    assert [each.unreadable is not None for each in taken] == [False, True, False]
    kept = [row["headers"] for row in await connection.fetch("SELECT headers FROM dead_letters ORDER BY id")]
    for before, after in zip(sent, kept, strict=True):
        assert after.startswith(before.rstrip(" }") if before != "{ }" else "{")
    assert [json.loads(after)["diator-dlq-reason"] for after in (kept[0], kept[2])] == ["no"] * 2
