"""Which rows a claim leases, and what it costs."""

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker

from diator.outbox.sqlalchemy import SqlAlchemyStore, _statements, _store
from tests.integration.outbox.databases import ON_POSTGRESQL, engine_of
from tests.integration.outbox.helpers import add, claim, fail, message, names


@pytest.fixture
def window(monkeypatch):
    """How many rows a claim looks at."""
    monkeypatch.setattr(_statements, "WINDOW", 20)
    monkeypatch.setattr(_store, "WINDOW", 20)
    return 20


@pytest.fixture
async def store(window, engine, metadata):
    store = SqlAlchemyStore(engine, metadata)
    await store.create_tables()
    yield store
    await store.close()


async def drain(store, **options):
    """Send all that can be sent, and return the names in their order."""
    sent, empty = [], 0
    while empty < 10:
        claimed = await claim(store, limit=10, **options)
        sent += [row.message.message_name for row in claimed.rows]
        await store.finish(claimed.lease, sent=[row.position for row in claimed.rows], untried=[], failed=[])
        empty = 0 if claimed.rows or claimed.next_due == 0 else empty + 1
    return sent


async def backlog(store, sessions, count=100):
    """Store *count* messages with one key, and then some with others."""
    expected = [f"A{number}" for number in range(count)]
    await add(store, sessions, *(message(name, key="a") for name in expected))
    others = [f"B{number}" for number in range(15)]
    await add(store, sessions, *(message(name, key=name) for name in others[:10]))
    await add(store, sessions, *(message(name) for name in others[10:]))
    return expected, others


async def test_a_backlog_behind_a_dead_row_delays_no_other_key(store, sessions):
    expected, others = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    assert await drain(store) == others

    await add(store, sessions, message("Last", key="a"), message("Other"))
    assert await drain(store) == ["Other"]
    status = await store.status()
    assert (status.blocked, status.pending, status.scheduled) == (100, 100, 0)

    await store.discard([claimed.rows[0].position])
    assert await drain(store) == [*expected[1:], "Last"]


async def test_no_later_row_overtakes_what_was_parked(store, sessions, window):
    expected, _ = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    await drain(store)
    await store.discard([claimed.rows[0].position])
    await add(store, sessions, message("Last", key="a"))
    for first in (1, 1 + window):  # each part that was sent brings the next one back
        await add(store, sessions, message("Other"), due=timedelta(0))
        claimed = await claim(store)
        found = [row.message.message_name for row in claimed.rows]
        assert found == [*expected[first : first + window], "Other"]
        await store.finish(claimed.lease, sent=[row.position for row in claimed.rows], untried=[], failed=[])


async def test_a_redriven_row_goes_first(store, sessions):
    expected, others = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    assert await drain(store) == others
    assert await store.redrive() == 1
    assert await drain(store) == expected


async def test_a_backlog_behind_a_retry_delays_no_other_key(store, sessions, engine):
    expected, others = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows, retry_after=3_600)
    assert await drain(store) == others
    await add(store, sessions, message("Last", key="a"))
    async with engine.begin() as connection:  # an hour later
        earlier = "available_at - interval '1 hour'" if engine.dialect.name == "postgresql" else "available_at - 3600"
        await connection.execute(sa.text(f"UPDATE diator_outbox SET available_at = {earlier} WHERE attempts > 0"))
    assert await drain(store) == [*expected, "Last"]


async def test_a_backlog_that_was_due_before_a_retry_of_its_key_stops_nothing(store, sessions, window):
    await add(store, sessions, message("A0", key="a"))
    claimed = await claim(store)
    later = [f"A{number}" for number in range(1, 2 * window)]
    await add(store, sessions, *(message(name, key="a") for name in later), due=timedelta(0))
    await add(store, sessions, message("Other"), due=timedelta(0))
    await fail(store, claimed, *claimed.rows, retry_after=0.0)
    sent = await drain(store)
    assert {*sent} == {"A0", *later, "Other"}
    assert next(name for name in sent if name != "Other") == "A0"


async def test_a_backlog_behind_a_lease_is_not_touched(store, sessions):
    await backlog(store, sessions)
    held = await claim(store, limit=5)
    assert await names(store, limit=100) == []
    await store.finish(held.lease, sent=[], untried=[row.position for row in held.rows], failed=[])
    assert (await names(store, limit=5)) == ["A0", "A1", "A2", "A3", "A4"]


async def test_a_dead_row_that_was_deleted_by_hand_blocks_no_more(store, sessions, engine):
    expected, others = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    assert await drain(store) == others
    async with engine.begin() as connection:
        await connection.execute(sa.text("DELETE FROM diator_outbox WHERE dead_reason IS NOT NULL"))
    assert await drain(store) == expected[1:]


@pytest.mark.parametrize("options", [{"on_dead": "skip"}, {"order": "none"}], ids=["skip", "none"])
async def test_a_relay_with_another_setting_sends_what_was_blocked(store, sessions, engine, options):
    expected, others = await backlog(store, sessions)
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    assert await drain(store) == others
    assert await drain(SqlAlchemyStore(engine), **options) == expected[1:]


async def test_a_message_that_is_cancelled_lets_those_behind_it_go(store, sessions):
    expected, others = await backlog(store, sessions)
    late = message("Late", key="a")
    claimed = await claim(store, limit=1)
    await fail(store, claimed, *claimed.rows)
    assert await drain(store) == others
    await store.discard([claimed.rows[0].position])  # brings the next ones back
    async with sessions.begin() as session:
        for name in expected[1:21]:
            found = await session.execute(
                sa.text("SELECT message_id FROM diator_outbox WHERE message_name = :name"), {"name": name}
            )
            message_id = found.scalar_one()
            assert await store.cancel(message_id if not isinstance(message_id, str) else UUID(message_id), session)
        await store.add([late], [None], session)
    assert await drain(store) == [*expected[21:], "Late"]


async def test_retries_and_scheduled_messages_leave_room_for_others(store, sessions):
    await add(store, sessions, *(message(f"Scheduled{number}") for number in range(20)), due=timedelta(seconds=0))
    await add(store, sessions, *(message(f"AtOnce{number}") for number in range(20)))
    for _ in range(2):
        kinds = [name[0] for name in await names(store, limit=10)]
        assert sorted(kinds) == ["A"] * 5 + ["S"] * 5


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_a_row_that_is_just_cancelled_holds_back_those_behind_it(store, sessions):
    first = message("First", key="a")
    await add(store, sessions, first, message("Second", key="a"), message("Other", key="b"))
    async with sessions() as session:
        assert await store.cancel(first.message_id, session)
        assert await names(store) == ["Other"]
        await session.rollback()
    assert await names(store) == ["First", "Second"]


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_only_transactions_that_have_stored_hold_messages_back(store, sessions, engine):
    async with engine.connect() as other, sessions() as writer, sessions() as undone:
        await other.execute(sa.text("SELECT pg_current_xact_id()"))  # a transaction of another program, which writes
        await add(store, sessions, message("Before", key="a"))
        async with undone.begin_nested() as savepoint:
            await store.add([message("Undone", key="a")], [None], undone)
            await savepoint.rollback()
        await store.add([message("Open", key="a")], [None], writer)
        await store.add([message("Open", key="a")], [None], writer)
        await add(store, sessions, message("After", key="a"), message("Other", key="b"), message("Free"))

        claimed = await claim(store)
        assert [row.message.message_name for row in claimed.rows] == ["Before", "Free"]
        await store.finish(claimed.lease, sent=[row.position for row in claimed.rows], untried=[], failed=[])
        status = await store.status()
        assert status.held_back == 2
        assert status.held_back_by == await writer.scalar(sa.text("SELECT pg_backend_pid()"))
        assert status.held_back_for > 0
        assert 0 < (await claim(store)).next_due <= 1

        await writer.commit()
        assert (await store.status()).held_back == 0
    assert await names(store) == ["Open", "Open", "After", "Other"]


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_a_transaction_that_stores_often_takes_one_lock(store, sessions):
    async with sessions() as session:
        async with session.begin_nested() as savepoint:  # its end releases the lock
            await store.add([message()], [None], session)
            await savepoint.rollback()
        for number in range(50):
            await store.add([message(f"E{number}")], [None], session)
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert await session.scalar(sa.text(held)) == 1


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_the_isolation_of_the_program_does_not_matter(url, level, window):
    engine = engine_of(url, isolation_level=level)
    stores = [SqlAlchemyStore(engine) for _ in range(2)]
    await stores[0].create_tables()
    sessions = async_sessionmaker(engine)
    await asyncio.gather(*(add(stores[0], sessions, message(f"E{number}", key="a")) for number in range(5)))
    claimed = await asyncio.gather(*(claim(store, limit=3) for store in stores for _ in range(2)))
    assert sorted(len(each.rows) for each in claimed) == [0, 0, 0, 3]
    await engine.dispose()


async def test_a_cancelled_call_is_rolled_back_before_the_store_is_closed(store, sessions, engine):
    await add(store, sessions, message())
    begun = asyncio.Event()
    sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: begun.set())
    claiming = asyncio.create_task(claim(store))
    await begun.wait()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    await store.close()
    assert engine.pool.checkedout() == 0
    assert await names(store) == ["Happened"]


@pytest.mark.parametrize("driver", ON_POSTGRESQL)
async def test_a_relay_that_is_suspended_in_a_claim_does_not_stop_the_others(store, sessions, engine):
    await add(store, sessions, message())
    async with engine.connect() as suspended:
        await suspended.execute(store._locks.claim)
        wanted = await suspended.scalar(sa.text("SHOW idle_in_transaction_session_timeout"))
        assert wanted == "10s"
        await suspended.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '200ms'"))
        assert await names(store) == ["Happened"]  # waited for the lock until PostgreSQL ended the other
        await suspended.invalidate()


async def fill(engine, count):
    """Store so many messages with 100 keys, of which a tenth is scheduled, and some are dead or wait for a retry."""
    on_postgresql = engine.dialect.name == "postgresql"
    numbers = (
        f"generate_series(1, {count}) n"
        if on_postgresql
        else f"(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {count}) SELECT n FROM c)"
    )
    later = "now() + interval '1 hour'" if on_postgresql else "9e9"
    at_once = "'-infinity'::timestamptz".replace(":", "\\:") if on_postgresql else "0.0"
    async with engine.begin() as connection:
        await connection.execute(
            sa.text(
                "INSERT INTO diator_outbox (message_id, message_type, message_name, key, headers, payload,"
                " available_at, attempts, dead_reason)"
                " SELECT '00000000-0000-0000-0000-000000000001', 't', 'n', 'k' || (n % 100), '{}',"
                f" '{{}}', CASE WHEN n % 10 = 0 OR n % 997 = 0 THEN {later} ELSE {at_once} END,"
                " CASE WHEN n % 997 = 0 OR n % 1009 = 0 THEN 1 ELSE 0 END, CASE WHEN n % 1009 = 0 THEN 'x' END"
                f" FROM {numbers}"
            )
        )


@pytest.mark.parametrize("analyzed", [False, True])
async def test_a_claim_reads_few_rows_of_many_by_its_indexes(engine, metadata, analyzed):
    store = SqlAlchemyStore(engine, metadata)
    await store.create_tables()
    await store.claim(limit=100, lease=30, order="key", on_dead="block")
    await fill(engine, 100_000)
    if analyzed:
        async with engine.connect() as connection:
            await connection.run_sync(lambda sync: sync.exec_driver_sql("ANALYZE diator_outbox"))
            await connection.commit()
    statement = store._statements.claim["key"]["block"].text
    parameters = {"lease": UUID("00000000-0000-0000-0000-000000000001"), "seconds": 30, "limit": 100, "half": 50}
    if engine.dialect.name == "postgresql":
        async with store._locked() as (connection, settled):
            explained = await connection.execute(
                sa.text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"), {**parameters, "settled": settled}
            )
            [plan] = explained.scalar_one()
            await connection.rollback()
        nodes = [*_nodes(plan["Plan"])]
        assert not {node["Node Type"] for node in nodes} & {"Seq Scan", "Sort", "Bitmap Heap Scan"}
        assert {node["Index Name"] for node in nodes if "Index Name" in node} >= {
            f"diator_outbox_{name}" for name in ("due", "tried", "dead", "parked", "pkey")
        }
        assert max(node["Actual Rows"] * node["Actual Loops"] for node in nodes) <= 2_000
    else:
        async with engine.connect() as connection:
            explained = await connection.execute(
                sa.text(f"EXPLAIN QUERY PLAN {statement}"), {**parameters, "lease": "1"}
            )
            steps = [row.detail for row in explained]
        searched = [step for step in steps if step.startswith("SEARCH o USING INDEX diator_outbox_due")]
        assert len(searched) == 2
        assert steps.count("SCAN o") == 3  # of what these have found, and of both together
        assert not [step for step in steps if "TEMP B-TREE" in step]
        used = {
            name
            for name in ("tried", "dead", "parked")
            if f"INDEX diator_outbox_{name} (key=? AND seq<?)" in f"{steps}"
        }
        assert used == {"tried", "dead", "parked"}


def _nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
