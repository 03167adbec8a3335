"""Kafka topics: which must exist, and how a missing topic is created."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import errors
from aiokafka.admin.config_resource import ConfigResourceType
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.metadata import MetadataRequest

from diator.brokers.kafka._client import Cluster, close_client, started
from diator.brokers.kafka._fetched import has_codecs, require_codec
from diator.brokers.kafka._names import DEAD, RETRY, is_of_group, possible_sources
from diator.brokers.kafka._offsets import DELAYS
from diator.exceptions import MessageRejected


@dataclass(frozen=True, kw_only=True)
class TopicPolicy:
    """
    Whether missing topics are created, and how.

    Attributes:
        create: Whether missing topics are created.
        partitions: How many partitions a new topic gets.
        replication_factor: How many copies of each partition. None means as many as there are brokers, at most three.
        max_message_bytes: The largest body that a new topic must accept.
    """

    create: bool
    partitions: int
    replication_factor: int | None
    max_message_bytes: int

    def partitions_of(self, topic: str) -> int:
        """Return how many partitions *topic* gets. A retry topic has one for each delay bucket."""
        if topic.endswith(RETRY):
            return len(DELAYS) + 1
        return 1 if topic.endswith(DEAD) else self.partitions

    def replicas(self, brokers: int) -> int:
        """Return how many copies a partition gets in a cluster of so many *brokers*."""
        return self.replication_factor or max(1, min(3, brokers))

    def configs(self, topic: str, replicas: int) -> dict[str, str]:
        """
        Return the settings of a new *topic*.

        With three replicas, a confirmed message survives the loss of a broker. A dead-letter topic keeps its messages
        until somebody deletes them.
        """
        configs = {"min.insync.replicas": "2"} if replicas > 2 else {}  # noqa: PLR2004
        if self.max_message_bytes > MAX_KAFKA_BYTES or is_of_group(topic):
            largest = max(self.max_message_bytes, MAX_KAFKA_BYTES) + HEADERS_BYTES
            # A retry or a dead letter has further headers, and may be as large as Kafka allows by default.
            configs["max.message.bytes"] = str(largest + HEADERS_BYTES if is_of_group(topic) else largest)
        if topic.endswith(DEAD):
            configs["retention.ms"] = "-1"
        return configs


HEADERS_BYTES = 64 * 1024
"""How many bytes the headers and the key of a message may take, beside its body."""
MAX_HEADERS_BYTES = HEADERS_BYTES - 4 * 1024
"""How many of these a program may use. A dead letter needs the rest for its own headers."""
MAX_KAFKA_BYTES = 1024 * 1024 - HEADERS_BYTES
"""The largest body that fits into a message of Kafka's default size."""
_ALREADY_THERE = 36
_BAD_CONFIG = (40, 44)  # not valid, or against the policy of the cluster
_UNKNOWN_TOPIC = 3
_BEYOND = 2**63 - 1
"""An offset that no message has, for a read that finds nothing."""


async def ensure_topics(
    cluster: Cluster, policy: TopicPolicy, wanted: Collection[str], *, reading: Collection[str] = ()
) -> None:
    """
    Return when the *wanted* topics exist. Create the missing ones as *policy* says.

    After a creation, all partitions have leaders then. Nobody waits for a partition that has lost its leader, since the
    others can be used. This also checks that the topics of *reading* may be read.

    Raises:
        MessageRejected: A topic is missing, and *policy* forbids to create it, or Kafka refused. The text has the
            reason, or the command that creates the topic.
        ConfigurationError: A topic of *reading* is compressed in a way that this program cannot read.
        KafkaError: The cluster does not answer, or refuses access.
    """
    client = cluster.client()
    try:
        await started(client.bootstrap())
        await create_missing(client, cluster, policy, wanted, reading=reading)
    finally:
        await close_client(client)


async def create_missing(
    client: Any, cluster: Cluster, policy: TopicPolicy, wanted: Collection[str], *, reading: Collection[str] = ()
) -> None:
    """Do what `ensure_topics` does, by a *client* that is connected."""
    missing, leaderless = await _look_for(client, wanted)
    is_new = bool(missing)
    if missing and not policy.create:
        replicas = policy.replicas(len(client.cluster.brokers()))
        commands = "; ".join(_command(cluster, policy, name, replicas) for name in missing)
        raise MessageRejected(f"a topic is missing, and create_topics is off; create it with: {commands}")
    if missing:
        await client.force_metadata_update()  # there may be another controller by now
        await _create(client, policy, missing, within=cluster.timeout)
    while missing or (leaderless and is_new):
        await asyncio.sleep(0.02)
        missing, leaderless = await _look_for(client, wanted)
    if reading:
        await _try_to_read(client, reading)
        await _require_codecs(client, reading)


async def _look_for(client: Any, topics: Collection[str]) -> tuple[list[str], list[str]]:
    """Return which of *topics* are missing, and which have a partition without a leader. Create none."""
    # aiokafka's own request creates missing topics, where a broker has `auto.create.topics.enable`.
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
    """Read at an offset without messages. Kafka checks permissions first, and reports a missing one to readers only."""
    request = FetchRequest(0, 0, 1, 0, [(topic, [(0, _BEYOND, 1)]) for topic in topics])
    response = await client.send(client.get_random_node(), request)
    for name, partitions in response.topics:
        for _, error_code, *_ in partitions:
            error = errors.for_code(error_code)
            if error is errors.TopicAuthorizationFailedError:
                raise error(name)


async def _require_codecs(client: Any, topics: Collection[str]) -> None:
    if has_codecs():
        return
    for name, settings in (await described(client, ConfigResourceType.TOPIC, topics)).items():
        if not isinstance(settings, str):  # otherwise Kafka does not show them to this user
            require_codec(settings.get("compression.type", ""), f"the topic {name}")


async def described(
    client: Any, kind: ConfigResourceType, names: Collection[str], *, node: Any = None
) -> dict[str, Mapping[str, str] | str]:
    """Return the settings of each of *names*, or the name of the error that hides them."""
    if not names:
        return {}
    request = DescribeConfigsRequest(resources=[(int(kind), name, None) for name in names], include_synonyms=False)
    response = await client.send(client.get_random_node() if node is None else node, request)
    return {
        name: errors.for_code(error_code).__name__
        if error_code
        else {setting[0]: setting[1] or "" for setting in settings}
        for error_code, _, _, name, settings in response.resources
    }


async def _configs(
    client: Any, policy: TopicPolicy, names: Collection[str], replicas: int
) -> dict[str, dict[str, str]]:
    """Return the settings of each new topic. A group's own topic accepts what the topic beside it accepts."""
    sources = {name: possible_sources(name) for name in names if is_of_group(name)}
    known = await described(client, ConfigResourceType.TOPIC, {each for found in sources.values() for each in found})
    configs = {name: policy.configs(name, replicas) for name in names}
    for name, found in sources.items():
        for settings in (known.get(source) for source in found):
            if settings is None or isinstance(settings, str):
                continue  # there is none, or Kafka does not show its settings to this user
            largest = int(settings["max.message.bytes"]) + HEADERS_BYTES
            configs[name]["max.message.bytes"] = str(max(largest, int(configs[name]["max.message.bytes"])))
            configs[name]["compression.type"] = settings["compression.type"]
    return configs


async def _create(client: Any, policy: TopicPolicy, missing: Collection[str], *, within: float) -> None:
    replicas = policy.replicas(len(client.cluster.brokers()))
    configs = await _configs(client, policy, missing, replicas)
    refused = await _refused(client, policy, configs, replicas, within=within)
    limited = {name for name, (error_code, _) in refused.items() if error_code in _BAD_CONFIG and is_of_group(name)}
    if limited:  # the cluster, or Kafka itself, allows no topic with such large messages
        refused = {name: why for name, why in refused.items() if name not in limited}
        for name in limited:
            del configs[name]["max.message.bytes"]
        refused |= await _refused(client, policy, {name: configs[name] for name in limited}, replicas, within=within)
    for name, (error_code, message) in refused.items():
        error = errors.for_code(error_code)
        if error.retriable:
            raise error(message)
        raise MessageRejected(f"the topic {name} cannot be created ({error.__name__}: {message})")


async def _refused(
    client: Any, policy: TopicPolicy, configs: Mapping[str, Mapping[str, str]], replicas: int, *, within: float
) -> dict[str, tuple[int, str]]:
    """Create topics with these *configs*. Return the error code and the text for each that Kafka refuses."""
    requests: list[Any] = [
        (name, policy.partitions_of(name), replicas, [], [*settings.items()]) for name, settings in configs.items()
    ]
    controller = client.cluster.controller
    node = client.get_random_node() if controller is None else controller.nodeId
    # aiokafka's own `create_topics` raises nothing when Kafka refuses.
    request = CreateTopicsRequest(requests, timeout=round(within * 1000), validate_only=False)
    response = await client.send(node, request)
    return {
        name: (error_code, message)
        for name, error_code, message in response.topic_errors
        if error_code not in (0, _ALREADY_THERE)
    }


def _command(cluster: Cluster, policy: TopicPolicy, name: str, replicas: int) -> str:
    configs = "".join(f" --config {key}={value}" for key, value in policy.configs(name, replicas).items())
    return (
        f"kafka-topics.sh --bootstrap-server {cluster.bootstrap_servers[0]} --create --topic {name} "
        f"--partitions {policy.partitions_of(name)} --replication-factor {replicas}{configs}"
    )
