"""What is stored in the transaction of the program."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from diator.brokers import Message
from diator.exceptions import ConfigurationError, EncodingError, UsageError
from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import engine_of
from tests.integration.outbox.helpers import add, claim, message, names


class Base(DeclarativeBase):
    pass


class Member(Base):
    __tablename__ = "members"
    id: Mapped[int] = mapped_column(primary_key=True)


async def test_a_message_comes_back_as_it_was_stored(store, sessions):
    stored = Message(
        message_type="ecst_event",
        message_name="Joined \u2013 wörld",
        message_id=UUID(int=7),
        payload_json='{"b":  1, "a":"ü\\u0000", "b":2.0,\n "n":12345678901234567890}'.encode(),
        key="a key with ' and \\ and %s :x \U0001f600",
        headers={"z": "1", "a": "ü\0", "trace": 'x"y'},
        time=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    )
    before = datetime.now(UTC)
    await add(store, sessions, stored)
    [row] = (await claim(store)).rows
    assert row.message == stored
    assert [*row.message.headers] == ["z", "a", "trace"]
    assert row.message.time.isoformat() == stored.time.isoformat()
    assert type(row.message.message_id) is UUID
    assert type(row.message.key) is str
    assert row.attempts == 1
    assert abs(row.stored_at - before) < timedelta(minutes=1)
    assert row.stored_at.utcoffset() == timedelta(0)


async def test_messages_of_one_transaction_keep_their_order(store, sessions):
    expected = [f"E{number}" for number in range(250)]
    async with sessions.begin() as session:
        await store.add([message(name) for name in expected[:200]], [None] * 200, session)
        for name in expected[200:]:
            await store.add([message(name)], [None], session)
    claimed = await claim(store, limit=1_000)
    assert [row.message.message_name for row in claimed.rows] == expected
    assert [row.position for row in claimed.rows] == sorted(row.position for row in claimed.rows)


async def test_a_message_exists_if_its_transaction_was_committed(store, sessions):
    async with sessions() as session:
        was_rolled_back = await store.add([message("Committed")], [None], session)
        assert not was_rolled_back()
        await session.commit()
        assert not was_rolled_back()
        second = await store.add([message("RolledBack")], [None], session)
        await session.rollback()
        assert second()
        third = await store.add([message("Closed")], [None], session)
    assert third()
    assert not was_rolled_back()
    assert await names(store) == ["Committed"]


async def test_a_savepoint_that_is_rolled_back_takes_its_messages_along(store, sessions):
    async with sessions.begin() as session:
        kept = await store.add([message("Kept")], [None], session)
        async with session.begin_nested():
            released = await store.add([message("Released")], [None], session)
        async with session.begin_nested() as savepoint:
            gone = await store.add([message("Gone")], [None], session)
            async with session.begin_nested():
                inner = await store.add([message("Inner")], [None], session)
            assert not inner()
            await savepoint.rollback()
        assert [kept(), released(), gone(), inner()] == [False, False, True, True]
    assert [kept(), released(), gone(), inner()] == [False, False, True, True]
    assert await names(store) == ["Kept", "Released"]


async def test_a_released_savepoint_is_rolled_back_with_its_transaction(store, sessions):
    async with sessions() as session:
        async with session.begin_nested():
            stored = await store.add([message()], [None], session)
        assert not stored()
        await session.rollback()
    assert stored()
    assert await names(store) == []


async def test_a_commit_that_fails_rolls_back(store, sessions, engine):
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sessions() as session:
        session.add_all([Member(id=1)])
        await session.commit()
    with pytest.raises(sa.exc.IntegrityError):  # noqa: PT012
        async with sessions(autoflush=False) as session:
            session.add(Member(id=1))
            was_rolled_back = await store.add([message()], [None], session)
            await session.commit()
    assert was_rolled_back()
    assert await names(store) == []


async def test_a_session_keeps_nothing_after_its_transaction(store, sessions):
    async with sessions() as session:
        for end in (session.commit, session.rollback):
            await store.add([message()], [None], session)
            await end()
            assert not session.info


@pytest.mark.parametrize("autoflush", [True, False])
async def test_what_is_pending_is_written_before_the_message(store, engine, autoflush):
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine, autoflush=autoflush) as session:
        session.add(Member(id=1))
        await store.add([message()], [None], session)
        assert bool(session.new) is not autoflush
        await session.commit()
        assert await session.scalar(sa.select(Member.id)) == 1
    assert await names(store) == ["Happened"]


async def test_the_session_may_be_bound_to_a_connection(store, engine):
    async with engine.connect() as connection:
        await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            await store.add([message()], [None], session)
            await session.commit()
        await connection.rollback()
        assert await names(store) == []
        async with AsyncSession(connection) as session, session.begin():
            await store.add([message()], [None], session)
    assert await names(store) == ["Happened"]


async def test_a_session_with_an_engine_for_each_class_uses_that_of_the_store(store, engine):
    async with AsyncSession(binds={Member: engine}) as session, session.begin():
        await store.add([message()], [None], session)
        assert await store.first_time(UUID(int=1), "group", "handler", session)
    assert await names(store) == ["Happened"]


@pytest.mark.parametrize("wrong", [None, "session", object()], ids=["None", "text", "object"])
async def test_another_object_than_a_session_is_refused(store, wrong):
    with pytest.raises(ConfigurationError, match="AsyncSession of SQLAlchemy, and it was given"):
        await store.add([message()], [None], wrong)


async def test_a_session_of_another_database_is_refused(store, url, tmp_path):
    for other in ("sqlite+aiosqlite://", f"sqlite+aiosqlite:///{tmp_path}/other.db", url.set(database="another")):
        engine = engine_of(sa.make_url(other))
        async with AsyncSession(engine) as session:
            with pytest.raises(ConfigurationError, match=r"uses another database .* pass the same engine to both"):
                await store.add([message()], [None], session)
            with pytest.raises(ConfigurationError, match="uses another database"):
                await store.first_time(UUID(int=1), "group", "handler", session)
        await engine.dispose()


async def test_another_engine_of_the_same_database_is_accepted(store, url):
    engine = engine_of(url)
    await add(store, async_sessionmaker(engine), message())
    await engine.dispose()
    assert await names(store) == ["Happened"]


async def test_a_transaction_that_the_handler_has_ended_is_named(store, sessions):
    async with sessions.begin() as session:
        await session.commit()
        with pytest.raises(UsageError, match="its handler called commit"):
            await store.add([message()], [None], session)
    assert await names(store) == []


async def test_whether_a_transaction_was_committed_is_watched(store, sessions):
    async with sessions() as session:
        await store.first_time(message().message_id, "group", "handler", session)
        first = store.watch(session)
        assert first() is None
        await session.commit()
        assert first() is True
        await store.first_time(message().message_id, "group", "handler", session)
        second = store.watch(session)
    assert (first(), second()) == (True, False)


async def test_a_session_without_transactions_is_refused(store, engine):
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            await store.add([message()], [None], session)


async def test_an_engine_without_transactions_is_refused(store, url):
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with AsyncSession(engine) as session:
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            await store.add([message()], [None], session)
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            await store.first_time(UUID(int=1), "group", "handler", session)
    await engine.dispose()


@pytest.mark.parametrize(
    ("broken", "on_sqlite"),
    [
        ({"key": "\ud800"}, False),
        ({"name": "\ud800"}, False),
        ({"headers": {"a": "\ud800"}}, False),
        ({"payload_json": b'{"a":"\xff"}'}, False),
        ({"key": "a\0b"}, True),
        ({"name": "a\0b"}, True),
        ({"key": "\xfc" * 1_001}, True),
    ],
    ids=["key", "name", "header", "payload", "NUL in the key", "NUL in the name", "long key"],
)
async def test_a_message_that_the_database_cannot_hold_is_refused(store, sessions, driver, broken, on_sqlite):
    unfit, expected = message(**broken), ["Before"]
    async with sessions.begin() as session:
        await store.add([message("Before")], [None], session)
        if on_sqlite and driver.startswith("sqlite"):
            await store.add([unfit], [None], session)
            expected.append(unfit.message_name)
        else:
            with pytest.raises(EncodingError, match=str(unfit.message_id)) as caught:
                await store.add([unfit], [None], session)
            assert "\xfc" not in str(caught.value)
    rows = (await claim(store)).rows  # the transaction went on
    assert [row.message.message_name for row in rows] == expected
    assert rows[-1].message == unfit or len(rows) == 1


async def test_an_error_of_the_database_shows_nothing_of_the_message(store, sessions, metadata, engine):
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
    secret = message(key="secret-key", payload_json=b'{"secret-payload":1}', headers={"x": "secret-header"})
    async with sessions() as session:
        with pytest.raises(sa.exc.DBAPIError) as caught:
            await store.add([secret], [None], session)
    assert "secret" not in str(caught.value)
    assert "INSERT INTO" in str(caught.value)


async def test_two_stores_of_one_program(engine, sessions, metadata):
    first, again = SqlAlchemyStore(engine, metadata), SqlAlchemyStore(engine, metadata)
    second = SqlAlchemyStore(engine, metadata, outbox_table="other outbox", inbox_table='other "inbox"')
    assert first.outbox_table is again.outbox_table
    for store in (first, second):
        await store.create_tables()
    await add(first, sessions, message("First"))
    await add(second, sessions, message("Second"))
    assert await names(second) == ["Second"]
    assert await names(again) == ["First"]
    async with sessions.begin() as session:
        assert await first.first_time(UUID(int=1), "group", "handler", session)
        assert await second.first_time(UUID(int=1), "group", "handler", session)


def test_other_tables_of_these_names_are_refused(engine, metadata):
    sa.Table("diator_inbox", metadata)
    with pytest.raises(ConfigurationError, match=r"already has another table `diator_inbox`.*inbox_table="):
        SqlAlchemyStore(engine, metadata)
