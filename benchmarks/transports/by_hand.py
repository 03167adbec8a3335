"""The event and its message in a program without a library: a dataclass and orjson."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from uuid import UUID, uuid4

import orjson
from measuring import GREETING, NICKNAME


@dataclass(frozen=True, kw_only=True)
class UserJoined:
    event_id: UUID = field(default_factory=uuid4)
    event_timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    number: int
    sent_at: float
    nickname: str
    greeting: str


def encoded(number: int) -> bytes:
    event = UserJoined(number=number, sent_at=perf_counter(), nickname=NICKNAME, greeting=GREETING)
    return orjson.dumps(
        {
            "message_type": "notification_event",
            "message_name": "UserJoined",
            "message_id": event.event_id,
            "payload": event,
        }
    )


def decoded(body: bytes) -> UserJoined:
    payload = orjson.loads(body)["payload"]
    payload["event_id"] = UUID(payload["event_id"])
    payload["event_timestamp"] = datetime.fromisoformat(payload["event_timestamp"])
    return UserJoined(**payload)
