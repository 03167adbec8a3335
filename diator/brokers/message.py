"""What travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, TypeAlias
from uuid import UUID, uuid4

from diator.exceptions import EncodingError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, kw_only=True)
class Message:
    """
    What travels through a broker: what it is about, an id, and a payload that is JSON already.

    Its payload was encoded when it was made, so that what cannot be encoded is found out inside the unit of work,
    and a change to an event afterwards changes nothing on the wire. It is no part of the `repr`: that ends in logs.
    """

    message_type: str
    """`notification_event`, `ecst_event`, or a kind of your own."""
    message_name: str
    """What happened, by a registered name."""
    message_id: UUID
    """The same for every repeat of one message."""
    payload_json: bytes = field(repr=False)
    """A JSON object, in UTF-8."""
    key: str | None = None
    """Messages of one key keep their order where the transport keeps any."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What is said about the message rather than by it: trace context, correlation."""

    @classmethod
    def create(  # the fields of a message, each by its name
        cls,
        *,
        message_name: str,
        payload: dict[str, object],
        message_type: str = "notification_event",
        message_id: UUID | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """
        Make a message without an event class, from a *payload* of plain JSON values.

        Raises:
            EncodingError: *payload* holds something that JSON does not.
        """
        import json  # noqa: PLC0415  # making and reading by hand is rare, and importing diator is to be quick

        try:
            payload_json = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise EncodingError(f"{message_name}.payload", str(error)) from error
        parsed: object = json.loads(payload_json)
        if parsed != payload or not isinstance(parsed, dict):
            raise EncodingError(f"{message_name}.payload", "it is no object of plain JSON values with text as keys")
        return cls(
            message_type=message_type,
            message_name=message_name,
            message_id=message_id or uuid4(),
            payload_json=payload_json,
            key=key,
            headers=headers or {},
        )

    @classmethod
    def _of_fields(cls, fields: dict[str, object]) -> Self:
        """Make a message of all its fields at once, for codecs: the constructor, one by one, costs twice as much."""
        message = cls.__new__(cls)
        object.__setattr__(message, "__dict__", fields)
        return message

    @property
    def payload(self) -> dict[str, Json]:
        """The payload, parsed anew at each access. For reading; events are decoded by `diator.brokers.codec`."""
        import json  # noqa: PLC0415  # as above

        parsed: dict[str, Json] = json.loads(self.payload_json)
        return parsed
