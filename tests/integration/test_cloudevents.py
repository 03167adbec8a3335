"""
CloudEvents on every transport, in both modes.

Programs with the official SDKs of Python and Node.js read what diator sends; diator consumes what they send.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar
from uuid import UUID, uuid4

import aio_pika
import aiokafka
import pytest
import redis.asyncio
from cloudevents.core.bindings import amqp
from cloudevents.core.bindings import kafka as like_kafka
from cloudevents.core.bindings import rabbitmq as like_rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from diator.brokers.base import Topic
from diator.brokers.cloudevents import CloudEvents
from diator.brokers.codec import encode, headers_with_key
from diator.brokers.message import Message
from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent
from diator.exceptions import ConfigurationError
from diator.retrying import PermanentError, RetryPolicy
from tests import peers
from tests.integration.transports import broker_for

pytestmark = pytest.mark.timeout(600)  # the first test installs the packages of Node.js

GROUP = "billing"
SOURCE = "https://shop.example/members"
TOPIC = Topic("notification_event", "UserJoined")
ID = UUID("9f62e977-8a1c-4b7e-a0d5-6c1f2f3b9e11")
AT = datetime(2026, 3, 7, 9, 26, 2, 588_000, tzinfo=UTC)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    message_key: ClassVar[str] = "user_id"
    user_id: int


EVENT = UserJoined(event_id=ID, event_timestamp=AT, user_id=7)


# -- where the messages of a transport are, for programs without diator -------------------------------------------


@dataclass(frozen=True)
class Transport:
    """A transport, and how a program with its client sends and receives there."""

    name: str
    address: str
    ours: str
    prefix: str

    @property
    def place(self) -> str:
        names = {"rabbitmq": f"{self.prefix}/{'.'.join(TOPIC)}", "kafka": f"{self.prefix}.{'.'.join(TOPIC)}"}
        return names.get(self.name, f"{self.prefix}:{':'.join(TOPIC)}")

    @property
    def dead(self) -> str:
        names = {"kafka": f"{self.place}.{GROUP}-dlq"}
        return names.get(self.name, f"{self.prefix}:{':'.join(TOPIC)}:{GROUP}:dead")

    @property
    def group(self) -> str | None:
        return None if self.name == "pubsub" else GROUP

    def broker(self):
        return broker_for(self.ours, self.prefix)


@dataclass(frozen=True)
class Raw:
    """A message as a client of the service reads it, with texts as headers."""

    body: bytes
    headers: Mapping[str, str]
    key: str | None = None
    content_type: str | None = None


STORING = ("streams", "rabbitmq", "kafka")
ALL = [("pubsub", "structured"), *((name, mode) for name in STORING for mode in ("structured", "binary"))]


@pytest.fixture
def transport(request, redis_url, rabbitmq_url, kafka_servers):
    addresses = {
        "pubsub": (redis_url, redis_url),
        "streams": (redis_url, redis_url.replace("redis", "redis-streams", 1)),
        "rabbitmq": (rabbitmq_url, rabbitmq_url),
        "kafka": (kafka_servers, f"kafka://{kafka_servers}"),
    }
    return Transport(request.param, *addresses[request.param], f"events-{uuid4().hex[:12]}")


EVERYWHERE = pytest.mark.parametrize(
    ("transport", "mode"), ALL, indirect=["transport"], ids=["-".join(each) for each in ALL]
)


@asynccontextmanager
async def receiving(transport, place):
    """Return a function that returns the next message there, for a program that has subscribed."""
    if transport.name == "pubsub":
        async with redis.asyncio.Redis.from_url(transport.address) as client, client.pubsub() as pubsub:
            await pubsub.subscribe(place)
            messages = pubsub.listen()
            assert (await anext(messages))["type"] == "subscribe"  # only from then on it receives

            async def receive():
                return Raw((await anext(messages))["data"], {})

            yield receive
    elif transport.name == "streams":
        async with redis.asyncio.Redis.from_url(transport.address) as client:
            last = b"0"

            async def receive():
                nonlocal last
                while not (found := await client.xread({place: last}, count=1, block=1000)):
                    pass
                last, entry = found[0][1][0] if isinstance(found, list) else found[place.encode()][0][0]
                texts = {name.decode(): value.decode() for name, value in entry.items()}
                return Raw(texts.pop("body").encode(), texts)

            yield receive
    elif transport.name == "rabbitmq":
        async with await aio_pika.connect(transport.address) as connection:
            channel = await connection.channel()
            exchange, _, routing_key = place.partition("/")
            if routing_key:
                arguments = {"alternate-exchange": f"{exchange}:retained"}
                await channel.declare_exchange(exchange, "topic", durable=True, arguments=arguments)
                queue = await channel.declare_queue(exclusive=True)
                await queue.bind(exchange, routing_key)
            else:
                queue = await channel.get_queue(place, ensure=False)
            async with queue.iterator() as messages:

                async def receive():
                    message = await anext(messages)
                    await message.ack()
                    headers = {name: str(value) for name, value in message.headers.items()}
                    return Raw(message.body, headers, content_type=message.content_type)

                yield receive
    else:
        options = {"bootstrap_servers": transport.address, "auto_offset_reset": "earliest"}
        async with aiokafka.AIOKafkaConsumer(place, **options) as consumer:

            async def receive():
                record = await consumer.getone()
                headers = {name: value.decode() for name, value in record.headers}
                return Raw(record.value, headers, key=record.key and record.key.decode())

            yield receive


async def send(transport, raw):
    """Send a message as a program with its client does."""
    place = transport.place
    if transport.name in ("pubsub", "streams"):
        async with redis.asyncio.Redis.from_url(transport.address) as client:
            if transport.name == "pubsub":
                await client.publish(place, raw.body)
            else:
                await client.xadd(place, {"body": raw.body, **raw.headers})
    elif transport.name == "rabbitmq":
        async with await aio_pika.connect(transport.address) as connection:
            channel = await connection.channel()
            exchange, _, routing_key = place.partition("/")
            message = aio_pika.Message(raw.body, headers=dict(raw.headers), content_type=raw.content_type)
            await (await channel.get_exchange(exchange, ensure=False)).publish(message, routing_key)
    else:
        async with aiokafka.AIOKafkaProducer(bootstrap_servers=transport.address) as producer:
            headers = [(name, value.encode()) for name, value in raw.headers.items()]
            await producer.send_and_wait(place, raw.body, key=raw.key and raw.key.encode(), headers=headers)


# -- the SDK of Python ---------------------------------------------------------------------------------------------


def read_by_sdk(transport, raw):
    """Return the attributes and the data of an event as the SDK reads it."""
    if transport.name == "pubsub":
        event = JSONFormat().read(CloudEvent, raw.body)
    elif transport.name == "rabbitmq":
        message = like_rabbitmq.RabbitMQMessage(dict(raw.headers), raw.content_type, raw.body)
        event = like_rabbitmq.from_rabbitmq_event(message)
    else:
        headers = {name: value.encode() for name, value in raw.headers.items()}
        event = like_kafka.from_kafka_event(like_kafka.KafkaMessage(headers, raw.key, raw.body))
    return event.get_attributes(), event.get_data()


def written_by_sdk(transport, mode, attributes, data):
    """Return a message that the SDK has written."""
    event = CloudEvent(attributes, data)
    if transport.name == "pubsub":
        return Raw(JSONFormat().write(event), {})
    if transport.name == "rabbitmq":
        message = getattr(like_rabbitmq, f"to_{mode}_event")(event)
        return Raw(message.body, message.headers, content_type=message.content_type)
    message = getattr(like_kafka, f"to_{mode}_event")(event)
    return Raw(message.value, {name: value.decode() for name, value in message.headers.items()}, key=message.key)


# -- both directions -----------------------------------------------------------------------------------------------

HEADERS = {"tenant": "Zürich", "traceparent": TRACE, "correlation-id": "c-1", "subject": "members/7"}


def message(mode, **changes):
    fields = {"message_name": "UserJoined", "message_id": ID, "payload": {"user_id": 7}, "time": AT, "key": "7"}
    return Message.create(**{**fields, "headers": HEADERS, "codec": CloudEvents(SOURCE, mode=mode), **changes})


def check_what_was_sent(attributes, data):
    assert data == {"user_id": 7}
    assert {name: attributes[name] for name in ("specversion", "id", "source", "type", "datacontenttype")} == {
        "specversion": "1.0",
        "id": str(ID),
        "source": SOURCE,
        "type": "UserJoined",
        "datacontenttype": "application/json",
    }
    extensions = {"tenant": "Zürich", "traceparent": TRACE, "correlationid": "c-1", "partitionkey": "7"}
    assert {name: attributes[name] for name in extensions} == extensions
    assert attributes["subject"] == "members/7"


@EVERYWHERE
async def test_the_sdk_of_python_reads_what_diator_sends(transport, mode):
    async with transport.broker() as broker:
        if transport.name == "kafka":
            await broker.send_message(message(mode))  # it creates the topic
        async with receiving(transport, transport.place) as receive, asyncio.timeout(60):
            if transport.name != "kafka":
                await broker.send_message(message(mode))
            raw = await receive()

    attributes, data = read_by_sdk(transport, raw)
    check_what_was_sent(attributes, data)
    assert attributes["time"] == AT
    if transport.name == "kafka":
        assert raw.key == "7"


#: What an SDK sends: an id of its own, no `event_id`, no `event_timestamp`.
FOREIGN = {
    "id": "order-7",
    "source": "/sdk",
    "type": "UserJoined",
    "subject": "members/7",
    "datacontenttype": "application/json",
    "partitionkey": "7",
    "tenant": "8",
    "traceparent": TRACE,
}


@asynccontextmanager
async def consuming(transport, handle, **options):
    """Run a consumer. Return its broker, and the queue of the outcomes."""
    event_map, reports = EventMap(), asyncio.Queue()
    event_map.handler(handle)
    async with transport.broker() as broker:
        delayed = {} if transport.name == "pubsub" else {"first_delay": 0.1}
        policy = RetryPolicy(immediate_retries=0, delayed_retries=len(delayed), **delayed)
        options |= {"retry": policy, "group": transport.group, "on_handled": reports.put_nowait}
        consumer = Consumer(broker, event_map=event_map, **options)
        async with asyncio.timeout(60):
            await consumer.__aenter__()
        try:
            yield broker, reports
        finally:
            await asyncio.wait_for(consumer.__aexit__(None, None, None), 60)


def check_what_was_handled(events, report):
    (event,) = events
    assert (report.outcome, report.reason) == ("acked", None)
    assert (event.user_id, event.event_timestamp) == (7, AT)
    assert event.event_id == report.message_id != ID


@EVERYWHERE
async def test_diator_reads_what_the_sdk_of_python_sends(transport, mode):
    events = []

    async def handle(event: UserJoined) -> None:
        events.append(event)

    async with consuming(transport, handle, codec=CloudEvents(SOURCE)) as (_, reports), asyncio.timeout(60):
        await send(transport, written_by_sdk(transport, mode, {**FOREIGN, "time": AT}, {"user_id": 7}))
        report = await reports.get()

    check_what_was_handled(events, report)


def test_the_other_binding_of_the_sdk_reads_and_writes_the_prefix_of_amqp_1_0():
    codec = CloudEvents(SOURCE, mode="binary", header_prefix="cloudEvents:")
    sent = message("binary", codec=codec)
    headers = headers_with_key(sent, attribute_prefix="ce-")
    properties = {"content-type": headers.pop("content-type")}

    event = amqp.from_binary(amqp.AMQPMessage(properties, headers, encode(sent)), JSONFormat(), CloudEvent)
    check_what_was_sent(event.get_attributes(), event.get_data())

    written = amqp.to_binary(CloudEvent({**FOREIGN, "time": AT}, {"user_id": 7}), JSONFormat())
    texts = {name: str(value) for name, value in written.application_properties.items()}
    received = codec.decode(written.application_data, {**written.properties, **texts}, TOPIC)
    assert (received.time, received.key, received.payload) == (AT, "7", {"user_id": 7})


# -- Node.js -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def node(pytestconfig):
    """A function that asks a program in Node.js to do something."""
    try:
        command = await asyncio.to_thread(peers.command, "node", pytestconfig.cache.mkdir("peers"))
    except peers.MissingToolchain as error:
        give_up = pytest.fail if "node" in peers.required() else pytest.skip
        give_up(f"node: {error}; CONTRIBUTING.md says what the tests use")
    async with peers.running(*command) as process:
        yield lambda do, **options: peers.answer(process, do, **options)


@EVERYWHERE
async def test_the_sdk_of_node_reads_what_diator_sends(node, transport, mode):
    place = {"transport": transport.name, "name": transport.place}
    async with transport.broker() as broker:
        if transport.name in ("kafka", "streams"):
            await broker.send_message(message(mode))
            await node("listen", address=transport.address, **place)
        else:
            await node("listen", address=transport.address, **place)
            await broker.send_message(message(mode))
        attributes = (await node("readEvent", **place))["event"]

    check_what_was_sent(attributes, attributes["data"])
    assert attributes["time"] == "2026-03-07T09:26:02.588Z"


@EVERYWHERE
async def test_diator_reads_what_the_sdk_of_node_sends(node, transport, mode):
    events = []

    async def handle(event: UserJoined) -> None:
        events.append(event)

    place = {"transport": transport.name, "name": transport.place, "address": transport.address}
    async with consuming(transport, handle, codec=CloudEvents(SOURCE)) as (_, reports), asyncio.timeout(60):
        event = {**FOREIGN, "time": "2026-03-07T09:26:02.588Z", "data": {"user_id": 7}}
        await node("sendEvent", mode=mode, event=event, **place)
        report = await reports.get()

    check_what_was_handled(events, report)


# -- diator on both sides ------------------------------------------------------------------------------------------


@EVERYWHERE
async def test_an_event_comes_back_equal_beside_the_other_envelope(transport, mode):
    events, old = [], UserJoined(user_id=7)

    async def handle(event: UserJoined) -> None:
        events.append(event)

    async with consuming(transport, handle, codec=CloudEvents("/billing")) as (broker, reports), asyncio.timeout(60):
        await EventEmitter(message_broker=broker, codec=CloudEvents(SOURCE, mode=mode)).emit(EVENT)
        await EventEmitter(message_broker=broker).emit(old)
        outcomes = [(await reports.get()).outcome for _ in range(2)]

    assert outcomes == ["acked", "acked"]
    assert sorted(events, key=lambda event: event != EVENT) == [EVENT, old]


@pytest.mark.parametrize("transport", ["pubsub"], indirect=True)
async def test_a_transport_without_headers_refuses_the_binary_mode(transport):
    with pytest.raises(ConfigurationError, match="this transport has none; use the mode structured"):
        EventEmitter(message_broker=transport.broker(), codec=CloudEvents(SOURCE, mode="binary"))


@pytest.mark.parametrize("transport", STORING, indirect=True)
@pytest.mark.parametrize("mode", ["structured", "binary"])
async def test_retries_and_dead_letters_keep_the_envelope(transport, mode):
    attempts = []

    async def handle(event: UserJoined) -> None:
        attempts.append(event)
        raise PermanentError if len(attempts) == 2 else RuntimeError

    async with consuming(transport, handle, codec=CloudEvents(SOURCE)) as (broker, reports), asyncio.timeout(60):
        await broker.send_message(message(mode, headers={**HEADERS, "x-tenant": "8"}))
        outcomes = [(await reports.get()).outcome for _ in range(2)]
        async with receiving(transport, transport.dead) as receive:
            raw = await receive()

    assert outcomes == ["retried", "dead_lettered"]
    check_what_was_sent(*read_by_sdk(transport, raw))
    assert raw.headers["x-tenant"] == "8"
    assert raw.headers["diator-dlq-attempts"] == "2"


UNREADABLE = {
    "version": {"specversion": "0.3"},
    "no type": {"type": None},
    "content type": {"datacontenttype": "application/xml"},
    "time": {"time": "yesterday"},
}


def altered(transport, mode, changes):
    """Return a message of another program whose attributes have *changes*, as no SDK would write it."""
    attributes = {"specversion": "1.0", **FOREIGN, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    if mode == "structured":
        headers = {"content-type": "application/cloudevents+json"}
        body = json.dumps({**attributes, "data": {"user_id": 7}}).encode()
    else:
        prefix = "ce-" if transport.name == "rabbitmq" else "ce_"
        headers = {"content-type": attributes.pop("datacontenttype")}
        headers |= {f"{prefix}{name}": value for name, value in attributes.items()}
        body = b'{"user_id":7}'
    content_type = headers.pop("content-type") if transport.name == "rabbitmq" else None
    return Raw(body, {} if transport.name == "pubsub" else headers, content_type=content_type)


@EVERYWHERE
async def test_an_event_that_cannot_be_read_stops_no_other(transport, mode):
    events = []

    async def handle(event: UserJoined) -> None:
        events.append(event)

    bad = [altered(transport, mode, changes) for changes in UNREADABLE.values()]
    bad.append(Raw(b'[{"specversion":"1.0"}]', {"content-type": "application/cloudevents-batch+json"}))
    if transport.name == "rabbitmq":
        bad[-1] = Raw(bad[-1].body, {}, content_type="application/cloudevents-batch+json")
    async with consuming(transport, handle, codec=CloudEvents(SOURCE)) as (_, reports), asyncio.timeout(60):
        for raw in [*bad, altered(transport, mode, {})]:
            await send(transport, raw)
        outcomes = sorted([(await reports.get()).outcome for _ in range(len(bad) + 1)])
        letters = []
        if transport.name != "pubsub":  # which has no dead-letter queue
            async with receiving(transport, transport.dead) as receive:
                letters = [await receive() for _ in bad]

    lost = "given_up" if transport.name == "pubsub" else "dead_lettered"
    assert outcomes == sorted(["acked", *[lost] * len(bad)])
    assert [event.user_id for event in events] == [7]
    if transport.name == "pubsub":
        return
    reasons = [each.headers["diator-dlq-reason"] for each in letters]
    assert all(reason.startswith("undecodable: ") for reason in reasons), reasons

    def kept(raw):
        own = {name: value for name, value in raw.headers.items() if not name.startswith("diator-dlq-")}
        return (raw.body, sorted(own.items()), str(raw.content_type))

    assert sorted(map(kept, letters)) == sorted(map(kept, bad))
