"""Messages in a stream: their fields, their content, and that none is appended twice."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from diator.brokers.codec import decode
from diator.exceptions import OutcomeUnknown
from diator.testing.fault_proxy import Flow
from tests.integration.redis_streams.helpers import (
    COUNTED,
    SLACK,
    TIMEOUT,
    dead_letters,
    eventually,
    message,
    nothing_left,
    number_of,
    send,
    subscribed,
    take,
)


async def test_headers_and_key_are_fields(broker, admin, stream) -> None:
    headers = {"traceparent": "00-ab-cd-01", "name": "Zoë"}
    await broker.send_message(sent := message(1, key="meeting-7", headers=headers))

    [(_, fields)] = await admin.xrange(stream)
    assert json.loads(fields.pop(b"body")).keys() == {"message_type", "message_name", "message_id", "payload"}
    assert fields == {b"traceparent": b"00-ab-cd-01", b"name": "Zoë".encode(), b"key": b"meeting-7"}
    async with subscribed(broker) as deliveries:
        [delivery] = await take(deliveries, 1)
        assert decode(delivery.body, headers=delivery.headers) == sent


@pytest.mark.parametrize("name", ["body", "again", "message_id", "", "diator-dlq-reason"])
async def test_a_header_of_any_name(broker, name) -> None:
    """A program may choose any header names; they never replace a field of the message."""
    await broker.send_message(sent := message(1, headers={name: "said"}))

    async with subscribed(broker) as deliveries:
        [delivery] = await take(deliveries, 1)
        assert decode(delivery.body, headers=delivery.headers) == sent


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": 2},
        {"protocol": 3},
        {"protocol": 2, "legacy_responses": False},
        {"protocol": 3, "legacy_responses": False},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True},
        {"health_check_interval": 0.05, "socket_timeout": 0.3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick")
async def test_replies_have_another_shape_for_each_client(*, make, redis_url, admin, stream, options) -> None:
    """Reading, settling, claiming and trimming work with the program's own client."""
    await check_all_replies(make, Redis.from_url(redis_url, **options), admin, stream)


class Traced(Redis):
    """A client with an `execute_command` of its own, which the broker must not bypass."""

    async def execute_command(self, *args, **options):
        return await super().execute_command(*args, **options)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.usefixtures("quick")
async def test_a_client_with_commands_of_its_own_parses_no_reply(*, make, redis_url, admin, stream, protocol) -> None:
    await check_all_replies(make, Traced.from_url(redis_url, protocol=protocol), admin, stream)


async def check_all_replies(make, client, admin, stream) -> None:
    """Read, settle, claim and trim with *client*, and close it."""
    async with client, AsyncExitStack() as stack:
        broker = await make(client, retention=0.0)
        for number in (1, 2, 3):  # one by one: `Traced` sends concurrent messages on several connections
            await send(broker, number)
        await admin.xgroup_create(stream, "billing", "0")
        await admin.xreadgroup("billing", "gone", {stream: ">"}, count=1)
        deliveries = await stack.enter_async_context(subscribed(broker))

        two, three, one = await take(deliveries, 3)
        assert [(number_of(each), each.attempt) for each in (one, two, three)] == [(1, 2), (2, 1), (3, 1)]
        await one.dead_letter("bad")
        await two.retry(after=0.01)
        await three.ack()
        [two] = await take(deliveries, 1)
        assert (number_of(two), two.attempt, two.topic) == (2, 2, COUNTED)
        await two.ack()

        async def trimmed() -> bool:
            return await admin.xlen(stream) <= 1

        await nothing_left(admin, stream)
        await eventually(trimmed)
        assert len(await dead_letters(admin, stream)) == 1
        await stack.aclose()
        await broker.aclose()


@pytest.mark.parametrize("own_client", [False, True])
async def test_an_entry_is_not_appended_twice(*, make, proxy, proxied_url, admin, stream, own_client) -> None:
    """The reply is lost, and the caller gets OutcomeUnknown even if the client would retry."""
    retry = Retry(ConstantBackoff(0.01), 5)
    async with Redis.from_url(proxied_url, socket_timeout=0.2, retry=retry) as client:
        broker = await make(client if own_client else proxied_url)
        proxy.withhold(Flow.TO_CLIENT)
        async with asyncio.timeout(TIMEOUT + SLACK):
            with pytest.raises(OutcomeUnknown) as raised:
                await broker.send_message(sent := message(1))
        await proxy.heal()

        assert raised.value.message_id == sent.message_id
        assert await admin.xlen(stream) == 1
        await broker.aclose()
