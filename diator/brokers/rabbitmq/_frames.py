"""How a message is encoded for RabbitMQ, in AMQP 0-9-1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from time import time
from typing import NamedTuple
from uuid import UUID, uuid4

from diator.brokers.rabbitmq._channel import Channel
from diator.brokers.rabbitmq._client import (
    CONTENT_BODY,
    CONTENT_HEADER,
    FRAME,
    FRAME_END,
    FRAME_OVERHEAD,
    commands,
    marshal,
)
from diator.brokers.rabbitmq._content import BASIC, HEADER, JSON, JSON_FIELD, PUBLICATION_ID, Properties
from diator.exceptions import EncodingError

_FLAGS = 1 << 15 | 1 << 12 | 1 << 7 | 1 << 6 | 1 << 5  # content_type, delivery_mode, message_id, timestamp, type
_HEADERS_FLAG = 1 << 13
_PERSISTENT = b"\x02"


class Publication(NamedTuple):
    """
    A message as it is published.

    Attributes:
        exchange: The exchange that it goes to; the empty name is the default exchange.
        routing_key: What the exchange routes it by.
        header: The payload of its content header frame.
        body: Its body.
        key: What its header has as `Properties.key`: RabbitMQ returns an unroutable message without a number.
        message_id: Its id, if that is known.
        mandatory: Whether RabbitMQ returns it if no queue wants it.
    """

    exchange: str
    routing_key: str
    header: bytes
    body: bytes
    key: str
    message_id: UUID | None
    mandatory: bool

    def frames(self, frame_max: int) -> bytes:
        """Encode all of it, in frames of at most *frame_max* bytes. ValueError if its headers do not fit into one."""
        most, body = frame_max - FRAME_OVERHEAD, self.body
        if len(self.header) > most:
            raise ValueError(f"its headers have {len(self.header):,} bytes, and RabbitMQ accepts {most:,}")
        parts = [_framed(CONTENT_BODY, body[start : start + most]) for start in range(0, len(body), most)]
        method = _publish(self.exchange, self.routing_key, self.mandatory)
        return method + _framed(CONTENT_HEADER, self.header) + b"".join(parts)


def _framed(kind: int, payload: bytes) -> bytes:
    return b"%b%b%b" % (FRAME.pack(kind, Channel.NUMBER, len(payload)), payload, FRAME_END)


@lru_cache(maxsize=1024)
def _publish(exchange: str, routing_key: str, mandatory: bool) -> bytes:  # noqa: FBT001
    frame = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=mandatory)
    return marshal(frame, Channel.NUMBER)


def header_of(name: str, message_id: str, headers: Mapping[str, str], size: int, content_type: str = JSON) -> bytes:
    """
    Encode the properties of a message whose body has *size* bytes.

    Raises:
        EncodingError: A header is not valid Unicode, or its name is too long.
    """
    try:
        media_type = JSON_FIELD if content_type is JSON else _short(content_type, 255)
        kind, table = _short(name, 255), b""
        for each, value in headers.items():
            text = value.encode()
            table += _short(each, 128) + b"S" + len(text).to_bytes(4) + text
    except (UnicodeEncodeError, ValueError) as error:
        raise EncodingError(f"{name}.headers", str(error)) from error
    flags, properties = _FLAGS, media_type
    if table:
        flags, properties = _FLAGS | _HEADERS_FLAG, media_type + len(table).to_bytes(4) + table
    known = b"%b%b\x24%b%b" % (properties, _PERSISTENT, message_id.encode(), int(time()).to_bytes(8))
    return HEADER.pack(BASIC, 0, size, flags) + known + kind


def _short(text: str, most: int) -> bytes:
    encoded = text.encode()
    if len(encoded) > most:
        raise ValueError(f"a name has {len(encoded)} bytes, and AMQP accepts {most}")
    return b"%c%b" % (len(encoded), encoded)


def again(
    properties: Properties, added: Mapping[str, str | int], body: bytes, queue: str, **which: bool
) -> Publication:
    """Make a publication to *queue* of a received message, with the headers *added*; see `Properties.again`."""
    key = properties.text("message-id")
    if not key:
        key = uuid4().hex
        added = {**added, PUBLICATION_ID: key}
    try:
        message_id = UUID(key)
    except ValueError:
        message_id = None
    return Publication("", queue, properties.again(len(body), added, **which), body, key, message_id, mandatory=True)
