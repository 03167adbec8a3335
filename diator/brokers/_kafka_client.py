"""What the parts of the Kafka transport share: settings, names of topics, errors as ours, and ends that do not hang."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from diator.brokers._kafka_offsets import DELAYS
from diator.brokers.base import Topic
from diator.brokers.batching import own_verdict
from diator.exceptions import BrokerError, BrokerUnavailable, MessageRejected, MissingExtra, OutcomeUnknown, WiringError

try:
    from aiokafka import errors
    from aiokafka.client import AIOKafkaClient
    from aiokafka.protocol.admin import CreateTopicsRequest
    from aiokafka.protocol.fetch import FetchRequest
    from aiokafka.protocol.metadata import MetadataRequest
except ModuleNotFoundError as _missing:
    raise MissingExtra("diator.brokers.kafka", "kafka") from _missing

logger: logging.Logger = logging.getLogger(__name__)


class InvalidRecord(errors.BrokerResponseError):  # type: ignore[misc]  # aiokafka comes without types
    """What aiokafka does not know by itself: a message without a key for a compacted topic, for one."""

    errno = 87
    message = "INVALID_RECORD"
    description = "The broker refused a record, such as one without a key for a compacted topic."


errors.kafka_errors.setdefault(InvalidRecord.errno, InvalidRecord)

# Beside its own errors the client lets through what the network and a broken connection do to it, and the assertions
# and lookups of what it has forgotten meanwhile.
CLIENT_ERRORS = (
    errors.KafkaError,
    errors.ConsumerStoppedError,
    OSError,
    asyncio.TimeoutError,
    AssertionError,
    AttributeError,
    LookupError,
    ValueError,
)
NO_RIGHT = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)
TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


# At this level aiokafka logs whole requests and responses. Payloads are in no log, whatever a program listens to.
for _name in ("aiokafka.conn", "aiokafka.producer.producer"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno > logging.DEBUG)


# -- settings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where Kafka is, and who we are there. Its `repr` has no password."""

    servers: tuple[str, ...]
    timeout: float
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    sasl_mechanism: str | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.servers or not all(re.fullmatch(r"\[?[^/@\s]+:\d{1,5}", each) for each in self.servers):
            # Not what was given: somebody may have taken it for an URL, with a password in it.
            raise WiringError("this is no address of Kafka; it has the form host:port, or host:port,host:port")
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise WiringError("ssl_context is an ssl.SSLContext, such as ssl.create_default_context() makes")
        if self.sasl_mechanism is not None and self.sasl_mechanism not in _MECHANISMS:
            raise WiringError(f"sasl_mechanism is one of {', '.join(_MECHANISMS)}")
        if len({self.sasl_mechanism is None, self.username is None, self.password is None}) > 1:
            raise WiringError("sasl_mechanism, username and password belong together; give all of them, or none")

    def settings(self, *, request_timeout: float | None = None) -> dict[str, Any]:
        """Give what every client of aiokafka is made with."""
        over = "SASL_" if self.sasl_mechanism else ""
        # One address that does not answer leaves time for the next.
        bounded = self.timeout / len(self.servers) if request_timeout is None else request_timeout
        return {
            "bootstrap_servers": [*self.servers],
            "client_id": "diator",
            "request_timeout_ms": round(bounded * 1000),
            "security_protocol": f"{over}SSL" if self.ssl_context else f"{over}PLAINTEXT",
            "ssl_context": self.ssl_context,
            "sasl_mechanism": self.sasl_mechanism or "PLAIN",
            "sasl_plain_username": self.username,
            "sasl_plain_password": self.password,
        }


# -- names -------------------------------------------------------------------------------------------------------

RETRY, DEAD = "-retry", "-dlq"
_LONGEST_NAME = 249


class Names:
    """
    The topics of one prefix: `<prefix>.<message_type>.<message_name>`, and those of each group beside it.

    Kafka allows letters, digits, `.`, `_` and `-`. Everything else, and `-` itself, is written as `-` and two
    hexadecimal digits for each byte, so that different names stay apart. A `.` is allowed in the name of a message
    only: elsewhere it ends a part.
    """

    def __init__(self, prefix: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", prefix):
            raise WiringError(
                "a prefix has letters, digits, `.`, `_` and `-` only: it begins the names of Kafka topics"
            )
        self.prefix = prefix
        self._known: dict[Topic, str] = {}

    def topic(self, topic: Topic) -> str:
        """Name the topic that has the messages of *topic*. MessageRejected if Kafka has no room for that name."""
        name = self._known.get(topic)
        if name is None:
            name = f"{self.prefix}.{_escaped(topic.message_type, '_')}.{_escaped(topic.message_name, '._')}"
            self._known[topic] = _checked(name)
        return name

    def group(self, group: str) -> str:
        """Name a group: two prefixes of one cluster, such as those of two environments, must not disturb each other."""
        return f"{self.prefix}.{group}"

    def beside(self, topic: str, group: str | None, what: str) -> str:
        """Name what a group has beside *topic*: `RETRY` or `DEAD`. No message can have such a name."""
        return _checked(f"{topic}.{_escaped(group, '_')}{what}" if group is not None else f"{topic}{what}")


def _escaped(text: str, allowed: str) -> str:
    plain = re.compile(rf"[A-Za-z0-9{re.escape(allowed)}]")
    try:
        return "".join(
            each if plain.match(each) else "".join(f"-{byte:02x}" for byte in each.encode()) for each in text
        )
    except UnicodeEncodeError as error:
        raise MessageRejected(f"a name is no valid Unicode ({error.reason})") from error


def _checked(name: str) -> str:
    if len(name) > _LONGEST_NAME:
        raise MessageRejected(f"its topic would be {name[:60]}…, {len(name)} characters; Kafka allows {_LONGEST_NAME}")
    return name


# -- topics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How topics are created, if they are."""

    create: bool
    partitions: int
    replication_factor: int | None
    max_message_bytes: int

    def partitions_of(self, topic: str) -> int:
        """How many partitions *topic* gets: a retry topic has one for each range of delays."""
        if topic.endswith(RETRY):
            return len(DELAYS) + 1
        return 1 if topic.endswith(DEAD) else self.partitions

    def replicas(self, brokers: int) -> int:
        """As many as there are brokers, three at most, unless it was said."""
        return self.replication_factor or max(1, min(3, brokers))

    def configs(self, topic: str, replicas: int) -> dict[str, str]:
        """
        Give the settings of *topic*: what is confirmed survives the loss of a broker, where there are three.

        What was put aside stays until somebody removes it.
        """
        configs = {"min.insync.replicas": "2"} if replicas > 2 else {}  # noqa: PLR2004
        if self.max_message_bytes > MAX_KAFKA_BYTES:
            configs["max.message.bytes"] = str(self.max_message_bytes + HEADERS_BYTES)
        if topic.endswith(DEAD):
            configs["retention.ms"] = "-1"
        return configs


HEADERS_BYTES = 64 * 1024
"""What is left for the headers and the key of a message, beside its body."""
MAX_HEADERS_BYTES = HEADERS_BYTES - 4 * 1024
"""How much of that a program may fill; a dead letter has more to say."""
MAX_KAFKA_BYTES = 1024 * 1024 - HEADERS_BYTES
"""How large a body fits into what Kafka takes unless it is told otherwise."""
_ALREADY_THERE = 36
_UNKNOWN_TOPIC = 3
_BEYOND = 2**63 - 1
"""An offset that no message has."""


async def ensure_topics(
    cluster: Cluster, policy: Policy, wanted: Collection[str], *, reading: Collection[str] = ()
) -> None:
    """
    See that the *wanted* topics are there; the missing ones are created as the *policy* says.

    What is new, or to be read, has leaders then. A sender does not wait for those of its other partitions.

    aiokafka's own `create_topics` raises nothing when Kafka refuses: it has to be looked at. Those of *reading* may be
    read, else it raises what Kafka says.

    Raises:
        MessageRejected: One is missing, and is not to be or cannot be created; it says why, or with which command.
    """
    client = AIOKafkaClient(**cluster.settings())
    try:
        await started(client.bootstrap())
        missing, leaderless = await _look_for(client, wanted)
        is_new = bool(missing)
        if missing and not policy.create:
            replicas = policy.replicas(len(client.cluster.brokers()))
            commands = "; ".join(_command(cluster, policy, name, replicas) for name in missing)
            raise MessageRejected(f"a topic is missing, and create_topics is off; create it: {commands}")
        if missing:
            await _create(client, policy, missing, within=cluster.timeout)
        while missing or (leaderless and (is_new or reading)):
            await asyncio.sleep(0.02)
            missing, leaderless = await _look_for(client, wanted)
        if reading:
            await _try_to_read(client, reading)
    finally:
        await close_client(client)


async def _look_for(client: Any, topics: Collection[str]) -> tuple[list[str], list[str]]:
    """Those of *topics* that are missing, and those that have a partition without a leader. It creates none."""
    # aiokafka's own question would: a broker with `auto.create.topics.enable` takes it for a wish.
    request = MetadataRequest([*topics], allow_auto_topic_creation=False)
    response = await client.send(client.get_random_node(), request)
    missing: list[str] = []
    leaderless: list[str] = []
    for error_code, name, _, partitions in response.topics:
        error = errors.for_code(error_code)
        if error_code == _UNKNOWN_TOPIC:
            missing.append(name)
        elif error_code and not error.retriable:
            raise error(name)
        elif error_code or any(partition[0] for partition in partitions):
            leaderless.append(name)
    return missing, leaderless


async def _try_to_read(client: Any, topics: Collection[str]) -> None:
    """Read where nothing is: Kafka looks at rights first, and only a reader is told that it has none."""
    request = FetchRequest(0, 0, 1, 0, [(topic, [(0, _BEYOND, 1)]) for topic in topics])
    response = await client.send(client.get_random_node(), request)
    for name, partitions in response.topics:
        for _, error_code, *_ in partitions:
            error = errors.for_code(error_code)
            if error is errors.TopicAuthorizationFailedError:
                raise error(name)


async def _create(client: Any, policy: Policy, missing: Collection[str], *, within: float) -> None:
    replicas = policy.replicas(len(client.cluster.brokers()))
    requests: list[Any] = [
        (name, policy.partitions_of(name), replicas, [], [*policy.configs(name, replicas).items()]) for name in missing
    ]
    controller = client.cluster.controller
    node = client.get_random_node() if controller is None else controller.nodeId
    request = CreateTopicsRequest(requests, timeout=round(within * 1000), validate_only=False)
    response = await client.send(node, request)
    for name, error_code, message in response.topic_errors:
        if error_code not in (0, _ALREADY_THERE):
            error = errors.for_code(error_code)
            if error.retriable:
                raise error(message)
            raise MessageRejected(f"the topic {name} cannot be created ({error.__name__}: {message})")


def _command(cluster: Cluster, policy: Policy, name: str, replicas: int) -> str:
    configs = "".join(f" --config {key}={value}" for key, value in policy.configs(name, replicas).items())
    return (
        f"kafka-topics.sh --bootstrap-server {cluster.servers[0]} --create --topic {name} "
        f"--partitions {policy.partitions_of(name)} --replication-factor {replicas}{configs}"
    )


# -- errors ------------------------------------------------------------------------------------------------------

_BROKEN_PRODUCER = (
    errors.ProducerFenced,
    errors.OutOfOrderSequenceNumber,
    errors.InvalidProducerEpoch,
    errors.UnknownProducerId,
    errors.UnknownError,
)


def verdict(error: BaseException, message_id: UUID | None, *, handed_over: bool) -> BrokerError:
    """Translate an error of the client, its cause. *handed_over*: whether the message may have left by then."""
    if isinstance(error, BrokerError):
        return own_verdict(error, message_id)
    told = _translated(error, message_id, handed_over=handed_over)
    told.__cause__ = error
    return told


def _translated(error: BaseException, message_id: UUID | None, *, handed_over: bool) -> BrokerError:
    problem = f"{type(error).__name__}: {error}"
    if isinstance(error, TOO_LARGE):
        remedy = "raise max.message.bytes of its topic, or send less"
        return MessageRejected(f"Kafka refused it as too large ({problem}); {remedy}", message_id=message_id)
    if refused(error):
        return MessageRejected(f"Kafka refused it ({problem})", message_id=message_id)
    if not handed_over:
        return BrokerUnavailable(f"Kafka is not available ({problem})", message_id=message_id)
    return OutcomeUnknown(f"Kafka did not confirm it ({problem}); it may have arrived", message_id=message_id)


def refused(error: BaseException) -> bool:
    """Whether Kafka has answered, and would answer the same again."""
    if isinstance(error, NO_RIGHT):
        return True
    return (
        isinstance(error, errors.BrokerResponseError)
        and not error.retriable
        and not isinstance(error, _BROKEN_PRODUCER)
    )


# -- ends that do not hang, and forget nothing ---------------------------------------------------------------------

_LEAVING_THE_START = 0.5


async def started(starting: Coroutine[Any, Any, None]) -> None:
    """
    Await *starting*, which connects a client. Whoever is cancelled meanwhile lets it end, for half a second at most.

    aiokafka forgets a connection on which it asks about the cluster while it is cancelled: nobody could close it.
    """
    start = asyncio.create_task(starting)
    try:
        await asyncio.shield(start)
    finally:
        if not start.done():
            await asyncio.wait({start}, timeout=_LEAVING_THE_START)
        await end_tasks([start])


async def close_client(client: Any) -> None:
    """
    Close the connections of a client of aiokafka, whether or not anybody is at the other end.

    Its own way waits for what was written to be taken. What was worth waiting for was waited for before.
    """
    for connection in [*client._conns.values()]:  # noqa: SLF001  # there is no other way to them
        writer = getattr(connection, "_writer", None)
        if writer is not None:
            writer.transport.abort()
    try:
        async with asyncio.timeout(1):
            await client.close()
    except CLIENT_ERRORS as error:
        logger.debug("closing connections to Kafka failed: %r", error)


async def end_tasks(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    """Cancel *tasks* until they have ended: those of aiokafka wait, once cancelled, for others that may never end."""
    given = {task for task in tasks if task is not None}
    running = {task for task in given if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.05)
    for task in given:
        if not task.cancelled():
            task.exception()  # it has been seen
