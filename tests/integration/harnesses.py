"""How the conformance suite gets diator's own transports."""

import asyncio
import base64
import contextlib
import functools
import json
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker, _Entry
from diator.brokers.supervisor import Patience
from diator.exceptions import UnsupportedCapability
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Harness, Limits
from diator.testing.fault_proxy import FaultProxy
from tests.integration.private_services import Certificates, PrivateServices
from tests.services import BACKENDS


class MemoryHarness(Harness):
    """The broker inside the process. Each broker is a service of its own."""

    name = "memory"
    facilities = frozenset({"raw", "dead_letters", "full"})
    limits = Limits(settle=0.05, redelivery=1.0)

    def transport(self):
        return MemoryMessageBroker()

    def full(self, room):
        return MemoryMessageBroker(capacity=room)

    async def send_raw(self, transport: MemoryMessageBroker, topic: Topic, body: bytes) -> None:
        for queue in transport._queues:
            if topic in queue.topics:
                queue.put(_Entry(topic, body))

    async def dead_letters(self, transport: MemoryMessageBroker, topic: Topic, group: str | None):
        return [
            DeadLettered(body=letter.body, reason=letter.reason)
            for letter in transport.dead_letters
            if letter.topic == topic
        ]


class PlainHarness(Harness):
    """The broker inside the process, with everything taken from it that can be missing: at most once, to everybody."""

    name = "memory, at most once"
    limits = MemoryHarness.limits

    def transport(self):
        return PlainMessageBroker()


class PlainMessageBroker(MemoryMessageBroker):
    """Promises little, and refuses the rest. Each capability has a transport that has it and one that has not."""

    @property
    def capabilities(self):
        return Capabilities(
            receipt="accepted",
            ordering="destination",
            distribution=frozenset({"broadcast"}),
            backpressure="pull",
            max_message_bytes=super().capabilities.max_message_bytes,
        )

    async def send_message(self, message, /):
        await super().send_message(message)
        self._kept.take_all([Topic(message.message_type, message.message_name)])

    @asynccontextmanager
    async def subscribe(self, topics, /, *, group=None, prefetch=64, on_gap=None):
        if group is not None:
            raise UnsupportedCapability("PlainMessageBroker", ["groups"], why="a group", remedy="leave it out")
        async with super().subscribe(topics, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield _PlainDeliveries(deliveries)


class _PlainDeliveries:
    # No generator: a cancelled wait would end it.

    def __init__(self, deliveries):
        self._deliveries = deliveries

    def __aiter__(self):
        return self

    async def __anext__(self):
        delivery = await anext(self._deliveries)
        delivery.settler = _Plain(delivery.settler)
        return delivery


class _Plain:
    def __init__(self, settler):
        self._settler = settler

    async def ack(self, delivery, /):
        await self._settler.ack(delivery)

    async def retry(self, delivery, after, /):
        raise UnsupportedCapability("PlainMessageBroker", ["retry"], why="retry", remedy="do not")

    async def dead_letter(self, delivery, reason, /):
        raise UnsupportedCapability("PlainMessageBroker", ["dead_letter"], why="dead_letter", remedy="do not")


# -- Redis -------------------------------------------------------------------------------------------------------


class RedisHarness(Harness):
    """Redis Pub/Sub, at `DIATOR_TEST_REDIS_URL`."""

    name = "redis"
    facilities = frozenset({"proxy", "raw", "crash", "processes", "outages", "operator", "security"})
    limits = Limits(scale=2.0, redelivery=3.0, timeout=2.0, liveness=6.0, recovery=5.0, pause=1.0)
    password = "swordfish-of-the-redis-harness"

    def __init__(self):
        self.services = PrivateServices()
        self.certificates = None

    def start(self):
        url = os.environ.get("DIATOR_TEST_REDIS_URL")
        if not url:
            raise EnvironmentMissing("DIATOR_TEST_REDIS_URL does not say where Redis is")
        self.url = self.direct = url
        import redis

        with redis.Redis.from_url(url) as client:
            try:
                self.version = client.info("server")["redis_version"]
                self.keeps = client.info("persistence")["aof_enabled"]
            except redis.RedisError as error:
                raise EnvironmentMissing(str(error)) from error

    def stop(self):
        self.services.close()
        if self.certificates:
            self.certificates.close()

    def prepare(self, facility):
        if facility in {"outages", "alarm"}:
            self.services.get("breakable", "redis")
        if facility == "security":
            self.certificates = self.certificates or Certificates()
            for certificate in ("server", "expired"):
                self.services.get(certificate, guarded_redis(self.certificates, certificate, self.password))

    def service(self):
        return f"Redis {self.version}"

    def driver(self):
        return f"redis-py {version('redis')}"

    def transport(self):
        return self.connecting_to(self.url)

    def connecting_to(self, url):
        from diator.brokers.redis import RedisMessageBroker

        return RedisMessageBroker.from_url(named(url), **self.options())

    def options(self):
        return {"timeout": 2.0, "patience": Patience(connect=2.0, idle=1.0, silence=1.0, longest_pause=1.0)}

    async def send_raw(self, transport, topic, body):
        await transport._client.publish(transport._channel(topic), body)

    @asynccontextmanager
    async def proxied(self):
        parts = urlsplit(self.direct)
        async with FaultProxy(parts.hostname, parts.port or 6379) as proxy:
            with self._at(f"redis://{proxy.host}:{proxy.port}", self.direct):
                yield proxy

    @asynccontextmanager
    async def private(self):
        async with self.services["breakable"].breakable() as service:
            with self._at(service.url, service.url):
                yield service

    @contextmanager
    def _at(self, url, direct):
        before = self.url, self.direct
        self.url, self.direct = url, direct
        try:
            yield
        finally:
            self.url, self.direct = before

    async def crash(self, transport):
        pool = transport._client.connection_pool

        async def no_more(*_, **__):
            raise ConnectionError("its process is dead")

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

    def guarded(self, access):
        service = self.services["expired" if access == "expired" else "server"]
        port, trusted = urlsplit(service.url).port, self.certificates.path
        authority = "other" if access == "unknown authority" else "ca"
        host = "localhost" if access == "wrong host" else "127.0.0.1"
        user = access.replace(" ", "-") if access.startswith("may not") else "granted"
        password = "wrong" if access == "wrong password" else self.password
        address = f"{user}:{password}@{host}:{port}/0"
        plain = access == "plain"
        return self.connecting_to(
            f"redis://{address}" if plain else f"rediss://{address}?ssl_ca_certs={trusted}/{authority}.pem"
        )


class RedisStreamHarness(RedisHarness):
    """Redis Streams, at `DIATOR_TEST_REDIS_URL`."""

    name = "redis streams"
    facilities = RedisHarness.facilities | {"dead_letters", "topology", "alarm"}

    def connecting_to(self, url):
        from diator.brokers.redis_streams import RedisStreamMessageBroker

        return RedisStreamMessageBroker.from_url(
            named(url), lease=1.0, durability="crash" if self.keeps else "none", **self.options()
        )

    async def send_raw(self, transport, topic, body):
        await transport._client.xadd(transport._stream(topic), {"body": body})

    async def dead_letters(self, transport, topic, group):
        entries = await transport._client.xrange(f"{transport._stream(topic).decode()}:{group}:dead")
        found = [{_bytes(name): _bytes(value) for name, value in fields.items()} for _, fields in entries]
        return [DeadLettered(body=fields[b"body"], reason=fields[b"diator-dlq-reason"].decode()) for fields in found]

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


def named(url):
    """Give the connections of one transport a name at the server."""
    return f"{url}{'&' if '?' in url else '?'}client_name=conformance-{uuid4().hex}"


def guarded_redis(certificates, certificate, password):
    """Redis that speaks only TLS, and has three users."""
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


# -- RabbitMQ ----------------------------------------------------------------------------------------------------


class RabbitMQHarness(Harness):
    """RabbitMQ, at `DIATOR_TEST_RABBITMQ_URL`. What it declares is deleted at the end."""

    name = "rabbitmq"
    facilities = frozenset(
        {"proxy", "raw", "dead_letters", "crash", "processes", "outages", "operator", "topology", "alarm", "security"}
    )
    limits = Limits(scale=2.0, settle=0.2, redelivery=3.0, timeout=5.0, liveness=6.0, recovery=8.0, pause=1.0)
    password = "swordfish-of-the-rabbitmq-harness"

    def __init__(self):
        self.services = PrivateServices()
        self.certificates = None
        self.prefix = os.environ.setdefault("DIATOR_CONFORMANCE_PREFIX", f"conformance-{os.getpid()}")
        self.declared = set()

    def start(self):
        url = os.environ.get("DIATOR_TEST_RABBITMQ_URL")
        if not url:
            raise EnvironmentMissing("DIATOR_TEST_RABBITMQ_URL does not say where RabbitMQ is")
        self.url = self.direct = self.shared = url
        try:
            self.version = alone(self._amqp(lambda channel: channel.connection.server_properties["version"]))
        except OSError as error:
            raise EnvironmentMissing(str(error)) from error

    def stop(self):
        from aiormq.exceptions import ChannelPreconditionFailed

        async def delete(channel):
            with contextlib.suppress(OSError):  # what other processes of this run have declared
                self.declared |= {each["name"] for each in self._manage("GET", "queues?columns=name")}
            for queue in self.declared:
                if queue.startswith(f"{self.prefix}:"):
                    await channel.queue_delete(queue)
            with contextlib.suppress(ChannelPreconditionFailed):  # another harness of this process uses it
                await channel.exchange_delete(self.prefix, if_unused=True)

        if self.prefix.endswith(f"-{os.getpid()}"):  # and not in another process of this run
            alone(self._amqp(delete))
        self.services.close()
        if self.certificates:
            self.certificates.close()

    def prepare(self, facility):
        if facility in {"outages", "alarm"}:
            self.services.get("breakable", "rabbitmq")
        if facility == "operator":
            try:
                self._manage("GET", "overview")
            except OSError as error:
                raise EnvironmentMissing(f"RabbitMQ's management plugin does not answer: {error}") from error
        if facility == "security":
            self.certificates = self.certificates or Certificates()
            for certificate in ("server", "expired"):
                self.services.get(certificate, guarded_rabbitmq(self.certificates, certificate, self.password))

    def service(self):
        return f"RabbitMQ {self.version}"

    def driver(self):
        return f"aiormq {version('aiormq')}"

    def transport(self):
        return self.connecting_to(self.url)

    def connecting_to(self, url, **options):
        from diator.brokers.rabbitmq import RabbitMQMessageBroker

        harness = self

        class Watched(RabbitMQMessageBroker):
            """Tells what it declares, for it to be deleted, and what it has open, for it to be broken."""

            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.writers, self.disconnected = set(), set()
                dial = self._address.dial

                async def dialled(purpose):
                    connection, writer = await dial(purpose)
                    self.writers.add(writer)
                    return connection, writer

                self._address.dial = dialled

            @asynccontextmanager
            async def _reading(self, member, prefetch):
                if member.group is not None:
                    harness.declared |= {*member.queues, *map(member.dead, member.queues)}
                async with super()._reading(member, prefetch) as reading:
                    if harness.direct != harness.shared:
                        # RabbitMQ writes down within a second that a quorum queue is there; killed before that, it
                        # has lost the queue, whatever was confirmed.
                        await asyncio.sleep(1.5)
                    yield reading

        name = f"{'&' if '?' in url else '?'}name=conformance-{uuid4().hex}"
        # Killed and started again, it answers before its queues are there.
        patience = Patience(connect=15.0, idle=1.0, silence=1.0, longest_pause=1.0)
        broker = Watched(url + name, self.prefix, timeout=5.0, patience=patience, **options)
        broker.name = name.partition("=")[2]
        return broker

    async def send_raw(self, transport, topic, body):
        from diator.brokers._rabbitmq_names import routing_key

        key = routing_key(*topic)
        await self._amqp(lambda channel: channel.basic_publish(body, exchange=self.prefix, routing_key=key))

    async def dead_letters(self, transport, topic, group):
        from pamqp.commands import Basic

        from diator.brokers._rabbitmq_names import queue_name

        found = []

        async def take(channel):
            dead = f"{queue_name(self.prefix, topic, group)}:dead"
            while not isinstance((letter := await channel.basic_get(dead)).delivery, Basic.GetEmpty):
                reason = letter.header.properties.headers["diator-dlq-reason"]
                found.append(DeadLettered(body=letter.body, reason=reason))

        await self._amqp(take)
        return found

    async def crash(self, transport):
        async def no_more(purpose):
            raise ConnectionError("its process is dead")

        transport._address.dial = no_more
        for writer in transport.writers:
            writer.transport.abort()

    @asynccontextmanager
    async def proxied(self):
        parts = urlsplit(self.direct)
        async with FaultProxy(parts.hostname, parts.port or 5672) as proxy:
            url = f"amqp://{parts.username}:{parts.password}@{proxy.host}:{proxy.port}{parts.path}"
            with self._at(url, self.direct):
                yield proxy

    @asynccontextmanager
    async def private(self):
        async with self.services["breakable"].breakable() as service:
            with self._at(service.url, service.url):
                yield service

    @contextmanager
    def _at(self, url, direct):
        before = self.url, self.direct
        self.url, self.direct = url, direct
        try:
            yield
        finally:
            self.url, self.direct = before

    @asynccontextmanager
    async def alarm(self):
        await self.services["breakable"].run("rabbitmqctl set_vm_memory_high_watermark 0.000001")
        try:
            yield
        finally:
            await self.services["breakable"].run("rabbitmqctl set_vm_memory_high_watermark 0.6")

    async def disconnect(self, transport):
        def of_transport():
            connections = self._manage("GET", "connections")
            return [
                each["name"] for each in connections if each.get("user_provided_name", "").startswith(transport.name)
            ]

        # The management plugin learns of connections, and of their end, within seconds.
        found, count = set(), max(1, sum(map(is_open, transport.writers)))  # one may be just about to be
        while len(found) < count:
            await asyncio.sleep(0.2)  # nobody tells
            found = set(await asyncio.to_thread(of_transport)) - transport.disconnected
        transport.disconnected |= found
        for name in found:
            with contextlib.suppress(HTTPError):  # closed already
                await asyncio.to_thread(self._manage, "DELETE", f"connections/{quote(name)}")

    def _manage(self, method, what):
        parts = urlsplit(self.direct)
        host = container_of(parts.port) or parts.hostname
        request = Request(f"http://{host}:15672/api/{what}", method=method)
        credentials = base64.b64encode(f"{parts.username}:{parts.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
        with urlopen(request, timeout=5) as answer:
            said = answer.read()
        return json.loads(said) if said else None

    async def delete(self, transport, topic, group):
        from diator.brokers._rabbitmq_names import queue_name

        async def delete(channel):
            if group is None:
                await channel.exchange_delete(self.prefix)
            deleted = queue_name(self.prefix, topic, group or "")
            for queue in {queue for queue in self.declared if queue.startswith(deleted)} | {deleted}:
                await channel.queue_delete(queue)

        await self._amqp(delete)

    async def _amqp(self, do):
        """Do something with a client of its own."""
        import aiormq

        async with aiormq.connect(self.direct) as connection:
            done = do(await connection.channel())
            return await done if asyncio.iscoroutine(done) else done

    def guarded(self, access):
        service = self.services["expired" if access == "expired" else "server"]
        authority = "other" if access == "unknown authority" else "ca"
        host = "localhost" if access == "wrong host" else "127.0.0.1"
        user = access.replace(" ", "-") if access.startswith("may not") else "granted"
        password = "wrong" if access == "wrong password" else self.password
        address = f"{user}:{password}@{host}:{urlsplit(service.url).port}/"
        if access == "plain":
            return self.connecting_to(f"amqp://{address}")
        trusted = ssl.create_default_context(cafile=self.certificates.path / f"{authority}.pem")
        return self.connecting_to(f"amqps://{address}", ssl_context=trusted)


def is_open(writer):
    return not writer.transport.is_closing()


def alone(coroutine):
    """Run *coroutine* to its end, whether or not an event loop is running here."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


def guarded_rabbitmq(certificates, certificate, password):
    """RabbitMQ that speaks only TLS, and has three users."""
    rights = {
        "granted": {"configure": ".*", "write": ".*", "read": ".*"},
        "may-not-send": {"configure": ".*", "write": r".*:.*|amq\\.default", "read": ".*"},
        "may-not-read": {"configure": ".*", "write": ".*", "read": ""},
    }
    definitions = {
        "vhosts": [{"name": "/"}],
        "users": [{"name": name, "password": password, "tags": ""} for name in rights],
        "permissions": [{"user": name, "vhost": "/", **right} for name, right in rights.items()],
    }
    settings = [
        "listeners.tcp = none",
        "listeners.ssl.default = 5672",
        "ssl_options.certfile = /tmp/certificate",
        "ssl_options.keyfile = /tmp/key",
        "ssl_options.cacertfile = /tmp/ca",
        "ssl_options.verify = verify_none",
        "load_definitions = /tmp/definitions.json",
        "log.console = true",
    ]
    files = {
        "certificate": certificates.read(f"{certificate}.pem"),
        "key": certificates.read(f"{certificate}.key"),
        "ca": certificates.read("ca.pem"),
        "definitions.json": json.dumps(definitions),
        "guarded.conf": "\n".join(settings),
    }
    names = {name: name.upper().replace(".", "_") for name in files}
    write = "; ".join(f'printf "%s\\n" "${variable}" > /tmp/{name}' for name, variable in names.items())

    async def probe(url):
        import aiormq

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with aiormq.connect(url.replace("guest:guest", f"granted:{password}"), context=context):
            pass

    return replace(
        BACKENDS["rabbitmq"],
        url="amqps://guest:guest@127.0.0.1:{port}/",
        command=f"sh -c '{write}; chmod 644 /tmp/*; RABBITMQ_CONFIG_FILE=/tmp/guarded.conf exec rabbitmq-server'",
        environment={names[name]: text.replace("{", "{{").replace("}", "}}") for name, text in files.items()},
        probe=probe,
    )


def _bytes(value):
    return value.encode() if isinstance(value, str) else value


# -- Kafka -------------------------------------------------------------------------------------------------------


class KafkaHarness(Harness):
    """Kafka, at `DIATOR_TEST_KAFKA_SERVERS`; one in a container of its own, where it is to be broken or proxied."""

    name = "kafka"
    facilities = frozenset({"proxy", "raw", "dead_letters", "crash", "processes", "outages", "topology", "security"})
    # Joining a group, and creating a topic, take a tenth of a second each; the lowest session that Kafka allows is 6 s.
    limits = Limits(
        scale=4.0, settle=0.3, redelivery=5.0, timeout=3.0, liveness=10.0, recovery=20.0, lag=2.0, pause=1.0
    )
    password = "swordfish-of-the-kafka-harness"
    in_place = False

    def __init__(self):
        self.services = PrivateServices()
        self.certificates = None

    @property
    def is_proxied(self):
        return int(self.servers.rpartition(":")[2]) == self.services["breakable"]._service.proxied

    def start(self):
        servers = os.environ.get("DIATOR_TEST_KAFKA_SERVERS")
        if not servers:
            raise EnvironmentMissing("DIATOR_TEST_KAFKA_SERVERS does not say where Kafka is")
        self.servers = servers

    def stop(self):
        self.services.close()
        if self.certificates:
            self.certificates.close()

    def prepare(self, facility):
        if facility in {"proxy", "outages"}:  # a proxy has to stand where Kafka sends its clients to
            self.services.get("breakable", "kafka")
        if facility == "security":
            self.certificates = self.certificates or Certificates()
            for certificate in ("server", "expired"):
                self.services.get(certificate, guarded_kafka(self.certificates, certificate, self.password))

    def service(self):
        return "Kafka"

    def driver(self):
        return f"aiokafka {version('aiokafka')}"

    def transport(self):
        return self.connecting_to(self.servers)

    def connecting_to(self, servers, **options):
        from diator.brokers.kafka import KafkaMessageBroker

        patience = Patience(connect=10.0, idle=1.5, silence=1.5, longest_pause=1.0)
        return KafkaMessageBroker(
            servers,
            "conformance",
            timeout=3.0,
            session=6.0,
            heartbeat=0.1,
            drain=10.0,
            retry_in_place=self.in_place,
            patience=patience,
            **options,
        )

    async def send_raw(self, transport, topic, body):
        await transport._producer.send(transport._names.topic(topic), body, headers=[])

    async def dead_letters(self, transport, topic, group):
        from aiokafka import AIOKafkaConsumer

        name = transport._names.beside(transport._names.topic(topic), group, "-dlq")
        async with AIOKafkaConsumer(name, bootstrap_servers=self.servers, auto_offset_reset="earliest") as consumer:
            (place,) = consumer.assignment()
            count = (await consumer.end_offsets([place]))[place]
            found = [await consumer.getone() for _ in range(count)]
        return [
            DeadLettered(body=record.value, reason=dict(record.headers)["diator-dlq-reason"].decode())
            for record in found
        ]

    @asynccontextmanager
    async def proxied(self):
        service = self.services["breakable"]._service
        if self.is_proxied:
            raise EnvironmentMissing("Kafka sends its clients to one address, at which one proxy can stand")
        proxy = FaultProxy("127.0.0.1", service.behind)
        proxy.port = service.proxied
        async with proxy:
            with self._at(f"{proxy.host}:{proxy.port}"):
                yield proxy

    @asynccontextmanager
    async def private(self):
        async with self.services["breakable"].breakable() as service:
            with self._at(service.url):
                yield service

    @contextmanager
    def _at(self, servers):
        before, self.servers = self.servers, servers
        try:
            yield
        finally:
            self.servers = before

    async def crash(self, transport):
        nowhere = replace(transport._cluster, servers=("127.0.0.1:1",))

        async def nothing(*_, **__):
            pass

        clients = [transport._producer._producer.client] if transport._producer._producer else []
        transport._producer._cluster = nowhere
        for subscription in transport._producer.subscriptions:
            connections = subscription._leave.__self__
            connections._cluster = nowhere
            connection = connections.latest
            connection.say_goodbye = nothing
            if committing := getattr(connection, "_committing", None):
                committing.cancel()
            clients.append(connection.consumer._client)
        for client in clients:
            client._get_conn = nothing
            for connection in client._conns.values():
                if connection._writer:
                    connection._writer.transport.abort()

    def guarded(self, access):
        service = self.services["expired" if access == "expired" else "server"]
        authority = "other" if access == "unknown authority" else "ca"
        host = "localhost" if access == "wrong host" else "127.0.0.1"
        trusted = ssl.create_default_context(cafile=self.certificates.path / f"{authority}.pem")
        return self.connecting_to(
            f"{host}:{service.url.rpartition(':')[2]}",
            ssl_context=None if access == "plain" else trusted,
            sasl_mechanism="PLAIN",
            username=access.replace(" ", "-") if access.startswith("may not") else "granted",
            password="wrong" if access == "wrong password" else self.password,
        )

    async def delete(self, transport, topic, group):
        from aiokafka.admin import AIOKafkaAdminClient

        name = transport._names.topic(topic)
        admin = AIOKafkaAdminClient(bootstrap_servers=self.servers)
        await admin.start()
        try:
            await admin.delete_topics([name if group is None else transport._names.beside(name, group, "-retry")])
        finally:
            await admin.close()
        if group is not None:
            await self._forget_what_was_read(name, transport._names.group(group))

    async def _forget_what_was_read(self, name, group):
        from aiokafka import AIOKafkaConsumer, TopicPartition
        from aiokafka.errors import CommitFailedError

        async with AIOKafkaConsumer(
            bootstrap_servers=self.servers, group_id=group, enable_auto_commit=False
        ) as consumer:
            await consumer._client._wait_on_metadata(name)
            places = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
            consumer.assign(places)
            with suppress(CommitFailedError):  # Kafka touches no group that has members
                await consumer.commit(dict.fromkeys(places, 0))


_ALL, _READ, _WRITE = 2, 3, 4
_DENY, _ALLOW = 2, 3
_TOPIC, _LITERAL = 2, 3
_EVERYTHING = {_TOPIC: "*", 3: "*", 4: "kafka-cluster"}
"""All topics, all groups, and the cluster; numbers as in Kafka's protocol."""


def guarded_kafka(certificates, certificate, password):
    """Kafka that speaks only TLS to others, and has three users."""
    rights = {"granted": [], "may-not-send": [_WRITE], "may-not-read": [_READ]}
    users = " ".join(f'user_{name}="{password}"' for name in rights)
    login = "org.apache.kafka.common.security.plain.PlainLoginModule"
    settings = {
        "LISTENERS": "GUARDED://:{port},INSIDE://127.0.0.1:9094,CONTROLLER://127.0.0.1:9093",
        "ADVERTISED_LISTENERS": "GUARDED://127.0.0.1:{port},INSIDE://127.0.0.1:9094",
        "LISTENER_SECURITY_PROTOCOL_MAP": "GUARDED:SASL_SSL,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "INTER_BROKER_LISTENER_NAME": "INSIDE",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "SASL_ENABLED_MECHANISMS": "PLAIN",
        "LISTENER_NAME_GUARDED_PLAIN_SASL_JAAS_CONFIG": f"{login} required {users};",
        "LISTENER_NAME_GUARDED_SSL_KEYSTORE_TYPE": "PEM",
        "LISTENER_NAME_GUARDED_SSL_KEYSTORE_CERTIFICATE_CHAIN": _in_a_line(certificates.read(f"{certificate}.pem")),
        "LISTENER_NAME_GUARDED_SSL_KEYSTORE_KEY": _in_a_line(certificates.read(f"{certificate}.key")),
        "AUTHORIZER_CLASS_NAME": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "SUPER_USERS": "User:granted;User:ANONYMOUS",
    }

    async def probe(servers):
        """Let the users do everything but what they may not: that is how one sees that it answers."""
        from aiokafka.client import AIOKafkaClient
        from aiokafka.protocol.admin import CreateAclsRequest

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client = AIOKafkaClient(bootstrap_servers=servers, ssl_context=context, **_sasl("granted", password))
        try:
            await client.bootstrap()
            for name, forbidden in rights.items():
                allowed = [(kind, everything, _ALL, _ALLOW) for kind, everything in _EVERYTHING.items()]
                denied = [(_TOPIC, "*", operation, _DENY) for operation in forbidden]
                for kind, what, operation, permission in (*allowed, *denied):
                    request = CreateAclsRequest(kind, what, _LITERAL, f"User:{name}", "*", operation, permission)
                    response = await client.send(client.get_random_node(), request)
                    assert not any(error_code for error_code, _ in response.creation_responses), response
        finally:
            await client.close()

    kafka = BACKENDS["kafka"]
    environment = {name: value for name, value in kafka.environment.items() if "LISTENER" not in name}
    environment |= {f"KAFKA_{name}": value for name, value in settings.items()}
    return replace(kafka, environment=environment, probe=probe)


def _sasl(user, password):
    return {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": user,
        "sasl_plain_password": password,
    }


def _in_a_line(pem):
    return " ".join(pem.split("\n")).strip()


class KafkaInPlaceHarness(KafkaHarness):
    """Kafka, where what is given back holds up what is behind it."""

    name = "kafka, retry in place"
    in_place = True


@functools.cache
def container_of(port):
    """The address of the container on this machine that is reached at *port*; None if there is none."""
    from docker import from_env
    from docker.errors import DockerException

    try:
        with contextlib.closing(from_env()) as engine:
            for container in engine.containers.list(filters={"publish": str(port)}):
                for network in container.attrs["NetworkSettings"]["Networks"].values():
                    return network["IPAddress"]
    except DockerException:
        return None
