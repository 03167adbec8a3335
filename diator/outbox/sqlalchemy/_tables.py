"""The two tables, as they are on PostgreSQL and on SQLite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from diator.exceptions import ConfigurationError

_Types: TypeAlias = "dict[str, sa.types.TypeEngine[Any]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """
    What differs between the databases: types, and the words of a statement.

    Attributes:
        types: The types of columns, by what they hold.
        now: The time of the statement.
        at_once, parked: The `available_at` of a row that may be sent at once, and of one that waits for others.
        uuid: The parameter of a statement that is a UUID.
        json: How a JSON column is read as the text that it is.
        seconds: A duration of so many seconds.
        elapsed: A duration, as seconds.
        among: A list of positions.
        items: The rows of a JSON list.
        item: The part of such a row at a place, as text.
    """

    types: _Types
    now: str
    at_once: str
    parked: str
    uuid: str
    json: str
    seconds: str
    elapsed: str
    among: str
    items: str
    item: str


_TIMESTAMP = sa.TIMESTAMP(timezone=True)
POSTGRESQL = Dialect(
    types={
        "position": sa.BigInteger(),
        "id": sa.Uuid(),
        "text": sa.Text(),
        # Compared byte by byte: faster, and two keys are one only if they are the same text.
        "key": sa.Text(collation="C"),
        "json": postgresql.JSON(),  # kept as it was written, unlike jsonb
        "time": _TIMESTAMP,
        "count": sa.Integer(),
    },
    # Stable within a statement, so that an index serves `available_at <= now`; not the start of the transaction, which
    # may have waited for its lock.
    now="statement_timestamp()",
    at_once="'-infinity'",
    parked="'infinity'",
    uuid="CAST({} AS uuid)",
    json="CAST({} AS text)",
    seconds="make_interval(secs => CAST({} AS double precision))",
    elapsed="CAST(EXTRACT(EPOCH FROM {}) AS double precision)",
    among="= ANY(CAST({} AS bigint[]))",
    items="json_array_elements(CAST({} AS json)) AS each(value)",
    item="each.value ->> {}",
)
SQLITE = Dialect(
    types={
        "position": sa.Integer(),
        "id": sa.Text(),
        "text": sa.Text(),
        "key": sa.Text(),
        "json": sa.Text(),
        "time": sa.REAL(),  # seconds since 1970
        "count": sa.Integer(),
    },
    now="((julianday('now') - 2440587.5) * 86400.0)",
    at_once="0.0",
    parked="9e999",
    uuid="{}",
    json="{}",
    seconds="{}",
    elapsed="{}",
    among="IN (SELECT value FROM json_each({}))",
    items="json_each({}) AS each",
    item="json_extract(each.value, '$[{}]')",
)
DIALECTS = {"postgresql": POSTGRESQL, "sqlite": SQLITE}

#: Where the table objects say which of the two they are, so that several stores of one program share them.
_INFO = "diator"


def dialect_of(name: str) -> Dialect:
    """
    Return the dialect of this *name*.

    Raises:
        ConfigurationError: The store does not know it.
    """
    if name not in DIALECTS:
        raise ConfigurationError(f"SqlAlchemyStore needs an engine of PostgreSQL or SQLite, and this one is of {name}")
    return DIALECTS[name]


def make_outbox(name: str, metadata: sa.MetaData, dialect: str) -> sa.Table:
    """Return the table of the outbox: the one that *metadata* already has, or a new one in it."""
    if (found := _found(name, metadata, "outbox")) is not None:
        return found
    words, on_postgresql = dialect_of(dialect), dialect == "postgresql"
    types = words.types
    columns: list[sa.Column[Any]] = [
        sa.Column(
            "seq",
            types["position"],
            *([sa.Identity(always=True)] if on_postgresql else []),
            primary_key=True,
            autoincrement=True,
        ),
        # Not unique: the inbox knows duplicates, and the work of the program must not fail here.
        sa.Column("message_id", types["id"], nullable=False),
        sa.Column("message_type", types["text"], nullable=False),
        sa.Column("message_name", types["text"], nullable=False),
        sa.Column("key", types["key"]),
        sa.Column("headers", types["json"], nullable=False),
        sa.Column("payload", types["json"], nullable=False),
        sa.Column("event_time", types["text"]),  # with its offset from UTC, which a timestamp would lose
        sa.Column("created_at", types["time"], nullable=False, server_default=_clock(dialect)),
        sa.Column("available_at", types["time"], nullable=False, server_default=sa.text(words.at_once)),
        sa.Column("attempts", types["count"], nullable=False, server_default=sa.text("0")),
        sa.Column("lease", types["id"]),
        sa.Column("lease_until", types["time"]),
        sa.Column("dead_reason", types["text"]),
        sa.Column("dead_at", types["time"]),
        sa.Column("last_error", types["text"]),
    ]
    table = sa.Table(
        name,
        metadata,
        *columns,
        sa.CheckConstraint("(lease IS NULL) = (lease_until IS NULL)", name=f"{name}_lease"),
        # A leased or dead row has been claimed: `attempts > 0` finds all rows that later ones may have to wait for.
        sa.CheckConstraint("attempts > 0 OR (lease IS NULL AND dead_reason IS NULL)", name=f"{name}_attempts"),
        info={_INFO: "outbox"},
        sqlite_autoincrement=True,
    )
    for index, columns_of, where in (
        ("due", ("available_at", "seq"), "dead_reason IS NULL"),
        ("tried", ("key", "seq"), "attempts > 0 AND dead_reason IS NULL"),
        ("dead", ("key", "seq"), "dead_reason IS NOT NULL"),
        ("parked", ("key", "seq"), f"available_at = {words.parked}"),
        ("scheduled", ("message_id",), f"attempts = 0 AND available_at > {words.at_once}"),
    ):
        condition = sa.text(where)
        sa.Index(
            f"{name}_{index}",
            *(table.c[column] for column in columns_of),
            postgresql_where=condition,
            sqlite_where=condition,
        )
    return table


def make_inbox(name: str, metadata: sa.MetaData, dialect: str) -> sa.Table:
    """Return the table of the inbox, as `make_outbox`."""
    if (found := _found(name, metadata, "inbox")) is not None:
        return found
    types = dialect_of(dialect).types
    table = sa.Table(
        name,
        metadata,
        sa.Column("group_name", types["text"], primary_key=True),
        sa.Column("handler", types["text"], primary_key=True),
        sa.Column("message_id", types["id"], primary_key=True),
        sa.Column("handled_at", types["time"], nullable=False, server_default=_clock(dialect)),
        info={_INFO: "inbox"},
    )
    sa.Index(f"{name}_handled_at", table.c.handled_at)
    return table


def _found(name: str, metadata: sa.MetaData, kind: str) -> sa.Table | None:
    table = metadata.tables.get(f"{metadata.schema}.{name}" if metadata.schema else name)
    if table is not None and table.info.get(_INFO) != kind:
        raise ConfigurationError(
            f"the metadata already has another table `{name}`; give that of the {kind} another name, such as "
            f"SqlAlchemyStore(…, {kind}_table='{name}_2')"
        )
    return table


def check_table(connection: sa.Connection, table: sa.Table, schema: str | None) -> None:
    """
    Compare *table* with that in the database.

    Raises:
        ConfigurationError: It is missing there, or has other columns or indexes. The text says what to do.
    """
    inspector, name = sa.inspect(connection), f"{schema}.{table.name}" if schema else table.name
    if not inspector.has_table(table.name, schema):
        raise ConfigurationError(
            f"the table {name} does not exist in the database {connection.engine.url.database}; make it by a "
            "migration, such as `alembic revision --autogenerate`, or by `await store.create_tables()`"
        )
    found = {column["name"]: column["type"] for column in inspector.get_columns(table.name, schema)}
    problems = [
        f"the column {column.name} is missing"
        if column.name not in found
        else f"the column {column.name} is {_written(found[column.name], connection)}, and should be {expected}"
        for column in table.columns
        if (expected := _written(column.type, connection)) != _written(found.get(column.name), connection)
    ]
    indexes = {index["name"] for index in inspector.get_indexes(table.name, schema)}
    problems += [f"the index {index.name} is missing" for index in table.indexes if index.name not in indexes]
    if problems:
        raise ConfigurationError(
            f"the table {name} is not that of this version of diator: {', '.join(problems)}; bring it up to date by a "
            "migration, such as `alembic revision --autogenerate`"
        )


def _written(type_: sa.types.TypeEngine[Any] | None, connection: sa.Connection) -> str | None:
    if type_ is None:
        return None
    return type_.compile(dialect=connection.dialect).partition(" COLLATE ")[0]


def _clock(dialect: str) -> sa.TextClause:
    return sa.text("clock_timestamp()" if dialect == "postgresql" else SQLITE.now)
