"""mediatr, which has no events; its handlers and behaviours are global to the process."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mediatr import GenericQuery, Mediator, __behaviors__
from workloads import (
    LINK,
    MEETING_ID,
    TYPES,
    USER_ID,
    Send,
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
class Join(GenericQuery[None]):
    meeting_id: int
    user_id: int


class JoinHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, request: Join) -> None:
        self._tally.note(request.user_id)


@dataclass
class JoinAndYield(Join):
    pass


class JoinAndYieldHandler(JoinHandler):
    async def handle(self, request: JoinAndYield) -> None:
        self._tally.note(request.user_id)
        await asyncio.sleep(0)


@dataclass
class MeetingLink:
    meeting_id: int
    link: str


@dataclass
class ReadLink(GenericQuery[MeetingLink]):
    meeting_id: int


class ReadLinkHandler:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, request: ReadLink) -> MeetingLink:
        self._tally.calls += 1
        return MeetingLink(meeting_id=request.meeting_id, link=LINK)


def workloads() -> dict[str, Workload]:
    tally = Tally()
    send = Mediator(handler_class_manager=lambda handler_type, *_: handler_type(tally)).send_async
    for handler_type in (JoinHandler, JoinAndYieldHandler, ReadLinkHandler):
        Mediator.register_handler(handler_type)
    join = Join(meeting_id=MEETING_ID, user_id=USER_ID)
    return {
        "W0": construction(Join),
        "W1": sending(send, join, tally),
        "W2": query(send, ReadLink(meeting_id=MEETING_ID), tally),
        "W3": sending_through_behaviors(send, join, tally),
        "W5": sending_in_turn(send, requests_of_many_types(), tally),
        "W6": sending_at_once(send, JoinAndYield(meeting_id=MEETING_ID, user_id=USER_ID), tally),
    }


def sending_through_behaviors(send: Send, join: Join, tally: Tally) -> Workload:
    async def pass_through(_: Join, proceed: Callable) -> object:
        tally.calls += 1
        return await proceed()

    async def repeat(times: int) -> object:
        # Registered only while W3 runs: each send goes through all of them.
        __behaviors__[Join] = [pass_through] * 3
        for _ in range(times):
            result = await send(join)
        __behaviors__.clear()
        return result

    return Workload(repeat=repeat, returns=lambda result: result is None, tally=tally, counted=4)


def requests_of_many_types() -> list[Join]:
    requests = []
    for number in range(TYPES):
        request_type = dataclass(type(f"Join{number}", (GenericQuery,), {"__annotations__": Join.__annotations__}))

        handler_type = copy_of(JoinHandler, number)
        handler_type.handle.__annotations__["request"] = request_type
        Mediator.register_handler(handler_type)
        requests.append(request_type(meeting_id=MEETING_ID, user_id=USER_ID))
    return requests
