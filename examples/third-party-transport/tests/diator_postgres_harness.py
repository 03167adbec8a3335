"""The harness: how the conformance suite gets this transport, and what it can do to PostgreSQL."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
from diator_postgres import PostgresMessageBroker
from diator_postgres.broker import _encoded

from diator.brokers.base import Topic
from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Foreign, Harness, Limits

SCHEMA = "diator_postgres_conformance"

RECONNECT = ReconnectPolicy(connect_timeout=2.0, idle_timeout=4.0, max_delay=1.0)

# Refuses a message for a group that has as many messages as the setting of the connection allows.
LIMIT_ROOM = (
    """
    CREATE OR REPLACE FUNCTION limit_room() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('diator.room')::int <= count(*) FROM messages WHERE topic = NEW.topic AND grp = NEW.grp THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE OR REPLACE TRIGGER limit_room BEFORE INSERT ON messages
        FOR EACH ROW WHEN (current_setting('diator.room', true) <> '') EXECUTE FUNCTION limit_room()
    """,
)


class PostgresHarness(Harness):
    name = "postgres"
    facilities = frozenset(
        {"raw", "foreign", "dead_letters", "full", "crash", "proxy", "operator", "topology", "processes"}
    )
    limits = Limits(timeout=2.0, redelivery=3.0, liveness=6.0, recovery=5.0, max_delay=1.0, absence=31.0)

    def start(self) -> None:
        self._dsn = os.environ.get("DIATOR_TEST_POSTGRES_URL", "postgresql://127.0.0.1:5432/postgres")
        parts = urlsplit(self._dsn)
        self.service_address = self.address = parts.hostname or "127.0.0.1", parts.port or 5432
        try:
            self._version = asyncio.run(self._ask("SELECT version()"))
        except (OSError, asyncpg.PostgresError) as error:
            raise EnvironmentMissing("no PostgreSQL answers at DIATOR_TEST_POSTGRES_URL") from error

    def service(self) -> str:
        return " ".join(self._version.split()[:2])

    def driver(self) -> str:
        return f"asyncpg {version('asyncpg')}"

    def transport(self, **settings: str) -> Any:
        host, port = self.address
        name = f"conformance-{uuid4().hex}"
        options = {"host": host, "port": port, "server_settings": {"application_name": name, **settings}}
        transport: Any = PostgresMessageBroker(
            self._dsn, schema=SCHEMA, timeout=2.0, lease=2.0, absence=30.0, reconnect=RECONNECT, **options
        )
        transport.name = name
        return transport

    def prepare(self, facility: str) -> None:
        if facility == "full":
            asyncio.run(self._limit_room())

    async def _limit_room(self) -> None:
        async with self.transport():
            for statement in LIMIT_ROOM:
                await self._ask(statement)

    def full(self, room: int) -> Any:
        return self.transport(**{"diator.room": str(room)})

    async def send_raw(self, transport: Any, topic: Topic, body: bytes) -> None:
        await self._store(topic, body)

    async def send_foreign(self, transport: Any, topic: Topic, group: str | None, kind: Foreign, body: bytes) -> int:
        limit = transport.capabilities.max_message_bytes
        odd = {"number": 1, "null": None, "list": [{}], "deep": json.loads("[" * 500 + "]" * 500)}
        texts = {"": "", "key": "", "\n": "\t", "x" * 1_000: "y" * 100_000, "diator-dlq-reason": "forged"}
        if kind == "due times":
            raise EnvironmentMissing("only the transport writes the column with the due time")
        variations: dict[str, list[tuple[bytes, str]]] = {
            "metadata": [(body, json.dumps({"a": value})) for value in odd.values()]
            + [(body, '{"a": "\\ud800"}'), (body, '{"\\u0000": "\\u0000"}'), (body, '{"a": 1, "a": 2, "n": 1e999}')],
            "headers": [(body, json.dumps({name: value})) for name, value in texts.items()],
            "large": [(b" " * (limit + 1), "{}"), (body + b" " * 20_000_000, "{}")],
            "counters": [(body, json.dumps({name: "999"})) for name in ("attempt", "diator-attempt", "attempts")],
            "compressed": [(gzip.compress(each), "{}") for each in (body, bytes(10_000_000))],
        }
        for each, headers in variations[kind]:
            await self._store(topic, each, headers)
        return len(variations[kind])

    async def dead_letters(self, transport: Any, topic: Topic, group: str | None) -> list[DeadLettered]:
        query = "SELECT array_agg(encode(body, 'hex') || ' ' || headers ORDER BY id) FROM dead_letters WHERE topic = $1"
        found = [letter.split(" ", 1) for letter in await self._ask(query, _encoded(*topic)) or ()]
        letters = [(bytes.fromhex(body), json.loads(headers)) for body, headers in found]
        mine = [(body, headers) for body, headers in letters if headers["diator-dlq-consumer-group"] == (group or "")]
        return [DeadLettered(body=body, reason=each["diator-dlq-reason"], headers=each) for body, each in mine]

    async def crash(self, transport: Any) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError("this process is dead")

        for connection in (transport._service, transport._reader):
            connection._make = refuse
            connection.abort()

    async def disconnect(self, transport: Any) -> None:
        query = "SELECT count(pg_terminate_backend(pid, 1000)) FROM pg_stat_activity WHERE application_name = $1"
        while not await self._ask(query, transport.name):
            pass  # a connection may be opening just now

    async def delete(self, transport: Any, topic: Topic, group: str | None) -> None:
        names = [group and _encoded(group), _encoded(*topic)]
        await self._ask(
            "WITH gone AS (DELETE FROM groups WHERE coalesce(grp = $1, true) AND topic = $2) "
            "DELETE FROM messages WHERE coalesce(grp = $1, true) AND topic = $2",
            *names,
        )

    async def _store(self, topic: Topic, body: bytes, headers: str = "{}") -> None:
        await self._ask("SELECT send($1, $2, $3)", [_encoded(*topic)], [body], [headers])

    async def _ask(self, query: str, *arguments: object) -> Any:
        connection = await asyncpg.connect(self._dsn, server_settings={"search_path": SCHEMA})
        try:
            return await connection.fetchval(query, *arguments)
        finally:
            await connection.close()
