"""The properties of a message of RabbitMQ: whatever bytes they are, they are read, and written again as they came."""

import struct
from time import process_time
from uuid import uuid4

import pytest

pytest.importorskip("aio_pika")

from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.header import ContentHeader

from diator.brokers.rabbitmq._content import Deliver, Properties
from diator.brokers.rabbitmq._frames import again, header_of
from tests import amqp
from tests.amqp import (
    short,
    sized,
    text,
)
from tests.amqp import table as table_of


def table(**entries: bytes) -> bytes:
    return table_of(*((name.encode(), value) for name, value in entries.items()))


def nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + table(a=value)
    return value


def header(*, size: int = 2, **properties: bytes) -> bytes:
    """A content header with these properties, which are given in their order on the wire."""
    flags = sum(getattr(amqp, name.upper()) for name in properties)
    return struct.pack(">HHQH", 60, 0, size, flags) + b"".join(properties.values())


ID = short(b"id")


def test_the_content_type_is_a_header_unless_it_is_json():
    json, xml = short(b"application/json"), short(b"application/xml")
    named = table(**{"content-type": text(b"text/plain")})

    assert Properties(header(content_type=json)).headers() == {}
    assert Properties(header(content_type=xml)).headers() == {"content-type": "application/xml"}
    assert Properties(header(content_type=xml, headers=named)).headers() == {"content-type": "text/plain"}
    assert Properties(header(content_type=short(b"\xff"))).headers() == {}
    assert Properties(header()).headers() == {}


# -- reading -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_are_read_and_can_be_written_again(anything):
    properties = Properties(anything)

    properties.headers()
    again = properties.again(2, {"diator-attempt": 1}, deaths=True, only_readable=True)
    assert Properties(again).unreadable == []
    assert Properties(properties.again(2, {}, deaths=False)).count("diator-attempt") == 0


kinds = st.sampled_from(b"tbBsuIilLfdDTVSxFA\x00Z")
values = st.builds(lambda kind, data: bytes([kind]) + data, kinds, st.binary(max_size=24))


@given(st.lists(st.tuples(st.binary(max_size=8), values), max_size=5))
def test_any_table_is_read_and_what_is_written_again_can_be_read(entries):
    properties = Properties(header(headers=table_of(*entries)))

    again = Properties(properties.again(2, {"diator-attempt": 7}, deaths=True, only_readable=True))

    assert again.unreadable == []
    assert again.count("diator-attempt") == 7
    assert again.headers().items() >= {
        name: value for name, value in properties.headers().items() if not name.startswith("diator-")
    }.items() - {("CC", ""), ("BCC", "")}


@pytest.mark.parametrize(
    "hostile",
    [
        header(headers=table(a=nested(5_000))),
        header(headers=table_of(*[(b"", b"V")] * 43_000)),
        header(headers=table(a=b"A" + sized(b"A\x00\x00\x00\x00" * 26_000))),
        header(headers=table(a=b"A" + sized(b"V" * 130_000))),
        header(headers=table_of(*[(b"\xff", text(b""))] * 18_000)),
        header(headers=sized(b"\xff" * 131_000)),
        header(headers=b"\xff" * 131_000),
    ],
    ids=["nested", "entries", "lists", "values", "names", "junk", "sizes"],
)
def test_the_largest_header_frame_takes_a_moment(hostile):
    began = process_time()
    properties = Properties(hostile)
    properties.headers()
    properties.again(2, {"diator-attempt": 1}, deaths=True, only_readable=True)

    assert process_time() - began < 2.0  # it takes 0.01


@pytest.mark.parametrize(
    ("content_header", "unreadable"),
    [
        (header(message_id=short(b"caf\xe9")), ["message-id"]),
        (header(timestamp=struct.pack(">q", -14_256_000)), ["timestamp"]),
        (header(timestamp=struct.pack(">Q", 1_772_000_000_123_456)), ["timestamp"]),
        (header(timestamp=struct.pack(">Q", 1_772_000_000_123)), []),
        (header(timestamp=bytes(8)), []),
        (header(headers=table(a=b"T" + struct.pack(">Q", 2**60))), ["headers"]),
        (header(headers=table(a=b"A" + sized(b"T" + struct.pack(">Q", 2**60)))), ["headers"]),
        (header(headers=table_of((b"\xff\xfe", text(b"a")))), ["headers"]),
        (header(headers=table(a=b"F" + table_of((b"\xff", b"V")))), ["headers"]),
        (header(headers=table_of(*[(b"a", b"V")] * 4_096)), []),
        (header(headers=table_of(*[(b"a", b"V")] * 4_097)), ["headers"]),
        (header(headers=table(a=b"A" + sized(b"V" * 4_096))), ["headers"]),
        (header(headers=table(a=nested(32))), []),
        (header(headers=table(a=nested(33))), ["headers"]),
        (header(headers=table(a=b"Zabc")), ["headers"]),
        (header(headers=table(a=b"S\x00\x00\x01\x00abc")), ["headers"]),
        (header(headers=table(a=b"A" + sized(b"S\x00\x00\x01\x00abc"))), ["headers"]),
        (header(headers=table(a=b"F" + sized(b"\x05a"))), ["headers"]),
        (header(headers=sized(b"\x09a")), ["headers"]),
        (header(headers=table(a=text(b"\xff\xfe"))), []),
        (header(headers=table(a=b"d" + struct.pack(">d", float("nan")))), []),
        (header(headers=table(a=b"D\xff" + struct.pack(">i", -5))), []),
        (header(headers=table_of((b"", b"V"))), []),
        (header(headers=b"\x00\x00\x00\x09"), ["properties"]),
        (header(message_id=b"\x09abc"), ["properties"]),
        (header(), []),
        (header() + b"abc", ["properties"]),
        (header()[:-2] + b"\x00\x01\x00\x00", ["properties"]),
        (header()[:-2] + b"\x00\x02", ["properties"]),
        (b"", ["properties"]),
    ],
)
def test_what_cannot_be_decoded_is_named(content_header, unreadable):
    assert Properties(content_header).unreadable == unreadable


def test_headers_are_texts_and_those_of_rabbitmq_and_diator_are_not_among_them():
    properties = Properties(
        header(
            headers=table_of(
                (b"text", text("ä".encode())),
                (b"bytes", b"x" + sized(b"\xff")),
                (b"true", b"t\x01"),
                (b"int", b"I" + struct.pack(">i", -7)),
                (b"double", b"d" + struct.pack(">d", 1e300)),
                (b"decimal", b"D\x02" + struct.pack(">i", -31415)),
                (b"time", b"T" + struct.pack(">Q", 1_772_000_000)),
                (b"void", b"V"),
                (b"table", nested(1)),
                (b"x-death", text(b"")),
                (b"x-delivery-count", b"I" + struct.pack(">i", 7)),
                (b"diator-attempt", b"I" + struct.pack(">i", 7)),
                (b"\xff", text(b"")),
            )
        )
    )

    assert properties.headers() == {
        "text": "ä",
        "bytes": "\ufffd",
        "true": "True",
        "int": "-7",
        "double": "1e+300",
        "decimal": "-31415E-2",
        "time": "1772000000",
        "table": "",
    }


@pytest.mark.parametrize(
    ("value", "count"),
    [(b"b\x07", 7), (b"b\xff", 0), (b"l" + struct.pack(">q", 2**40), 2**40), (text(b"7"), 0), (b"t\x01", 0), (b"V", 0)],
)
def test_a_count_is_a_whole_number_above_0(value, count):
    assert Properties(header(headers=table(n=value))).count("n") == count
    assert Properties(header()).count("n") == 0


def test_a_delivery_is_read_whatever_its_routing_key_is():
    method = (
        b"\x00\x3c\x00\x3c" + short(b"queue") + struct.pack(">QB", 2**40, 1) + short(b"diator") + short(b"\xff\xfe")
    )

    assert Deliver.read(method) == ("queue", 2**40, True, b"diator")


# -- writing again -----------------------------------------------------------------------------------------------


def test_each_property_is_byte_for_byte_as_it_came():
    names = ["content_type", "content_encoding", "correlation_id", "reply_to", "message_id", "message_type"]
    came = commands.Basic.Properties(**{name: name for name in names}, app_id="a", priority=255, delivery_mode=2)
    came.headers = {"a": 1}
    written = ContentHeader(0, 2, came).marshal().replace(table(a=b"b\x01"), ODD)

    again = Properties(written).again(2, {}, deaths=False)

    assert again == written


#: What client libraries write in another form than they have read.
ODD = table_of(
    (b"n" * 255, b"f" + struct.pack(">f", 0.1)),
    (b"d", b"d" + struct.pack(">d", 1e300)),
    (b"ms", b"T" + struct.pack(">Q", 1_772_000_000_123)),
    (b"l", b"l" + struct.pack(">q", 1)),
    (b"u", b"i" + b"\xff" * 4),
    (b"x", b"x" + sized(b"\xff\x00")),
    (b"F", nested(32)),
    (b"", b"V"),
)


def test_what_rabbitmq_would_act_upon_has_another_name():
    elsewhere = b"A" + sized(text(b"elsewhere"))
    came = header(
        headers=table_of((b"CC", elsewhere), (b"BCC", elsewhere), (b"x-death", b"V"), (b"x-delivery-count", b"b\x07")),
        delivery_mode=b"\x01",
        expiration=short(b"60000"),
        user_id=short(b"somebody"),
    )

    again = Properties(came).again(9, {"diator-attempt": 3}, deaths=True)

    expected = table_of(
        (b"diator-attempt", b"l" + (3).to_bytes(8)),
        (b"diator-original-expiration", text(b"60000")),
        (b"diator-original-user-id", text(b"somebody")),
        (b"diator-original-CC", elsewhere),
        (b"diator-original-BCC", elsewhere),
        (b"diator-original-x-death", b"V"),
    )
    assert again == header(size=9, headers=expected, delivery_mode=b"\x02")


def test_a_direct_reply_to_would_close_the_channel():
    """Programs of other protocols can send it; RabbitMQ refuses it on a channel that consumes no replies."""
    came = header(reply_to=short(b"amq.rabbitmq.reply-to"), message_id=ID)
    usual = header(headers=table(), delivery_mode=b"\x02", reply_to=short(b"amq.rabbitmq.reply-to.x"), message_id=ID)

    assert Properties(came).again(2, {}, deaths=True) == header(
        headers=table_of((b"diator-original-reply-to", text(b"amq.rabbitmq.reply-to"))),
        delivery_mode=b"\x02",
        message_id=ID,
    )
    assert Properties(usual).again(2, {}, deaths=True) == usual


def test_deaths_that_rabbitmq_has_written_are_dropped():
    came = header(headers=table_of((b"x-death", b"V"), (b"x-first-death-queue", b"V"), (b"a", b"V")), message_id=ID)

    assert Properties(came).again(2, {}, deaths=False) == header(
        headers=table(a=b"V"), delivery_mode=b"\x02", message_id=ID
    )


def test_a_name_that_would_be_too_long_with_its_new_beginning_is_dropped():
    longest, too_long = b"x-death" + b"n" * 232, b"x-death" + b"n" * 233
    came = header(headers=table_of((longest, b"V"), (too_long, b"V")), message_id=ID)

    assert Properties(came).again(2, {}, deaths=True) == header(
        headers=table_of((b"diator-original-" + longest, b"V")), delivery_mode=b"\x02", message_id=ID
    )


def test_a_dead_letter_lacks_what_cannot_be_decoded_and_nothing_else():
    came = header(
        headers=table_of((b"good", text(b"1")), (b"\xff", text(b"2")), (b"late", b"T" + b"\xff" * 8)),
        message_id=short(b"\xff"),
        timestamp=b"\xff" * 8,
    )
    properties = Properties(came)

    again = Properties(properties.again(2, {}, deaths=True, only_readable=True))
    whole = Properties(properties.again(2, {}, deaths=True))

    assert properties.unreadable == ["message-id", "headers", "timestamp"]
    assert (again.unreadable, again.headers()) == ([], {"good": "1"})
    assert whole.unreadable == properties.unreadable


def test_a_retry_has_the_headers_that_were_not_read():
    values = table_of(*[(b"a", b"V")] * 5_000)
    properties = Properties(header(headers=values, delivery_mode=b"\x02", message_id=ID))

    assert properties.again(2, {}, deaths=True) == header(headers=values, delivery_mode=b"\x02", message_id=ID)
    assert Properties(properties.again(2, {}, deaths=True, only_readable=True)).unreadable == []


def test_a_dead_letter_can_lack_its_headers():
    properties = Properties(header(headers=table(a=text(b"1")), message_id=short(b"id")))

    again = Properties(properties.again(2, {"diator-dlq-reason": "r"}, deaths=True, with_headers=False))

    assert (again.headers(), again.key) == ({"diator-dlq-reason": "r"}, "id")


@pytest.mark.parametrize("properties", [{}, {"message_id": short(b"\xff")}, {"message_id": short(b"")}])
def test_a_message_without_an_id_is_recognised_by_a_header(properties):
    came = Properties(header(headers=table_of((b"diator-publication-id", text(b"forged"))), **properties))

    first, second = (again(came, {}, b"{}", "queue", deaths=True) for _ in range(2))

    assert first.key != second.key
    assert (Properties(first.header).key, Properties(second.header).key) == (first.key, second.key)


def test_a_message_with_an_id_is_recognised_by_that():
    publication = again(Properties(header(message_id=ID)), {}, b"{}", "queue", deaths=True)

    assert (publication.key, Properties(publication.header).key) == ("id", "id")


def test_added_headers_replace_those_of_the_same_name():
    came = header(headers=table_of((b"a", text(b"old")), (b"a", text(b"older"))), message_id=short(b"id"))

    assert Properties(Properties(came).again(2, {"a": "new"}, deaths=True)).headers() == {"a": "new"}


def test_what_diator_sends_is_readable():
    message_id = str(uuid4())
    properties = Properties(header_of("Joined", message_id, {"key": "k"}, 2))

    assert (properties.unreadable, properties.headers(), properties.key) == ([], {"key": "k"}, message_id)
