"""The documentation lists the permissions of each role. They are enough, and each of them is needed."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker, _subscription
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import AccessRefused
from tests.integration.redis.helpers import listening, message, send_all
from tests.records import fields
from tests.services import Service

PAGE = Path(__file__).parents[3] / "docs" / "brokers.md"
JOINED = Topic("notification_event", "user_joined")
STREAM = "app:notification_event:user_joined"


def rules_of(role: str) -> list[str]:
    """Return the rules that the documentation lists for *role*, with the prefix `app`."""
    [rules] = re.findall(rf"^{role} +(.*)$", PAGE.read_text(), re.MULTILINE)
    return rules.replace("<prefix>", "app").split()


@pytest.fixture
async def admin(private_redis: Service) -> AsyncIterator[Redis]:
    async with Redis.from_url(private_redis.url, protocol=2) as admin:
        yield admin


async def url_of(admin: Redis, private_redis: Service, role: str) -> str:
    """Make a user with the documented rules and no others, and forget which commands were called before."""
    await admin.execute_command("ACL", "SETUSER", role, "reset", "on", ">pw", *rules_of(role))
    await admin.acl_log_reset()
    await admin.config_resetstat()
    return private_redis.url.replace("//", f"//{role}:pw@")


async def check(admin: Redis, role: str) -> None:
    """Nothing was denied, and every permitted command was called."""
    called = {name.removeprefix("cmdstat_") for name in await admin.info("commandstats")}
    permitted = {rule[1:] for rule in rules_of(role) if rule.startswith("+")}
    assert {denied["object"] for denied in await admin.acl_log()} <= {"client|setinfo"}  # redis-py tries that
    assert permitted - called == set()


async def test_a_sender_on_pubsub(admin: Redis, private_redis: Service) -> None:
    url = await url_of(admin, private_redis, "pubsub-sender")
    async with listening(private_redis.url, "app") as ears, RedisMessageBroker(url, "app") as broker:
        assert await send_all(broker, 1, 2) == {None: 2}
        assert await ears.numbers() == [1, 2]
    await check(admin, "pubsub-sender")


async def test_a_receiver_on_pubsub(admin: Redis, private_redis: Service) -> None:
    url = await url_of(admin, private_redis, "pubsub-receiver")
    async with (
        RedisMessageBroker(url, "app") as broker,
        RedisMessageBroker(private_redis.url, "app") as sender,
        broker.subscribe([JOINED]) as deliveries,
        asyncio.timeout(30),
    ):
        for n in range(2):
            await sender.send_message(message(n))
            await (await anext(deliveries)).ack()
        [subscription] = broker._service.subscriptions
        async with subscription.connect() as connection:
            await connection.probe()
            await connection.receive(1)
    await check(admin, "pubsub-receiver")


async def test_a_sender_on_streams(admin: Redis, private_redis: Service) -> None:
    url = await url_of(admin, private_redis, "streams-sender")
    async with RedisStreamMessageBroker(url, "app") as broker:
        assert await send_all(broker, 1, 2) == {None: 2}
    await check(admin, "streams-sender")


async def test_a_consumer_on_streams(admin: Redis, private_redis: Service) -> None:
    """It takes over messages, requeues, dead-letters, renews leases, and leaves unsettled ones to others."""
    url = await url_of(admin, private_redis, "streams-consumer")
    async with RedisStreamMessageBroker(private_redis.url, "app") as sender:
        assert await send_all(sender, *range(4)) == {None: 4}
    await admin.xgroup_create(STREAM, "g", "0")
    await admin.xreadgroup("g", "dead", {STREAM: ">"}, count=1)
    async with (
        RedisStreamMessageBroker(url, "app", lease=0.6) as broker,
        broker.subscribe([JOINED], group="g") as deliveries,
        asyncio.timeout(30),
    ):
        held = [await anext(deliveries) for _ in range(4)]
        await held[0].ack()
        await held[1].retry(after=0.1)
        await held[2].dead_letter("bad")
        await (await anext(deliveries)).retry()
        await (await anext(deliveries)).ack()
        await asyncio.sleep(0.3)  # a renewal
    await check(admin, "streams-consumer")
    assert await admin.xlen(f"{STREAM}:g:dead") == 1
    assert (await admin.xpending(STREAM, "g"))["pending"] == 1


async def test_a_consumer_without_one_of_them_is_refused_at_once(admin: Redis, private_redis: Service) -> None:
    url = await url_of(admin, private_redis, "streams-consumer")
    await admin.execute_command("ACL", "SETUSER", "streams-consumer", "-xinfo")  # which only a script uses at first
    async with RedisStreamMessageBroker(url, "app") as broker:
        with pytest.raises(AccessRefused, match=r"'xinfo\|stream'.*; permit it to this user with ACL SETUSER"):
            await broker.subscribe([JOINED], group="g").__aenter__()


async def test_a_consumer_that_may_not_trim_does_not_fill_the_log(
    admin: Redis, private_redis: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_subscription, "SCAN_EVERY", 0.05)
    url = await url_of(admin, private_redis, "streams-consumer")
    async with (
        RedisStreamMessageBroker(url, "app", retention=60.0) as broker,
        broker.subscribe([JOINED], group="g") as deliveries,
    ):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(deliveries), 2.0)
        lines = [line for line in caplog.messages if "trim" in line]
        assert len(lines) == 5
        assert lines[0].startswith(f"{STREAM} could not be trimmed: Redis refuses a command (")
        [record, *_] = [each for each in caplog.records if each.getMessage() == lines[0]]
        of_all = {"broker": "RedisStreamMessageBroker", "group": "g", "message_names": [JOINED.message_name]}
        assert fields(record) == {**of_all, "source": STREAM, "error_type": "AccessRefused"}
