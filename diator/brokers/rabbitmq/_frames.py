"""How a message is encoded for RabbitMQ, in AMQP 0-9-1."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from time import time
from typing import Any, NamedTuple
from uuid import uuid4

from diator.brokers.rabbitmq._channel import Channel
from diator.brokers.rabbitmq._client import ContentHeader, commands, marshal
from diator.exceptions import EncodingError

_FRAME = struct.Struct(">BHI")
# How many bytes a frame has besides its payload.
_OVERHEAD = 8
_HEADER = struct.Struct(">HHQH")
_BASIC = 60
_FLAGS = 1 << 15 | 1 << 12 | 1 << 7 | 1 << 6 | 1 << 5  # content_type, delivery_mode, message_id, timestamp, type
_HEADERS_FLAG = 1 << 13
_JSON = b"\x10application/json"
_PERSISTENT = b"\x02"


class Publication(NamedTuple):
    """
    A message as it is published.

    Attributes:
        exchange: The exchange that it goes to; the empty name is the default exchange.
        routing_key: What the exchange routes it by.
        header: The payload of its content header frame.
        body: Its body.
        message_id: The id in its header. RabbitMQ returns an unroutable message without naming the publication.
        mandatory: Whether RabbitMQ returns it if no queue wants it.
    """

    exchange: str
    routing_key: str
    header: bytes
    body: bytes
    message_id: str
    mandatory: bool

    def frames(self, frame_max: int) -> bytes:
        """Encode all of it, in frames of at most *frame_max* bytes. ValueError if its headers do not fit into one."""
        most, body = frame_max - _OVERHEAD, self.body
        if len(self.header) > most:
            raise ValueError(f"its headers have {len(self.header):,} bytes, and RabbitMQ accepts {most:,}")
        parts = [_framed(3, body[start : start + most]) for start in range(0, len(body), most)]
        return _publish(self.exchange, self.routing_key, self.mandatory) + _framed(2, self.header) + b"".join(parts)


def _framed(kind: int, payload: bytes) -> bytes:
    """Encode a frame: kind 2 is the header of a message, 3 a part of its body."""
    return b"%b%b\xce" % (_FRAME.pack(kind, Channel.NUMBER, len(payload)), payload)


@lru_cache(maxsize=1024)
def _publish(exchange: str, routing_key: str, mandatory: bool) -> bytes:  # noqa: FBT001
    frame = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=mandatory)
    return marshal(frame, Channel.NUMBER)


def header_of(name: str, message_id: str, headers: Mapping[str, str], size: int) -> bytes:
    """
    Encode the properties of a message whose body has *size* bytes.

    Raises:
        EncodingError: A header is not valid Unicode, or its name is too long.
    """
    try:
        kind, table = _short(name, 255), b""
        for each, value in headers.items():
            text = value.encode()
            table += _short(each, 128) + b"S" + len(text).to_bytes(4) + text
    except (UnicodeEncodeError, ValueError) as error:
        raise EncodingError(f"{name}.headers", str(error)) from error
    flags, properties = _FLAGS, _JSON
    if table:
        flags, properties = _FLAGS | _HEADERS_FLAG, _JSON + len(table).to_bytes(4) + table
    known = b"%b%b\x24%b%b" % (properties, _PERSISTENT, message_id.encode(), int(time()).to_bytes(8))
    return _HEADER.pack(_BASIC, 0, size, flags) + known + kind


def _short(text: str, most: int) -> bytes:
    encoded = text.encode()
    if len(encoded) > most:
        raise ValueError(f"a name has {len(encoded)} bytes, and AMQP accepts {most}")
    return b"%c%b" % (len(encoded), encoded)


def again(header: ContentHeader, headers: Mapping[str, Any], body: bytes, queue: str) -> Publication:
    """Make a publication to *queue* from a received message, with other *headers*, and with an id if it had none."""
    properties = header.properties
    properties.message_id = properties.message_id or str(uuid4())
    properties.headers = _writable(headers)
    properties.delivery_mode = 2
    properties.expiration = None
    properties.user_id = None  # RabbitMQ refuses any other user than the connection's
    written = ContentHeader(0, len(body), properties).marshal()
    return Publication("", queue, written, body, properties.message_id, mandatory=True)


def _writable(value: Any) -> Any:
    """Turn bytes, at any depth, into the bytearrays that pamqp encodes as bytes: it decodes them to bytes."""
    if isinstance(value, Mapping):
        return {name: _writable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_writable(each) for each in value]
    return bytearray(value) if isinstance(value, bytes) else value
