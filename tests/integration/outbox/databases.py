"""The databases of these tests: PostgreSQL by two drivers, and SQLite."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from diator.outbox.sqlalchemy import configure_sqlite

DRIVERS = ["postgresql+asyncpg", "postgresql+psycopg", "sqlite+aiosqlite"]
ON_POSTGRESQL = DRIVERS[:2]


@asynccontextmanager
async def database(driver: str, postgres_url: str | None, folder: Path) -> AsyncIterator[sa.URL]:
    """Make an empty database, and drop it at the end."""
    name = f"diator_{uuid4().hex}"
    if driver.startswith("sqlite"):
        yield sa.make_url(f"{driver}:///{folder / name}.db")
        return
    assert postgres_url is not None
    connection = await asyncpg.connect(postgres_url)
    try:
        # The locale of the service decides the encoding otherwise, and psycopg needs one.
        await connection.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0 STRATEGY wal_log")
        try:
            url = sa.make_url(postgres_url).set(drivername=driver, database=name)
            # asyncpg leaves the error of a future unread if it is cancelled while it asks for TLS.
            yield url.update_query_dict({"ssl": "disable"}) if driver.endswith("asyncpg") else url
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


def engine_of(url: sa.URL, **options):
    """Return an engine of the program, as a program makes it."""
    engine = create_async_engine(url, **options)
    if engine.dialect.name == "sqlite":
        configure_sqlite(engine)
    return engine
