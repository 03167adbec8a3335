"""The hand-written code that every library is compared with."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

from workloads import (
    CONCURRENT,
    LINK,
    MEETING_ID,
    NICKNAME,
    TYPES,
    USER_ID,
    Repeat,
    Tally,
    Workload,
    carries,
    construction,
    copy_of,
    is_the_link,
)


@dataclass
class Join:
    meeting_id: int
    user_id: int


class JoinHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)


class YieldingJoinHandler(JoinHandler):
    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        await asyncio.sleep(0)


@dataclass
class ReadLink:
    meeting_id: int


@dataclass(frozen=True, kw_only=True)  # both sides create instances of the same kind of class
class MeetingLink:
    meeting_id: int
    link: str


class ReadLinkHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


class PassThrough:
    def __init__(self, tally: Tally, following: Callable[[Join], Awaitable[None]]) -> None:
        self._tally = tally
        self._following = following

    async def __call__(self, request: Join) -> None:
        self._tally.calls += 1
        return await self._following(request)


@dataclass(frozen=True, kw_only=True)
class Joined:
    meeting_id: int
    user_id: int


class AnnouncingJoinHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.events: list[Joined] = []

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        self.events.append(Joined(meeting_id=request.meeting_id, user_id=request.user_id))


class JoinedHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


class AlsoJoinedHandler(JoinedHandler):
    async def handle(self, event: Joined) -> None:
        self._tally.note(event.user_id)


@dataclass
class UserJoined:
    meeting_id: int
    user_id: int
    nickname: str
    event_id: UUID = field(default_factory=uuid4)
    event_timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))


def workloads() -> dict[str, Workload]:
    tally = Tally()
    event = UserJoined(meeting_id=MEETING_ID, user_id=USER_ID, nickname=NICKNAME)
    body = encode(event)
    return {
        "W0": construction(Join),
        "W1": Workload(repeat=command(tally), returns=is_none, tally=tally),
        "W2": Workload(repeat=query(tally), returns=is_the_link, tally=tally),
        "W3": Workload(repeat=command_through_middlewares(tally), returns=is_none, tally=tally, counted=4),
        "W4": Workload(repeat=command_with_an_event(tally), returns=is_none, tally=tally, counted=3),
        "W5": Workload(repeat=commands_in_turn(tally), returns=is_none, tally=tally, sends=TYPES),
        "W6": Workload(repeat=commands_at_once(tally), returns=is_none, tally=tally, sends=CONCURRENT),
        "W7e": Workload(repeat=encoding(event), returns=carries(event), tally=tally, counted=0),
        "W7d": Workload(repeat=decoding(body), returns=lambda decoded: decoded == event, tally=tally, counted=0),
    }


def is_none(result: object) -> bool:
    return result is None


def command(tally: Tally) -> Repeat:
    async def repeat(times: int) -> object:
        request = Join(meeting_id=MEETING_ID, user_id=USER_ID)
        for _ in range(times):
            result = await JoinHandler(tally).handle(request)
        return result

    return repeat


def query(tally: Tally) -> Repeat:
    async def repeat(times: int) -> object:
        request = ReadLink(meeting_id=MEETING_ID)
        for _ in range(times):
            result = await ReadLinkHandler(tally).handle(request)
        return result

    return repeat


def command_through_middlewares(tally: Tally) -> Repeat:
    async def handle(request: Join) -> None:
        return await JoinHandler(tally).handle(request)

    wired = PassThrough(tally, PassThrough(tally, PassThrough(tally, handle)))

    async def repeat(times: int) -> object:
        request = Join(meeting_id=MEETING_ID, user_id=USER_ID)
        for _ in range(times):
            result = await wired(request)
        return result

    return repeat


def command_with_an_event(tally: Tally) -> Repeat:
    async def repeat(times: int) -> object:
        request = Join(meeting_id=MEETING_ID, user_id=USER_ID)
        for _ in range(times):
            handler = AnnouncingJoinHandler(tally)
            result = await handler.handle(request)
            for event in handler.events:
                await JoinedHandler(tally).handle(event)
                await AlsoJoinedHandler(tally).handle(event)
        return result

    return repeat


def commands_in_turn(tally: Tally) -> Repeat:
    handler_types = {
        dataclass(type(f"Join{number}", (Join,), {})): copy_of(JoinHandler, number) for number in range(TYPES)
    }
    requests = [request_type(meeting_id=MEETING_ID, user_id=USER_ID) for request_type in handler_types]

    async def repeat(times: int) -> object:
        for _ in range(times):
            for request in requests:
                result = await handler_types[type(request)](tally).handle(request)
        return result

    return repeat


def commands_at_once(tally: Tally) -> Repeat:
    async def repeat(times: int) -> object:
        request = Join(meeting_id=MEETING_ID, user_id=USER_ID)
        for _ in range(times):
            await asyncio.gather(*[YieldingJoinHandler(tally).handle(request) for _ in range(CONCURRENT)])

    return repeat


def encoding(event: UserJoined) -> Repeat:
    async def repeat(times: int) -> object:
        for _ in range(times):
            body = encode(event)
        return body

    return repeat


def decoding(body: bytes) -> Repeat:
    async def repeat(times: int) -> object:
        for _ in range(times):
            event = decode(body)
        return event

    return repeat


def encode(event: UserJoined) -> bytes:
    event_id = str(event.event_id)
    return json.dumps(
        {
            "message_type": "notification_event",
            "message_name": type(event).__name__,
            "message_id": event_id,
            "payload": {
                "event_id": event_id,
                "event_timestamp": event.event_timestamp.isoformat(),
                "meeting_id": event.meeting_id,
                "user_id": event.user_id,
                "nickname": event.nickname,
            },
        }
    ).encode()


def decode(body: bytes) -> UserJoined:
    payload = json.loads(body)["payload"]
    return UserJoined(
        event_id=UUID(payload["event_id"]),
        event_timestamp=datetime.fromisoformat(payload["event_timestamp"]),
        meeting_id=payload["meeting_id"],
        user_id=payload["user_id"],
        nickname=payload["nickname"],
    )
