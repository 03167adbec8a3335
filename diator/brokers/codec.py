"""
The wire format: event → message → bytes, and back. No other module knows what a message looks like on the wire.

A program may choose another codec for its messages: `Message.codec`. The functions here then call that one.

The body is one JSON object with four keys: `message_type`, `message_name`, `message_id` and `payload`. It has a fifth
key, `headers`, only if the transport has no headers of its own and the message has headers or a key.

Other programs write the same format with their own habits. What can be read is read: null counts as absent, unknown
keys are ignored, and a header that is a number is read as text. Nothing is invented: see `event_decoder`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_type_hints
from uuid import UUID

import msgspec
import orjson

from diator._hints import name_of
from diator.brokers._standard import as_standard
from diator.brokers.message import Codec, Message, Topic, set_fields
from diator.brokers.payloads import difference, dump, names_in_json, plan_payload, wire_names
from diator.exceptions import DecodingError, DiatorError, EncodingError, MessageTooLarge

E = TypeVar("E")

#: The default size limit of an encoded message, in bytes.
MAX_MESSAGE_BYTES = 1024 * 1024

KEY = "key"

# -- message ↔ bytes ---------------------------------------------------------------------------------------------


def encode(message: Message, *, max_bytes: int = MAX_MESSAGE_BYTES, headers_in_body: bool = False) -> bytes:
    """
    Return the body of *message*, as it is sent.

    With *headers_in_body*, the body contains the headers and the key. Without it, the transport has to send them beside
    the body; `headers_with_key` returns them.

    Raises:
        MessageTooLarge: The body has more than *max_bytes* bytes.
        EncodingError: The type or the name is not valid Unicode, or (with *headers_in_body*) the key or a header is
            not; or the codec of the message cannot encode it.
        ConfigurationError: The codec of the message needs headers beside the body.
    """
    if message.codec is not None:
        with _errors_of_codec(message):
            body = message.codec.encode(message, headers_in_body=headers_in_body)
            if not isinstance(body, bytes):
                raise EncodingError(message.message_name, f"its codec returned {name_of(type(body))} in place of bytes")
        if len(body) > max_bytes:
            raise MessageTooLarge(len(body), max_bytes, message_id=message.message_id)
        return body
    message_id = message.message_id
    if type(message_id) is not UUID:
        message_id = plain_id(message_id)
    headers = b""
    try:
        if headers_in_body and (message.headers or message.key is not None):
            headers = b',"headers":' + orjson.dumps(headers_with_key(message))
        beginning = message._beginning or beginning_of(message.message_type, message.message_name)
        body = b"".join((beginning, orjson.dumps(message_id), b',"payload":', message.payload_json, headers, b"}"))
    except (TypeError, UnicodeEncodeError) as error:
        raise EncodingError(message.message_name.encode(errors="replace").decode(), str(error)) from error
    if len(body) > max_bytes:
        raise MessageTooLarge(len(body), max_bytes, message_id=message.message_id)
    return body


@contextmanager
def _errors_of_codec(message: Message) -> Generator[None]:
    """Raise what a codec raises as an `EncodingError`, unless it is one of diator's errors."""
    try:
        yield
    except DiatorError:
        raise
    except Exception as error:
        raise EncodingError(message.message_name, f"its codec raised {name_of(type(error))}") from error


@lru_cache
def beginning_of(message_type: str, message_name: str) -> bytes:
    """Return the body of a message up to its id."""
    return orjson.dumps({"message_type": message_type, "message_name": message_name})[:-1] + b',"message_id":'


def headers_with_key(message: Message, *, attribute_prefix: str = "ce_") -> dict[str, str]:
    """
    Return the headers of *message* as they are sent; the key is one of them.

    For transports whose service has headers of its own. Every returned text can be encoded as UTF-8. `decode` separates
    the key from the headers again. If the message has a codec, the headers are those of its envelope, and
    *attribute_prefix* is how their names begin, see `Codec.headers`.

    Raises:
        EncodingError: The program has set a header that is named `key`, or a header or the key is not text, or not
            valid Unicode; or the codec of the message cannot encode it.
    """
    if message.codec is not None:
        with _errors_of_codec(message):
            headers = {**message.codec.headers(message, attribute_prefix=attribute_prefix)}
    elif KEY in message.headers:
        raise EncodingError(
            f"{message.message_name}.headers",
            f"the header {KEY!r} is reserved for the key of the message; set the key instead",
        )
    else:
        headers = {**message.headers} if message.key is None else {**message.headers, KEY: message.key}
    try:
        for name, value in headers.items():
            (name + value).encode()
    except UnicodeEncodeError as error:
        raise EncodingError(f"{message.message_name}.headers", str(error)) from error
    except TypeError:
        problem = "the names and values of headers, and the key, must be text"
        raise EncodingError(f"{message.message_name}.headers", problem) from None
    return headers


def plain_id(message_id: object) -> Any:
    """Return an id of a subclass of `UUID` as a plain `UUID`: orjson writes no other. Return any other id as it is."""
    return as_standard(message_id) if isinstance(message_id, UUID) else message_id


class Envelope(msgspec.Struct, gc=False):  # nothing that it refers to refers back
    """
    What a consumer needs of a received message. A `Message` would take several times as long to make.

    Attributes:
        message_type: As `Message.message_type`.
        message_name: As `Message.message_name`.
        message_id: As `Message.message_id`.
        payload_json: As `Message.payload_json`.
        key: As `Message.key`.
        headers: The headers in the body as they are in JSON, see `headers_of`; None if there are none. If a codec has
            read the message: as `Message.headers`.
        time: As `Message.time`, if a codec has read it.
    """

    message_type: str
    message_name: str
    message_id: UUID
    payload_json: bytes
    key: str | None
    headers: Mapping[str, Any] | None = None
    time: datetime | None = None

    def __repr__(self) -> str:
        """Name the message, without its content."""
        return f"Envelope({self.message_type} {self.message_name} {self.message_id})"


class _Body(msgspec.Struct, gc=False):  # as `Envelope`
    message_type: str
    message_name: str
    message_id: UUID
    payload: msgspec.Raw
    headers: dict[str, Any] | None = None


def _text_of(value: Any) -> str:
    """Return the value of a header as text: a number as JSON writes it, a list or an object as an empty text."""
    if isinstance(value, str):
        return value
    return "" if isinstance(value, (list, dict)) else json.dumps(value)


_parse = msgspec.json.Decoder(_Body).decode


def decode(body: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES, headers: Mapping[str, str] | None = None) -> Message:
    """
    Return the message that `encode` wrote as *body*. Ignore keys that this version does not know.

    *headers* are the service's own headers, if it has any; they take precedence over the headers in the body.

    Raises:
        DecodingError: The body is too large, is not JSON, or does not have the shape of a message.
    """
    parsed, payload_json = _parsed(body, max_bytes)
    if payload_json[:1] != b"{":
        raise DecodingError("the body is not a message: the payload is not a JSON object - at `$.payload`")
    all_headers = headers_of(parsed.headers, headers or {})
    message = object.__new__(Message)
    set_fields(
        message,
        {
            "message_type": parsed.message_type,
            "message_name": parsed.message_name,
            "message_id": parsed.message_id,
            "payload_json": payload_json,
            "key": all_headers.pop(KEY, None),
            "headers": all_headers,
        },
    )
    return message


def headers_of(in_body: Mapping[str, Any] | None, of_service: Mapping[str, str]) -> dict[str, str]:
    """Return all headers of a message, the key among them. The service's own take precedence over those in the body."""
    if not in_body:
        return {**of_service}
    return {name: _text_of(value) for name, value in in_body.items() if value is not None} | {**of_service}


def decode_envelope(body: bytes, *, max_bytes: int, headers: Mapping[str, str]) -> Envelope:
    """
    Return what a consumer needs of the message that `decode` would return.

    It raises the same errors, but accepts a payload that is not an object: no event can be decoded from one anyway.
    """
    # As `_parsed`, written out for the usual body: a call would take a fiftieth of a consumer's time.
    parsed, payload_json = None, b""
    try:
        if len(body) <= max_bytes:
            parsed = _parse(body)
            payload_json = bytes(parsed.payload)
    except (msgspec.DecodeError, RecursionError):
        parsed = None
    if parsed is None or not payload_json.isascii():
        parsed, payload_json = _parsed(body, max_bytes)
    key = headers.get(KEY) if headers else None
    envelope = Envelope(parsed.message_type, parsed.message_name, parsed.message_id, payload_json, key)
    if parsed.headers:
        envelope.headers = parsed.headers  # of thousands of headers, most consumers need none
        if key is None and (sent := parsed.headers.get(KEY)) is not None:
            envelope.key = _text_of(sent)
    return envelope


def decode_with(codec: Codec, body: bytes, *, max_bytes: int, headers: Mapping[str, str], topic: Topic) -> Envelope:
    """
    Return what a consumer needs of a message from *topic* whose envelope is that of *codec*.

    Raises:
        DecodingError: The body is too large, or *codec* has raised any error.
    """
    _check_size(body, max_bytes)
    try:
        message = codec.decode(body, headers, topic)
        return Envelope(
            message.message_type,
            message.message_name,
            message.message_id,
            message.payload_json,
            message.key,
            message.headers,
            message.time,
        )
    except DecodingError:
        raise
    except Exception as error:  # noqa: BLE001  # a program has written it, and no message stops another one
        problem = f"the codec raised {name_of(type(error))}"
    raise DecodingError(problem)  # here, not above: the error would keep the one that may quote the message


def _check_size(body: bytes, max_bytes: int) -> None:
    if len(body) > max_bytes:
        raise DecodingError(f"the body has {len(body):,} bytes; this broker accepts at most {max_bytes:,}")


def _parsed(body: bytes, max_bytes: int) -> tuple[_Body, bytes]:
    _check_size(body, max_bytes)
    try:
        parsed = _parse(body)
        payload_json = bytes(parsed.payload)
        payload_json.decode()  # msgspec does not validate a raw value
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"the body is not a message: {_without_content(error, _Body.__struct_fields__)}"
    else:
        return parsed, payload_json
    # Here, not above: an error keeps the error that it was raised from, whose text quotes the message.
    raise DecodingError(problem if body and not body.isspace() else "the body is empty")


# -- event ↔ payload ---------------------------------------------------------------------------------------------


def payload_encoder(event_type: type[E]) -> Callable[[E], bytes]:
    """
    Return a function that encodes an *event_type* as the payload of a message.

    The function raises `EncodingError`, with the path of the field, for a value that would not come back as it is: an
    unsupported type, a type other than that of the field, a number that is not finite, text that is not valid Unicode,
    or a value that contains itself.

    Raises:
        ConfigurationError: As `plan_payload`.
    """
    plan = plan_payload(event_type)
    proven, path = plan.proven, name_of(event_type)

    def encode_payload(event: E) -> bytes:
        try:
            payload_json = dump(event)
        except Exception as error:  # a class may have code of its own that runs here
            raise _encoding_error(event, error) from error
        if proven is not None and proven(event):
            return payload_json
        try:
            found = difference(event, plan.read(payload_json), path)
        except Exception as error:  # noqa: BLE001  # a class may reject its fields with any error
            found = _unreadable(event_type, error)  # without the error itself, which quotes the values
        if found is not None:
            raise EncodingError(*found)
        return payload_json

    return encode_payload


def key_of(value: object) -> str:
    """Return a value of a payload as the key of a message: its text in the payload, without quotes."""
    text = dump(value)
    return msgspec.json.decode(text, type=str) if text[:1] == b'"' else text.decode()


def payload_decoder(event_type: type[E]) -> Callable[[bytes], E]:
    """
    Return a function that decodes the payload of a message into an *event_type*.

    The function ignores fields that the class does not have. It raises `DecodingError` if a field is missing or has a
    wrong value.

    Raises:
        ConfigurationError: As `plan_payload`.
    """
    read = plan_payload(event_type).read

    def decode_payload(payload_json: bytes) -> E:
        try:
            return read(payload_json)
        except Exception as error:  # noqa: BLE001  # a class may reject its fields with any error
            problem = _misfit(event_type, error)
        raise DecodingError(problem)  # here, not above: the error would keep the one that quotes the payload

    return decode_payload


def event_decoder(event_type: type[E]) -> Callable[[Envelope], E]:
    """
    Return a function that decodes the payload of a message into an *event_type*, as `payload_decoder` does.

    Another program may leave out what diator always writes. Nothing is invented then: without an `event_id`, the event
    has the id of its message, at each attempt and in each group; without an `event_timestamp`, it has the time of its
    envelope, or None. A default of the class would be another value at each attempt. A field that is null counts as
    left out.

    Raises:
        ConfigurationError: As `plan_payload`.
    """
    read = plan_payload(event_type).read
    names = {field: names[0] for field, names in names_in_json(event_type).items() if len(names) == 1}
    has_id, has_time = "event_id" in names, "event_timestamp" in names
    id_name, time_name = names.get("event_id", "event_id"), names.get("event_timestamp", "event_timestamp")
    read_sent = _sent_decoder(id_name, time_name)
    # How diator's own payloads begin: to compare these bytes takes a third of the time of parsing.
    before_id, before_time = f'{{"{id_name}":"'.encode(), f'","{time_name}":"'.encode()
    id_at = len(before_id)
    id_end = id_at + 36
    time_at = id_end + len(before_time)

    def decode_event(envelope: Envelope) -> E:
        payload_json = envelope.payload_json
        try:
            if payload_json[:id_at] == before_id and payload_json[id_end:time_at] == before_time:
                return read(payload_json)
            sent = read_sent(payload_json)
            sent_id, sent_time = bytes(sent.event_id), bytes(sent.event_timestamp)
            if b"null" in (sent_id, sent_time):
                payload_json = _without_null(payload_json, {id_name, time_name})
            if has_id and sent_id in _ABSENT:
                payload_json = _with_field(payload_json, id_name, envelope.message_id)
            lacks_time = has_time and sent_time in _ABSENT
            if lacks_time and envelope.time is not None:
                payload_json, lacks_time = _with_field(payload_json, time_name, envelope.time), False
            event = read(payload_json)
            if lacks_time:
                _forget_time(event)
        except Exception as error:  # noqa: BLE001  # as above
            problem = _misfit(event_type, error)
        else:
            return event
        raise DecodingError(problem)

    return decode_event


_ABSENT = (b"", b"null")


def _sent_decoder(id_name: str, time_name: str) -> Callable[[bytes], Any]:
    """Return a function that returns the id and the timestamp of a payload as they were sent, empty if absent."""
    fields = [(name, msgspec.Raw, msgspec.Raw()) for name in ("event_id", "event_timestamp")]
    sent = msgspec.defstruct("Sent", fields, rename={"event_id": id_name, "event_timestamp": time_name})
    return msgspec.json.Decoder(sent).decode


def _without_null(payload_json: bytes, names: Collection[str]) -> bytes:
    """Remove the fields *names* where they are null: most classes do not accept null there."""
    fields = msgspec.json.decode(payload_json, type=dict[str, msgspec.Raw])
    return msgspec.json.encode(
        {name: raw for name, raw in fields.items() if name not in names or bytes(raw) != b"null"}
    )


def _with_field(payload_json: bytes, name: str, value: object) -> bytes:
    """Append a field. The payload is not parsed for it: that could take a multiple of its size in memory."""
    begin = payload_json.strip()[:-1].rstrip()
    return begin + (b"" if begin == b"{" else b",") + orjson.dumps({name: value})[1:]


def _forget_time(event: object) -> None:
    """Set the timestamp of an event to None, also if the event is frozen."""
    if isinstance(event, msgspec.Struct):
        msgspec.structs.force_setattr(event, "event_timestamp", None)
    else:
        object.__setattr__(event, "event_timestamp", None)


# -- describing a message that cannot be decoded, without its content: called only after a failure ---------------

# The error texts of msgspec that begin like this contain nothing of the input.
_SAFE = (
    "Expected ",
    "Input data was truncated",
    "Invalid RFC3339",
    "Invalid UUID",
    "JSON is malformed",
    "Number out of range",
    "Object missing ",
)
_PLACE = re.compile(r" - at `\$([^`]*)`$")
_INVALID = "a value is invalid"
# To describe each error of pydantic costs time and memory, and a sender can cause 100,000 of them.
_MAX_ERRORS = 8


def _misfit(event_type: type, error: Exception) -> str:
    return f"the payload does not fit {name_of(event_type)}: {_without_content(error, _names_within(event_type))}"


def _without_content(error: BaseException, names: Collection[str]) -> str:
    """
    Describe what is wrong and where. The text ends up in logs, so it contains no text of the sender.

    *names* are those that the class has given to its fields. Any other name in a place is a key that the sender chose.
    """
    if _is_of_pydantic(error):
        return _errors_of_pydantic(error, names, "$")
    if isinstance(error, UnicodeDecodeError):
        return f"it is not valid UTF-8 - at byte {error.start}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error) if isinstance(error, msgspec.DecodeError) else ""
    # If a class itself rejects a value, msgspec quotes the error text of that class and keeps the error as the cause.
    if text.startswith(_SAFE) and error.__cause__ is None:
        return text
    place = _PLACE.search(text)
    steps = re.findall(r"[^.\[\]]+", place[1]) if place else ()
    if not place or not all(step.isdecimal() or step in names for step in steps):
        return _INVALID
    is_model = _is_of_pydantic(error.__cause__)  # a model in another class
    return _errors_of_pydantic(error.__cause__, names, f"${place[1]}") if is_model else f"{_INVALID}{place[0]}"


def _is_of_pydantic(error: object) -> bool:
    pydantic: Any = sys.modules.get("pydantic_core")
    return pydantic is not None and isinstance(error, pydantic.ValidationError)


def _errors_of_pydantic(error: Any, names: Collection[str], root: str) -> str:
    if (count := error.error_count()) > _MAX_ERRORS:
        return f"{count:,} values are invalid"
    known = get_args(sys.modules["pydantic_core.core_schema"].ErrorType)  # a validator can make up further types
    described = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        steps = (
            f".{step}" if step in names else f"[{step}]" if isinstance(step, int) else "[...]" for step in each["loc"]
        )
        described.append(f"{each['type'] if each['type'] in known else _INVALID} - at `{root}{''.join(steps)}`")
    return "; ".join(described)


@lru_cache
def _names_within(event_type: type) -> Collection[str]:
    """Return the names of the fields of a class, and of the classes of its fields, as they are in JSON."""
    names: set[str] = set()
    hints: dict[int, Any] = {id(event_type): event_type}  # by identity: some are not hashable
    left: list[Any] = [event_type]
    while left:
        hint = left.pop()
        found = [*get_args(hint), getattr(hint, "__value__", None)]  # an alias of `type X = …` has a value
        if isinstance(hint, type):
            names.update(*names_in_json(hint).values())
            with suppress(Exception):  # an annotation may contain a name that does not exist at run time
                fields = get_type_hints(hint)
                names.update(fields)
                found += fields.values()
        new = [each for each in found if id(each) not in hints]
        hints |= {id(each): each for each in new}
        left += new
    return names


# -- finding the value that failed: called only after a failure --------------------------------------------------

# An error from these modules is diator's own, or one of msgspec, which has no frames in Python.
_OWN_ERRORS = {__name__, "diator.brokers.payloads", "diator.brokers._standard"}
# So many steps into an event are searched. Each step encodes what is left of it.
_MAX_STEPS = 64


def _encoding_error(event: object, error: Exception) -> EncodingError:
    """Return the error for the innermost value that cannot be encoded."""
    path, value, containers = [name_of(type(event))], event, [event]
    while len(containers) <= _MAX_STEPS:
        found = next(((step, part) for step, part in _parts(value) if not _is_encodable(part)), None)
        if found is None:
            break
        path.append(found[0])
        value = found[1]
        if any(value is each for each in containers):
            return EncodingError("".join(path), "the value contains itself")
        containers.append(value)
    if isinstance(error, RecursionError):
        return EncodingError("".join(path[:2]), "the value is nested too deeply")
    return EncodingError("".join(path), _problem(value))


def _problem(value: object) -> str:
    try:
        dump(value)
    except UnicodeEncodeError:
        return "the text is not valid Unicode (a lone surrogate)"
    except Exception as error:  # noqa: BLE001  # as when the event was encoded
        return _reason_of(error)
    return "the value cannot be encoded"  # pragma: no cover  # encoding it failed a moment ago


def _reason_of(error: Exception) -> str:
    """Return the text of an error of msgspec or diator. Code of a class may quote a value in the text of its error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    is_ours = trace is not None and trace.tb_frame.f_globals.get("__name__") in _OWN_ERRORS
    return str(error) if is_ours else f"code of its class raised {name_of(type(error))}"


def _is_encodable(value: object) -> bool:
    try:
        dump(value)
    except Exception:  # noqa: BLE001  # as when the event was encoded
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of *value* that are written, each with the step that leads from *value* to it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f" (key {type(key).__name__})", key
            yield "[...]", part  # a key is content: it may be an e-mail address
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, part in enumerate(value):
            yield f"[{index}]", part
    elif not isinstance(value, type):
        kind: Any = type(value)
        for name in wire_names(kind):
            yield f".{name}", getattr(value, name, None)


def _unreadable(event_type: type, error: Exception) -> tuple[str, str]:
    """Return the path and the problem of an event that has been written, and cannot be read back."""
    problem, _, place = _without_content(error, _names_within(event_type)).partition(" - at ")
    step = place.partition("$")[2].partition("`")[0]
    return f"{name_of(event_type)}{step}", f"it could not be read back: {problem}"
