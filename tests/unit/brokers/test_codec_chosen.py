"""A program chooses the codec of its messages: of an emitter, a consumer or one message."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from diator._hints import described
from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import decode_with, encode, event_decoder, headers_with_key
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.context import MessageContext
from diator.events import EventEmitter, Events
from diator.exceptions import ConfigurationError, DecodingError, EncodingError, MessageTooLarge
from diator.mediator import Mediator
from tests.unit.consumer.helpers import JOINED, ONCE, consume, on_joined
from tests.unit.doubles import Join, Moved, Recorder, UserJoined, Witness, events_of, requests_of

CANARY = "canary-4711"


class Plain:
    """Writes the payload alone; the topic says the name. What *fails* names raises an error that quotes a value."""

    def __init__(self, *fails, error=None):
        self.fails = fails
        self.error = error or LookupError(CANARY)

    def _do(self, what):
        if what in self.fails:
            raise self.error

    def encode(self, message, /, *, headers_in_body):
        self._do("encode")
        about = {"id": str(message.message_id), "key": message.key, "at": message.time, "in_body": headers_in_body}
        return b"%b\n%b" % (json.dumps(about, default=str).encode(), message.payload_json)

    def headers(self, message, /, *, attribute_prefix):
        self._do("headers")
        return {"content-type": "text/plain", f"{attribute_prefix}key": message.key or "", **message.headers}

    def decode(self, body, headers, topic, /):
        self._do("decode")
        about, _, payload = body.partition(b"\n")
        about = json.loads(about)
        return Message(
            message_type=topic.message_type,
            message_name=topic.message_name,
            message_id=UUID(about["id"]),
            payload_json=payload,
            key=about["key"],
            headers={**headers},
        )


def message(**changes):
    return Message.create(**{"message_name": "UserJoined", "payload": {"user_id": 7}, "codec": Plain(), **changes})


# -- one message ---------------------------------------------------------------------------------------------------


def test_a_transport_carries_what_the_codec_writes():
    sent = message(key="7", headers={"tenant": "8"})

    assert b'"in_body": false' in encode(sent)
    assert b'"in_body": true' in encode(sent, headers_in_body=True)
    assert headers_with_key(sent) == {"content-type": "text/plain", "ce_key": "7", "tenant": "8"}
    assert headers_with_key(sent, attribute_prefix="x-")["x-key"] == "7"


def test_a_body_of_a_codec_that_is_too_large_is_refused():
    size = len(encode(message(message_id=UUID(int=1))))

    encode(message(message_id=UUID(int=1)), max_bytes=size)
    with pytest.raises(MessageTooLarge, match=f"{UUID(int=1)}.*{size}"):
        encode(message(message_id=UUID(int=1)), max_bytes=size - 1)


def test_a_changed_message_keeps_its_codec():
    sent = message(time=datetime(2026, 3, 7, tzinfo=UTC))

    changed = replace(sent, headers={"tenant": "8"})

    assert (changed.codec, changed.time) == (sent.codec, sent.time)
    assert "Plain" not in repr(sent)


@pytest.mark.parametrize(("what", "call"), [("encode", encode), ("headers", headers_with_key)])
def test_an_error_of_a_codec_is_an_encoding_error(what, call):
    with pytest.raises(EncodingError, match=r"^UserJoined: its codec raised LookupError$") as raised:
        call(message(codec=Plain(what)))

    assert isinstance(raised.value.__cause__, LookupError)
    with pytest.raises(ConfigurationError, match=r"^no$"):
        call(message(codec=Plain(what, error=ConfigurationError("no"))))


def test_the_body_of_a_codec_is_bytes():
    class Text(Plain):
        def encode(self, message, /, *, headers_in_body):
            return "{}"

    with pytest.raises(EncodingError, match=r"^UserJoined: its codec returned str in place of bytes$"):
        encode(message(codec=Text()))


def test_headers_of_a_codec_are_text():
    with pytest.raises(EncodingError, match="headers"):
        headers_with_key(message(headers={"tenant": 7}))
    with pytest.raises(EncodingError, match="headers"):
        headers_with_key(message(headers={"tenant": "\ud800"}))


def received(codec, body, max_bytes=1000, headers=None, topic=JOINED):
    return decode_with(codec, body, max_bytes=max_bytes, headers=headers or {}, topic=topic)


def test_what_a_codec_reads_is_what_a_consumer_gets():
    sent = message(key="7")

    envelope = received(Plain(), encode(sent), headers={"tenant": "8"}, topic=Topic("audit", "Other"))

    assert (envelope.message_type, envelope.message_name) == ("audit", "Other")
    assert (envelope.message_id, envelope.key) == (sent.message_id, "7")
    assert envelope.payload_json == sent.payload_json


def test_a_body_that_is_too_large_does_not_reach_the_codec():
    with pytest.raises(DecodingError, match="11 bytes; this broker accepts at most 10"):
        received(Plain("decode"), b"x" * 11, max_bytes=10)


def test_an_error_of_a_codec_that_reads_is_a_decoding_error_without_its_text():
    with pytest.raises(DecodingError, match=r"^the codec raised LookupError$") as raised:
        received(Plain("decode"), b"")

    assert (raised.value.__cause__, raised.value.__context__) == (None, None)
    with pytest.raises(DecodingError, match=r"^that is why$"):
        received(Plain("decode", error=DecodingError("that is why")), b"")


class ReturnsNothing(Plain):
    def decode(self, *_):
        return None


def test_a_codec_that_returns_no_message_is_a_decoding_error():
    with pytest.raises(DecodingError, match=r"^the codec raised AttributeError$"):
        received(ReturnsNothing(), b"")


@pytest.mark.parametrize("sent", [b"{}", b'{"event_timestamp":null}'])
def test_the_time_of_an_envelope_is_that_of_an_event_that_lacks_one(sent):
    at = datetime(2026, 3, 7, 9, 26, 2, tzinfo=UTC)

    class Timed(Plain):
        def decode(self, body, headers, topic, /):
            return message(payload=json.loads(body), time=at)

    read = event_decoder(UserJoined)

    assert read(received(Timed(), sent)).event_timestamp == at
    assert read(received(Timed(), b'{"event_timestamp":"2025-01-01T00:00:00Z"}')).event_timestamp.year == 2025


# -- an emitter and a consumer ---------------------------------------------------------------------------------------


async def test_an_emitter_writes_and_a_consumer_reads_the_envelope():
    broker, codec, events = MemoryMessageBroker(), Plain(), []

    async def handler(event: UserJoined) -> None:
        events.append(event)

    sent = UserJoined(user_id=7)
    await EventEmitter(message_broker=broker, codec=codec).emit(sent)
    await consume(broker, handler, codec=codec)

    assert events == [sent]


async def test_the_context_of_a_message_is_what_the_codec_reads():
    broker, contexts = MemoryMessageBroker(), []

    class Tenanted(Plain):
        def decode(self, body, headers, topic, /):
            return replace(super().decode(body, headers, topic), headers={"tenant": "8"})

    async def handler(event: Moved, context: MessageContext) -> None:
        contexts.append(context)

    sent = Moved()
    await EventEmitter(message_broker=broker, codec=Plain()).emit(sent)
    await consume(broker, handler, codec=Tenanted())

    (context,) = contexts
    assert (context.message_id, context.key, context.headers) == (sent.event_id, "A", {"tenant": "8"})


async def test_the_message_of_an_emitter_has_the_codec_and_the_time_of_its_event():
    recorder, codec, event = Recorder(), Plain(), Moved()
    await EventEmitter(message_broker=recorder, codec=codec).emit(event)
    await EventEmitter(message_broker=recorder).emit(event)

    with_codec, without = recorder.sent
    assert (with_codec.codec, with_codec.time, with_codec.key) == (codec, event.event_timestamp, "A")
    assert (without.codec, without.time) == (None, None)


async def test_a_consumer_sends_what_its_handlers_raise_with_its_codec():
    class Keeping(MemoryMessageBroker):
        async def send_message(self, message, /):
            codecs.append(message.codec)
            await super().send_message(message)

    broker, codec, codecs = Keeping(), Plain(), []

    async def handler(event: UserJoined, events: Events) -> None:
        events.append(Moved())

    await EventEmitter(message_broker=broker, codec=codec).emit(UserJoined())
    await consume(broker, handler, codec=codec)

    assert codecs == [codec, codec]
    assert (await broker.receive()).message_name == "Moved"


async def test_a_mediator_takes_the_codec_of_its_emitter():
    recorder, codec = Recorder(), Plain()

    async def handler(command: Join, events: Events) -> str:
        events.append(UserJoined())
        return ""

    await Mediator(requests_of(handler), message_broker=recorder, codec=codec).send(Join())

    assert recorder.sent[0].codec is codec


async def test_what_the_codec_refuses_fails_inside_the_unit_of_work():
    broker, witness = MemoryMessageBroker(), Witness()

    async def handler(command: Join, events: Events) -> str:
        events.append(Moved())
        return ""

    codec = Plain()
    mediator = Mediator(requests_of(handler), message_broker=broker, codec=codec, middlewares=[witness])
    await mediator.send(Join())
    codec.fails = ("encode",)
    with pytest.raises(EncodingError, match="its codec raised LookupError"):
        await mediator.send(Join())

    assert isinstance(witness.outcome, EncodingError)
    assert len(broker) == 1


async def test_a_message_that_the_codec_cannot_read_stops_no_other():
    broker, events = MemoryMessageBroker(), []

    async def handler(event: UserJoined) -> None:
        events.append(event.user_id)

    await EventEmitter(message_broker=broker).emit(UserJoined(user_id=1))  # it has diator's envelope
    await EventEmitter(message_broker=broker, codec=Plain()).emit(UserJoined(user_id=2))
    reports = await consume(broker, handler, codec=Plain(), count=2, retry=ONCE)

    assert events == [2]
    assert sorted((each.outcome, each.reason) for each in reports) == [
        ("acked", None),
        ("dead_lettered", "undecodable: the codec raised KeyError"),
    ]


async def test_a_consumer_without_the_codec_dead_letters_the_envelope():
    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker, codec=Plain()).emit(UserJoined())

    reports = await consume(broker, on_joined, retry=ONCE)

    assert [each.outcome for each in reports] == ["dead_lettered"]
    assert broker.dead_letters[0].body.startswith(b'{"id"')


class TextOnly:
    def encode(self, *_, **__):
        return b""


@pytest.mark.parametrize("codec", [Plain, TextOnly(), "cloudevents"])
@pytest.mark.parametrize(
    "use",
    [
        lambda codec: EventEmitter(codec=codec),
        lambda codec: Mediator(requests_of(), codec=codec),
        lambda codec: Consumer(MemoryMessageBroker(), event_map=events_of(on_joined), codec=codec),
        lambda codec: Consumer(
            MemoryMessageBroker(), event_map=events_of(on_joined), codec=codec, event_emitter=EventEmitter()
        ),
    ],
    ids=["emitter", "mediator", "consumer", "consumer with an emitter"],
)
def test_an_object_without_the_methods_of_a_codec_is_refused(codec, use):
    problem = f"codec must be an object with the methods encode, headers, decode, and it is {described(codec)}"
    with pytest.raises(ConfigurationError, match=f"^{problem}$"):
        use(codec)


def test_a_codec_that_cannot_write_for_this_transport_is_refused_at_once():
    codec = Plain("encode", error=ConfigurationError("it needs headers"))

    with pytest.raises(ConfigurationError, match=r"^it needs headers$"):
        EventEmitter(message_broker=MemoryMessageBroker(), codec=codec)


class Native(Recorder):
    """A broker whose service has headers of its own."""

    capabilities = Capabilities(headers="native")


async def test_the_headers_of_a_codec_are_asked_for_where_the_service_has_headers():
    """At once, and then with each event, before it is sent."""
    refusing = Plain("headers", error=ConfigurationError("no headers"))
    with pytest.raises(ConfigurationError, match=r"^no headers$"):
        EventEmitter(message_broker=Native(), codec=refusing)
    in_body = EventEmitter(message_broker=MemoryMessageBroker(), codec=refusing)
    await in_body.emit(UserJoined())

    emitter = EventEmitter(message_broker=(broker := Native()), codec=(codec := Plain()))
    await emitter.emit(UserJoined())
    codec.fails = ("headers",)
    with pytest.raises(EncodingError, match="its codec raised LookupError"):
        await emitter.emit(UserJoined())

    assert broker.names == ["UserJoined"]


def test_a_codec_is_for_an_emitter_not_beside_one():
    with pytest.raises(ConfigurationError, match="event_emitter was passed together with"):
        Mediator(requests_of(), event_emitter=EventEmitter(), codec=Plain())


async def test_a_broker_in_memory_returns_a_message_with_the_codec_that_wrote_it():
    broker, sent = MemoryMessageBroker(), message(message_id=uuid4())
    await broker.send_message(sent)

    assert (await broker.receive()).message_id == sent.message_id
