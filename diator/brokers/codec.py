"""
The only place that knows what messages look like on the wire: event → message → bytes, and back.

The body is one JSON object with the four keys `message_type`, `message_name`, `message_id` and `payload`, and
`headers` as a fifth only where the transport has no headers of its own and there is something in them.
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

MAX_MESSAGE_BYTES = 1024 * 1024
"""How large an encoded message may be, in bytes, unless a broker says otherwise."""

_KEY = "key"

# -- message ↔ bytes ---------------------------------------------------------------------------------------------


def encode(message: Message, *, max_bytes: int = MAX_MESSAGE_BYTES, headers_in_body: bool = False) -> bytes:
    """
    Write *message* as the body that travels.

    With *headers_in_body*, its headers and key are in it; without, they are the transport's to send beside it, as
    `headers_with_key` gives them.

    Raises:
        MessageTooLarge: It has more than *max_bytes* bytes.
        EncodingError: Its type, name, or (in the body) its key or a header is no valid Unicode.
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
    Give the headers as they travel: the key of the message is one of them.

    For transports whose service has headers of its own. What is given can be written in UTF-8; `decode` takes it apart.

    Raises:
        EncodingError: The program has a header of that name, or one (or the key) is no valid Unicode.
    """
    if _KEY in message.headers:
        raise EncodingError(
            f"{message.message_name}.headers", f"{_KEY!r} is where the key of a message travels; set that"
        )
    headers = {**message.headers} if message.key is None else {**message.headers, _KEY: message.key}
    try:
        for name, value in headers.items():
            (name + value).encode()
    except UnicodeEncodeError as error:
        raise EncodingError(f"{message.message_name}.headers", str(error)) from error
    return headers


class _Envelope(msgspec.Struct):
    message_type: str
    message_name: str
    message_id: UUID
    payload: msgspec.Raw
    headers: dict[str, str] = {}


_envelope_of = msgspec.json.Decoder(_Envelope).decode


def decode(body: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES, headers: Mapping[str, str] | None = None) -> Message:
    """
    Read a body as `encode` writes it. Keys that are not known are ignored.

    *headers* are those of the service, where it has any; they stand above those in the body.

    Raises:
        DecodingError: It is too large, no JSON, or not of that shape.
    """
    if len(body) > max_bytes:
        raise DecodingError(f"the body has {len(body):,} bytes, and this broker takes {max_bytes:,}")
    try:
        envelope = _envelope_of(body)
        payload_json = bytes(envelope.payload)
        payload_json.decode()  # what is raw was not looked at
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodingError(f"the body is no message: {_without_content(error)}") from None
    if not payload_json.startswith(b"{"):
        raise DecodingError("the body is no message: the payload is no JSON object - at `$.payload`")
    given = {**envelope.headers, **(headers or {})}
    key = given.pop(_KEY, None)
    return Message._of_fields(
        {
            "message_type": envelope.message_type,
            "message_name": envelope.message_name,
            "message_id": envelope.message_id,
            "payload_json": payload_json,
            "key": key,
            "headers": given,
        }
    )


# -- event ↔ payload ---------------------------------------------------------------------------------------------


def payload_encoder(event_type: type[E]) -> Callable[[E], bytes]:
    """
    Make the function that writes an *event_type* as the payload of a message.

    It raises `EncodingError`, with the path of the field, for what JSON cannot hold: another type, a number that is
    not finite, text that is no Unicode, something that contains itself.
    """
    dump: Callable[[E], bytes] = _dump_model if hasattr(event_type, "model_dump_json") else _dump

    def encode_payload(event: E) -> bytes:
        try:
            payload_json = dump(event)
        except (TypeError, ValueError, RecursionError) as error:
            raise _explained(event, error) from error
        if payload_json.find(b"null") >= 0 and (found := next(_not_finite(event, name_of(event_type)), None)):
            # Both libraries write NaN and infinity as null. Whoever reads that reads something that was never said.
            raise EncodingError(found, "JSON has no number for NaN or infinity")
        return payload_json

    return encode_payload


def payload_decoder(event_type: type[E]) -> Callable[[bytes], E]:
    """
    Make the function that reads the payload of a message as an *event_type*.

    It ignores fields that the class does not have, and raises `DecodingError` for missing or wrong ones.

    Raises:
        EncodingError: A field has a type that cannot be read back, such as a union of two dataclasses.
    """
    if hasattr(event_type, "model_validate_json"):
        model: Any = event_type
        return _refusing(event_type, model.model_validate_json)
    try:
        decoder = msgspec.json.Decoder(event_type)
    except TypeError as error:
        raise EncodingError(name_of(event_type), f"cannot be read back from JSON: {error}") from error
    return _refusing(event_type, decoder.decode)


def _refusing(event_type: type[E], read: Callable[[bytes], E]) -> Callable[[bytes], E]:
    def decode_payload(payload_json: bytes) -> E:
        try:
            return read(payload_json)
        except Exception as error:  # noqa: BLE001  # whatever a class refuses its fields with
            # Without its cause, which has parts of the payload in its text.
            raise DecodingError(f"the payload is no {name_of(event_type)}: {_without_content(error)}") from None

    return decode_payload


def _dump_other(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"values of {name_of(type(value))} have no form in JSON")


_dump = msgspec.json.Encoder(enc_hook=_dump_other).encode


def _dump_model(model: Any) -> bytes:
    encoded: str = model.model_dump_json()
    return encoded.encode()


_SAFE = ("Expected ", "Object missing ", "JSON is malformed", "Input data was truncated", "Invalid UUID")
"""How those texts of msgspec begin that have nothing of the input in them."""


def _without_content(error: BaseException) -> str:
    """Say what is wrong and where, and nothing of the input: an error's text ends up in logs."""
    if hasattr(error, "error_count"):  # pydantic's; a place can be a key, so only the field is said
        found: Callable[[], list[dict[str, Any]]] = getattr(error, "errors", list)
        return "; ".join(f"{each['type']} - at `$.{each['loc'][0] if each['loc'] else ''}`" for each in found())
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 - at byte {error.start}"
    if not isinstance(error, (msgspec.DecodeError, RecursionError)):
        return "a value that is not allowed"
    text = str(error)
    end = text.rfind(" - at `$")
    problem, place = (text, "") if end < 0 else (text[:end], text[end:])
    # What a class says of its values itself, msgspec quotes, and keeps as the cause.
    safe = problem.startswith(_SAFE) and error.__cause__ is None
    return (problem if safe else "a value that is not allowed") + place


# -- where it went wrong: only called once it did ---------------------------------------------------------------


def _explained(event: object, error: Exception) -> EncodingError:
    """Find the innermost value that cannot be written."""
    path, value = name_of(type(event)), event
    if isinstance(error, RecursionError):
        return EncodingError(path, "it is nested too deeply, or contains itself")
    while found := next(((step, part) for step, part in _parts(value) if not _can_be_written(part)), None):
        step, value = found
        path += step
    return EncodingError(path, str(error) if value is event else _problem(value))


def _problem(value: object) -> str:
    try:
        _dump(value)
    except UnicodeEncodeError:
        return "the text is no valid Unicode (a lone surrogate)"
    except (TypeError, ValueError) as error:
        return str(error)
    return "cannot be written"  # pragma: no cover  # it could not be a moment ago


def _can_be_written(value: object) -> bool:
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
    """Take *value* apart into what it consists of, each with the step that leads there."""
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
