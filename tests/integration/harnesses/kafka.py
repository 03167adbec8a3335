"""The harnesses of the Kafka transport."""

import asyncio
import gc
import gzip
import os
import ssl
import struct
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version

from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Limits
from diator.testing.fault_proxy import FaultProxy
from tests.integration.harnesses.service import SCALE, ServiceHarness
from tests.services import BACKENDS


class KafkaHarness(ServiceHarness):
    """Kafka at `DIATOR_TEST_KAFKA_SERVERS`, or in a private container for scenarios that break it or use a proxy."""

    name = backend = "kafka"
    breaking = frozenset({"proxy", "outages"})  # the proxy has to listen where Kafka sends its clients
    facilities = frozenset(
        {"proxy", "raw", "foreign", "dead_letters", "crash", "processes", "outages", "topology", "security"}
    )
    # Joining a group and creating a topic take 0.1 s each. The shortest session timeout that Kafka allows is 6 s.
    limits = Limits(
        scale=4.0 * SCALE,
        quiet=0.3,
        redelivery=5.0,
        timeout=5.0,
        liveness=10.0,
        recovery=20.0,
        lag=2.0 * SCALE,
        max_delay=1.0,
    )
    password = "swordfish-of-the-kafka-harness"
    in_place = False

    @property
    def is_proxied(self):
        return int(self.url.rpartition(":")[2]) == self.services["breakable"]._service.proxied

    def start(self):
        servers = os.environ.get("DIATOR_TEST_KAFKA_SERVERS")
        if not servers:
            raise EnvironmentMissing("DIATOR_TEST_KAFKA_SERVERS does not name a Kafka server")
        self.url = self.direct = servers

    def guarded_service(self, certificate):
        return guarded_kafka(self.certificates, certificate, self.password)

    def service(self):
        return "Kafka"

    def driver(self):
        return f"aiokafka {version('aiokafka')}"

    def connecting_to(self, servers, **options):
        from diator.brokers.kafka import KafkaMessageBroker

        reconnect = ReconnectPolicy(connect_timeout=10.0, idle_timeout=1.5, probe_timeout=1.5, max_delay=1.0)
        return KafkaMessageBroker(
            servers,
            "conformance",
            timeout=self.limits.timeout,
            session_timeout=6.0,
            heartbeat_interval=0.1,
            drain_timeout=10.0,
            retry_in_place=self.in_place,
            reconnect=reconnect,
            **options,
        )

    async def send_raw(self, transport, topic, body):
        await transport._service.send(transport._names.topic(topic), body)

    async def send_foreign(self, transport, topic, group, kind, body):
        name = transport._names.topic(topic)
        if kind == "due times":
            if self.in_place:
                raise EnvironmentMissing("retries wait in memory")
            name = transport._names.beside(name, group, "-retry")
        most = await self._largest_batch(name) if kind == "large" else 0
        return await self._produce(name, foreign_batches(kind, body, most))

    async def _largest_batch(self, name):
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

        admin = AIOKafkaAdminClient(bootstrap_servers=self.url)
        await admin.start()
        try:
            resource = ConfigResource(ConfigResourceType.TOPIC, name)
            [response] = await admin.describe_configs([resource])
        finally:
            await admin.close()
        return int({config[0]: config[1] for config in response.resources[0][4]}["max.message.bytes"])

    async def _produce(self, name, batches):
        """Store *batches* as they are, without a client's encoder. Return how many of them Kafka accepts."""
        from aiokafka import TopicPartition
        from aiokafka.client import AIOKafkaClient
        from aiokafka.errors import InvalidTimestampError, KafkaError, NoError, for_code
        from aiokafka.protocol.produce import ProduceRequest

        client = AIOKafkaClient(bootstrap_servers=self.url)
        await client.bootstrap()
        try:
            await client._wait_on_metadata(name)

            async def answer(batch):
                leader = client.cluster.leader_for_partition(TopicPartition(name, 0))
                response = await client.send(leader, ProduceRequest(None, -1, 5_000, [(name, [(0, batch)])]))
                error = for_code(response.topics[0][1][0][1])
                if error not in {NoError, InvalidTimestampError}:
                    raise error
                return error

            stored = 0
            deadline = time.monotonic() + self.limits.timeout
            for batch in batches:
                while True:
                    try:
                        stored += await answer(batch) is NoError
                        break
                    except KafkaError as error:
                        # A broker that heard of a topic a moment ago may not lead its partitions yet.
                        if not error.retriable or time.monotonic() > deadline:
                            raise
                        await asyncio.sleep(0.05)
                        await client.force_metadata_update()
            return stored
        finally:
            await client.close()

    async def dead_letters(self, transport, topic, group):
        from aiokafka import AIOKafkaConsumer

        name = transport._names.beside(transport._names.topic(topic), group, "-dlq")
        async with AIOKafkaConsumer(name, bootstrap_servers=self.url, auto_offset_reset="earliest") as consumer:
            (place,) = consumer.assignment()
            count = (await consumer.end_offsets([place]))[place]
            found = [await consumer.getone() for _ in range(count)]
        letters = [(each.value, {name: value.decode() for name, value in each.headers}) for each in found]
        return [
            DeadLettered(body=body, reason=headers["diator-dlq-reason"], headers=headers) for body, headers in letters
        ]

    @asynccontextmanager
    async def proxied(self):
        service = self.services["breakable"]._service
        if self.is_proxied:
            raise EnvironmentMissing("Kafka sends all its clients to one address, where only one proxy can listen")
        proxy = FaultProxy("127.0.0.1", service.behind)
        proxy.port = service.proxied
        async with proxy:
            with self._at(f"{proxy.host}:{proxy.port}", self.direct):
                yield proxy

    async def crash(self, transport):
        from diator.brokers.kafka._connection import ReaderConnection
        from diator.brokers.kafka._group import GroupConnection

        async def nothing(*_, **__):
            pass

        nowhere = replace(transport._cluster, bootstrap_servers=("127.0.0.1:1",))
        clients = [transport._service._link._producer.client] if transport._service._link else []
        transport._service._cluster = nowhere
        subscriptions = {*transport._service.subscriptions}
        for subscription in subscriptions:
            subscription._connect = partial(subscription._connect, cluster=nowhere)
        for connection in gc.get_objects():  # a subscription does not keep its connection
            if type(connection) in (ReaderConnection, GroupConnection) and connection.subscription in subscriptions:
                connection.say_goodbye = nothing
                for task in connection.tasks:
                    task.cancel()
                clients.append(connection.consumer._consumer._client)
        for client in clients:
            client._get_conn = nothing
            for connection in client._conns.values():
                if connection._writer:
                    connection._writer.transport.abort()

    def entering(self, entrance):
        return self.connecting_to(
            entrance.address,
            ssl_context=entrance.ssl_context,
            sasl_mechanism="PLAIN",
            username=entrance.user,
            password=entrance.password,
        )

    async def delete(self, transport, topic, group):
        from aiokafka.admin import AIOKafkaAdminClient

        name = transport._names.topic(topic)
        admin = AIOKafkaAdminClient(bootstrap_servers=self.url)
        await admin.start()
        try:
            await admin.delete_topics([name if group is None else transport._names.beside(name, group, "-retry")])
        finally:
            await admin.close()
        if group is not None:
            await self._reset_offsets(name, transport._names.group(group))

    async def _reset_offsets(self, name, group):
        from aiokafka import AIOKafkaConsumer, TopicPartition
        from aiokafka.errors import CommitFailedError

        async with AIOKafkaConsumer(bootstrap_servers=self.url, group_id=group, enable_auto_commit=False) as consumer:
            await consumer._client._wait_on_metadata(name)
            places = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
            consumer.assign(places)
            with suppress(CommitFailedError):  # Kafka refuses this while the group has consumers
                await consumer.commit(dict.fromkeys(places, 0))


def foreign_batches(kind, body, most):
    """Return batches with one foreign record of *kind* each; the large ones have *most* bytes."""
    match kind:
        case "metadata":
            odd = [(b"\xff\xfe", b"v"), (b"", b""), (b"n", None), (b"key", b"\xff\xfe"), (b"n", b"\xc3\x28")]
            times = [2**62, -1, -(2**62), int(time.time() * 1e6), int(time.time() * 1e9)]
            batches = [batch_of(body, headers=[header]) for header in odd]
            batches += [batch_of(body, key=key) for key in (b"", b"\xff\xfe", b"k" * 100_000)]
            return batches + [batch_of(body, timestamp=each) for each in times] + [batch_of(None, key=b"k")]
        case "headers":
            names = ["key", "diator-dlq-reason", "diator-retry-due", "diator-retry-attempt", "\n", "x" * 100_000]
            batches = [batch_of(body, headers=[(name.encode(), b"-1")]) for name in names]
            twice = [(b"a", b"1"), (b"b", None), (b"a", b"2"), (b"\xff", b"\xff")]
            return [
                *batches,
                batch_of(body, headers=twice),
                batch_of(body, headers=[(b"n%d" % n, b"") for n in range(9_999)]),
            ]
        case "counters":
            names = [b"diator-attempt", b"diator-retry-attempt", b"attempt"]
            return [batch_of(body, headers=[(name, b"9" * length)]) for name in names for length in (3, 400)]
        case "due times":
            forged = [b"9" * 400, b"-" + b"9" * 30, b"99999999999999", b"soon", b"\xff", b""] * 20
            return [
                batch_of(
                    body,
                    headers=[
                        (b"diator-retry-attempt", b"2"),
                        (b"diator-retry-due", due),
                        (b"diator-retry-origin", b"0:0"),
                    ],
                )
                for due in forged
            ]
        case "large":
            return [batch_of(b" " * (most - less - len(batch_of(b"")) - 8)) for less in (0, 60, 400)]
        case "compressed":
            compressed = {1: gzip.compress, 2: _as_snappy, 3: _as_lz4, 4: _as_zstd}
            batches = [batch_of(body, codec=codec, compress=compress) for codec, compress in compressed.items()]
            return [*batches, batch_of(bytes(10_000_000), codec=1, compress=gzip.compress)]


def batch_of(value, *, key=None, headers=(), timestamp=None, codec=0, compress=bytes):
    """Encode a batch (version 2) with one record, as the documentation of Kafka's protocol describes it."""
    from aiokafka.record.util import calc_crc32c

    timestamp = int(time.time() * 1000) if timestamp is None else timestamp
    fields = [b"\0", varint(0), varint(0), sized(key), sized(value), varint(len(headers))]
    record = b"".join([*fields, *(sized(each) for header in headers for each in header)])
    records = compress(varint(len(record)) + record)
    checked = struct.pack(">hiqqqhii", codec, 0, timestamp, timestamp, -1, -1, -1, 1) + records
    return struct.pack(">qiibI", 0, len(checked) + 9, -1, 2, calc_crc32c(checked)) + checked


def sized(value):
    return varint(-1) if value is None else varint(len(value)) + value


def varint(number):
    number, encoded = (number << 1) ^ (number >> 63), b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def _as_snappy(data):
    from aiokafka.codec import snappy_encode

    return snappy_encode(data)


def _as_lz4(data):
    from aiokafka.codec import lz4_encode

    return lz4_encode(data)


def _as_zstd(data):
    from aiokafka.codec import zstd_encode

    return zstd_encode(data)


_ALL, _READ, _WRITE = 2, 3, 4
_DENY, _ALLOW = 2, 3
_TOPIC, _LITERAL = 2, 3
_EVERYTHING = {_TOPIC: "*", 3: "*", 4: "kafka-cluster"}
"""All topics, all groups and the cluster, with the numbers of Kafka's protocol."""


def guarded_kafka(certificates, certificate, password):
    """Return a Kafka container that accepts only TLS from outside and has three users."""
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
        """Set the permissions of the users, which also proves that Kafka answers."""
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
    """Kafka with `retry_in_place`: a requeued message holds up the messages behind it."""

    name = "kafka, retry in place"
    in_place = True
