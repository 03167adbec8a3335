"""kerux with handlers from factories, since the hand-written code builds one for each request too."""

import asyncio
from dataclasses import dataclass

from kerux import Mediator, Next, Notification, Request
from workloads import (
    LINK,
    MEETING_ID,
    TYPES,
    USER_ID,
    Tally,
    Workload,
    construction,
    copy_of,
    query,
    sending,
    sending_at_once,
    sending_in_turn,
)


@dataclass
class Join(Request[None]):
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
class MeetingLink:
    meeting_id: int
    link: str


@dataclass
class ReadLink(Request[MeetingLink]):
    meeting_id: int


class ReadLinkHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


@dataclass
class Joined(Notification):
    meeting_id: int
    user_id: int


class AnnouncingJoinHandler:
    """Publish by itself, since kerux collects no events."""

    def __init__(self, tally: Tally, mediator: Mediator) -> None:
        self._tally = tally
        self._mediator = mediator

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)
        await self._mediator.publish(Joined(meeting_id=request.meeting_id, user_id=request.user_id))


class JoinedHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, notification: Joined) -> None:
        self._tally.note(notification.user_id)


class AlsoJoinedHandler(JoinedHandler):
    async def handle(self, notification: Joined) -> None:
        self._tally.note(notification.user_id)


def workloads() -> dict[str, Workload]:
    tally = Tally()
    join = Join(meeting_id=MEETING_ID, user_id=USER_ID)

    plain = Mediator()
    plain.register(Join, factory=lambda: JoinHandler(tally))
    plain.register(ReadLink, factory=lambda: ReadLinkHandler(tally))

    async def pass_through(_: object, proceed: Next) -> object:
        tally.calls += 1
        return await proceed()

    wrapped = Mediator()
    wrapped.register(Join, factory=lambda: JoinHandler(tally))
    for _ in range(3):
        wrapped.add_behavior(pass_through)

    announcing = Mediator()
    announcing.register(Join, factory=lambda: AnnouncingJoinHandler(tally, announcing))
    announcing.register_notification_handler(Joined, factory=lambda: JoinedHandler(tally))
    announcing.register_notification_handler(Joined, factory=lambda: AlsoJoinedHandler(tally))

    many, requests = Mediator(), []
    for number in range(TYPES):
        request_type = dataclass(type(f"Join{number}", (Join,), {}))
        handler_type = copy_of(JoinHandler, number)
        many.register(request_type, factory=lambda handler_type=handler_type: handler_type(tally))
        requests.append(request_type(meeting_id=MEETING_ID, user_id=USER_ID))

    yielding = Mediator()
    yielding.register(Join, factory=lambda: YieldingJoinHandler(tally))

    return {
        "W0": construction(Join),
        "W1": sending(plain.send, join, tally),
        "W2": query(plain.send, ReadLink(meeting_id=MEETING_ID), tally),
        "W3": sending(wrapped.send, join, tally, counted=4),
        "W4": sending(announcing.send, join, tally, counted=3),
        "W5": sending_in_turn(many.send, requests, tally),
        "W6": sending_at_once(yielding.send, join, tally),
    }
