"""
CloudEvents 1.0: an envelope that programs in many languages know.

    codec = CloudEvents("https://shop.example/members")
    Mediator(request_map, event_map=event_map, message_broker=broker, codec=codec)
    Consumer(broker, event_map=event_map, codec=codec)

The data of a CloudEvent is the payload of the message. Its attributes are `id` (the id of the message), `source`,
`type` (the message name), `time` (when the event happened), `datacontenttype` (JSON), `partitionkey` (the key), and
one for each header of the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal, TypeAlias
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
import orjson

from diator._options import word
from diator.brokers.codec import decode, key_of
from diator.brokers.message import Message, Topic
from diator.exceptions import ConfigurationError, DecodingError, EncodingError

__all__ = ["CloudEvents"]

Mode: TypeAlias = Literal["structured", "binary"]

_VERSION = "1.0"
_JSON = "application/json"
_EVENT = "application/cloudevents"
_CONTENT_TYPE = "content-type"
_REQUIRED = ("specversion", "id", "source", "type")

#: Headers of diator whose attributes have other names, which CloudEvents' extension "correlation" has given them.
_ATTRIBUTES = {"correlation-id": "correlationid", "causation-id": "causationid"}
_HEADERS = {attribute: header for header, attribute in _ATTRIBUTES.items()}
#: Headers that no program may set: they would be read as something else.
_RESERVED = {*_REQUIRED, *_HEADERS, "time", "datacontenttype", "data", "partitionkey", "key", _CONTENT_TYPE}
_NAME = re.compile("[a-z0-9]+")
#: How the name of an attribute begins in a header: on Kafka, on RabbitMQ, in AMQP 1.0, and in JMS.
_PREFIX = re.compile("ce_|ce-|cloudevents:|cloudevents_", re.IGNORECASE)
#: What no value of an attribute may contain: control characters, lone surrogates, and what Unicode never assigns.
_NEVER_ASSIGNED = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_UNFIT = re.compile(rf"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_NEVER_ASSIGNED}]")
_JSON_TYPE = re.compile(r"[^/;]+/(?:[^/;]+\+)?json", re.IGNORECASE)

_SECONDS = re.compile("[0-9]{1,20}")
#: The year 5138 in seconds, or 1973 in milliseconds.
_LATEST_SECONDS = 100_000_000_000


class _Timed(msgspec.Struct):
    event_timestamp: str | None = None


_parse = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_parse_value = msgspec.json.Decoder(str | int | float | bool | None).decode
_parse_timed = msgspec.json.Decoder(_Timed).decode
_parse_data = msgspec.json.Decoder(msgspec.Raw).decode


class CloudEvents:
    """
    A codec that writes CloudEvents 1.0, and reads them in both modes. It also reads diator's own envelope.

    So a system can migrate in either direction: the consumers take this codec first, the senders follow one by one.

    In the mode `structured`, the body is one JSON object with attributes and data, on every transport. In the mode
    `binary`, the body is the data, and the attributes are headers: `ce_…` on Kafka and Redis Streams, `ce-…` on
    RabbitMQ. A transport without headers has only the first mode.

    A header of a message becomes the attribute of its name; `correlation-id` becomes `correlationid`, and
    `causation-id` becomes `causationid`. The name of an attribute has letters from a to z and digits. A header with
    another name stays a header beside the event; if the transport has no headers, it is an `EncodingError`.

    A reader gets `source`, `subject`, `dataschema` and every extension attribute as headers of the message. The message
    type is that of the topic. If the `id` is not a UUID, the message id follows from `source` and `id`, and is the same
    at each delivery.

    Args:
        source: The attribute `source`: a URI reference that names this program.
        mode: Which mode is written.
        type_prefix: What `type` has before the message name, such as `com.example.`.
        header_prefix: How the names of attributes begin in headers, instead of `ce_` and `ce-`: `cloudEvents:` for
            readers that use AMQP 1.0.

    Raises:
        ConfigurationError: An argument cannot be what it is for.
    """

    def __init__(
        self, source: str, *, mode: Mode = "structured", type_prefix: str = "", header_prefix: str | None = None
    ) -> None:
        if not _fits(source) or re.search(r"\s", source):
            raise ConfigurationError("source must be a URI reference that names this program, such as https://…/orders")
        if mode not in ("structured", "binary"):
            raise ConfigurationError(f"mode must be structured or binary, not {word(mode)}")
        if not _is_text(type_prefix):
            raise ConfigurationError("type_prefix must be text without control characters, such as com.example.")
        if header_prefix is not None and not _PREFIX.fullmatch(str(header_prefix)):
            raise ConfigurationError(
                f"header_prefix must be one of ce_, ce-, cloudEvents: and cloudEvents_, not {word(header_prefix)}"
            )
        self._source = source
        self._is_binary = mode == "binary"
        self._type_prefix = type_prefix
        self._header_prefix = header_prefix

    def __repr__(self) -> str:
        return f"CloudEvents({self._source!r}, mode={'binary' if self._is_binary else 'structured'!r})"

    # -- writing -------------------------------------------------------------------------------------------------

    def encode(self, message: Message, /, *, headers_in_body: bool) -> bytes:
        """See `Codec.encode`."""
        if self._is_binary:
            if headers_in_body:
                raise ConfigurationError(
                    "the binary mode of CloudEvents needs headers, and this transport has none; use the mode structured"
                )
            return message.payload_json
        attributes, beside = self._split(message)
        if headers_in_body and beside:
            raise EncodingError(
                f"{message.message_name}.headers",
                "this transport has no headers, and an attribute of a CloudEvent has only a-z and 0-9 in its name; "
                "give each header such a name",
            )
        return b"".join((orjson.dumps(attributes)[:-1], b',"data":', message.payload_json, b"}"))

    def headers(self, message: Message, /, *, attribute_prefix: str) -> Mapping[str, str]:
        """See `Codec.headers`."""
        attributes, beside = self._split(message)
        if not self._is_binary:
            return {_CONTENT_TYPE: f"{_EVENT}+json", **beside}
        content_type = attributes.pop("datacontenttype")
        prefix = self._header_prefix or attribute_prefix
        return {_CONTENT_TYPE: content_type, **{f"{prefix}{name}": attributes[name] for name in attributes}, **beside}

    def _split(self, message: Message) -> tuple[dict[str, str], dict[str, str]]:
        """Return the attributes of the event, and the headers that cannot be attributes."""
        attributes = {
            "specversion": _VERSION,
            "id": str(message.message_id),
            "source": self._source,
            "type": f"{self._type_prefix}{message.message_name}",
        }
        if time := _time_in(message.payload_json) if message.time is None else key_of(message.time):
            attributes["time"] = time
        attributes["datacontenttype"] = _JSON
        if message.key is not None:
            attributes["partitionkey"] = message.key
        for name in ("type", "partitionkey"):
            if not _fits(attributes.get(name, " ")):
                what = "name" if name == "type" else "key"
                raise EncodingError(
                    f"{message.message_name}.{what}".encode(errors="replace").decode(),
                    f"the attribute `{name}` of a CloudEvent must be text without control characters, and not empty",
                )
        beside: dict[str, str] = {}
        for name, value in message.headers.items():
            if not (_is_text(name) and _is_text(value)):
                problem = "a header of a CloudEvent must be text without control characters"
                raise EncodingError(f"{message.message_name}.headers", problem)
            if name in _RESERVED or _PREFIX.match(name):
                problem = f"the header {name!r} is reserved for CloudEvents"
                raise EncodingError(f"{message.message_name}.headers", problem)
            attribute = _ATTRIBUTES.get(name, name)
            (attributes if _NAME.fullmatch(attribute) else beside)[attribute] = value
        return attributes, beside

    # -- reading -------------------------------------------------------------------------------------------------

    def decode(self, body: bytes, headers: Mapping[str, str], topic: Topic, /) -> Message:
        """See `Codec.decode`."""
        attributes: dict[str, str] = {}
        beside: dict[str, str] = {}
        content_type = ""
        for name, value in headers.items():
            if prefix := _PREFIX.match(name):
                attributes[name[prefix.end() :].lower()] = value
            elif name.lower() == _CONTENT_TYPE:
                content_type = value
            else:
                beside[name] = value
        media_type = content_type.partition(";")[0].strip().lower()
        is_event = media_type.startswith(_EVENT)
        if is_event and media_type not in (_EVENT, f"{_EVENT}+json"):
            what = "a batch; send each event as a message" if "batch" in media_type else "in another format than JSON"
            raise DecodingError(f"the message is not one CloudEvent in JSON: it is {what}")
        if is_event or "specversion" not in attributes:
            fields = _fields(body)
            if not is_event and "message_type" in fields:  # no attribute can have this name
                return decode(body, max_bytes=len(body), headers=headers)
            if not is_event and "specversion" not in fields:
                raise DecodingError("the body is neither a CloudEvent nor a message of diator")
            data, data_base64 = fields.pop("data", None), fields.pop("data_base64", None)
            attributes = _attributes(fields)
            payload = _payload(data, data_base64)
        else:
            if media_type:
                attributes["datacontenttype"] = media_type
            if _SECONDS.fullmatch(attributes.get("time", "")):
                attributes["time"] = _rfc3339(int(attributes["time"]))
            payload = body
        return self._message(attributes, beside, payload, topic)

    def _message(self, attributes: dict[str, str], beside: dict[str, str], payload: bytes, topic: Topic) -> Message:
        for name in _REQUIRED:
            if not attributes.get(name):
                raise DecodingError(f"the message is not a CloudEvent: it has no `{name}`")
        if attributes.pop("specversion") != _VERSION:
            raise DecodingError(
                f"the message is not a CloudEvent that can be read: its `specversion` is not {_VERSION}"
            )
        if not _JSON_TYPE.fullmatch(attributes.pop("datacontenttype", _JSON).partition(";")[0].strip()):
            raise DecodingError("the data of the CloudEvent is not JSON: its `datacontenttype` says so")
        time = attributes.pop("time", None)
        key = beside.pop("key", None)
        key = attributes.pop("partitionkey", key)
        id_, type_ = attributes.pop("id"), attributes.pop("type")
        headers = {_HEADERS.get(name, name): value for name, value in attributes.items()}
        return Message(
            message_type=topic.message_type,
            message_name=type_.removeprefix(self._type_prefix),
            message_id=_message_id(attributes["source"], id_),
            payload_json=_checked(payload),
            key=key,
            headers=beside | headers,
            time=None if time is None else _time(time),
        )


def _is_text(value: object) -> bool:
    """Return whether an attribute can have this value."""
    # The search takes a multiple of the time of the test before it.
    return isinstance(value, str) and (value.isprintable() or not _UNFIT.search(value))


def _fits(value: object) -> bool:
    """Return whether an attribute that is required can have this value."""
    return value != "" and _is_text(value)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _parse(body)
    except (msgspec.DecodeError, RecursionError):
        pass
    # Here, not above: an error keeps the error that it was raised from, whose text quotes the message.
    if body.lstrip()[:1] == b"[":
        raise DecodingError("the body is a list: a batch of CloudEvents cannot be read; send each event as a message")
    raise DecodingError("the body is not a JSON object" if body.strip() else "the body is empty")


def _attributes(fields: Mapping[str, msgspec.Raw]) -> dict[str, str]:
    """Return the attributes of an event in JSON, as texts. Null counts as absent."""
    try:
        values = {name: _parse_value(raw) for name, raw in fields.items()}
    except (msgspec.DecodeError, RecursionError):
        values = None
    if values is None:
        raise DecodingError("the message is not a CloudEvent: an attribute is neither text nor number nor boolean")
    texts = {name: value for name, value in values.items() if value is not None}
    return {name: value if isinstance(value, str) else orjson.dumps(value).decode() for name, value in texts.items()}


def _payload(data: msgspec.Raw | None, data_base64: msgspec.Raw | None) -> bytes:
    if data is not None:
        return bytes(data)
    if data_base64 is None:
        raise DecodingError("the CloudEvent has no `data`")
    with suppress(msgspec.DecodeError, ValueError):
        return msgspec.json.decode(data_base64, type=bytes)
    raise DecodingError("the `data_base64` of the CloudEvent is not base64")


def _checked(payload: bytes) -> bytes:
    """Return *payload* if it is a JSON object."""
    payload = payload.strip()
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        payload.decode()  # msgspec does not validate a raw value
        _parse_data(payload)
        if payload[:1] == b"{":
            return payload
    raise DecodingError("the data of the CloudEvent is not a JSON object")


def _message_id(source: str, id_: str) -> UUID:
    """Return the id of a message. An event is identified by both; a UUID is enough."""
    with suppress(ValueError):
        message_id = UUID(id_)
        if id_.lower() in (str(message_id), message_id.hex):
            return message_id
    return uuid5(NAMESPACE_URL, f"{source} {id_}")


def _time_in(payload_json: bytes) -> str | None:
    """Return the `event_timestamp` of a payload, if it has one that other programs can read."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, DecodingError):
        if text := _parse_timed(payload_json).event_timestamp:
            _time(text)
            return text
    return None


def _time(text: str) -> datetime:
    with suppress(msgspec.ValidationError):
        time = msgspec.convert(text, datetime)
        if time.tzinfo is not None:
            return time
    raise DecodingError("the `time` of the CloudEvent is not a timestamp with a time zone")


def _rfc3339(seconds: int) -> str:
    """Return the text of a timestamp that came as a number, as AMQP may have it: of seconds, or of milliseconds."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds / 1000 if seconds > _LATEST_SECONDS else seconds, UTC).isoformat()
    return ""
