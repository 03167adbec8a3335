"""The headers of a message that is sent: from header sources, from the class of the event, and diator's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast
from uuid import UUID

from diator._hints import described, fields_of, name_of
from diator.brokers.message import check_headers
from diator.context import correlation, correlation_headers
from diator.exceptions import ConfigurationError, EncodingError, NotAnEvent
from diator.instruments import Observer

#: Returns headers for the message of an event.
HeaderSource: TypeAlias = Callable[[Any], Mapping[str, str]]
#: Returns the headers of a message: of an event, its id, its payload, and what was passed with the event.
MakeHeaders: TypeAlias = Callable[[Any, UUID, bytes, "Mapping[str, str] | None"], dict[str, str]]


def checked_sources(headers: Any) -> tuple[HeaderSource, ...]:
    """
    Return the header sources as a tuple.

    Raises:
        ConfigurationError: They are not a list of functions that return headers at once.
    """
    if not isinstance(headers, Iterable) or isinstance(headers, (str, Mapping)):
        raise ConfigurationError(
            f"headers must be a list of functions (event) -> headers, and it is {described(headers)}"
        )
    sources: tuple[Any, ...] = tuple(headers)
    for source in sources:
        if isinstance(source, type) or not callable(source) or inspect.iscoroutinefunction(source):
            raise ConfigurationError(
                f"{name_of(source) if callable(source) else described(source)} is not a header source; pass a function "
                "(event) -> headers that is not asynchronous"
            )
    return sources


def message_headers_of(event_type: type) -> Mapping[str, str]:
    """
    Return the headers that a class of events declares, each with the name of its field.

    Raises:
        NotAnEvent: `message_headers` is not a dictionary of texts, or names what is not a field.
    """
    declared: Any = getattr(event_type, "message_headers", None)
    if declared is None or "message_headers" in (fields := fields_of(event_type)):
        return {}
    where = f"{name_of(event_type)}.message_headers"
    if not isinstance(declared, Mapping):
        raise NotAnEvent(f"{where} must be a dictionary from headers to fields, and it is {described(declared)}")
    for field in declared.values():
        if field not in fields:
            raise NotAnEvent(f"{where} names {field!r}, which is not a field of the class")
    try:
        check_headers(dict.fromkeys(declared, ""), where)
    except EncodingError as error:
        raise NotAnEvent(str(error)) from None
    return declared


def header_maker(
    event_type: type, sources: Sequence[HeaderSource], observer: Observer | None, *, is_native: bool
) -> tuple[MakeHeaders, bool, bool]:
    """
    Return what makes the headers of a message, whether they correlate it, and whether there are any others.

    Raises:
        NotAnEvent: As `message_headers_of`.
    """
    event_name = name_of(event_type)
    correlates = is_native or correlation in sources
    named = [(f"{event_name}, header source {name_of(each)}", each) for each in sources if each is not correlation]
    if declared := message_headers_of(event_type):
        named.append((f"{event_name}.message_headers", _declared_source(declared)))

    def make(event: Any, message_id: UUID, payload_json: bytes, given: Mapping[str, str] | None) -> dict[str, str]:
        headers = correlation_headers(message_id, payload_json) if correlates else {}
        if observer is not None:
            headers |= observer.headers(event)
        for name, source in named:
            headers |= _of_source(name, source, event)
        if given is not None:
            check_headers(given, f"{event_name}, its own headers")
            headers |= given
        check_headers(headers, f"{event_name}.headers")
        return headers

    return make, correlates, bool(named) or observer is not None


def _of_source(name: str, source: HeaderSource, event: Any) -> Mapping[str, str]:
    try:
        headers: Any = source(event)
    except Exception as error:
        raise EncodingError(name, f"it raised {name_of(type(error))}") from error
    if inspect.iscoroutine(headers):
        headers.close()
    check_headers(headers, name)
    return cast("Mapping[str, str]", headers)


def _declared_source(declared: Mapping[str, str]) -> HeaderSource:
    from diator.brokers.codec import key_of  # noqa: PLC0415  # it loads msgspec and orjson

    def of_fields(event: Any) -> Mapping[str, str]:
        values = ((header, getattr(event, field)) for header, field in declared.items())
        return {header: value if type(value) is str else key_of(value) for header, value in values if value is not None}

    return of_fields
