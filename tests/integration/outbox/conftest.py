"""Each test has its own database."""

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker

from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import DRIVERS, database, engine_of


@pytest.fixture(params=DRIVERS)
def driver(request):
    return request.param


@pytest.fixture
async def url(driver, request, tmp_path):
    postgres_url = None if driver.startswith("sqlite") else request.getfixturevalue("postgres_url")
    async with database(driver, postgres_url, tmp_path) as found:
        yield found


@pytest.fixture
async def engine(url):
    engine = engine_of(url)
    yield engine
    await engine.dispose()


@pytest.fixture
def metadata():
    return sa.MetaData()


@pytest.fixture
async def store(engine, metadata):
    store = SqlAlchemyStore(engine, metadata)
    await store.create_tables()
    yield store
    await store.close()


@pytest.fixture
def sessions(engine):
    return async_sessionmaker(engine, expire_on_commit=False)
