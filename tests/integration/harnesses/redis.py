"""The harnesses of the Redis transports: Pub/Sub and Streams."""

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from urllib.parse import urlsplit
from uuid import uuid4

from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Limits
from diator.testing.fault_proxy import FaultProxy
from tests.integration.harnesses.service import SCALE, ServiceHarness, foreign_bodies
from tests.services import BACKENDS


class RedisHarness(ServiceHarness):
    """Redis Pub/Sub at `DIATOR_TEST_REDIS_URL`."""

    name = backend = "redis"
    facilities = frozenset({"proxy", "raw", "foreign", "crash", "processes", "outages", "operator", "security"})
    limits = Limits(
        lag=SCALE, scale=2.0 * SCALE, redelivery=3.0, timeout=2.0, liveness=6.0, recovery=5.0, max_delay=1.0
    )
    password = "swordfish-of-the-redis-harness"
    #: A lost connection loses messages here, so Redis has more time to answer on a busy machine.
    reconnect = ReconnectPolicy(connect_timeout=2.0, idle_timeout=0.5, probe_timeout=2.5, max_delay=1.0)

    def start(self):
        url = os.environ.get("DIATOR_TEST_REDIS_URL")
        if not url:
            raise EnvironmentMissing("DIATOR_TEST_REDIS_URL does not name a Redis server")
        self.url = self.direct = url
        import redis

        with redis.Redis.from_url(url) as client:
            try:
                self.version = client.info("server")["redis_version"]
                self.keeps = client.info("persistence")["aof_enabled"]
            except redis.RedisError as error:
                raise EnvironmentMissing(str(error)) from error

    def guarded_service(self, certificate):
        return guarded_redis(self.certificates, certificate, self.password)

    def service(self):
        return f"Redis {self.version}"

    def driver(self):
        return f"redis-py {version('redis')}"

    def connecting_to(self, url):
        from diator.brokers.redis import RedisMessageBroker

        return RedisMessageBroker.from_url(named(url), **self.options())

    def options(self):
        return {"timeout": 2.0, "reconnect": self.reconnect}

    async def send_raw(self, transport, topic, body):
        await transport._client.publish(transport._channel(topic), body)

    async def send_foreign(self, transport, topic, group, kind, body):
        """A message of Pub/Sub has nothing beside its body."""
        bodies = foreign_bodies(kind, body, transport.capabilities.max_message_bytes)
        for each in bodies:
            await self.send_raw(transport, topic, each)
        return len(bodies)

    @asynccontextmanager
    async def proxied(self):
        parts = urlsplit(self.direct)
        async with FaultProxy(parts.hostname, parts.port or 6379) as proxy:
            with self._at(f"redis://{proxy.host}:{proxy.port}", self.direct):
                yield proxy

    async def crash(self, transport):
        pool = transport._client.connection_pool

        async def no_more(*_, **__):
            raise ConnectionError("the process is dead")

        pool.get_connection = no_more
        for connection in {*pool._in_use_connections, *pool._available_connections}:
            if connection._writer:
                connection._writer.transport.abort()

    async def disconnect(self, transport):
        name = transport._client.connection_pool.connection_kwargs["client_name"]
        async with self._operator() as operator:
            for connection in await operator.client_list():
                if connection["name"] == name:
                    await operator.client_kill_filter(_id=connection["id"])

    def _operator(self):
        from redis.asyncio import Redis

        return Redis.from_url(self.direct)

    def entering(self, entrance):
        url = f"redis://{entrance.user}:{entrance.password}@{entrance.address}/0"
        if entrance.authority:
            url = f"{url.replace('redis', 'rediss', 1)}?ssl_ca_certs={entrance.authority}"
        return self.connecting_to(url)


class RedisStreamHarness(RedisHarness):
    """Redis Streams at `DIATOR_TEST_REDIS_URL`."""

    name = "redis streams"
    facilities = RedisHarness.facilities | {"dead_letters", "topology", "alarm"}
    reconnect = ReconnectPolicy(connect_timeout=2.0, idle_timeout=1.0, probe_timeout=1.0, max_delay=1.0)

    def connecting_to(self, url):
        from diator.brokers.redis_streams import RedisStreamMessageBroker

        return RedisStreamMessageBroker.from_url(
            named(url), lease=1.0, durability="crash" if self.keeps else "none", **self.options()
        )

    async def send_raw(self, transport, topic, body):
        await transport._client.xadd(transport._stream(topic), {"body": body})

    async def send_foreign(self, transport, topic, group, kind, body):
        stream = transport._stream(topic)
        if kind == "due times":
            from diator.brokers.redis._group import Group

            delayed = Group(transport._service.execute, group).key(stream, b"delayed")
            members = {b"": "-inf", b"\xff": 1, b"{}": 1e300, body: 2, b"later": "inf", os.urandom(100): 4e15}
            return await transport._client.zadd(delayed, members)
        entries = foreign_entries(kind, body, transport.capabilities.max_message_bytes)
        for fields in entries:
            await transport._client.execute_command("XADD", stream, "*", *fields)
        return len(entries)

    async def dead_letters(self, transport, topic, group):
        from diator.brokers.redis._names import DEAD, of_group

        entries = await transport._client.xrange(of_group(transport._stream(topic), group, DEAD))
        found = [{_bytes(name): _bytes(value) for name, value in fields.items()} for _, fields in entries]
        return [
            DeadLettered(
                body=fields.pop(b"body"),
                reason=fields[b"diator-dlq-reason"].decode(),
                headers={name.decode(): value.decode() for name, value in fields.items()},
            )
            for fields in found
        ]

    async def delete(self, transport, topic, group):
        stream = transport._stream(topic)
        async with self._operator() as operator:
            if group is None:
                await operator.delete(stream)
            else:
                await operator.xgroup_destroy(stream, group)

    @asynccontextmanager
    async def alarm(self):
        async with self._operator() as operator:
            await operator.config_set("maxmemory", 1)
            try:
                yield
            finally:
                await operator.config_set("maxmemory", 0)


def foreign_entries(kind, body, limit):
    """Return the fields of foreign entries of *kind*: names and values, as Redis stores them."""
    whole = ["body", body]
    match kind:
        case "metadata":
            return [
                ["other", body], ["body", b""], [*whole, b"\xff\xfe", b"\xff"], [*whole, "key", b"\xc3\x28"],
                [*whole, *whole], [*whole, "body", b"\0"], [b"", b"", *whole],
            ]  # fmt: skip
        case "headers":
            names = ["", "\n\0", "x" * 1_000_000, "again", "key", "diator-dlq-reason", "BODY"]
            many = [part for number in range(5_000) for part in (f"n{number}", "v")]
            return [*([*whole, name, "y"] for name in names), [*whole, *many], [*whole, "a", "1", "a", "2"]]
        case "counters":
            return [[*whole, name, "999"] for name in ("attempt", "attempts", "diator-attempt", "RETRYCOUNT")]
        case "large":
            return [["body", b" " * (limit + 1)], ["body", body + b" " * 8 * limit]]
        case "compressed":
            return [["body", each] for each in foreign_bodies(kind, body, limit)]


def named(url):
    """Return *url* with a client name, by which the server knows the connections of one transport."""
    return f"{url}{'&' if '?' in url else '?'}client_name=conformance-{uuid4().hex}"


def guarded_redis(certificates, certificate, password):
    """Return a Redis container that accepts only TLS and has three users."""
    rights = {
        "granted": "+@all",
        "may-not-send": "+@all -publish -xadd",
        "may-not-read": "+@all -subscribe -xreadgroup",
    }
    settings = [
        "port 0",
        "tls-port 6379",
        "protected-mode no",
        "appendonly yes",
        "bind 0.0.0.0",
        "tls-auth-clients no",
        "tls-cert-file /tmp/certificate",
        "tls-key-file /tmp/key",
        "tls-ca-cert-file /tmp/ca",
        "user default off",
        *(f"user {name} on >{password} ~* &* {right}" for name, right in rights.items()),
    ]
    files = {
        "certificate": certificates.read(f"{certificate}.pem"),
        "key": certificates.read(f"{certificate}.key"),
        "ca": certificates.read("ca.pem"),
        "settings": "\n".join(settings),
    }
    write = "; ".join(f'echo "${name}" > /tmp/{name}' for name in files)

    async def probe(url):
        from redis.asyncio import Redis

        async with Redis.from_url(url, username="granted", password=password, ssl_cert_reqs="none") as client:
            await client.ping()

    return replace(
        BACKENDS["redis"],
        url="rediss://127.0.0.1:{port}/0",
        command=f"sh -c '{write}; exec redis-server /tmp/settings'",
        environment=files,
        probe=probe,
    )


def _bytes(value):
    return value.encode() if isinstance(value, str) else value
