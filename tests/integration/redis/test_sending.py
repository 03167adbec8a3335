"""Messages through a real Redis: content, receipts, order, pipelining and bounds."""

import asyncio
import json
import math
import socket
from contextlib import aclosing
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker
from diator.events import NotificationEvent
from diator.exceptions import (
    BrokerUnavailable,
    EventsNotSent,
    MessagesNotSent,
    MessageTooLarge,
    MessageUnroutable,
    OutcomeUnknown,
)
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from diator.testing.fault_proxy import FaultProxy, Flow
from tests.integration.redis.helpers import SLACK, Ears, connections, listening, message, promised, send_all


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The data of each socket write that contains PUBLISH."""
    written: list[bytes] = []
    send = socket.socket.send

    def note(self: socket.socket, data: bytes, *flags: int) -> int:
        if b"PUBLISH" in bytes(data):
            written.append(bytes(data))
        return send(self, data, *flags)

    monkeypatch.setattr(socket.socket, "send", note)
    return written


async def test_channel_and_body(broker: RedisMessageBroker, ears: Ears, prefix: str) -> None:
    """The channel names the event; the body is one JSON object with four keys."""
    sent = Message.create(message_name="user_joined", payload={"user_id": 7, "name": "Zoë"})

    await broker.send_message(sent)

    body = (
        f'{{"message_type":"notification_event","message_name":"user_joined","message_id":"{sent.message_id}",'
        '"payload":{"user_id":7,"name":"Zoë"}}'
    )
    assert await ears.heard() == [(f"{prefix}:notification_event:user_joined", body.encode())]


async def test_the_default_prefix(redis_url: str) -> None:
    name = f"test-{uuid4()}"
    async with (
        RedisMessageBroker.from_url(redis_url) as broker,
        Redis.from_url(redis_url) as client,
        client.pubsub() as pubsub,
    ):
        await pubsub.subscribe(f"python_diator_channel:ecst_event:{name}")
        await pubsub.get_message(timeout=5)

        await broker.send_message(Message.create(message_type="ecst_event", message_name=name, payload={}))

        assert await pubsub.get_message(timeout=5)


async def test_headers_and_key_travel_in_the_body(broker: RedisMessageBroker, ears: Ears) -> None:
    """Pub/Sub has no headers of its own, so they are a fifth key, and the key of the message is one of them."""
    await broker.send_message(message(1, key="meeting-7", headers={"traceparent": "00-ab-cd-01"}))

    ((_, body),) = await ears.heard()
    assert list(json.loads(body)) == ["message_type", "message_name", "message_id", "payload", "headers"]
    assert json.loads(body)["headers"] == {"traceparent": "00-ab-cd-01", "key": "meeting-7"}


async def test_a_message_that_is_too_large_is_not_sent(redis_url: str, prefix: str, ears: Ears) -> None:
    """The limit counts the whole body; a body of exactly that length is allowed."""
    async with RedisMessageBroker.from_url(redis_url, prefix) as unlimited:
        await unlimited.send_message(message(1))
    size = len((await ears.heard())[0][1])
    async with RedisMessageBroker.from_url(redis_url, prefix, max_message_bytes=size) as broker:
        with pytest.raises(MessageTooLarge) as raised:
            await broker.send_message(message(22))
        await broker.send_message(message(3))

    assert (raised.value.size, raised.value.limit) == (size + 1, size)
    assert await ears.numbers() == [3]


async def test_messages_of_one_task_keep_their_order(broker: RedisMessageBroker, ears: Ears) -> None:
    for n in range(200):
        await broker.send_message(message(n))

    assert await ears.numbers() == list(range(200))


async def test_every_task_gets_its_own_receipts(broker: RedisMessageBroker, ears: Ears) -> None:
    """With fifty tasks each send gets its own reply, each message arrives once, and each task's order is kept."""

    async def work(worker: int) -> list[int]:
        receipts = []
        for n in range(20):
            heard = message(worker * 100 + n)
            unheard = message(message_type="unheard_event")
            receipts.append(await broker.publish(heard if n % 2 else unheard))
        return receipts

    receipts = await asyncio.gather(*map(work, range(50)))

    assert receipts == [[0, 1] * 10] * 50
    numbers = await ears.numbers()
    assert sorted(numbers) == [worker * 100 + n for worker in range(50) for n in range(1, 20, 2)]
    by_worker = [[n for n in numbers if n // 100 == worker] for worker in range(50)]
    assert all(own == sorted(own) for own in by_worker)


async def test_the_number_of_receivers(broker: RedisMessageBroker, redis_url: str, prefix: str) -> None:
    receivers = [await broker.publish(message())]
    async with listening(redis_url, prefix):
        receivers += [await broker.publish(message())]
        async with listening(redis_url, prefix):
            receivers += [await broker.publish(message())]

    assert receivers == [0, 1, 2]


async def test_a_receiver_can_be_required(redis_url: str, prefix: str) -> None:
    sent = message()
    async with RedisMessageBroker.from_url(redis_url, prefix, require_receiver=True) as broker:
        with pytest.raises(MessageUnroutable) as raised:
            await broker.send_message(sent)
        async with listening(redis_url, prefix):
            await broker.send_message(message())

    assert raised.value.message_id == sent.message_id


async def test_several_messages_go_out_in_their_order(broker: RedisMessageBroker, ears: Ears) -> None:
    await broker.send_messages([message(n) for n in range(100)])

    assert await ears.numbers() == list(range(100))


@pytest.mark.parametrize("others", [0, 4])
@pytest.mark.parametrize("max_in_flight", [1, 3, 32])
async def test_several_messages_keep_their_order_where_there_is_no_room(
    redis_url: str, prefix: str, ears: Ears, max_in_flight: int, others: int
) -> None:
    """More messages than may be in flight: first while the connection is being opened, then with an open one."""

    async def send_others() -> None:
        for _ in range(100):
            await broker.send_message(message(1000))

    async with aclosing(RedisMessageBroker.from_url(redis_url, prefix, max_in_flight=max_in_flight)) as broker:
        for _ in range(2):
            batch = [message(n) for n in range(200)]
            await asyncio.gather(broker.send_messages(batch), *(send_others() for _ in range(others)))
            assert [n for n in await ears.numbers() if n < 1000] == list(range(200))


async def test_of_several_messages_those_not_confirmed_are_named(broker: RedisMessageBroker, ears: Ears) -> None:
    """The others are sent; the error names the unconfirmed ones, and its cause is the send error of the first."""
    large = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 2_000_000})
    larger = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 3_000_000})

    with pytest.raises(MessagesNotSent) as raised:
        await broker.send_messages([message(1), large, message(2), larger, message(3)])

    assert raised.value.message_ids == (large.message_id, larger.message_id)
    assert isinstance(raised.value.__cause__, MessageTooLarge)
    assert raised.value.__cause__.message_id == large.message_id
    assert await ears.numbers() == [1, 2, 3]


async def test_concurrent_callers_share_a_connection_and_its_writes(
    broker: RedisMessageBroker, ears: Ears, prefix: str, writes: list[bytes]
) -> None:
    async def work() -> None:
        for n in range(20):
            await broker.send_message(message(n))

    await asyncio.gather(*(work() for _ in range(50)))

    assert len(await ears.heard()) == 1000
    assert await connections(ears.client, prefix) == 1
    assert sum(written.count(b"PUBLISH") for written in writes if prefix.encode() in written) >= 1000
    assert len(writes) < 200


async def test_a_lone_message_is_not_delayed(broker: RedisMessageBroker, writes: list[bytes]) -> None:
    """It is written in the iteration of the event loop in which it is sent."""
    broker._service._ask_role_at = math.inf  # with no other command before it
    for _ in range(3):
        send = asyncio.create_task(broker.send_message(message()))
        await asyncio.sleep(0)
        written = len(writes)
        writes.clear()
        await send
        assert written == 1


async def test_messages_in_flight_are_bounded(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """While Redis does not respond, at most `max_in_flight` messages reach it; the others are sent afterwards."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=4) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        sends = asyncio.gather(*(broker.send_message(message(n)) for n in range(20)))
        await asyncio.sleep(0.2)
        reached = await ears.numbers()
        await proxy.heal()
        await sends

    assert reached == [0, 1, 2, 3]
    assert await ears.numbers() == list(range(4, 20))


async def test_bytes_in_flight_are_bounded(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """About 4 MiB, however many messages are allowed."""
    async with RedisMessageBroker.from_url(proxied_url, prefix) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        large = [
            Message.create(message_name="user_joined", payload={"n": n, "text": "x" * 1_000_000}) for n in range(12)
        ]
        sends = asyncio.gather(*map(broker.send_message, large))
        reached: list[int] = []
        async with asyncio.timeout(SLACK):
            while len(reached) < 5:
                reached += await ears.numbers()
        await asyncio.sleep(0.1)
        reached += await ears.numbers()
        await proxy.heal()
        await sends

    assert reached == [0, 1, 2, 3, 4]
    assert await ears.numbers() == list(range(5, 12))


async def test_waiting_for_room_counts_for_the_timeout(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    """A call ends within one timeout, including the wait for a slot, for a connection and for the reply."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, timeout=3, max_in_flight=1) as broker:

        async def send_and_withhold() -> None:
            await broker.send_message(message(1))
            proxy.withhold(Flow.TO_CLIENT)

        proxy.withhold(Flow.TO_CLIENT)
        first = asyncio.create_task(send_and_withhold())
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            second = asyncio.create_task(send_all(broker, 2))
            await asyncio.sleep(2.4)
            await proxy.heal()
            assert await second == {OutcomeUnknown: 1}

        await first
        assert await ears.numbers() == [1, 2]


async def test_connecting_counts_for_the_timeout(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    async def connect_slowly(connection: AbstractConnection) -> None:
        await connection.on_connect()
        await asyncio.sleep(2.4)
        proxy.withhold(Flow.TO_CLIENT)

    async with Redis.from_url(proxied_url, redis_connect_func=connect_slowly) as client:
        broker = RedisMessageBroker(client, prefix, timeout=3)

        async with asyncio.timeout(5):
            assert await send_all(broker, 1) == {OutcomeUnknown: 1}

        await broker.aclose()


@pytest.mark.parametrize("count", [1, 3])
async def test_a_request_is_done_even_if_redis_is_away(
    proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears, count: int
) -> None:
    """The error has the response and the events; resent, they are the same messages."""

    class UserJoined(NotificationEvent):
        pass

    class JoinMeeting(Request[str]):
        pass

    class JoinMeetingHandler(RequestHandler[JoinMeeting, str]):
        async def handle(self, request: JoinMeeting) -> str:
            self.events.extend(UserJoined() for _ in range(count))
            return "joined"

    request_map = RequestMap()
    request_map.bind(JoinMeeting, JoinMeetingHandler)
    mediator = Mediator(request_map, message_broker=proxied)
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(0.05)

    async with promised():
        with pytest.raises(EventsNotSent) as raised:
            await mediator.send(JoinMeeting())

    assert raised.value.response == "joined"
    assert [type(event) for event in raised.value.events] == [UserJoined] * count
    assert isinstance(raised.value.__cause__, BrokerUnavailable)
    assert await ears.heard() == []

    await proxy.heal()
    assert await mediator.send(JoinMeeting()) == "joined"
    assert len(await ears.heard()) == count
