"""Which settings of a Kafka cluster weaken a promise of the transport. The audit only reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from aiokafka.admin.config_resource import ConfigResourceType
from aiokafka.protocol.metadata import MetadataRequest

from diator._text import counted, listed
from diator.brokers.audit import Finding
from diator.brokers.kafka._client import Cluster, close_client, started
from diator.brokers.kafka._names import DEAD, is_of_group, possible_sources
from diator.brokers.kafka._offsets import MAX_COMMIT_METADATA
from diator.brokers.kafka._topics import HEADERS_BYTES, TopicPolicy, described

_DAY_MS = 24 * 60 * 60 * 1000
_WEEK_MINUTES = 7 * 24 * 60
_REPLICAS = 3
#: Stands for the topic in a remedy until it is known how many topics have the same problem.
_TOPIC = "…"


async def inspect(cluster: Cluster, policy: TopicPolicy, prefix: str) -> list[Finding]:
    """Return the findings about the cluster, one of its brokers, and every topic of *prefix*."""
    client = cluster.client()
    try:
        await started(client.bootstrap())
        node = client.get_random_node()
        response = await client.send(node, MetadataRequest(None, allow_auto_topic_creation=False))
        replicas = {
            name: min((len(partition[3]) for partition in partitions), default=0)
            for error_code, name, _, partitions in response.topics
            if not error_code and name.startswith(f"{prefix}.")
        }
        brokers = [broker[0] for broker in response.brokers]
        found = [*_cluster_findings(len(brokers), policy)]
        if brokers:
            found += _broker_findings(
                await described(client, ConfigResourceType.BROKER, [str(brokers[0])], node=brokers[0])
            )
        settings_of = await described(client, ConfigResourceType.TOPIC, [*replicas], node=node)
        topics: dict[Finding, list[str]] = {}
        for name, settings in sorted(settings_of.items()):
            findings = [*_topic_findings(name, replicas[name], settings, policy), *_limit_findings(name, settings_of)]
            for finding in findings:
                topics.setdefault(finding, []).append(name)
        return [*found, *(_with_topics(finding, names) for finding, names in topics.items())]
    finally:
        await close_client(client)


def _cluster_findings(brokers: int, policy: TopicPolicy) -> Iterator[Finding]:
    if policy.create and policy.replicas(brokers) < _REPLICAS:
        yield Finding(
            capability="durability",
            problem=f"topics are created with {counted(policy.replicas(brokers), 'replica')}; the cluster has "
            f"{counted(brokers, 'broker')}",
            remedy="run at least three brokers and set replication_factor=3",
        )


def _broker_findings(found: Mapping[str, Mapping[str, str] | str]) -> Iterator[Finding]:
    for name, settings in found.items():
        if isinstance(settings, str):
            yield _hidden(f"broker {name}", settings, "DescribeConfigs on the cluster")
            continue
        if int(settings.get("offsets.retention.minutes", _WEEK_MINUTES)) < _WEEK_MINUTES:
            yield Finding(
                capability="subscription",
                problem=f"offsets.retention.minutes is {settings['offsets.retention.minutes']}: a group that has no "
                "consumers for that long loses its offsets, and receives every message again",
                remedy=f"set it to at least {_WEEK_MINUTES} (a week), and above the longest downtime of any group",
            )
        if int(settings.get("offset.metadata.max.bytes", MAX_COMMIT_METADATA)) < MAX_COMMIT_METADATA:
            yield Finding(
                capability="delivery_count",
                problem=f"offset.metadata.max.bytes is {settings['offset.metadata.max.bytes']}: commits have no room "
                "for their metadata, so messages above the committed offset are redelivered after a rebalance, and "
                "their attempts are counted from 1 again",
                remedy=f"set it to at least {MAX_COMMIT_METADATA}, which is its default",
            )
        if settings.get("auto.create.topics.enable") == "true":
            yield Finding(
                capability="durability",
                problem="auto.create.topics.enable is true: Kafka creates a deleted topic again by itself, with one "
                "replica unless default.replication.factor is higher",
                remedy="set it to false",
            )


def _topic_findings(
    name: str, replicas: int, settings: Mapping[str, str] | str, policy: TopicPolicy
) -> Iterator[Finding]:
    """Yield the findings about one topic, without its name: many topics have the same findings."""
    if replicas < _REPLICAS:
        yield Finding(
            capability="durability",
            problem=f"replicas: {replicas}; messages are lost when the disks of that many brokers are lost",
            remedy=f"reassign the partitions of {_TOPIC} to three brokers (kafka-reassign-partitions.sh)",
        )
    if isinstance(settings, str):
        yield _hidden("these topics", settings, f"DescribeConfigs on the topic {_TOPIC}")
        return
    set_to = f"kafka-configs.sh --alter --topic {_TOPIC} --add-config"
    if int(settings.get("min.insync.replicas", 1)) < 2:  # noqa: PLR2004  # a second copy makes a message safe
        yield Finding(
            capability="receipt",
            problem="min.insync.replicas is below 2: a message is confirmed when only one replica has stored it",
            remedy=f"{set_to} min.insync.replicas=2",
        )
    if settings.get("unclean.leader.election.enable") == "true":
        yield Finding(
            capability="durability",
            problem="unclean.leader.election.enable is true: a replica that lacks confirmed messages may take over",
            remedy=f"{set_to} unclean.leader.election.enable=false",
        )
    if "compact" in settings.get("cleanup.policy", ""):
        yield Finding(
            capability="guarantee",
            problem="cleanup.policy is compact: Kafka removes all messages of a key but the last, read or not",
            remedy=f"{set_to} cleanup.policy=delete",
        )
    yield from _retention_findings(name, settings, set_to)
    if (most := int(settings.get("max.message.bytes", 0))) < policy.max_message_bytes:
        yield Finding(
            capability="max_message_bytes",
            problem=f"max.message.bytes is {most:,}, below max_message_bytes={policy.max_message_bytes:,}",
            remedy=f"{set_to} max.message.bytes={policy.max_message_bytes + HEADERS_BYTES}",
        )


def _limit_findings(name: str, settings_of: Mapping[str, Mapping[str, str] | str]) -> Iterator[Finding]:
    """Yield a finding if *name* is a group's own topic and accepts less than the topic beside it."""
    known = [settings for each in (name, *possible_sources(name)) if (settings := settings_of.get(each))]
    limits = [int(settings["max.message.bytes"]) for settings in known if not isinstance(settings, str)]
    if is_of_group(name) and len(limits) > 1 and limits[0] < max(limits):
        yield Finding(
            capability="dead_letter",
            problem=f"max.message.bytes is {limits[0]:,}, and {max(limits):,} for the topic beside it: a larger "
            "message cannot be requeued, and is dead-lettered without its body",
            remedy=f"kafka-configs.sh --alter --topic {_TOPIC} --add-config max.message.bytes={max(limits)}",
        )


def _retention_findings(name: str, settings: Mapping[str, str], set_to: str) -> Iterator[Finding]:
    kept_ms, kept_bytes = int(settings.get("retention.ms", -1)), int(settings.get("retention.bytes", -1))
    if name.endswith(DEAD):
        if kept_ms >= 0 or kept_bytes >= 0:
            yield Finding(
                capability="dead_letter",
                problem="retention removes dead letters, whether or not anybody has read them",
                remedy=f"{set_to} retention.ms=-1,retention.bytes=-1",
            )
        return
    if 0 <= kept_ms < _DAY_MS:
        yield Finding(
            capability="subscription",
            problem=f"messages are kept for {kept_ms / 1000:g} s: a group without consumers for longer misses messages",
            remedy=f"{set_to} retention.ms={7 * _DAY_MS}",
        )
    if kept_bytes >= 0:
        yield Finding(
            capability="subscription",
            problem=f"{kept_bytes:,} bytes of a partition are kept: a burst removes messages that were not read yet",
            remedy=f"{set_to} retention.bytes=-1",
        )


def _with_topics(finding: Finding, names: Sequence[str]) -> Finding:
    """Return one finding for all topics that have the same problem, so that the list stays short."""
    remedy = finding.remedy.replace(_TOPIC, names[0]) if len(names) == 1 else f"for each: {finding.remedy}"
    return replace(finding, problem=f"{listed(names)}: {finding.problem}", remedy=remedy)


def _hidden(what: str, why: str, right: str) -> Finding:
    return Finding(
        capability="durability",
        problem=f"this user may not read the settings of {what} ({why}), so they were not checked",
        remedy=f"grant it {right}",
    )
