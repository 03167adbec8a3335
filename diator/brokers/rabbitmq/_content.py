"""
What stands around a body in AMQP 0-9-1: how it was delivered, and its properties, read and changed as bytes.

No client library decodes the properties of a received message. A library reads less than others may write, and writes
what it has read in another form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

# What the payload of a content header frame begins with: class, weight, size of the body, and flags.
HEADER = struct.Struct(">HHQH")
BASIC = 60
# The properties in their order on the wire, which is that of their flags.
_NAMES = (
    *("content-type", "content-encoding", "headers", "delivery-mode", "priority", "correlation-id", "reply-to"),
    *("expiration", "message-id", "timestamp", "type", "user-id", "app-id", "cluster-id"),
)
_FLAGS = {name: 1 << 15 - index for index, name in enumerate(_NAMES)}
# The sizes of those that are not texts; 0: the table of headers, which begins with its size.
_SIZES = {"headers": 0, "delivery-mode": 1, "priority": 1, "timestamp": 8}
_PERSISTENT = b"\x02"

#: The property with the media type of the body. It is a header in a `Delivery`, unless it is this one.
CONTENT_TYPE, JSON = "content-type", "application/json"
JSON_FIELD = b"\x10" + JSON.encode()

# The kinds of values in a table: those that begin with their size, and those of a fixed size.
_TEXT, _BYTES, _TABLE, _LIST, _TIME, _DECIMAL = b"SxFATD"
_SIZED = frozenset({_TEXT, _BYTES, _TABLE, _LIST})
_FIXED = {
    ord(kind): struct.Struct(f">{layout}")
    for kind, layout in zip("tbBsuIilLfdDTV", (*"?bBhHiIqqfd", "Bi", "Q", ""), strict=True)
}
_INTEGERS = b"bBsuIilL"
_VOID = b"V"
# The end of the year 9999 in milliseconds, as a time on the wire: some clients write them in place of seconds.
_LATEST = (253_402_300_799_999).to_bytes(8)
# Tables and lists are read that are nested so deep.
_MAX_DEPTH = 32
# So many values are read, those in tables and lists among them. More would take a consumer more than 10 ms.
_MAX_VALUES = 4_096

# The header of a retried message that counts the deliveries before.
ATTEMPT = "diator-attempt"
# The header in which a quorum queue counts the deliveries that nobody settled.
DELIVERY_COUNT = "x-delivery-count"
# After this many unsettled deliveries RabbitMQ itself dead-letters a message. It is far above any retry policy.
DELIVERY_LIMIT = 1_000
# The header by which a returned message is recognised if it has no message-id.
PUBLICATION_ID = "diator-publication-id"
# How the names of the headers start that RabbitMQ adds when it dead-letters a message.
_DEATHS = (b"x-death", b"x-first-death-", b"x-last-death-")
# How the names of the headers start that RabbitMQ or diator writes, and no program.
RESERVED = (*(name.decode() for name in _DEATHS), DELIVERY_COUNT, "x-acquired-count", ATTEMPT, PUBLICATION_ID)
_RESERVED = tuple(name.encode() for name in RESERVED)
# Headers that RabbitMQ routes by.
ROUTING = frozenset({"CC", "BCC"})
_ROUTING = frozenset(name.encode() for name in ROUTING)
# The reply-to with which only a channel may publish that consumes the replies.
_DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"
# How the name of a header starts that holds what RabbitMQ would act upon under its own name.
_ORIGINAL = b"diator-original-"
_LONGEST_NAME = 255


class Deliver(NamedTuple):
    """
    How RabbitMQ delivers a message. The routing key is not read: it may be any bytes.

    Attributes:
        consumer_tag: The consumer that it is delivered to.
        delivery_tag: The number by which it is settled.
        redelivered: Whether it was delivered before.
        exchange: The exchange that it was published to.
    """

    consumer_tag: str
    delivery_tag: int
    redelivered: bool
    exchange: bytes

    @classmethod
    def read(cls, method: bytes) -> Deliver:
        """Decode the payload of the frame."""
        at = 5 + method[4]
        tag = int.from_bytes(method[at : at + 8])
        return cls(method[5:at].decode(), tag, bool(method[at + 8]), method[at + 10 : at + 10 + method[at + 9]])


class Properties:
    """
    The properties of a message. To read them never fails, and takes a time that grows with their size alone.

    Attributes:
        unreadable: The properties that cannot be decoded; `headers` if that is true of one of them.
    """

    __slots__ = ("_fields", "_headers", "_unread", "unreadable")

    def __init__(self, header: bytes) -> None:
        """*header* is the payload of a content header frame."""
        self._fields: dict[str, bytes] = {}  # in the order on the wire
        self._headers: list[tuple[bytes, bytes, bool]] = []  # the name, the value, and whether both can be decoded
        self._unread = b""  # the rest of the table
        self.unreadable: list[str] = []
        try:
            at = HEADER.size
            for name, size in _layout(header[12] << 8 | header[13]):
                if size is None:
                    end = at + 1 + header[at]
                    if not _is_text(header[at + 1 : end]):
                        self.unreadable.append(name)
                else:
                    end = at + (size or 4 + int.from_bytes(header[at : at + 4]))
                self._fields[name] = header[at:end]
                at = end
        except (LookupError, ValueError):
            at = -1
        if at != len(header):
            self._fields, self.unreadable = {}, ["properties"]
        if "headers" in self._fields and not self._read_headers(self._fields["headers"]):
            self.unreadable.append("headers")
        if self._fields.get("timestamp", b"") > _LATEST:
            self.unreadable.append("timestamp")

    def _read_headers(self, table: bytes) -> bool:
        at, good, left = 4, True, iter(range(_MAX_VALUES))
        try:
            while at < len(table):
                start = at + 1 + table[at]
                end = _end(table, start)
                name = table[at + 1 : start]
                readable = _is_readable(table, start, end, left) and _is_text(name)
                self._headers.append((name, table[start:end], readable))
                at, good = end, good and readable
        except (LookupError, ValueError, StopIteration):
            self._unread, good = table[at:], False
        return good

    def headers(self) -> dict[str, str]:
        """
        Return the headers of the program that sent the message, as texts; a table or a list is an empty one.

        The content type is one of them, unless it is JSON.
        """
        headers = {
            text: _text(value)
            for name, value, readable in self._headers
            if readable and value != _VOID and not (text := name.decode()).startswith(RESERVED)
        }
        if self._fields.get(CONTENT_TYPE, JSON_FIELD) != JSON_FIELD and (content_type := self.text(CONTENT_TYPE)):
            headers.setdefault(CONTENT_TYPE, content_type)
        return headers

    def count(self, header: str) -> int:
        """Return the number in *header*; 0 if there is no number above 0."""
        for name, value, _ in self._headers:
            if name == header.encode() and value[0] in _INTEGERS:
                number: int = _FIXED[value[0]].unpack(value[1:])[0]
                return max(0, number)
        return 0

    def text(self, name: str) -> str:
        """Return the property of this name, which is a text; empty if there is none that can be decoded."""
        return "" if name in self.unreadable else self._fields.get(name, b"\0")[1:].decode()

    def header(self, name: str) -> str:
        """Return the header of this name as a text; empty if there is none."""
        return next((_text(value) for each, value, _ in self._headers if each == name.encode()), "")

    @property
    def timestamp(self) -> int | None:
        """Return the timestamp, in seconds since 1970; None if there is none that can be decoded."""
        field = self._fields.get("timestamp")
        return None if field is None or "timestamp" in self.unreadable else int.from_bytes(field)

    @property
    def key(self) -> str:
        """Return what a returned message is recognised by: its message-id, or else the header in its place."""
        return self.text("message-id") or self.header(PUBLICATION_ID)

    def again(
        self,
        size: int,
        added: Mapping[str, str | int],
        *,
        deaths: bool,
        only_readable: bool = False,
        with_headers: bool = True,
    ) -> bytes:
        """
        Return the payload of a content header frame for the same message, with the headers *added*.

        Every property is byte for byte as it came, but: the message is persistent, and what RabbitMQ would act upon
        once more has another name, which starts with `diator-original-`.

        Args:
            size: The size of the body.
            added: Headers, which replace those of the same name.
            deaths: Whether to keep the `x-death` headers, under another name: those that came from the sender.
            only_readable: Whether to leave out what cannot be decoded.
            with_headers: Whether to keep headers.
        """
        left_out = self.unreadable if only_readable else ()
        fields = {name: field for name, field in self._fields.items() if name not in left_out}
        headers = {name.encode(): _value(text) for name, text in added.items()}
        replies_directly = self.text("reply-to") == _DIRECT_REPLY_TO
        for acted_upon in ("expiration", "user-id", *(("reply-to",) if replies_directly else ())):
            if field := fields.pop(acted_upon, None):
                headers[_ORIGINAL + acted_upon.encode()] = _long_text(field[1:])
        entries = [*headers.items()]
        for name, value, readable in self._headers if with_headers else ():
            kept = _name_again(name, deaths=deaths) if readable or not only_readable else None
            if kept is not None and kept not in headers:
                entries.append((kept, value))
        table = b"".join(b"%c%b%b" % (len(name), name, value) for name, value in entries)
        if with_headers and not only_readable:
            table += self._unread
        fields |= {"delivery-mode": _PERSISTENT, "headers": len(table).to_bytes(4) + table}
        flags = sum(_FLAGS[name] for name in fields)
        return HEADER.pack(BASIC, 0, size, flags) + b"".join(fields[name] for name in _FLAGS if name in fields)


def _name_again(name: bytes, *, deaths: bool) -> bytes | None:
    """Return the name under which a header is published again; None if it is not."""
    if name in _ROUTING or (deaths and name.startswith(_DEATHS) and len(name) <= _LONGEST_NAME - len(_ORIGINAL)):
        return _ORIGINAL + name
    return None if name.startswith(_RESERVED) else name


@lru_cache(maxsize=256)
def _layout(flags: int) -> Sequence[tuple[str, int | None]]:
    if flags & 3:
        raise ValueError("flags of properties that AMQP does not have")
    return [(name, _SIZES.get(name)) for name, flag in _FLAGS.items() if flags & flag]


def _end(data: bytes, at: int) -> int:
    """Return where the value ends whose kind is at *at*."""
    kind = data[at]
    end = at + (5 + int.from_bytes(data[at + 1 : at + 5]) if kind in _SIZED else 1 + _FIXED[kind].size)
    if end > len(data):
        raise ValueError("a size is wrong")
    return end


def _is_readable(data: bytes, at: int, end: int, left: Iterator[int], depth: int = 0) -> bool:
    """Return whether the value from *at* to *end* can be decoded, with all in it. StopIteration if none is *left*."""
    next(left)
    kind, at = data[at], at + 1
    if kind == _TIME:
        return data[at:end] <= _LATEST
    if kind not in (_TABLE, _LIST):
        return True
    if depth == _MAX_DEPTH:
        return False
    at += 4
    while at < end:
        if kind == _TABLE:
            name, at = data[at + 1 : at + 1 + data[at]], at + 1 + data[at]
            if not _is_text(name):
                return False
        ends = _end(data, at)
        if ends > end or not _is_readable(data, at, ends, left, depth + 1):
            return False
        at = ends
    return at == end


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text(value: bytes) -> str:
    kind, data = value[0], value[1:]
    if kind in _SIZED:
        return data[4:].decode(errors="replace") if kind in (_TEXT, _BYTES) else ""
    numbers = _FIXED[kind].unpack(data)
    return f"{numbers[1]}E-{numbers[0]}" if kind == _DECIMAL else str(*numbers)


def _value(value: str | int) -> bytes:
    return b"l" + value.to_bytes(8) if isinstance(value, int) else _long_text(value.encode(errors="replace"))


def _long_text(text: bytes) -> bytes:
    return b"S" + len(text).to_bytes(4) + text
