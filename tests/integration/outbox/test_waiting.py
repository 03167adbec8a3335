"""How a relay learns of stored messages."""

import asyncio
import logging
import time

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import ON_POSTGRESQL, engine_of
from tests.integration.outbox.helpers import add, claim, message, names


async def test_a_commit_wakes_the_relay(store, sessions):
    assert await names(store) == []
    waiting = asyncio.create_task(store.wait(60))
    await add(store, sessions, message())
    async with asyncio.timeout(30):
        await waiting
    assert await names(store) == ["Happened"]


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_another_process_wakes_the_relay_after_its_connection_was_lost(store, url):
    engine = engine_of(url)
    other, sessions = SqlAlchemyStore(engine), async_sessionmaker(engine)
    await claim(store)
    await store.wait(0.01)
    async with engine.connect() as connection:
        listening = sa.text(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND query LIKE 'LISTEN%'"
        )
        async with asyncio.timeout(30):
            while await connection.scalar(listening):
                await connection.rollback()
    for _ in range(2):
        waiting = asyncio.create_task(store.wait(60))
        await add(other, sessions, message())
        async with asyncio.timeout(30):
            await waiting
        assert await names(store) == ["Happened"]
    await engine.dispose()


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
@pytest.mark.parametrize("error", [OSError, TimeoutError])  # the driver's own timeout is a TimeoutError as well
async def test_a_relay_that_cannot_listen_waits_and_says_so_once(store, engine, caplog, monkeypatch, error):
    async def refuse():
        raise error

    monkeypatch.setattr(store._listener, "open", refuse)
    for _ in range(2):
        began = time.monotonic()
        await store.wait(0.1)
        assert time.monotonic() - began > 0.09
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot listen" in record.getMessage()
    assert error.__name__ in record.getMessage()


@pytest.mark.parametrize("driver", ON_POSTGRESQL[:1])
async def test_a_message_that_is_stored_while_a_connection_is_made_ends_the_next_wait(store, sessions, url):
    may_connect = asyncio.Event()

    async def connect():
        await may_connect.wait()
        return await asyncpg.connect(
            url.set(drivername="postgresql").difference_update_query(["ssl"]).render_as_string(hide_password=False)
        )

    slow = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=sa.NullPool)
    relay = SqlAlchemyStore(slow)
    may_connect.set()
    assert await names(relay) == []
    may_connect.clear()
    await relay.wait(0.01)
    await add(store, sessions, message())
    may_connect.set()
    async with asyncio.timeout(30):
        while not relay._listener.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await relay.wait(60)
    await relay.close()
    await slow.dispose()


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_without_notifications_a_commit_of_the_same_process_wakes_the_relay(engine, sessions):
    store = SqlAlchemyStore(engine, notify=False)
    await store.create_tables()
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await claim(store)
        waiting = asyncio.create_task(store.wait(60))
        await add(store, sessions, message())
        async with asyncio.timeout(30):
            await waiting
        listening = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        assert not await connection.scalar(sa.text(listening))


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_the_listening_connection_is_not_one_of_the_pool(url):
    engine = engine_of(url, pool_size=1, max_overflow=0, pool_timeout=10)
    store = SqlAlchemyStore(engine)
    await store.create_tables()
    for _ in range(2):
        await store.wait(0.01)
        assert await names(store) == []
        await store.close()
    await engine.dispose()


def test_one_event_loop_after_the_other(postgres_url, tmp_path, driver):
    """The program makes its engine and store when it is imported, and runs several loops."""
    if driver.startswith("sqlite"):
        url = sa.make_url(f"{driver}:///{tmp_path}/program.db")
    else:
        url = sa.make_url(postgres_url).set(drivername=driver)
        if driver.endswith("psycopg"):
            url = url.update_query_dict({"client_encoding": "utf8"})
    engine = engine_of(url)
    name = f"loops_{tmp_path.parent.name}_{time.time_ns()}".replace("-", "_")
    store = SqlAlchemyStore(engine, outbox_table=f"{name}_o", inbox_table=f"{name}_i")

    async def run():
        await store.create_tables()
        assert await names(store) == []
        await store.wait(0.01)
        waiting = asyncio.create_task(store.wait(60))
        await add(store, async_sessionmaker(engine), message())
        async with asyncio.timeout(30):
            await waiting
        claimed = await claim(store)
        assert len(claimed.rows) == 1
        await store.finish(claimed.lease, sent=[claimed.rows[0].position], untried=[], failed=[])
        await store.close()
        await engine.dispose()

    async def clean():
        async with engine.begin() as connection:
            await connection.run_sync(store.outbox_table.metadata.drop_all)
        await engine.dispose()

    for _ in range(3):
        asyncio.run(run())
    asyncio.run(clean())
