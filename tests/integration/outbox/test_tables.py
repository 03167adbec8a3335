"""The tables, as the program and the relay find them."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker

from diator.exceptions import ConfigurationError
from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import ON_POSTGRESQL, engine_of
from tests.integration.outbox.helpers import add, message, names


async def test_made_tables_are_in_order(store):
    await store.create_tables()
    await store.check()


async def test_several_processes_make_the_tables_at_the_same_time(url):
    engines = [engine_of(url) for _ in range(5)]
    stores = [SqlAlchemyStore(engine) for engine in engines]
    await asyncio.gather(*(store.create_tables() for store in stores))
    await stores[0].check()
    for engine in engines:
        await engine.dispose()


async def test_tables_that_were_not_made(engine):
    store = SqlAlchemyStore(engine)
    with pytest.raises(ConfigurationError, match=r"diator_outbox does not exist .*alembic revision.*create_tables\(\)"):
        await store.check()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("DROP TABLE diator_inbox", "the table diator_inbox does not exist"),
        ("ALTER TABLE diator_outbox DROP COLUMN last_error", "the column last_error is missing"),
        ("DROP INDEX diator_outbox_due", "the index diator_outbox_due is missing"),
        ("ALTER TABLE diator_outbox RENAME COLUMN event_time TO earlier", "the column event_time is missing"),
    ],
)
async def test_tables_of_another_version(store, engine, change, problem):
    async with engine.begin() as connection:
        await connection.execute(sa.text(change))
    with pytest.raises(ConfigurationError, match=f"{problem}.*alembic revision --autogenerate"):
        await store.check()


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_a_column_of_another_type(store, engine):
    async with engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE diator_outbox ALTER payload TYPE jsonb"))
    with pytest.raises(ConfigurationError, match="the column payload is JSONB, and should be JSON"):
        await store.check()


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
@pytest.mark.parametrize("translated", [False, True])
async def test_tables_in_a_schema(url, driver, translated):
    plain = engine_of(url)
    async with plain.begin() as connection:
        await connection.execute(sa.text('CREATE SCHEMA "Shop\'s"'))
    await plain.dispose()
    options = {"execution_options": {"schema_translate_map": {"tenant": "Shop's"}}} if translated else {}
    engine = engine_of(url, **options)
    store = SqlAlchemyStore(engine, sa.MetaData(schema="tenant" if translated else "Shop's"))
    with pytest.raises(ConfigurationError, match=r"Shop's\.diator_outbox does not exist"):
        await store.check()
    await store.create_tables()
    await store.check()
    await add(store, async_sessionmaker(engine), message(key="key"))
    assert (await store.status()).pending == 1
    assert await names(store) == ["Happened"]
    async with engine.connect() as connection:
        assert await connection.scalar(sa.text('SELECT count(*) FROM "Shop\'s".diator_outbox')) == 1
    await engine.dispose()


@pytest.mark.parametrize("driver", ON_POSTGRESQL[:1])
async def test_a_database_with_another_encoding(postgres_url, url):
    name = f"{url.database}_latin"
    admin = engine_of(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    latin = engine_of(url.set(database=name))
    async with admin.connect() as connection:
        await connection.execute(
            sa.text(f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        )
        try:
            store = SqlAlchemyStore(latin)
            await store.create_tables()
            with pytest.raises(ConfigurationError, match=r"encoding LATIN1.*UTF8"):
                await store.check()
        finally:
            await latin.dispose()
            await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    await admin.dispose()


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_a_user_who_may_not_read_the_sequence(store, engine, url):
    user = f"{url.database}_relay"
    async with engine.begin() as connection:
        await connection.execute(sa.text(f"CREATE ROLE {user} LOGIN PASSWORD 'x'"))
        tables = "diator_outbox, diator_inbox"
        await connection.execute(sa.text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {user}"))
    other = engine_of(url.set(username=user, password="x"))
    with pytest.raises(ConfigurationError, match=rf"{user} may not read the sequence of diator_outbox.*grant USAGE"):
        await SqlAlchemyStore(other).check()
    async with engine.begin() as connection:
        await connection.execute(sa.text(f"GRANT USAGE ON SEQUENCE diator_outbox_seq_seq TO {user}"))
    await SqlAlchemyStore(other).check()
    await other.dispose()
    async with engine.begin() as connection:
        await connection.execute(sa.text(f"DROP OWNED BY {user}"))
        await connection.execute(sa.text(f"DROP ROLE {user}"))


async def test_another_database_is_refused():
    engine = engine_of(sa.make_url("sqlite+aiosqlite://"))
    engine.sync_engine.dialect.name = "mysql"
    with pytest.raises(ConfigurationError, match="PostgreSQL or SQLite, and this one is of mysql"):
        SqlAlchemyStore(engine)
    with pytest.raises(ConfigurationError, match="needs an AsyncEngine"):
        SqlAlchemyStore(engine.sync_engine)
    await engine.dispose()
