"""The properties of a message in AMQP 0-9-1, as bytes: what no client library writes."""

CONTENT_TYPE, HEADERS, DELIVERY_MODE, REPLY_TO, EXPIRATION, MESSAGE_ID, TIMESTAMP, USER_ID = (
    1 << bit for bit in (15, 13, 12, 9, 8, 7, 6, 4)
)


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def sized(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def text(value: bytes) -> bytes:
    return b"S" + sized(value)


def table(*entries: tuple[bytes, bytes]) -> bytes:
    return sized(b"".join(short(name) + value for name, value in entries))
