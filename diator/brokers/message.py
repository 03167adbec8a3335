"""`Message`: what a program sends through a broker, `Topic`: where it goes, and `Codec`: how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, NamedTuple, Protocol, Self, TypeAlias, cast, overload
from uuid import UUID, uuid4

from diator._hints import described
from diator.exceptions import EncodingError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Topic(NamedTuple):
    """
    The destination of a message: its type and its name. A subscription reads one or more topics.

    Each part may be any text, and so may the name of a group. Two different topics are two destinations: a transport
    encodes them for its service so that they never collide, whatever the service does with separators, wildcards,
    upper and lower case, or long names. If a transport cannot encode a topic or a group, sending raises
    `MessageRejected` and subscribing raises `ConfigurationError`.

    Attributes:
        message_type: The kind of the message, such as `notification_event`.
        message_name: The wire name of the event.
    """

    message_type: str
    message_name: str


@dataclass(frozen=True, kw_only=True, init=False)
class Message:
    """
    A message that a broker sends: its type and name, an id, and a payload that is already encoded as JSON.

    The payload is encoded when the message is made. So a payload that JSON cannot represent fails inside the unit of
    work, and a later change to the event does not change the message. The `repr` contains neither payload nor key nor
    headers, so that no log does.

    Attributes:
        message_type: `notification_event`, `ecst_event`, or a type that the program defines.
        message_name: The wire name of the event.
        message_id: The id of the message; a duplicate has the same id.
        payload_json: A JSON object, encoded as UTF-8.
        key: Messages with the same key keep their order, if the transport keeps any order.
        headers: Metadata about the message, such as a trace context or a correlation id.
        codec: Writes the message in another envelope than diator's own; None for diator's own.
        time: When the event happened, for a codec whose envelope says so. The emitter sets it if it has a codec.

    A program may pass a *payload* of plain JSON values instead of *payload_json*. The id is random unless it is passed.

    Raises:
        EncodingError: *payload* contains something that JSON cannot represent.
    """

    message_type: str
    message_name: str
    message_id: UUID
    payload_json: bytes = field(repr=False)
    key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    codec: Codec | None = field(default=None, repr=False)
    time: datetime | None = field(default=None, repr=False)

    #: The body up to the id, if the emitter has set it: the same for all events of a class.
    _beginning: ClassVar[bytes] = b""

    @overload
    def __init__(
        self,
        *,
        message_type: str,
        message_name: str,
        message_id: UUID,
        payload_json: bytes,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        codec: Codec | None = None,
        time: datetime | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        message_type: str,
        message_name: str,
        message_id: UUID | None = None,
        payload: Mapping[str, object],
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        codec: Codec | None = None,
        time: datetime | None = None,
    ) -> None: ...
    def __init__(
        self,
        *,
        message_type: str,
        message_name: str,
        message_id: UUID | None = None,
        payload: Mapping[str, object] | None = None,
        payload_json: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        codec: Codec | None = None,
        time: datetime | None = None,
    ) -> None:
        if (payload is None) == (payload_json is None):
            raise TypeError("Message needs either payload or payload_json; replace() needs payload_json")
        fields: dict[str, object] = {
            "message_type": message_type,
            "message_name": message_name,
            "message_id": message_id or uuid4(),
            "payload_json": payload_json if payload is None else _encoded(message_name, payload),
            "key": key,
            "headers": headers or {},
            "codec": codec,
            "time": time,
        }
        set_fields(self, fields)

    @classmethod
    def create(
        cls,
        *,
        message_name: str,
        payload: Mapping[str, object],
        message_type: str = "notification_event",
        message_id: UUID | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        codec: Codec | None = None,
        time: datetime | None = None,
    ) -> Self:
        """Return a message with *payload*: a notification event by default. As the constructor."""
        return cls(
            message_type=message_type,
            message_name=message_name,
            message_id=message_id,
            payload=payload,
            key=key,
            headers=headers,
            codec=codec,
            time=time,
        )

    @property
    def payload(self) -> dict[str, Json]:
        """Return the payload, parsed again at each access. `diator.brokers.codec` decodes payloads into events."""
        import json  # noqa: PLC0415  # used rarely; without it, importing diator is faster

        parsed: dict[str, Json] = json.loads(self.payload_json)
        return parsed


#: The limit of all headers of a message together, in bytes: more is refused by Kafka, and does not fit into one frame
#: of RabbitMQ.
MAX_HEADER_BYTES = 60 * 1024
#: The limit of one name, in bytes: that of AMQP.
_MAX_NAME_BYTES = 255
#: What a header takes besides its name and value, in bytes.
_HEADER_BYTES = 16
_RESERVED = "diator-"


def check_headers(headers: object, source: str) -> None:
    """
    Check headers that *source* chose: for a message that is sent, not for one that was received.

    Raises:
        EncodingError: They are not texts, a name is not valid or reserved, or they are too large. The text of the error
            contains nothing of them.
    """
    size, name, value = 0, "", ""
    try:
        for name, value in cast("Mapping[str, str]", headers).items():
            name_bytes = len(str.encode(name))
            if name != name.lower() or not 0 < name_bytes <= _MAX_NAME_BYTES or not name.isprintable() or " " in name:
                problem = f"a name must be lower-case, without spaces, and of 1 to {_MAX_NAME_BYTES} bytes"
                raise EncodingError(source, problem)
            if name == "key" or name.startswith(_RESERVED):
                raise EncodingError(source, f"`key` and names that begin with `{_RESERVED}` are reserved")
            size += name_bytes + len(str.encode(value)) + _HEADER_BYTES
    except UnicodeEncodeError:
        raise EncodingError(source, "a name or a value is not valid Unicode") from None
    except (TypeError, AttributeError):
        for each in cast("tuple[object, object]", (name, value)):
            if not isinstance(each, str):
                raise EncodingError(source, f"names and values must be text, and one is {described(each)}") from None
        raise EncodingError(source, f"headers must be a dictionary of texts, and it is {described(headers)}") from None
    if size > MAX_HEADER_BYTES:
        raise EncodingError(source, f"the headers have {size:,} bytes, and all together may have {MAX_HEADER_BYTES:,}")


class Codec(Protocol):
    """
    An envelope: how a message becomes a body and headers, and back. Pass it to an `EventEmitter` and to a `Consumer`.

    Without a codec, messages have diator's own envelope. `diator.brokers.cloudevents.CloudEvents` is a codec, and a
    program may write its own. Any transport carries its messages, and keeps their body and headers as they are when it
    retries or dead-letters them. A codec has no state that a call changes: several emitters and consumers may use it.
    """

    def encode(self, message: Message, /, *, headers_in_body: bool) -> bytes:
        """
        Return the body of *message*.

        With *headers_in_body* the transport has no headers of its own: the body has to contain the key and the headers.

        Raises:
            EncodingError: The envelope cannot hold this message.
            ConfigurationError: The codec needs headers, and the transport has none.
        """
        ...

    def headers(self, message: Message, /, *, attribute_prefix: str) -> Mapping[str, str]:
        """
        Return the headers of *message*, for a transport that has headers of its own.

        They include the headers of the program and the key, if `encode` does not write them into the body. A header
        `content-type` is the media type of the body; on RabbitMQ it becomes the property of this name.

        *attribute_prefix* is how the names of headers begin in CloudEvents' binding for this service, such as `ce_`.

        Raises:
            EncodingError: The envelope cannot hold this message.
        """
        ...

    def decode(self, body: bytes, headers: Mapping[str, str], topic: Topic, /) -> Message:
        """
        Return the message that was received from *topic*. The consumer dead-letters a message that names another event.

        *headers* are the service's own; empty if the transport has none. The returned message has the headers of the
        sender without those of the envelope.

        Raises:
            DecodingError: The message has not this envelope. The text contains nothing of the message.
        """
        ...


def _encoded(message_name: str, payload: Mapping[str, object]) -> bytes:
    import json  # noqa: PLC0415  # as above

    try:
        payload_json = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"{message_name}.payload", str(error)) from error
    parsed: object = json.loads(payload_json)
    if parsed != payload or not isinstance(parsed, dict):
        raise EncodingError(
            f"{message_name}.payload", "the payload must be an object of plain JSON values with text as keys"
        )
    return payload_json


#: Set all fields of a message at once: for `object.__new__(Message)`, where the constructor would take three times as
#: long, and a function for both a third longer.
set_fields: Callable[[Message, dict[str, object]], None] = Message.__dict__["__dict__"].__set__
