"""Messages that cannot be decoded, or have no handler."""

import json
import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from diator.brokers import Message
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES
from diator.brokers.memory import MemoryMessageBroker
from diator.events import EventEmitter, NotificationEvent
from diator.retrying import RetryPolicy
from tests.unit.consumer.helpers import CANARY, JOIN, JOINED, consume, on_joined, outcomes, quick
from tests.unit.doubles import (
    FULL,
    WEAK,
    MeetingChanged,
    Moved,
    Scripted,
    UserJoined,
    body_of,
)


class Several(Exception):
    """An error as some validation libraries raise it."""

    def __init__(self, text):
        super().__init__(text)
        self.errors = [text]


REFUSALS = {"lookup": LookupError, "value": ValueError, "several": Several}


@dataclass(frozen=True, kw_only=True)
class Checked(NotificationEvent):
    """An event that validates its values."""

    name: str

    def __post_init__(self):
        kind, _, rest = self.name.partition(" ")
        raise REFUSALS[kind](rest)


PAYLOAD = json.loads(body_of(JOIN))["payload"]

DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000

UNDECODABLE = {
    "garbage": b"\xff\xfe\x00\x01" + CANARY.encode(),
    "text": CANARY.encode(),
    "empty": b"",
    "spaces": b"  \n",
    "cut off": body_of(JOIN, payload=PAYLOAD | {"note": CANARY})[:-9],
    "another charset": body_of(JOIN, payload=PAYLOAD | {"note": f"é {CANARY}"}).decode().encode("latin-1"),
    "UTF-16": body_of(JOIN, payload=PAYLOAD | {"note": CANARY}).decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + body_of(JOIN, payload=PAYLOAD | {"note": CANARY}),
    "deep": b"[" * 100_000,
    "deep in the payload": body_of(JOIN, payload={}).replace(b"{}", DEEP),
    "too large": body_of(JOIN, payload=PAYLOAD | {"note": CANARY * (MAX_MESSAGE_BYTES // len(CANARY))}),
    "a list": b"[]",
    "null": b"null",
    "no payload": b'{"message_type": "notification_event", "message_name": "UserJoined"}',
    "payload of text": body_of(JOIN, payload=CANARY),
    "payload is a list": body_of(JOIN, payload=[CANARY]),
    "payload is null": body_of(JOIN, payload=None),
    "no UUID": body_of(JOIN, message_id=CANARY),
    "name of another type": body_of(JOIN, message_name=[CANARY]),
    "a field is missing": body_of(Moved(), message_name="Checked", payload=PAYLOAD),
    "a field is wrong": body_of(JOIN, payload=PAYLOAD | {"user_id": CANARY}),
    "a field is null": body_of(JOIN, payload=PAYLOAD | {"user_id": None}),
    "NaN instead of a number": body_of(JOIN, payload=PAYLOAD | {"user_id": float("nan")}),
    **{
        f"its class refuses it: {how}": body_of(JOIN, message_name="Checked", payload=PAYLOAD | {"name": how})
        for how in (
            f"lookup {CANARY}",
            f"value {CANARY}",
            f"value Expected something else, got {CANARY}",
            f"value Wrong - at {CANARY}",
            f"several {CANARY}",
        )
    },
}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("body", UNDECODABLE.values(), ids=UNDECODABLE)
async def test_an_undecodable_message_is_dead_lettered_with_a_reason_and_never_logged(body, concurrency, caplog):
    runs = []

    async def counting(event: UserJoined) -> None:
        runs.append(event)

    async def on_checked(event: Checked) -> None:
        runs.append(event)

    caplog.set_level(logging.DEBUG)
    broker = Scripted(body, body_of(JOIN))
    retry = RetryPolicy(retry_undecodable=False)
    reports = await consume(broker, counting, on_checked, count=2, concurrency=concurrency, retry=retry)

    acked, (*poisoned, reason) = sorted(broker.log)  # the next message does not wait for the dead letter
    assert (poisoned, acked) == (["dead_letter"], ("ack",))
    [bad] = [each for each in reports if each.outcome != "acked"]
    assert (bad.outcome, bad.reason, runs) == ("dead_lettered", reason, [JOIN])
    assert reason.startswith("undecodable: ")
    assert CANARY not in reason + caplog.text
    [record] = [each for each in caplog.records if each.levelname != "INFO"]
    assert record.levelno == logging.ERROR
    assert reason in record.getMessage()


NO_MESSAGE = {
    each: UNDECODABLE[each]
    for each in (
        "garbage",
        "cut off",
        "too large",
        "a list",
        "no payload",
        "payload of text",
        "payload is a list",
        "deep",
    )
}
MISFITS = {
    each: body
    for each, body in UNDECODABLE.items()
    if each.startswith(("a field is ", "its class")) and each != "NaN instead of a number"
}


@pytest.mark.parametrize("body", NO_MESSAGE.values(), ids=NO_MESSAGE)
async def test_what_no_class_can_decode_is_dead_lettered_at_once(body):
    [handled] = await consume(Scripted(body), on_joined)

    assert (handled.outcome, handled.attempt) == ("dead_lettered", 1)


@pytest.mark.parametrize("body", MISFITS.values(), ids=MISFITS)
async def test_a_payload_that_does_not_fit_its_class_is_requeued_without_immediate_retries(body, caplog):
    async def on_checked(event: Checked) -> None: ...

    [handled] = await consume(broker := Scripted(body), on_joined, on_checked)

    assert (handled.outcome, handled.retries, broker.log) == ("retried", 0, [("retry",)])
    assert handled.reason.startswith("undecodable: the payload does not fit ")
    assert CANARY not in handled.reason + caplog.text
    [line] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "failed (undecodable: " in line.getMessage()
    assert line.getMessage().endswith("; requeued for attempt 2 of 6")


async def test_a_payload_that_never_fits_is_dead_lettered_after_the_last_delayed_retry():
    broker = MemoryMessageBroker()  # it retains the message for the first group
    await broker.send_message(Message.create(message_name="UserJoined", payload={"user_id": "seven"}))
    reports = await consume(broker, on_joined, retry=quick(2, 3), count=4)

    assert outcomes(reports) == ["retried"] * 3 + ["dead_lettered"]
    [letter] = broker.dead_letters
    assert (letter.reason.partition(":")[0], letter.attempts) == ("undecodable", 4)


async def test_a_newer_consumer_of_the_group_handles_what_an_older_one_could_not_decode():
    got = []

    @dataclass(frozen=True, kw_only=True)
    class Old(NotificationEvent):
        message_name: ClassVar[str] = "Paid"
        n: int

    @dataclass(frozen=True, kw_only=True)
    class New(NotificationEvent):
        message_name: ClassVar[str] = "Paid"
        n: str

    async def on_old(event: Old) -> None:
        got.append(("old", event.n))

    async def on_new(event: New) -> None:
        got.append(("new", event.n))

    broker = MemoryMessageBroker()
    for event in (New(n="1"), Old(n=2)):
        await EventEmitter(message_broker=broker).emit(event)
    retry = RetryPolicy(first_delay=0.2)
    reports = await consume(broker, on_old, count=2, group="g", retry=retry)
    later = await consume(broker, on_new, group="g", retry=retry)

    assert (outcomes(reports), outcomes(later)) == (["retried", "acked"], ["acked"])
    assert got == [("old", 2), ("new", "1")]


@pytest.mark.parametrize("capabilities", [WEAK, replace(FULL, delayed_retry=False)], ids=["weak", "no delays"])
async def test_where_the_transport_cannot_delay_a_retry_a_misfit_is_settled_at_once(capabilities):
    [handled] = await consume(Scripted(MISFITS["a field is wrong"], capabilities=capabilities), on_joined)

    assert handled.outcome == ("dead_lettered" if capabilities.dead_letter else "given_up")


async def test_what_the_transport_could_not_read_is_dead_lettered_with_its_reason():
    broker = Scripted()
    broker.script.append(broker.delivery(b"\x1f\x8b", unreadable="its compression is unknown"))
    [handled] = await consume(broker, on_joined)

    assert (handled.outcome, handled.reason) == ("dead_lettered", "undecodable: its compression is unknown")


async def test_the_transport_sets_the_largest_size_of_a_message():
    body = body_of(JOIN)
    small, smaller = (Capabilities(max_message_bytes=len(body) - less, dead_letter=True) for less in (0, 1))

    assert outcomes(await consume(Scripted(body, capabilities=small), on_joined)) == ["acked"]
    assert outcomes(await consume(Scripted(body, capabilities=smaller), on_joined)) == ["dead_lettered"]


@pytest.mark.parametrize(
    "envelope",
    [
        {"message_name": "MeetingChanged", "message_type": "ecst_event"},
        {"message_name": "UserLeft"},
        {"message_name": "userjoined"},
        {"message_name": "User\\u004aoined"},
        {"message_type": "ecst_event"},
        {"message_name": ""},
        {"message_name": f"\nERROR {CANARY}\x1b[2J" + "x" * 3_000},
    ],
    ids=range(7),
)
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_the_topic_chooses_the_handler_and_a_body_that_names_another_one_is_dead_lettered(
    envelope, concurrency, caplog
):
    """Otherwise whoever may write to one topic could run the handlers of every other one."""
    runs = []

    async def on_user(event: UserJoined) -> None:
        runs.append(event)

    async def on_meeting(event: MeetingChanged) -> None:
        runs.append(event)

    broker = Scripted()
    foreign = broker.delivery(body_of(JOIN, payload=PAYLOAD | {"note": CANARY}, **envelope), topic=JOINED)
    broker.script += [foreign, body_of(JOIN)]
    reports = await consume(broker, on_user, on_meeting, count=2, concurrency=concurrency)

    acked, (_, reason) = sorted(broker.log)
    assert reason == "mismatch: the body names another type or name than its topic, notification_event UserJoined"
    assert (acked, runs) == (("ack",), [JOIN])
    assert (reason, JOIN.event_id) in [(each.reason, each.message_id) for each in reports]
    assert CANARY not in caplog.text


async def test_a_delivery_of_a_topic_that_nobody_subscribed_to_stops_nothing():
    """A transport never makes one; a defect of it must not end the consumer."""
    broker = Scripted()
    broker.script += [broker.delivery(body_of(Moved())), body_of(JOIN)]

    assert sorted(outcomes(await consume(broker, on_joined, count=2))) == ["acked", "dead_lettered"]


async def test_a_newer_version_with_more_fields_is_read():
    broker = Scripted(body_of(JOIN, payload=PAYLOAD | {"title": "new", "more": [{}]}, version=2))

    assert outcomes(await consume(broker, on_joined)) == ["acked"]
