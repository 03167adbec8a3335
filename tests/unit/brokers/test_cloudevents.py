"""CloudEvents 1.0: what is written, what is read, and what cannot be read, in both modes."""

import json
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.cloudevents import CloudEvents
from diator.brokers.codec import encode, headers_with_key
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.events import EventEmitter, Events
from diator.exceptions import ConfigurationError, DecodingError, EncodingError
from diator.mediator import Mediator
from tests.unit.consumer.helpers import CANARY, JOINED, ONCE, consume, reason_of
from tests.unit.doubles import Join, Moved, UserJoined, Witness, requests_of

SOURCE = "https://shop.example/members"
STRUCTURED, BINARY = CloudEvents(SOURCE), CloudEvents(SOURCE, mode="binary")
BOTH = pytest.mark.parametrize("codec", [STRUCTURED, BINARY], ids=["structured", "binary"])
ID = UUID("9f62e977-8a1c-4b7e-a0d5-6c1f2f3b9e11")
AT = datetime(2026, 3, 7, 9, 26, 2, 588_855, tzinfo=UTC)


def message(codec=STRUCTURED, **changes):
    fields = {"message_name": "UserJoined", "message_id": ID, "payload": {"user_id": 7}, "time": AT}
    return Message.create(**{**fields, "codec": codec, **changes})


def read(body, headers=None, codec=STRUCTURED, topic=JOINED):
    return codec.decode(body, headers or {}, topic)


def problem_of(body, headers=None):
    with pytest.raises(DecodingError) as raised:
        read(body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    assert CANARY not in str(raised.value)
    assert raised.value.__context__ is None
    return str(raised.value)


# -- what is written -----------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "specversion": "1.0",
    "id": str(ID),
    "source": SOURCE,
    "type": "UserJoined",
    "time": "2026-03-07T09:26:02.588855Z",
    "partitionkey": "7",
    "tenant": "8",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "correlationid": "c",
    "causationid": "d",
    "subject": "members/7",
}
HEADERS = {
    "tenant": "8",
    "traceparent": ATTRIBUTES["traceparent"],
    "correlation-id": "c",
    "causation-id": "d",
    "subject": "members/7",
}


def test_a_structured_event_is_one_json_object():
    sent = message(key="7", headers=HEADERS)

    assert json.loads(encode(sent)) == {**ATTRIBUTES, "datacontenttype": "application/json", "data": {"user_id": 7}}
    assert encode(sent) == encode(sent, headers_in_body=True)
    assert headers_with_key(sent) == {"content-type": "application/cloudevents+json"}


@pytest.mark.parametrize(
    ("codec", "prefix"), [(BINARY, "ce-"), (CloudEvents(SOURCE, mode="binary", header_prefix="cloudEvents:"), None)]
)
def test_a_binary_event_is_the_payload_with_headers(codec, prefix):
    sent = message(codec, key="7", headers=HEADERS)

    assert encode(sent) == sent.payload_json
    headers = headers_with_key(sent, attribute_prefix="ce-")
    assert headers.pop("content-type") == "application/json"
    assert headers == {f"{prefix or 'cloudEvents:'}{name}": value for name, value in ATTRIBUTES.items()}


def test_the_prefix_of_the_usual_service_is_that_of_kafka():
    assert headers_with_key(message(BINARY))["ce_id"] == str(ID)


@BOTH
def test_a_header_that_cannot_be_an_attribute_stays_beside_the_event(codec):
    sent = message(codec, headers={"x-tenant": "8"})

    assert headers_with_key(sent)["x-tenant"] == "8"
    assert b"tenant" not in encode(sent)
    assert read(encode(sent), headers_with_key(sent)).headers == {"x-tenant": "8", "source": SOURCE}


@pytest.mark.parametrize("name", ["x-tenant", "tenant_id", "größe", ""])
def test_a_transport_without_headers_refuses_a_header_that_cannot_be_an_attribute(name):
    with pytest.raises(
        EncodingError, match=r"^UserJoined\.headers: this transport has no headers, .* only a-z and 0-9"
    ):
        encode(message(headers={name: "8"}), headers_in_body=True)


def test_the_type_has_the_prefix():
    codec = CloudEvents(SOURCE, type_prefix="com.example.")
    body = encode(message(codec))

    assert json.loads(body)["type"] == "com.example.UserJoined"
    assert read(body, codec=codec).message_name == "UserJoined"
    assert read(body, codec=STRUCTURED).message_name == "com.example.UserJoined"


def test_the_time_is_written_as_in_the_payload():
    at = AT.astimezone(timezone(timedelta(hours=2)))

    assert json.loads(encode(message(time=at)))["time"] == "2026-03-07T11:26:02.588855+02:00"


@pytest.mark.parametrize(
    ("timestamp", "time"),
    [
        (ATTRIBUTES["time"], ATTRIBUTES["time"]),
        *((value, None) for value in (None, "", "2026-03-07T09:26:02", "yesterday", 7, {"a": 1})),
    ],
)
def test_a_message_that_was_made_without_a_time_has_that_of_its_payload(timestamp, time):
    sent = message(time=None, payload={"event_timestamp": timestamp, "user_id": 7})

    assert json.loads(encode(sent)).get("time") == time
    assert "time" not in json.loads(encode(message(time=None)))
    assert json.loads(encode(replace(sent, time=AT)))["time"] == ATTRIBUTES["time"]


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        *("specversion", "id", "source", "type", "time", "datacontenttype", "data", "partitionkey", "key"),
        *("content-type", "correlationid", "causationid", "ce_tenant", "ce-tenant", "CE_id", "cloudEvents:tenant"),
    ],
)
def test_a_reserved_header_is_refused(codec, name):
    with pytest.raises(EncodingError, match=rf"^UserJoined\.headers: the header '{name}' is reserved for CloudEvents$"):
        headers_with_key(message(codec, headers={name: CANARY}))


UNFIT = ["line\nbreak", "\x7f", "\x85", "\ud800", "\ufffe", "\U0010ffff"]


@BOTH
@pytest.mark.parametrize("value", [*UNFIT, 7, None])
def test_a_value_that_no_attribute_can_have_is_refused(codec, value):
    with pytest.raises(EncodingError, match=r"^UserJoined\.headers: a header of a CloudEvent must be text"):
        headers_with_key(message(codec, headers={"tenant": value}))
    if value is not None:
        with pytest.raises(EncodingError, match=r"^UserJoined\.key: the attribute `partitionkey`"):
            headers_with_key(message(codec, key=value))


@BOTH
def test_an_empty_key_or_name_is_refused(codec):
    with pytest.raises(EncodingError, match=r"partitionkey.*not empty"):
        headers_with_key(message(codec, key=""))
    with pytest.raises(EncodingError, match=r"type.*not empty"):
        headers_with_key(message(codec, message_name=""))
    with pytest.raises(EncodingError, match=r"^\?\.name: the attribute `type`"):
        headers_with_key(message(codec, message_name="\ud800"))


@BOTH
@pytest.mark.parametrize("value", ["", "Zürich \u00a0 😀", "\u200b"])
def test_other_text_is_a_value(codec, value):
    sent = message(codec, headers={"tenant": value})

    assert read(encode(sent), headers_with_key(sent)).headers["tenant"] == value


@pytest.mark.parametrize("source", ["", "a b", "a\n", None, 7, "\ud800"])
def test_a_source_is_needed(source):
    with pytest.raises(ConfigurationError, match="source must be a URI reference"):
        CloudEvents(source)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="mode must be structured or binary, not 'batch'"):
        CloudEvents(SOURCE, mode="batch")
    with pytest.raises(ConfigurationError, match=r"header_prefix must be one of .*, not 'x-'"):
        CloudEvents(SOURCE, header_prefix="x-")
    with pytest.raises(ConfigurationError, match="header_prefix must be one of"):
        CloudEvents(SOURCE, header_prefix=b"ce_")


@pytest.mark.parametrize("prefix", [None, b"com.example.", "com.example\n"])
def test_the_prefix_of_types_is_text(prefix):
    with pytest.raises(ConfigurationError, match="type_prefix must be text"):
        CloudEvents(SOURCE, type_prefix=prefix)


def test_a_codec_shows_what_it_is():
    assert repr(BINARY) == f"CloudEvents('{SOURCE}', mode='binary')"
    assert repr(STRUCTURED) == f"CloudEvents('{SOURCE}', mode='structured')"


# -- what is read --------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]), max_size=20)
names = st.from_regex("[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: name not in {"id", "source", "type", "time", "data", "key", "correlationid", "causationid"}
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


messages = st.builds(
    Message,
    message_type=texts,
    message_name=texts.filter(bool),
    message_id=st.uuids(),
    payload=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), values, max_size=4),
    key=st.none() | texts.filter(bool),
    headers=st.dictionaries(names | st.sampled_from(["correlation-id", "x-tenant", "tenant_id"]), texts, max_size=4),
    time=st.none() | st.datetimes(timezones=st.just(UTC)),
    codec=st.sampled_from([STRUCTURED, BINARY]),
)


@given(messages, st.sampled_from(["ce_", "ce-"]))
def test_what_is_written_is_read(sent, prefix):
    topic = Topic(sent.message_type, sent.message_name)

    received = sent.codec.decode(encode(sent), headers_with_key(sent, attribute_prefix=prefix), topic)

    assert replace(received, codec=sent.codec) == replace(sent, headers={**sent.headers, "source": SOURCE})


BODY = {
    "specversion": "1.0",
    "id": str(ID),
    "source": "/others",
    "type": "UserJoined",
    "data": {"user_id": 7},
}
IN_HEADERS = {name: value for name, value in BODY.items() if name != "data"}
DATA = b'{"user_id":7}'


def event(**changes):
    return json.dumps({name: value for name, value in {**BODY, **changes}.items() if value is not ...}).encode()


def binary(prefix="ce_", **changes):
    attributes = {**IN_HEADERS, **changes}
    return {f"{prefix}{name}": value for name, value in attributes.items() if value is not ...}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/cloudevents+json"},
        {"Content-Type": "Application/CloudEvents+JSON; charset=UTF-8"},
        {"content-type": "application/cloudevents"},
        {"content-type": "application/json", "ce_id": "ignored"},
        {"content-type": "application/cloudevents+json", **binary(id="ignored", type="ignored")},
    ],
    ids=["none", "json", "capitals", "no format", "another type", "both modes"],
)
def test_a_structured_event_of_another_program_is_read(headers):
    received = read(event(time=None, subject="s", count=5, flag=True, share=0.5, nothing=None), headers)

    assert (received.message_type, received.message_name) == JOINED
    assert (received.message_id, received.payload_json, received.key) == (ID, b'{"user_id": 7}', None)
    assert (received.time, received.headers) == (
        None,
        {"source": "/others", "subject": "s", "count": "5", "flag": "true", "share": "0.5"},
    )


@pytest.mark.parametrize("prefix", ["ce_", "ce-", "cloudEvents:", "cloudEvents_", "CE-"])
@pytest.mark.parametrize(
    "content_type", [None, "application/json", "text/json", "application/vnd.x+json; charset=utf-8"]
)
def test_a_binary_event_of_another_program_is_read(prefix, content_type):
    headers = binary(prefix, time="2026-03-07T11:26:02+02:00", correlationid="c", partitionkey="7")
    if content_type:
        headers["content-type"] = content_type

    received = read(DATA, {**headers, "other": "x"})

    assert (received.message_id, received.key, received.payload_json) == (ID, "7", DATA)
    assert received.time == datetime(2026, 3, 7, 9, 26, 2, tzinfo=UTC)
    assert received.headers == {"source": "/others", "correlation-id": "c", "other": "x"}


def test_capitals_and_spaces_change_nothing():
    headers = {name.title(): value for name, value in binary(time=ATTRIBUTES["time"]).items()}
    data = b" " + DATA + b"\n"

    received = read(data, {**headers, "CONTENT-TYPE": " Application/JSON ; charset=utf-8"})

    assert (received.message_id, received.time, received.payload_json) == (ID, AT, DATA)
    assert read(event(datacontenttype="Application/Json ; charset=utf-8")).message_id == ID


def test_the_key_of_the_service_counts_without_a_partition_key():
    assert read(event(), {"key": "7"}).key == "7"
    assert read(event(partitionkey="8"), {"key": "7"}).key == "8"
    assert read(DATA, {**binary(), "key": "7"}).key == "7"
    assert "key" not in read(event(partitionkey="8"), {"key": "7"}).headers


@pytest.mark.parametrize("number", ["1772875562", "1772875562588"])
def test_a_time_of_amqp_may_be_a_number(number):
    assert read(DATA, binary(time=number)).time.replace(microsecond=0) == AT.replace(microsecond=0)


def test_json_in_base64_is_read():
    data = b64encode(DATA).decode()

    assert read(event(data=..., data_base64=data)).payload_json == DATA


@pytest.mark.parametrize("id_", ["7", "order-7", "{9f62e977-8a1c-4b7e-a0d5-6c1f2f3b9e11}", f"urn:uuid:{ID}", "ü"])
def test_an_id_other_than_a_uuid_has_one_message_id(id_):
    first, again, other = (read(event(id=id_, source=source)).message_id for source in ("/a", "/a", "/b"))

    assert first == again == read(DATA, binary(id=id_, source="/a")).message_id
    assert len({first, other, ID}) == 3


@pytest.mark.parametrize("id_", [str(ID).upper(), ID.hex])
def test_a_uuid_is_the_message_id_however_it_is_written(id_):
    assert read(event(id=id_)).message_id == ID


@BOTH
def test_the_own_envelope_is_read(codec):
    sent = message(None, key="7", headers={"tenant": "8"})

    beside = read(encode(sent), headers_with_key(sent), codec)
    within = read(encode(sent, headers_in_body=True), {}, codec)

    for received in (beside, within):
        assert (received.message_id, received.key, received.headers) == (ID, "7", {"tenant": "8"})
        assert received.payload_json == sent.payload_json


def test_the_own_envelope_may_have_a_specversion_as_a_further_key():
    body = json.dumps({**json.loads(encode(message(None))), "specversion": "1.0"}).encode()

    assert read(body).message_id == ID


# -- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"specversion": "0.3"}, "its `specversion` is not 1.0"),
        ({"specversion": "1.1"}, "its `specversion` is not 1.0"),
        ({"specversion": CANARY}, "its `specversion` is not 1.0"),
        *(({name: value}, f"it has no `{name}`") for name in ("id", "source", "type") for value in (..., "")),
        ({"datacontenttype": f"application/{CANARY}"}, "the data of the CloudEvent is not JSON"),
        ({"datacontenttype": "application/xml"}, "the data of the CloudEvent is not JSON"),
        ({"datacontenttype": "text/plain; a=application/json"}, "the data of the CloudEvent is not JSON"),
        ({"datacontenttype": "json"}, "the data of the CloudEvent is not JSON"),
        ({"time": CANARY}, "is not a timestamp with a time zone"),
        ({"time": "2026-03-07T09:26:02"}, "is not a timestamp with a time zone"),
    ],
    ids=repr,
)
def test_an_event_that_breaks_the_specification_is_not_read(changes, problem):
    assert problem in problem_of(event(**changes))
    if "datacontenttype" in changes:
        assert problem in problem_of(DATA, {**binary(), "content-type": changes["datacontenttype"]})
    else:
        assert problem in problem_of(DATA, binary(**changes))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (event(data=...), "the CloudEvent has no `data`"),
        (event(data=None), "the data of the CloudEvent is not a JSON object"),
        (event(data=CANARY), "the data of the CloudEvent is not a JSON object"),
        (event(data=[CANARY]), "the data of the CloudEvent is not a JSON object"),
        (event(data=..., data_base64=CANARY), "the `data_base64` of the CloudEvent is not base64"),
        (event(data=..., data_base64=5), "the `data_base64` of the CloudEvent is not base64"),
        (
            event(data=..., data_base64=b64encode(b"\xff\x00").decode()),
            "the data of the CloudEvent is not a JSON object",
        ),
        (event(tenant={CANARY: 1}), "an attribute is neither text nor number nor boolean"),
        (event(id=["7"]), "an attribute is neither text nor number nor boolean"),
        (b"[%b]" % event(), "a batch of CloudEvents cannot be read"),
        (b" []", "a batch of CloudEvents cannot be read"),
        (b"", "the body is empty"),
        (b"\n", "the body is empty"),
        (b"\xff\x00", "the body is not a JSON object"),
        (b"7", "the body is not a JSON object"),
        (b'{"a":' * 5_000, "the body is not a JSON object"),
        (b"{}", "the body is neither a CloudEvent nor a message of diator"),
        (json.dumps({CANARY: CANARY}).encode(), "the body is neither a CloudEvent nor a message of diator"),
        (b'{"message_type": "notification_event"}', "Object missing required field `message_name`"),
        (event().replace(b'"user_id": 7', b'"user_id": "\xff"'), "the data of the CloudEvent is not a JSON object"),
        (event().replace(b"/others", b"\xff"), "an attribute is neither text"),
    ],
    ids=repr,
)
def test_a_structured_event_that_cannot_be_read_says_why(body, problem):
    assert problem in problem_of(body)


def test_an_event_whose_type_says_so_needs_a_specversion():
    assert "it has no `specversion`" in problem_of(
        event(specversion=...), {"content-type": "application/cloudevents+json"}
    )


@pytest.mark.parametrize(
    ("content_type", "what"),
    [
        ("application/cloudevents-batch+json", "a batch"),
        ("Application/CloudEvents-Batch; charset=utf-8", "a batch"),
        ("application/cloudevents+avro", "in another format than JSON"),
        (f"application/cloudevents+{CANARY}", "in another format than JSON"),
    ],
)
def test_other_formats_are_not_read(content_type, what):
    assert f"the message is not one CloudEvent in JSON: it is {what}" in problem_of(
        event(), {"content-type": content_type}
    )


@pytest.mark.parametrize(
    "data", [b"", b"<a/>", b'"text"', b"[1]", b"7", b'{"a":', b'{"a":"\xff"}', b"{}{}", b'{"a":' * 5_000]
)
def test_binary_data_other_than_a_json_object_is_not_read(data):
    assert problem_of(data, binary()) == "the data of the CloudEvent is not a JSON object"


@pytest.mark.parametrize("number", ["9" * 20, "9" * 400, "9" * 5_000, "-1", "1e9", "\uff12\uff10\uff12\uff16"])
def test_a_number_that_is_not_a_time_is_not_read(number):
    assert "is not a timestamp" in problem_of(DATA, binary(time=number))


@given(st.binary(max_size=50), st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=3))
def test_anything_is_read_or_refused(body, headers):
    try:
        received = read(body, headers)
    except DecodingError:
        return
    assert received.payload_json[:1] == b"{"


# -- in a program --------------------------------------------------------------------------------------------------


async def handled(broker, *, codec, count=1):
    events = []

    async def handler(event: UserJoined) -> None:
        events.append(event)

    return events, await consume(broker, handler, codec=codec, count=count, retry=ONCE)


async def test_a_consumer_reads_both_envelopes_while_a_system_migrates():
    broker = MemoryMessageBroker()
    old, new = UserJoined(user_id=1), UserJoined(user_id=2)
    await EventEmitter(message_broker=broker).emit(old)
    await EventEmitter(message_broker=broker, codec=STRUCTURED).emit(new)

    events, _ = await handled(broker, codec=CloudEvents("/billing", type_prefix="com.example."), count=2)

    assert events == [old, new]


async def test_an_event_of_another_program_gets_id_and_time_of_its_envelope():
    broker = MemoryMessageBroker()
    broker._put(JOINED, event(time="2026-03-07T09:26:02.588855Z"))

    (received,), _ = await handled(broker, codec=STRUCTURED)

    assert (received.event_id, received.event_timestamp, received.user_id) == (ID, AT, 7)


async def test_a_key_orders_what_has_the_envelope():
    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker, codec=STRUCTURED).emit(Moved(room="B"))

    assert (await broker.receive()).key == "B"


async def test_no_event_stops_another_one_and_each_dead_letter_is_as_it_came():
    broker = MemoryMessageBroker()
    bodies = {
        event(specversion="0.3"): "its `specversion` is not 1.0",
        event(datacontenttype="application/xml", data=CANARY): "the data of the CloudEvent is not JSON",
        event(type="UserLeft"): "mismatch: the body names another type or name",
        event(
            data={"user_id": CANARY}
        ): "the payload does not fit UserJoined: Expected `int`, got `str` - at `$.user_id`",
        b"[]": "a batch of CloudEvents cannot be read",
    }
    for body in bodies:
        broker._put(JOINED, body)
    broker._put(JOINED, event())

    events, reports = await handled(broker, codec=STRUCTURED, count=len(bodies) + 1)

    assert [each.user_id for each in events] == [7]
    letters = {each.body: each.reason for each in broker.dead_letters}
    assert letters.keys() == bodies.keys()
    for body, problem in bodies.items():
        assert problem in letters[body]
        assert CANARY not in letters[body]
    assert [reason_of(each) for each in reports if each.outcome != "acked"] == [*map(str, letters.values())]


def test_the_binary_mode_needs_a_transport_with_headers():
    with pytest.raises(ConfigurationError, match="needs headers, and this transport has none; use the mode structured"):
        EventEmitter(message_broker=MemoryMessageBroker(), codec=BINARY)


async def test_a_header_that_cannot_be_written_fails_inside_the_unit_of_work():
    class Odd(Wrapped):
        """It adds a header, which the emitter cannot see."""

        def outgoing(self, message):
            return replace(message, headers={"x-tenant": "8"})

    broker, witness = MemoryMessageBroker(), Witness()

    async def handler(command: Join, events: Events) -> str:
        events.append(Moved(room=""))
        return ""

    options = {"codec": STRUCTURED, "middlewares": [witness]}
    with pytest.raises(EncodingError, match=r"^Moved\.key: the attribute `partitionkey`"):
        await Mediator(requests_of(handler), message_broker=broker, **options).send(Join())

    assert isinstance(witness.outcome, EncodingError)
    with pytest.raises(EncodingError, match="this transport has no headers"):
        await Odd(broker).send_message(message())
