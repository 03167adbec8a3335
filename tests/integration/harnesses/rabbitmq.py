"""The harness of the RabbitMQ transport."""

import asyncio
import base64
import contextlib
import functools
import gzip
import json
import os
import ssl
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Limits
from diator.testing.fault_proxy import FaultProxy
from tests import amqp
from tests.amqp import sized
from tests.integration.harnesses.service import SCALE, ServiceHarness
from tests.services import BACKENDS


class RabbitMQHarness(ServiceHarness):
    """RabbitMQ at `DIATOR_TEST_RABBITMQ_URL`. Its queues and exchange are deleted at the end."""

    name = backend = "rabbitmq"
    # Without `full`: a queue with `max-length` and `reject-publish` does not count what is prefetched, takes one more,
    # and does not keep the message out of the queues of other groups.
    facilities = frozenset(
        {
            "proxy",
            "raw",
            "foreign",
            "dead_letters",
            "retention",
            "crash",
            "processes",
            "outages",
            "operator",
            "topology",
            "alarm",
            "security",
        }
    )
    limits = Limits(
        lag=SCALE,
        scale=2.0 * SCALE,
        quiet=0.2,
        redelivery=3.0,
        timeout=5.0,
        liveness=6.0,
        recovery=8.0,
        max_delay=1.0,
        absence=16.0,
    )
    password = "swordfish-of-the-rabbitmq-harness"

    def __init__(self):
        super().__init__()
        self.prefix = os.environ.setdefault("DIATOR_CONFORMANCE_PREFIX", f"conformance-{os.getpid()}")
        self.declared = set()

    def start(self):
        url = os.environ.get("DIATOR_TEST_RABBITMQ_URL")
        if not url:
            raise EnvironmentMissing("DIATOR_TEST_RABBITMQ_URL does not name a RabbitMQ server")
        self.url = self.direct = self.shared = url
        try:
            self.version = alone(self._amqp(lambda channel: channel.connection.server_properties["version"]))
        except OSError as error:
            raise EnvironmentMissing(str(error)) from error

    def stop(self):
        from aiormq.exceptions import ChannelPreconditionFailed

        async def delete(channel):
            with contextlib.suppress(OSError):  # queues that other processes of this run have declared
                self.declared |= {each["name"] for each in self._manage("GET", "queues?columns=name")}
            for queue in self.declared:
                if queue.startswith(f"{self.prefix}:"):
                    await channel.queue_delete(queue)
            with contextlib.suppress(ChannelPreconditionFailed):  # another harness of this process still uses it
                await channel.exchange_delete(self.prefix, if_unused=True)
                await channel.exchange_delete(f"{self.prefix}:retained", if_unused=True)

        if self.prefix.endswith(f"-{os.getpid()}"):  # only the process that made the prefix deletes
            alone(self._amqp(delete))
        super().stop()

    def prepare(self, facility):
        super().prepare(facility)
        if facility == "operator":
            try:
                self._manage("GET", "overview")
            except OSError as error:
                raise EnvironmentMissing(f"RabbitMQ's management plugin does not answer: {error}") from error

    def guarded_service(self, certificate):
        return guarded_rabbitmq(self.certificates, certificate, self.password)

    def service(self):
        return f"RabbitMQ {self.version}"

    def driver(self):
        return f"aiormq {version('aiormq')}"

    def connecting_to(self, url, **options):
        from diator.brokers.rabbitmq import RabbitMQMessageBroker, _retained, _subscription
        from diator.brokers.rabbitmq._channel import SAFE_AFTER

        harness = self

        class Watched(RabbitMQMessageBroker):
            """Records its queues, so that they can be deleted, and its sockets, so that they can be broken."""

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
            async def subscribe(self, topics, /, *, group=None, prefetch=64, on_gap=None):
                async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
                    for each in self._service.subscriptions:
                        if each.group is not None:
                            harness.declared |= {*each.queues, *map(each.dead_letter_queue, each.queues)}
                    yield deliveries

        # A subscription waits until a kill of RabbitMQ no longer loses its new queues. Nobody kills the shared one.
        safe_after = 0.0 if self.direct == self.shared else SAFE_AFTER
        _subscription.SAFE_AFTER = _retained.SAFE_AFTER = safe_after
        _subscription._NO_GROUP_EXPIRES = self.limits.absence - 1  # two minutes are too long for a test
        # RabbitMQ takes messages back from a silent client after two heartbeats.
        name = f"{'&' if '?' in url else '?'}heartbeat=5&name=conformance-{uuid4().hex}"
        # After a kill, RabbitMQ answers before its queues are available.
        reconnect = ReconnectPolicy(connect_timeout=15.0, idle_timeout=1.0, probe_timeout=1.0, max_delay=1.0)
        broker = Watched(url + name, self.prefix, timeout=5.0, reconnect=reconnect, **options)
        broker.name = name.rpartition("=")[2]
        return broker

    async def send_raw(self, transport, topic, body):
        from diator.brokers.rabbitmq._names import routing_key

        key = routing_key(*topic)
        await self._amqp(lambda channel: channel.basic_publish(body, exchange=self.prefix, routing_key=key))

    async def send_foreign(self, transport, topic, group, kind, body):
        from diator.brokers.rabbitmq._frames import Publication
        from diator.brokers.rabbitmq._names import routing_key

        def publication(properties, body):
            header = struct.pack(">HHQ", 60, 0, len(body)) + properties
            return Publication(self.prefix, routing_key(*topic), header, body, str(uuid4()), None, mandatory=True)

        stored = foreign_properties(kind, body, transport.capabilities.max_message_bytes)
        for properties, each in stored:
            await transport._service.publish(publication(properties, each))
        return len(stored)

    async def dead_letters(self, transport, topic, group):
        from pamqp.commands import Basic

        from diator.brokers.rabbitmq._names import queue_name

        found = []

        async def take(channel):
            dead = f"{queue_name(self.prefix, topic, group)}:dead"
            while not isinstance((letter := await channel.basic_get(dead)).delivery, Basic.GetEmpty):
                headers = letter.header.properties.headers
                reason = headers["diator-dlq-reason"]
                found.append(DeadLettered(body=letter.body, reason=reason, headers=headers))

        await self._amqp(take)
        return found

    def retaining(self, room):
        return self.connecting_to(self.url, max_retained=room)

    async def crash(self, transport):
        async def no_more(purpose):
            raise ConnectionError("the process is dead")

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

        # The management plugin reports new and closed connections only after seconds.
        found, count = set(), max(1, sum(map(is_open, transport.writers)))  # a connection may be opening
        while len(found) < count:
            await asyncio.sleep(0.2)  # the plugin has no notifications
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
            content = answer.read()
        return json.loads(content) if content else None

    async def delete(self, transport, topic, group):
        from diator.brokers.rabbitmq._names import queue_name

        async def delete(channel):
            if group is None:
                await channel.exchange_delete(self.prefix)
            deleted = queue_name(self.prefix, topic, group or "")
            for queue in {queue for queue in self.declared if queue.startswith(deleted)} | {deleted}:
                await channel.queue_delete(queue)

        await self._amqp(delete)

    async def _amqp(self, do):
        """Call *do* with a channel of a separate client."""
        import aiormq

        async with aiormq.connect(self.direct) as connection:
            done = do(await connection.channel())
            return await done if asyncio.iscoroutine(done) else done

    def entering(self, entrance):
        scheme = "amqps" if entrance.authority else "amqp"
        url = f"{scheme}://{entrance.user}:{entrance.password}@{entrance.address}/"
        return self.connecting_to(url, ssl_context=entrance.ssl_context)


def foreign_properties(kind, body, limit):
    """Return the properties and bodies of foreign messages of *kind*: flags and values as RabbitMQ stores them."""
    number = entry("n", b"I" + struct.pack(">i", 1_000))
    match kind:
        case "metadata":
            tables = [
                entry(b"\xff\xfe", text("a")),  # a name that is not UTF-8
                entry("t", b"T" + struct.pack(">Q", 2**60)),  # a time that no datetime can be
                nested(500),
                entry("d", b"D\xff" + struct.pack(">I", 2**31 + 5)),  # 255 decimal places
            ]
            properties = [
                flagged({6: struct.pack(">Q", 2**64 - 1)}),  # timestamps out of range, and in microseconds
                flagged({6: struct.pack(">Q", int(time.time() * 1_000_000))}),
                flagged({15: b"\x02\xc3\x28"}),  # a content type, an id and an encoding that are not UTF-8
                flagged({7: b"\x02\xc3\x28"}),
                flagged({14: b"\x01\xff"}),
                struct.pack(">H", 0),  # no properties
            ]
            return [(each, body) for each in [*map(tabled, tables), *properties]]
        case "headers":
            values = [
                b"V", b"t\2", b"b\xff", b"B\xff", b"s\xff\xfe", b"u\xff\xfe", b"I" + b"\xff" * 4, b"i" + b"\xff" * 4,
                b"l" + b"\xff" * 8, b"f" + struct.pack(">f", 0.1), b"d" + struct.pack(">d", 1e300),
                b"D\2" + struct.pack(">i", -31415), b"x" + sized(b"\xff\0\xfe"), b"S" + sized(b"\xc3\x28"),
                b"A" + sized(text("a") + b"V" + b"F" + sized(number)), b"F" + sized(number), b"T" + bytes(8),
                text("x" * 100_000),
            ]  # fmt: skip
            names = ["", "\n", "N" * 200, "key", "diator-dlq-reason", "x-delay", "x-match"]
            tables = [*(entry("h", value) for value in values), *(entry(name, text("a")) for name in names)]
            tables += [number + number, *(entry(name, b"A" + sized(text("nowhere"))) for name in ("CC", "BCC"))]
            properties = [flagged({12: b"\1"}), flagged({11: b"\xff"}), flagged({9: b"\1r", 10: b"\1c"})]
            return [(each, body) for each in [*map(tabled, tables), *properties]]
        case "counters":
            names = ["diator-attempt", "x-delivery-count", "x-acquired-count", "x-death", "x-first-death-queue"]
            values = [b"I" + struct.pack(">i", 999), b"l" + struct.pack(">q", 2**62), text("999"), b"A" + sized(b"")]
            return [(tabled(entry(name, value)), body) for name in names for value in values]
        case "large":
            full = tabled(entry("h", text("x" * 130_900)))  # with the headers of a dead letter, more than a frame
            return [(struct.pack(">H", 0), body + b" " * limit), (full, b"{"), (full, body + b" " * limit)]
        case "compressed":
            encoded = [(b"\4gzip", gzip.compress(body)), (b"\7deflate", zlib.compress(body)), (b"\2br", b"\x0b")]
            encoded.append((b"\4gzip", gzip.compress(bytes(10_000_000))))
            return [(flagged({14: name}), each) for name, each in encoded]
    raise EnvironmentMissing("the messages that wait in RabbitMQ have no due times: their queue decides")


def flagged(values):
    """Encode properties, by the bits of their flags: 15 is the content type, 13 the headers, 7 the id."""
    return struct.pack(">H", sum(1 << bit for bit in values)) + b"".join(values[bit] for bit in sorted(values)[::-1])


def tabled(table):
    return flagged({13: sized(table)})


def entry(name, value):
    return amqp.short(name if isinstance(name, bytes) else name.encode()) + value


def text(value):
    return amqp.text(value.encode())


def nested(depth):
    table = b""
    for _ in range(depth):
        table = entry("a", b"F" + sized(table))
    return table


def guarded_rabbitmq(certificates, certificate, password):
    """Return a RabbitMQ container that accepts only TLS and has three users."""
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


def is_open(writer):
    return not writer.transport.is_closing()


def alone(coroutine):
    """Run *coroutine* to its end, whether or not an event loop is running in this thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


@functools.cache
def container_of(port):
    """Return the address of the local container that publishes *port*; None if there is none."""
    from docker import from_env
    from docker.errors import DockerException

    try:
        with contextlib.closing(from_env()) as engine:
            for container in engine.containers.list(filters={"publish": str(port)}):
                for network in container.attrs["NetworkSettings"]["Networks"].values():
                    return network["IPAddress"]
    except DockerException:
        return None
