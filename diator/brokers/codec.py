"""
The wire format: event → message → bytes, and back. No other module knows what a message looks like on the wire.

The body is one JSON object with four keys: `message_type`, `message_name`, `message_id` and `payload`. It has a fifth
key, `headers`, only if the transport has no headers of its own and the message has headers or a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import orjson

from diator._hints import fields_of, name_of
from diator.brokers.message import Message
from diator.exceptions import DecodingError, EncodingError, MessageTooLarge

E = TypeVar("E")

#: The default size limit of an encoded message, in bytes.
MAX_MESSAGE_BYTES = 1024 * 1024

_KEY = "key"

# -- message ↔ bytes ---------------------------------------------------------------------------------------------


def encode(message: Message, *, max_bytes: int = MAX_MESSAGE_BYTES, headers_in_body: bool = False) -> bytes:
    """
    Return the body of *message*, as it is sent.

    With *headers_in_body*, the body contains the headers and the key. Without it, the transport has to send them beside
    the body; `headers_with_key` returns them.

    Raises:
        MessageTooLarge: The body has more than *max_bytes* bytes.
        EncodingError: The type or the name is not valid Unicode, or (with *headers_in_body*) the key or a header is
            not.
    """
    envelope: dict[str, object] = {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "payload": orjson.Fragment(message.payload_json),
    }
    if headers_in_body and (message.headers or message.key is not None):
        envelope["headers"] = headers_with_key(message)
    try:
        body = orjson.dumps(envelope)
    except (TypeError, UnicodeEncodeError) as error:
        raise EncodingError(message.message_name.encode(errors="replace").decode(), str(error)) from error
    if len(body) > max_bytes:
        raise MessageTooLarge(len(body), max_bytes, message_id=message.message_id)
    return body


def headers_with_key(message: Message) -> dict[str, str]:
    """
    Return the headers of *message* as they are sent; the key is one of them.

    For transports whose service has headers of its own. Every returned text can be encoded as UTF-8. `decode` separates
    the key from the headers again.

    Raises:
        EncodingError: The program has set a header that is named `key`, or a header or the key is not valid Unicode.
    """
    if _KEY in message.headers:
        raise EncodingError(
            f"{message.message_name}.headers",
            f"the header {_KEY!r} is reserved for the key of the message; set the key instead",
        )
    headers = {**message.headers} if message.key is None else {**message.headers, _KEY: message.key}
    try:
        for name, value in headers.items():
            (name + value).encode()
    except UnicodeEncodeError as error:
        raise EncodingError(f"{message.message_name}.headers", str(error)) from error
    return headers


class Envelope(msgspec.Struct):
    """
    A received message without its headers: what a consumer needs. A `Message` would take several times as long to make.

    Attributes:
        message_type: As `Message.message_type`.
        message_name: As `Message.message_name`.
        message_id: As `Message.message_id`.
        payload_json: As `Message.payload_json`.
        key: As `Message.key`.
    """

    message_type: str
    message_name: str
    message_id: UUID
    payload_json: bytes
    key: str | None


class _Body(msgspec.Struct):
    message_type: str
    message_name: str
    message_id: UUID
    payload: msgspec.Raw
    headers: dict[str, str] = {}


_parse = msgspec.json.Decoder(_Body).decode


def decode(body: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES, headers: Mapping[str, str] | None = None) -> Message:
    """
    Return the message that `encode` wrote as *body*. Ignore keys that this version does not know.

    *headers* are the service's own headers, if it has any; they take precedence over the headers in the body.

    Raises:
        DecodingError: The body is too large, is not JSON, or does not have the shape of a message.
    """
    parsed, payload_json = _parsed(body, max_bytes)
    all_headers = {**parsed.headers, **headers} if headers else parsed.headers  # nobody else uses them
    return Message._of_fields(
        {
            "message_type": parsed.message_type,
            "message_name": parsed.message_name,
            "message_id": parsed.message_id,
            "payload_json": payload_json,
            "key": all_headers.pop(_KEY, None),
            "headers": all_headers,
        }
    )


def decode_envelope(body: bytes, *, max_bytes: int, headers: Mapping[str, str]) -> Envelope:
    """Return what a consumer needs of the message that `decode` would return. It raises the same errors."""
    parsed, payload_json = _parsed(body, max_bytes)
    key = headers.get(_KEY) if headers else None
    if key is None and parsed.headers:
        key = parsed.headers.get(_KEY)
    return Envelope(parsed.message_type, parsed.message_name, parsed.message_id, payload_json, key)


def _parsed(body: bytes, max_bytes: int) -> tuple[_Body, bytes]:
    if len(body) > max_bytes:
        raise DecodingError(f"the body has {len(body):,} bytes; this broker accepts at most {max_bytes:,}")
    try:
        parsed = _parse(body)
        payload_json = bytes(parsed.payload)
        payload_json.decode()  # msgspec does not validate a raw value
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodingError(f"the body is not a message: {_without_content(error)}") from None
    if payload_json[:1] != b"{":
        raise DecodingError("the body is not a message: the payload is not a JSON object - at `$.payload`")
    return parsed, payload_json


# -- event ↔ payload ---------------------------------------------------------------------------------------------


def payload_encoder(event_type: type[E]) -> Callable[[E], bytes]:
    """
    Return a function that encodes an *event_type* as the payload of a message.

    The function raises `EncodingError`, with the path of the field, for a value that JSON cannot represent: an
    unsupported type, a number that is not finite, text that is not valid Unicode, or a value that contains itself.
    """
    dump: Callable[[E], bytes] = _dump_model if hasattr(event_type, "model_dump_json") else _dump

    def encode_payload(event: E) -> bytes:
        try:
            payload_json = dump(event)
        except (TypeError, ValueError, RecursionError) as error:
            raise _encoding_error(event, error) from error
        if payload_json.find(b"null") >= 0 and (found := next(_not_finite(event, name_of(event_type)), None)):
            # Both libraries write NaN and infinity as null. A reader would receive a value that nobody sent.
            raise EncodingError(found, "JSON cannot represent NaN or infinity")
        return payload_json

    return encode_payload


def payload_decoder(event_type: type[E]) -> Callable[[bytes], E]:
    """
    Return a function that decodes the payload of a message into an *event_type*.

    The function ignores fields that the class does not have. It raises `DecodingError` if a field is missing or has a
    wrong value.

    Raises:
        EncodingError: A field has a type that cannot be read back, such as a union of two dataclasses.
    """
    if hasattr(event_type, "model_validate_json"):
        model: Any = event_type
        return _checked(event_type, model.model_validate_json)
    try:
        decoder = msgspec.json.Decoder(event_type)
    except TypeError as error:
        raise EncodingError(name_of(event_type), f"cannot be read back from JSON: {error}") from error
    return _checked(event_type, decoder.decode)


def _checked(event_type: type[E], read: Callable[[bytes], E]) -> Callable[[bytes], E]:
    def decode_payload(payload_json: bytes) -> E:
        try:
            return read(payload_json)
        except Exception as error:  # noqa: BLE001  # a class may reject its fields with any error
            # Without the cause: its text quotes the payload.
            raise DecodingError(f"the payload does not fit {name_of(event_type)}: {_without_content(error)}") from None

    return decode_payload


def _dump_other(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"values of {name_of(type(value))} cannot be written as JSON")


_dump = msgspec.json.Encoder(enc_hook=_dump_other).encode


def _dump_model(model: Any) -> bytes:
    encoded: str = model.model_dump_json()
    return encoded.encode()


# The error texts of msgspec that begin like this contain nothing of the input.
_SAFE = ("Expected ", "Object missing ", "JSON is malformed", "Input data was truncated", "Invalid UUID")


def _without_content(error: BaseException) -> str:
    """Describe what is wrong and where, without the input: error texts end up in logs."""
    if hasattr(error, "error_count"):  # pydantic's; its location can contain keys of the input, so name the field only
        found: Callable[[], list[dict[str, Any]]] = getattr(error, "errors", list)
        return "; ".join(f"{each['type']} - at `$.{each['loc'][0] if each['loc'] else ''}`" for each in found())
    if isinstance(error, UnicodeDecodeError):
        return f"it is not valid UTF-8 - at byte {error.start}"
    if not isinstance(error, (msgspec.DecodeError, RecursionError)):
        return "a value is invalid"
    text = str(error)
    end = text.rfind(" - at `$")
    problem, place = (text, "") if end < 0 else (text[:end], text[end:])
    # If a class itself rejects a value, msgspec quotes the error text of that class and keeps the error as the cause.
    safe = problem.startswith(_SAFE) and error.__cause__ is None
    return (problem if safe else "a value is invalid") + place


# -- finding the value that failed: called only after a failure --------------------------------------------------


def _encoding_error(event: object, error: Exception) -> EncodingError:
    """Return the error for the innermost value that cannot be encoded."""
    path, value = name_of(type(event)), event
    if isinstance(error, RecursionError):
        return EncodingError(path, "the value is nested too deeply, or contains itself")
    while found := next(((step, part) for step, part in _parts(value) if not _is_encodable(part)), None):
        step, value = found
        path += step
    return EncodingError(path, str(error) if value is event else _problem(value))


def _problem(value: object) -> str:
    try:
        _dump(value)
    except UnicodeEncodeError:
        return "the text is not valid Unicode (a lone surrogate)"
    except (TypeError, ValueError) as error:
        return str(error)
    return "the value cannot be encoded"  # pragma: no cover  # encoding it failed a moment ago


def _is_encodable(value: object) -> bool:
    try:
        _dump(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _not_finite(value: object, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    for step, part in _parts(value):
        yield from _not_finite(part, path + step)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of *value*, each with the step that leads from *value* to it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f" (key {type(key).__name__})", key
            yield f"[{key!r}]", part
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, part in enumerate(value):
            yield f"[{index}]", part
    elif not isinstance(value, type):
        for name in fields_of(type(value)):
            yield f".{name}", getattr(value, name, None)
