"""The clients of aiokafka: their settings, how they end without hanging, and what diator uses of their inside."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import ssl
from collections import deque
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from functools import partial
from types import CoroutineType
from typing import Any

from aiokafka import errors
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import create_conn
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.record import default_records

from diator._extras import require_internals
from diator.brokers.client_logs import demote, own_client
from diator.brokers.connecting import Backoff
from diator.brokers.kafka._errors import CLIENT_ERRORS, not_connected
from diator.brokers.kafka._unconfirmed import Place
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

#: Which part of the timeout the addresses may take, so that the caller has time left to learn which did not answer.
_OF_THE_TIMEOUT = 0.9
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


demote(
    "aiokafka",
    "aiokafka.cluster",
    "aiokafka.conn",
    "aiokafka.consumer.consumer",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.producer.producer",
    "aiokafka.producer.sender",
)
# At the level DEBUG aiokafka logs whole requests and responses. Payloads must not get into logs at any level.
for _name in ("aiokafka.conn", "aiokafka.producer.producer"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno > logging.DEBUG)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """
    Where Kafka is, and how to log in.

    Its `repr` shows neither user nor password.

    Attributes:
        bootstrap_servers: Addresses of the form `host:port`; one that answers is enough.
        timeout: Seconds within which a call must end.
        reconnect: The time limits and delays of connecting.
        ssl_context: For TLS. None means no TLS.
        sasl_mechanism: How *username* and *password* are checked. None means no login.
    """

    bootstrap_servers: tuple[str, ...]
    timeout: float
    reconnect: ReconnectPolicy = field(default_factory=ReconnectPolicy)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    sasl_mechanism: str | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.bootstrap_servers or not all(_is_address(each) for each in self.bootstrap_servers):
            # Without the value: it may be a URL with a password in it.
            raise ConfigurationError(
                "bootstrap_servers must be one string of the form host:port, or host:port,host:port, with a host that "
                "can be one, a port from 1 to 65535, and an IPv6 address in brackets"
            )
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise ConfigurationError(
                "ssl_context must be an ssl.SSLContext, such as ssl.create_default_context() returns"
            )
        if self.sasl_mechanism is not None and self.sasl_mechanism not in _MECHANISMS:
            raise ConfigurationError(f"sasl_mechanism must be one of {', '.join(_MECHANISMS)}")
        if len({self.sasl_mechanism is None, self.username is None, self.password is None}) > 1:
            raise ConfigurationError("sasl_mechanism, username and password belong together; pass all of them, or none")
        try:
            f"{self.username}{self.password}".encode()
        except UnicodeEncodeError:
            raise ConfigurationError("username and password must be valid Unicode") from None

    @property
    def where(self) -> str:
        """The addresses."""
        return ",".join(self.bootstrap_servers)

    def client(self) -> Any:
        """Return a client of aiokafka that neither sends nor receives messages."""
        return with_reasons(AIOKafkaClient(**self.settings()), self)

    def settings(self, *, request_timeout: float | None = None) -> dict[str, Any]:
        """Return the arguments for a client of aiokafka."""
        over = "SASL_" if self.sasl_mechanism else ""
        # An address that does not answer must leave time for the next one.
        bounded = self.timeout / len(self.bootstrap_servers) if request_timeout is None else request_timeout
        return {
            "bootstrap_servers": [*self.bootstrap_servers],
            "client_id": "diator",
            "request_timeout_ms": round(bounded * 1000),
            "security_protocol": f"{over}SSL" if self.ssl_context else f"{over}PLAINTEXT",
            "ssl_context": self.ssl_context,
            "sasl_mechanism": self.sasl_mechanism or "PLAIN",
            "sasl_plain_username": self.username,
            "sasl_plain_password": self.password,
        }


def _is_address(text: str) -> bool:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^/@:\s\[\]]+):([0-9]{1,5})", text)
    try:
        return found is not None and bool(found[1].encode("idna")) and 0 < int(found[2]) < 2**16
    except UnicodeError:
        return False


# -- connecting ------------------------------------------------------------------------------------------------------


def with_reasons(client: Any, cluster: Cluster) -> Any:
    """Return *client*, which raises why it cannot connect. By itself, it would only log that."""
    client.bootstrap = partial(_bootstrap, client, cluster)
    return client


async def _bootstrap(client: Any, cluster: Cluster) -> None:
    """Learn from the first address that answers which brokers there are. It does what aiokafka's own one does."""
    within = _OF_THE_TIMEOUT * cluster.timeout / len(cluster.bootstrap_servers)
    options = cluster.settings(request_timeout=within)
    del options["bootstrap_servers"]
    problems: dict[str, BaseException] = {}
    for host, port, _ in client.hosts:
        connection = None
        try:
            connection = await create_conn(host, port, **options)
            client.cluster.update_metadata(await connection.send(MetadataRequest([])))
            if client.cluster.brokers():
                break
            problems[f"{host}:{port}"] = errors.MetadataEmptyBrokerList()
        except CLIENT_ERRORS as error:
            problems[f"{host}:{port}"] = error
        finally:
            if connection is not None:  # the connections to the brokers are others
                connection.close()
    else:
        raise not_connected(problems, within=within)
    refresh_metadata(client)


# -- starting and ending tasks -------------------------------------------------------------------------------------

_LEAVING_THE_START = 0.5


async def started(starting: Coroutine[Any, Any, None]) -> None:
    """
    Await *starting*, which connects a client. If the caller is cancelled, wait half a second for it, then cancel it.

    aiokafka forgets a connection if it is cancelled while it asks for the cluster's metadata. Nobody could close that
    connection.
    """
    with own_client():
        start = asyncio.create_task(starting)
    try:
        await asyncio.shield(start)
    finally:
        if not start.done():
            await asyncio.wait({start}, timeout=_LEAVING_THE_START)
        await end_tasks([start])


async def end_tasks(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    """
    Cancel *tasks* again and again until they have ended.

    A task of aiokafka that is cancelled once may wait for another task, which may never end.
    """
    given = {task for task in tasks if task is not None}
    running = {task for task in given if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.05)
    for task in given:
        if not task.cancelled():
            task.exception()  # else asyncio logs that nobody looked at it


# -- what aiokafka keeps to itself -----------------------------------------------------------------------------------

# Sending and closing need more of aiokafka than its public part. All names of that kind are used below this line, and
# by `_batch.Records`, which takes the place of a BatchBuilder.
INTERNALS = {
    "aiokafka.client": (
        "AIOKafkaClient._conns",
        "AIOKafkaClient._get_conn",
        "AIOKafkaClient._md_synchronizer",
        "AIOKafkaClient._sync_task",
    ),
    "aiokafka.conn": ("AIOKafkaConnection._writer",),
    "aiokafka.producer.producer": (
        "AIOKafkaProducer._closed",
        "AIOKafkaProducer._message_accumulator",
        "AIOKafkaProducer._sender",
    ),
    "aiokafka.producer.sender": ("Sender._send_produce_req", "Sender.sender_task"),
    "aiokafka.producer.message_accumulator": (
        "BatchBuilder._build",
        "BatchBuilder._set_producer_state",
        "BatchBuilder.append",
        "BatchBuilder.closed",
        "BatchBuilder.record_count",
        "MessageAccumulator._append_batch",
        "MessageAccumulator._batch_ttl",
        "MessageAccumulator._batches",
        "MessageBatch.append",
        "MessageBatch.is_empty",
    ),
    "aiokafka.record.default_records": (
        "DefaultRecordBatchBuilder.append",
        "DefaultRecordBatchBuilder.build",
        "DefaultRecordBatchBuilder.size_of",
        "_DefaultRecordBatchBuilderPy.append",
        "_DefaultRecordBatchBuilderPy.build",
        "_DefaultRecordBatchBuilderPy.size_of",
    ),
}
require_internals("aiokafka", INTERNALS)

BatchBuilderInPython: Any = default_records._DefaultRecordBatchBuilderPy  # noqa: SLF001
"""Writes what the one in C refuses: names of headers that are not `str`, but a class derived from it."""


def refresh_metadata(client: Any) -> None:
    """Let *client* refresh its metadata from now on, as its own `bootstrap` does."""
    if client._sync_task is None:  # noqa: SLF001
        client._sync_task = asyncio.create_task(client._md_synchronizer())  # noqa: SLF001


def pace(client: Any, cluster: Cluster) -> None:
    """Make *client* wait between two attempts to connect to a node. aiokafka would try ten times a second for ever."""
    connect, backoffs = client._get_conn, dict[object, Backoff]()  # noqa: SLF001
    policy = cluster.reconnect.capped(cluster.timeout / 2)

    async def get_connection(node: object, *, group: ConnectionGroup = ConnectionGroup.DEFAULT, **rest: Any) -> Any:
        if (found := client._conns.get((node, group))) is not None and found.connected():  # noqa: SLF001
            return found
        async with backoffs.setdefault((node, group), Backoff(policy)).attempt():
            with own_client():
                return await connect(node, group=group, **rest)

    client._get_conn = get_connection  # noqa: SLF001


async def close_client(client: Any) -> None:
    """
    Close the connections of a client of aiokafka, whether or not anybody is at the other end.

    aiokafka's own way waits until the other end has taken what was written. diator has waited before for every answer
    that is worth it.
    """
    for connection in [*client._conns.values()]:  # noqa: SLF001
        if (writer := connection._writer) is not None:  # noqa: SLF001
            writer.transport.abort()
    try:
        async with asyncio.timeout(1):
            await client.close()
    except CLIENT_ERRORS as error:
        logger.debug("closing connections to Kafka failed: %r", error)


def without_own_end(producer: Any) -> Any:
    """Return *producer*, which keeps a batch until it is sent, and needs no `stop`: see `tear_down`."""
    producer._message_accumulator._batch_ttl = math.inf  # noqa: SLF001  # else a partition without a leader loses it
    producer._closed = True  # noqa: SLF001  # else aiokafka warns that nobody has called `stop`
    return producer


def sender_of(producer: Any) -> asyncio.Task[None]:
    """Return the task that does all the work of a producer that has been started."""
    return producer._sender.sender_task  # type: ignore[no-any-return]  # noqa: SLF001


def enqueue(producer: Any, records: Any, place: Place) -> None:
    """Queue *records* (see `_batch.Records`) as a batch for *place*, behind the batches that are queued there."""
    batch = producer._message_accumulator._append_batch(records, place)  # noqa: SLF001
    batch.append(None, None, None, lambda: records)  # its only message, as far as aiokafka knows


def drop_empty(producer: Any, places: Collection[Place]) -> None:
    """Remove the batches without records from the queues of *places*."""
    queues = producer._message_accumulator._batches  # noqa: SLF001
    for place in places:
        kept = [batch for batch in queues.get(place, ()) if not batch.is_empty()]
        if kept:
            queues[place] = deque(kept)
        else:
            queues.pop(place, None)


async def tear_down(producer: Any) -> None:
    """End *producer* without sending what it holds. Its own `stop` waits until everything is delivered."""
    sender = producer._sender  # noqa: SLF001
    # A cancelled sender waits for one request at most. It forgets its other requests.
    requests = [task for task in asyncio.all_tasks() if _is_request_of(sender, task.get_coro())]
    await end_tasks([sender.sender_task, *requests])
    await close_client(producer.client)


def _is_request_of(sender: Any, coroutine: object) -> bool:
    return (
        isinstance(coroutine, CoroutineType)
        and coroutine.cr_code is type(sender)._send_produce_req.__code__  # noqa: SLF001
        and coroutine.cr_frame is not None
        and coroutine.cr_frame.f_locals.get("self") is sender
    )
