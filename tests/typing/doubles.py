"""The tools for tests of a program: right programs, and wrong lines with the error of each type checker."""

import asyncio
from dataclasses import dataclass
from typing import assert_type

from diator.brokers import Message
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from diator.mediator import Mediator
from diator.requests import RequestMap
from diator.testing import FaultyMessageBroker, Recorder
from diator.testing.faults import crashed, duplicated, unavailable


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


async def record(recorder: Recorder, requests: RequestMap) -> None:
    Mediator(requests, message_broker=recorder)
    assert_type(recorder.one(UserJoined), UserJoined)
    assert_type(recorder.one(UserJoined, user_id=1).user_id, int)
    assert_type(recorder.events(UserJoined), list[UserJoined])
    assert_type(recorder.messages, list[Message])
    assert_type(recorder.names, list[str])
    recorder.none(UserJoined)

    recorder.one(UserJoined).name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    recorder.one("UserJoined")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recorder.one(UserJoined(user_id=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    found: UserJoined = recorder.events(UserJoined)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


async def script(broker: FaultyMessageBroker, events: EventMap, consumer: Consumer) -> None:
    broker.on_send(duplicated)
    broker.on_send(unavailable, of=UserJoined)
    broker.on_delivery(crashed)
    broker.inject(UserJoined, b"no JSON")
    assert_type(broker.sent, Recorder)
    assert_type(await asyncio.gather(broker.drain(consumer)), tuple[None])
    Consumer(broker, event_map=events)

    broker.on_send(crashed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    broker.on_delivery(unavailable)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    broker.on_send("unavailable")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    broker.inject(UserJoined, "no JSON")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(Recorder(), event_map=events)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
