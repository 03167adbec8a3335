"""What of RabbitMQ needs no RabbitMQ: addresses, names, and what is written for a message."""

import asyncio
import ssl
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pytest

pytest.importorskip("aio_pika")

import aio_pika
import yarl
from aiormq.connection import FrameReceiver
from aiormq.exceptions import AMQPConnectionError, InvalidFrameError, ProtocolSyntaxError
from pamqp import commands
from pamqp.frame import marshal, unmarshal
from pamqp.heartbeat import Heartbeat

from diator.brokers import Message
from diator.brokers.base import Delivery, Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _client
from diator.brokers.rabbitmq._channel import Channel
from diator.brokers.rabbitmq._content import Properties
from diator.brokers.rabbitmq._frames import Publication, header_of
from diator.brokers.rabbitmq._names import delay_bucket, own_queue_name, queue_name, routing_key
from diator.brokers.rabbitmq._subscription import Connection, Subscription, _Consumer, _Token
from diator.exceptions import ConfigurationError, EncodingError, UsageError

URL = "amqp://guest:swordfish@localhost/"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "redis://user:swordfish@localhost/",
        "amqp://",
        "amqp://user:swordfish@localhost:port/",
        "amqp://localhost/?heartbeat=swordfish",
        None,
        b"amqp://user:swordfish@localhost/",
        yarl.URL("redis://user:swordfish@localhost/"),
        {"password": "swordfish"},
        aio_pika.Connection,
    ],
)
def test_a_bad_address_is_refused_and_not_quoted(url):
    """The error has all forms, and does not show what may be a password."""
    with pytest.raises(ConfigurationError, match=r"amqp://.* yarl\.URL.* aio-pika") as refused:
        RabbitMQMessageBroker(url)

    assert "swordfish" not in str(refused.value)
    assert refused.value.__cause__ is None


class Dialled(Exception):
    """In place of a connection."""


@pytest.fixture
def dialled(monkeypatch):
    """What aiormq is asked to connect with, instead of connecting."""
    asked = []

    class NoConnection:
        def __init__(self, url, **options):
            asked.append((url, options))
            raise Dialled

    monkeypatch.setattr(_client, "Connection", NoConnection)
    return asked


async def dial(url, ssl_context=None):
    with pytest.raises(Dialled):
        await _client.Address(url, ssl_context).dial("testing")


async def test_a_connection_of_aio_pika_lends_what_it_connects_with(dialled):
    context = ssl.create_default_context()
    properties = {"connection_name": "billing", "team": "payments"}
    lent = aio_pika.RobustConnection(
        yarl.URL("amqps://user:swordfish@localhost/vhost?heartbeat=3&interleave=1&cafile=mine.pem"),
        ssl_context=context,
        client_properties=properties,
    )

    await dial(lent)

    ((url, options),) = dialled
    assert (url.host, url.user, url.password, url.path) == ("localhost", "user", "swordfish", "/vhost")
    assert (url.query["heartbeat"], url.query["cafile"]) == ("3", "mine.pem")
    assert (options.pop("context"), options.pop("interleave")) == (context, 1)
    assert options.pop("client_properties") == {"connection_name": "billing: testing", "team": "payments"}
    assert options.keys() == {"transport_factory"}
    assert RabbitMQMessageBroker(lent).capabilities.redelivery_bound == 6.0
    assert properties["connection_name"] == "billing"


async def test_a_renewed_password_is_used_for_the_next_connection(dialled):
    lent = aio_pika.Connection(yarl.URL("amqp://user:swordfish@localhost/"))
    address = _client.Address(lent, None)

    lent.url = lent.url.with_password("herring")  # as its `update_secret` does
    with pytest.raises(Dialled):
        await address.dial("testing")

    assert dialled[0][0].password == "herring"


@pytest.mark.parametrize(
    ("url", "name"), [(URL, "diator: testing"), (yarl.URL(f"{URL}?name=billing"), "billing: testing")]
)
async def test_a_connection_has_a_name(dialled, url, name):
    await dial(url)

    assert dialled[0][1]["client_properties"] == {"connection_name": name}


async def test_two_tls_contexts_are_refused():
    lent = aio_pika.Connection(yarl.URL("amqps://localhost/"), ssl_context=ssl.create_default_context())

    with pytest.raises(ConfigurationError, match="do not pass an ssl_context"):
        RabbitMQMessageBroker(lent, ssl_context=ssl.create_default_context())


async def test_a_connection_of_aio_pika_without_an_address_is_refused():
    lent = aio_pika.Connection(yarl.URL(""))

    with pytest.raises(ConfigurationError, match="not a URL of RabbitMQ"):
        RabbitMQMessageBroker(lent)


@pytest.mark.parametrize(
    "options",
    [
        {"extra_prefetch": -1},
        {"max_in_flight": 0},
        {"timeout": 0},
        {"unroutable": "keep"},
        {"max_retained": 0},
        {"queue_type": "stream"},
        {"prefix": ""},
        {"prefix": "amq.mine"},
        {"prefix": "a:b"},
        {"ssl_context": ssl.create_default_context()},
    ],
    ids=lambda options: "ssl_context" if "ssl_context" in options else str(options),  # its repr is an address
)
def test_an_option_that_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigurationError):
        RabbitMQMessageBroker(URL, **options)


@pytest.mark.parametrize(
    "rest",
    [
        "h:99999/", "h:0/", "h:x/", "a..b/", f"{'a' * 70}.b/", "h\ud800/", "h/?heartbeat=-1", "h/?heartbeat=99999",
        "h/,amqp://guest:guest@h2/", f"h/{'v' * 256}",
    ],
)  # fmt: skip
def test_an_address_that_names_no_rabbitmq_is_refused_without_its_password(rest):
    with pytest.raises(ConfigurationError) as refused:
        RabbitMQMessageBroker(f"amqp://guest:swordfish@{rest}")
    assert "swordfish" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_bound_of_redelivery_is_two_heartbeats():
    assert RabbitMQMessageBroker(URL).capabilities.redelivery_bound == 20.0
    assert RabbitMQMessageBroker(f"{URL}?heartbeat=3").capabilities.redelivery_bound == 6.0


def test_capabilities_follow_the_options():
    default = RabbitMQMessageBroker(URL).capabilities
    weaker = RabbitMQMessageBroker(URL, queue_type="classic", unroutable="drop").capabilities

    assert weaker.missing(default) == [
        "delivery_count (retries, needed is deliveries)",
        "unroutable (dropped, needed is retained)",
    ]
    assert RabbitMQMessageBroker(URL, unroutable="raise").capabilities.unroutable == "reported"


def test_a_routing_key_means_one_topic_only():
    assert routing_key("notification_event", "meetings.UserJoined") == "notification_event.meetings.UserJoined"
    assert routing_key("a.b", "c") != routing_key("a", "b.c")
    for wild in "*#":
        assert wild not in routing_key("notification_event", f"a.{wild}")
    with pytest.raises(ValueError, match="255 bytes"):
        routing_key("notification_event", "x" * 255)


def test_no_two_queues_have_one_name():
    parts = ["", "a", "a:b", "b", ":", "#", "#3A", "ä", "a b", "%", "/", "#2F", "/retained"]
    topics = [Topic(kind, name) for kind in parts for name in parts]
    names = {queue_name("p", topic, group) for topic in topics for group in parts}
    names |= {own_queue_name("p", topic, purpose) for topic in topics for purpose in ("", "retained")}

    assert len(names) == len(topics) * (len(parts) + 2)
    with pytest.raises(ValueError, match="255 bytes"):
        queue_name("p", Topic("notification_event", "x"), "g" * 230)


@pytest.mark.parametrize("frame_max", [4_096, 131_072])
def test_a_publication_is_read_by_others_as_it_was_written(frame_max):
    message_id, body = str(uuid4()), b"{" + b"x" * 10_000 + b"}"
    headers = {"trace": "\u00e4", "empty": "", "": "x"}
    header = header_of("Joined", message_id, headers, len(body))

    written = Publication("diator", "a.b", header, body, message_id, None, mandatory=True).frames(frame_max)

    frames = []
    while written:
        size, number, frame = unmarshal(written)
        assert (number, size <= frame_max) == (1, True)
        frames.append(frame)
        written = written[size:]
    publish, content, *parts = frames
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("diator", "a.b", True)
    assert b"".join(part.value for part in parts) == body
    properties = content.properties
    assert (content.body_size, properties.headers, properties.message_id) == (len(body), headers, message_id)
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    assert properties.message_type == "Joined"
    assert abs((datetime.now(UTC) - properties.timestamp).total_seconds()) < 5


def test_a_codec_sets_the_content_type():
    class Plain:
        def encode(self, message, /, *, headers_in_body):
            return b"text"

        def headers(self, message, /, *, attribute_prefix):
            return {"content-type": "text/plain", f"{attribute_prefix}id": "7"}

        decode = None

    broker = RabbitMQMessageBroker("amqp://localhost")
    message = Message.create(message_name="Joined", payload={})

    ours, plain = (broker._publication(each) for each in (message, replace(message, codec=Plain())))

    assert Properties(ours.header).headers() == {}
    assert Properties(plain.header).headers() == {"ce-id": "7", "content-type": "text/plain"}


@pytest.mark.parametrize("headers", [{"x" * 129: "1"}, {"a": "\ud800"}])
def test_a_header_that_amqp_cannot_have_is_refused(headers):
    with pytest.raises(EncodingError, match=r"Joined\.headers"):
        header_of("Joined", str(uuid4()), headers, 0)


def test_delays_are_rounded_up_by_a_third_at_most():
    for milliseconds in range(1, 100_000, 7):
        bound = delay_bucket(milliseconds / 1000)
        assert milliseconds <= bound <= max(milliseconds * 1.34, milliseconds + 1)
    assert len({delay_bucket(seconds / 10) for seconds in range(10, 36_000)}) < 50


class Taken(list):
    """A channel that only takes frames."""

    def take_frame(self, kind, frame):
        self.append((kind, frame))


def reader(*arriving):
    """The reader of aiormq, on a stream on which these bytes arrive, with channel 1."""
    stream, channel = asyncio.StreamReader(), Taken()
    for each in arriving:
        stream.feed_data(each)
    stream.feed_eof()
    return FrameReceiver(_client._Reader(stream, {1: channel})), channel


def frame(kind, number, payload):
    return kind.to_bytes(1) + number.to_bytes(2) + len(payload).to_bytes(4) + payload + b"\xce"


@pytest.mark.parametrize("size", [1, 7, 8, 9, 30, 1_000])
async def test_frames_of_a_channel_go_to_the_channel_and_aiormq_sees_heartbeats(size):
    """However the bytes of the stream are cut."""
    tune = marshal(commands.Connection.Tune(1, 2, 3), 0)
    frames = [frame(1, 1, b"method"), frame(2, 1, b"\xff" * 20), frame(3, 1, b""), frame(3, 2, b"of nobody"), tune]
    stream, channel = asyncio.StreamReader(), Taken()
    receiver = FrameReceiver(_client._Reader(stream, {1: channel}))
    arriving = b"".join(frames)

    seen = []
    for start in range(0, len(arriving), size):
        stream.feed_data(arriving[start : start + size])
        while not seen or not isinstance(seen[-1], commands.Connection.Tune):
            try:
                seen.append((await asyncio.wait_for(receiver.get_frame(), 0.01))[2])
            except TimeoutError:
                break

    assert channel == [(1, frames[0]), (2, frames[1]), (3, frames[2])]
    assert {type(each) for each in seen[:-1]} <= {Heartbeat}
    assert (seen[-1].channel_max, seen[-1].frame_max) == (1, 2)
    assert size == 1_000 or len(seen) > 1


@pytest.mark.parametrize(
    ("arriving", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", AMQPConnectionError),
        (b"AMQP\x00\x00\x09\x01", ProtocolSyntaxError),
        (frame(3, 1, b"x")[:-1] + b"\x00", InvalidFrameError),
        (frame(3, 1, b"x")[:-1], AMQPConnectionError),
    ],
)
async def test_aiormq_reports_what_is_not_amqp(arriving, error):
    receiver, channel = reader(arriving)

    with pytest.raises(error):
        await receiver.get_frame()

    assert channel == []


async def test_the_end_of_a_stream_ends_the_frames():
    blocked, unblocked = (marshal(each, 0) for each in (commands.Connection.Blocked(), commands.Connection.Unblocked()))
    receiver, channel = reader(frame(3, 1, b"x") + blocked + unblocked)

    seen = [type(each) async for _, _, each in receiver]

    assert seen == [commands.Connection.Blocked, commands.Connection.Unblocked]
    assert len(channel) == 1


@pytest.mark.parametrize(
    ("properties", "version", "arguments"),
    [
        ({"version": "4.0.5"}, 4, {"x-queue-type": "quorum", "x-delivery-limit": -1}),
        ({"version": "10.0.0-rc.1"}, 10, {"x-queue-type": "quorum", "x-delivery-limit": -1}),
        ({"version": "3.13.7"}, 3, {"x-queue-type": "quorum"}),  # which has no limit, and refuses to be told so
        ({"version": "unknown"}, 0, {"x-queue-type": "quorum"}),
        ({}, 0, {"x-queue-type": "quorum"}),
    ],
)
def test_a_dead_letter_queue_has_no_delivery_limit_whatever_the_version(properties, version, arguments):
    subscription = SimpleNamespace(_queue_type="quorum", dead_letter_queue="{}:dead".format)

    found = _client.major_version(SimpleNamespace(server_properties=properties))
    declaration = Subscription.dead_letter_declaration(subscription, "queue", found)

    assert (found, declaration.queue, declaration.arguments) == (version, "queue:dead", arguments)


async def test_a_write_to_a_half_closed_connection_does_not_block_later_ones():
    """A writer raises RuntimeError after the end of its half; the loss itself is reported by reading."""
    written = []

    class HalfClosed:
        def write(self, frames):
            if frames == b"1":
                raise RuntimeError("Cannot call write() after write_eof()")
            written.append(frames)

    channel = Channel()
    channel._loop, channel._writer = asyncio.get_running_loop(), HalfClosed()
    for frames in (b"1", b"2"):
        channel.write(frames)
        await asyncio.sleep(0)

    assert written == [b"2"]


async def test_a_retry_by_a_broker_of_another_event_loop_is_reported_as_that_and_the_message_is_requeued():
    class Elsewhere:
        timeout = 1.0

        async def publish(self, publication):
            raise UsageError("this broker is in use in another event loop")

    subscription = SimpleNamespace(
        log_fields={}, publisher=Elsewhere(), delay_queues={}, unsettled=1, notify_settled=lambda: None
    )
    connection = Connection(subscription, 1)
    connection._loop = asyncio.get_running_loop()
    connection._open[7] = SimpleNamespace(unsettled=1)
    token = _Token(7, "queue", Properties(header_of("Counted", str(uuid4()), {}, 2)), by_exchange=True)
    topic = Topic("notification_event", "Counted")
    delivery = Delivery(topic=topic, body=b"{}", headers={}, attempt=1, settler=connection, token=token)

    with pytest.raises(UsageError, match="another event loop"):
        await delivery.retry()

    await asyncio.sleep(6)
    assert (subscription.unsettled, delivery.outcome) == (0, None)


async def test_no_consumer_is_cancelled_before_it_has_started():
    """RabbitMQ's channel would crash, and lose the latest acknowledgements."""
    sent = []
    subscription = SimpleNamespace(log_fields={}, group="readers", is_ending=True, queues={})
    connection = Connection(subscription, 1)
    connection._loop, connection._is_consuming = asyncio.get_running_loop(), True
    connection.send = lambda frame: sent.append(frame.name)
    starting = asyncio.create_task(connection.consume("queue"))
    await asyncio.sleep(0)
    starting.cancel()  # as handing over is cancelled at the end

    ending = asyncio.create_task(connection.end(()))
    await asyncio.sleep(0.1)
    assert sent == ["Basic.Qos", "Basic.Consume"]
    connection._take_method(commands.Basic.QosOk())
    connection._take_method(commands.Basic.ConsumeOk("diator-1"))
    await asyncio.sleep(0.1)
    assert sent == ["Basic.Qos", "Basic.Consume", "Basic.Cancel"]

    connection._take_method(commands.Basic.CancelOk("diator-1"))
    await ending


@pytest.mark.parametrize(
    ("now", "postponed", "wanted"), [(1, 1, 10), (1, 0, 10), (10, 5, 20), (20, 1, None), (20, 0, 10)]
)
async def test_a_consumer_is_replaced_by_one_with_the_least_prefetch_count_or_more(now, postponed, wanted):
    """After a lost connection it begins with one message, whatever is postponed."""
    sent = []
    connection = Connection(SimpleNamespace(log_fields={}, postponed=postponed), 10)
    connection._loop, connection._is_consuming = asyncio.get_running_loop(), True
    connection.send = lambda frame: sent.append(getattr(frame, "prefetch_count", None))
    connection._consumers["diator-1"] = full = _Consumer("diator-1", "queue", now, unsettled=now)

    connection._adjust_prefetch(full)

    assert sent == ([] if wanted is None else [None, wanted, None])


@pytest.mark.parametrize(
    ("now", "redelivered", "wanted"), [(1, True, 4), (4, True, None), (4, False, 10), (10, True, None), (20, True, 10)]
)
async def test_a_consumer_prefetches_nothing_that_is_redelivered_after_a_lost_connection(now, redelivered, wanted):
    sent = []
    connection = Connection(SimpleNamespace(log_fields={}, postponed=0, first_prefetch_count=4), 10)
    connection._loop, connection._is_consuming = asyncio.get_running_loop(), True
    connection.send = lambda frame: sent.append(getattr(frame, "prefetch_count", None))
    connection._consumers["diator-1"] = full = _Consumer("diator-1", "queue", now, unsettled=now)

    connection._adjust_prefetch(full, redelivered=redelivered)

    assert sent == ([] if wanted is None else [None, wanted, None])


async def test_what_a_consumer_has_held_back_is_not_counted_as_seen_if_it_ends_meanwhile():
    sent = []
    connection = Connection(SimpleNamespace(log_fields={}, group="readers", is_ending=True, queues={}), 1)
    connection._loop, connection._is_consuming = asyncio.get_running_loop(), True
    connection.send = sent.append
    consumer = _Consumer("diator-1", "queue", 1, unsettled=1)
    connection._open, connection._requeued = {1: consumer, 2: consumer}, [2]

    await connection.end(())

    assert [(frame.name, frame.delivery_tag) for frame in sent] == [("Basic.Reject", 1), ("Basic.Nack", 2)]
