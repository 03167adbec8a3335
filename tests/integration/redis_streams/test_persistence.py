"""The broker and the audit ask the Redis server whether it persists messages."""

import asyncio
import re
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from diator.brokers import Message
from diator.brokers.audit import audit
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import BrokerUnavailable, UnsupportedCapability

STORED = Capabilities(durability="crash")


@pytest.fixture
async def server(private_redis):
    """A private Redis that the test may configure; it starts with `appendonly yes` and without snapshots."""
    async with Redis.from_url(private_redis.url, protocol=2) as client:
        yield client


@pytest.fixture
def url(private_redis):
    return private_redis.url


def message():
    return Message.create(message_name="Counted", payload={})


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, "crash"),
        ({"appendonly": "no"}, "none"),
        ({"appendonly": "no", "save": "60 1"}, "restart"),
    ],
)
@pytest.mark.parametrize("promised", ["none", "restart", "crash"])
async def test_a_promise_that_the_server_does_not_keep_is_refused(server, url, settings, kept, promised):
    for name, value in settings.items():
        await server.config_set(name, value)
    levels = ["none", "restart", "crash"]
    refused = levels.index(promised) > levels.index(kept)
    broker = RedisStreamMessageBroker.from_url(url, durability=promised)
    try:
        if not refused:
            await broker.send_message(message())
            assert broker.capabilities.durability == promised
            return
        with pytest.raises(
            UnsupportedCapability, match=rf"durability \({kept}, needed is {promised}\).*appendonly yes"
        ):
            await broker.send_message(message())
        with pytest.raises(UnsupportedCapability):
            async with broker.subscribe([Topic("notification_event", "Counted")], group="billing"):
                pass
        with pytest.raises(UnsupportedCapability):
            await broker.__aenter__()
        assert not await server.keys("*")
    finally:
        await broker.aclose()


async def test_a_promise_holds(url, private_redis):
    """Confirmed messages survive the death of the process."""
    async with RedisStreamMessageBroker.from_url(url, durability="crash") as broker:
        sent = [message() for _ in range(100)]
        await broker.send_messages(sent)
    await asyncio.to_thread(private_redis.kill)
    await asyncio.to_thread(private_redis.start)

    async with (
        RedisStreamMessageBroker.from_url(url, durability="crash") as broker,
        broker.subscribe([Topic("notification_event", "Counted")], group="billing", prefetch=100) as deliveries,
    ):
        came = [await anext(deliveries) for _ in range(100)]

    assert len(came) == len({delivery.body for delivery in came}) == len(sent)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"appendonly": "no"}, "durability: appendonly is no.*set appendonly yes"),
        ({"appendfsync": "no"}, "durability: appendfsync is no.*everysec or always"),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "guarantee: .*evicts whole streams.*noeviction"),
    ],
)
async def test_the_audit_finds_a_setting_that_loses_messages(server, url, settings, found):
    for name, value in settings.items():
        await server.config_set(name, value)
    async with RedisStreamMessageBroker.from_url(url) as broker:
        [finding] = await audit(broker)

    assert re.match(found, str(finding))


async def test_a_server_that_is_set_well_has_no_findings(url):
    async with RedisStreamMessageBroker.from_url(url) as broker:
        assert await audit(broker, requires=STORED) == []


async def test_missing_permission_is_a_finding(server, url):
    """Managed services do not allow CONFIG GET."""
    await server.acl_setuser("app", enabled=True, passwords=["+secret"], keys="*", commands=["+@all", "-config"])
    async with RedisStreamMessageBroker.from_url(url.replace("//", "//app:secret@")) as broker:
        [finding] = await audit(broker, requires=STORED)

    assert "CONFIG GET is not permitted" in finding.problem


async def test_followers_that_need_not_have_a_message_are_a_finding(url):
    """A failover promotes one of them."""
    address = urlsplit(url)
    _, follower = await asyncio.open_connection(address.hostname, address.port)
    follower.write(b"PSYNC ? -1\r\n")
    async with RedisStreamMessageBroker.from_url(url) as broker:
        while not (problems := [finding.problem for finding in await audit(broker)]):  # noqa: ASYNC110  # only an audit shows it
            await asyncio.sleep(0.01)
    follower.close()
    await follower.wait_closed()

    problem = "no replica must have a message before it is confirmed: a failover may lose confirmed messages"
    assert problems == [problem]


async def test_a_temporary_refusal_may_be_resent(server, url):
    """While the replicas that the audit recommends are away, Redis refuses every write."""
    async with RedisStreamMessageBroker.from_url(url) as broker:
        await server.config_set("min-replicas-to-write", "1")
        with pytest.raises(BrokerUnavailable, match="NOREPLICAS"):
            await broker.send_message(message())
        await server.config_set("min-replicas-to-write", "0")
        await broker.send_message(message())
