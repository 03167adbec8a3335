"""
Programs in Node.js and Go, with their own clients, read what diator sends; diator consumes what they send.

They send the documented form, and odd things with it: each is handled, or dead-lettered with a reason as it came.
"""

import asyncio
import json
from base64 import b64decode
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import ClassVar
from uuid import UUID, uuid4

import pytest
from jsonschema import Draft202012Validator

from diator.brokers.base import Topic
from diator.brokers.codec import decode
from diator.brokers.message import Message
from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent
from diator.retrying import PermanentError, RetryPolicy
from tests import peers
from tests.integration.transports import broker_for

pytestmark = pytest.mark.timeout(600)  # the first test of a language compiles its clients

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parents[2] / "docs" / "envelope.schema.json").read_text()))
GROUP = "billing"
TOPIC = Topic("notification_event", "UserJoined")


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    message_key: ClassVar[str] = "user_id"

    user_id: int
    case: str = ""
    note: str = ""
    account: Decimal | None = None
    balance: Decimal | None = None
    joined_at: datetime | None = None
    photo: bytes | None = None
    tags: list[str] | None = None


# -- peers and transports ------------------------------------------------------------------------------------------


@pytest.fixture(params=peers.TOOLCHAINS)
async def peer(request, pytestconfig):
    """A function that asks a program in another language to do something."""
    try:
        command = await asyncio.to_thread(peers.command, request.param, pytestconfig.cache.mkdir("peers"))
    except peers.MissingToolchain as error:
        give_up = pytest.fail if request.param in peers.required() else pytest.skip
        give_up(f"{request.param}: {error}; CONTRIBUTING.md says what the tests use")
    async with peers.running(*command) as process:
        yield lambda do, **options: peers.answer(process, do, **options)


@dataclass(frozen=True)
class Transport:
    """Where a peer finds the messages of one transport."""

    name: str
    address: str
    ours: str
    prefix: str

    @property
    def source(self) -> dict[str, str]:
        """Return where to send the events to, and where to receive them."""
        names = {
            "rabbitmq": f"{self.prefix}/notification_event.UserJoined",
            "kafka": f"{self.prefix}.notification_event.UserJoined",
        }
        return self._place(names.get(self.name, f"{self.prefix}:notification_event:UserJoined"))

    @property
    def dead(self) -> dict[str, str]:
        """Return where the dead letters of the group are."""
        names = {"kafka": f"{self.source['name']}.{GROUP}-dlq"}
        return self._place(names.get(self.name, f"{self.prefix}:notification_event:UserJoined:{GROUP}:dead"))

    @property
    def retries(self) -> dict[str, str]:
        """Return where another program of the group finds a retried message."""
        names = {
            "rabbitmq": f"{self.prefix}:notification_event:UserJoined:{GROUP}",
            "kafka": f"{self.source['name']}.{GROUP}-retry",
        }
        return self._place(names[self.name])

    @property
    def back(self) -> str:
        """Return where to send a dead letter that the group shall handle: on RabbitMQ no other group receives it."""
        return f"/{self.retries['name']}" if self.name == "rabbitmq" else self.source["name"]

    def _place(self, name: str) -> dict[str, str]:
        return {"transport": self.name, "address": self.address, "name": name}

    def broker(self, **options):
        """Return diator's broker."""
        return broker_for(self.ours, self.prefix, **options)


STORING = ("streams", "rabbitmq", "kafka")


@pytest.fixture(params=("pubsub", *STORING))
def transport(request, redis_url, rabbitmq_url, kafka_servers):
    addresses = {
        "pubsub": (redis_url, redis_url),
        "streams": (redis_url, redis_url.replace("redis", "redis-streams", 1)),
        "rabbitmq": (rabbitmq_url, rabbitmq_url),
        "kafka": (kafka_servers, f"kafka://{kafka_servers}"),
    }
    return Transport(request.param, *addresses[request.param], f"languages-{uuid4().hex[:12]}")


@asynccontextmanager
async def consuming(consumer):
    """Run the consumer."""
    async with asyncio.timeout(60):
        await consumer.__aenter__()
    try:
        yield
    finally:
        await asyncio.wait_for(consumer.__aexit__(None, None, None), 60)


# -- what diator sends ---------------------------------------------------------------------------------------------

AT = datetime(2026, 3, 7, 9, 26, 2, 588_000, tzinfo=UTC)
PLAIN, KEYED, HEADED = (UUID(int=number) for number in (1, 2, 3))


async def send_three(broker):
    """Send a message with an event class's key, a plain one, and one with headers."""
    event = UserJoined(
        event_id=KEYED,
        event_timestamp=AT,
        user_id=7,
        case="key",
        note="Grüße 😀 </script>",
        account=Decimal(2**63),
        balance=Decimal("12.30"),
        photo=b"\x00\xff",
        tags=["a"],
    )
    await EventEmitter(message_broker=broker).emit(event)
    await broker.send_message(message("plain", PLAIN))
    await broker.send_message(message("headers", HEADED, key="Schlüssel", headers={"tenant": "7", "city": "Zürich"}))


def message(case, message_id, **beside):
    payload = {"event_id": str(message_id), "event_timestamp": "2026-03-07T09:26:02.588Z", "user_id": 7, "case": case}
    return Message.create(message_name="UserJoined", message_id=message_id, payload=payload, **beside)


async def test_it_reads_what_diator_sends(peer, transport):
    async with transport.broker() as broker:
        keeps_messages = transport.name in ("streams", "kafka")  # for a reader that comes later
        if not keeps_messages:
            await peer("listen", **transport.source)
            await send_three(broker)
        else:
            await send_three(broker)
            await peer("listen", **transport.source)
        answers = [await peer("read", name=transport.source["name"]) for _ in range(3)]

    for answer in answers:
        SCHEMA.validate(json.loads(b64decode(answer["body"])))
    read = {UUID(answer["event"]["id"]): answer for answer in answers}
    assert {answer["event"]["name"] for answer in answers} == {"UserJoined"}
    assert {answer["event"]["at"] for answer in answers} == {"2026-03-07T09:26:02.588Z"}
    event = read[KEYED]["event"]
    assert {field: event[field] for field in ("user_id", "note", "account", "balance", "photo", "tags")} == {
        "user_id": 7,
        "note": "Grüße 😀 </script>",
        "account": "9223372036854775808",
        "balance": "12.30",
        "photo": [0, 255],
        "tags": ["a"],
    }
    beside = {each: (answer.get("key") or None, answer.get("headers") or {}) for each, answer in read.items()}
    if transport.name == "pubsub":  # in the body
        bodies = {each: json.loads(b64decode(answer["body"])) for each, answer in read.items()}
        assert bodies[HEADED]["headers"] == {"tenant": "7", "city": "Zürich", "key": "Schlüssel"}
        assert bodies[KEYED]["headers"] == {"key": "7"}
        assert "headers" not in bodies[PLAIN]
    else:
        if transport.name == "kafka":  # where the key is also a header
            assert [headers.pop("key", None) for _, headers in beside.values()] == [key for key, _ in beside.values()]
        assert beside == {
            PLAIN: (None, {}),
            KEYED: ("7", {"correlation-id": str(KEYED)}),
            HEADED: ("Schlüssel", {"tenant": "7", "city": "Zürich"}),
        }
    if transport.name == "rabbitmq":
        about = {"contentType": "application/json", "type": "UserJoined"}
        assert [answer["properties"] for answer in answers] == [{**about, "messageId": str(each)} for each in read]


@pytest.mark.parametrize("transport", STORING, indirect=True)
async def test_it_reads_what_diator_retries_and_dead_letters(peer, transport):
    event_map, reports = EventMap(), asyncio.Queue()

    @event_map.handler
    async def fail(event: UserJoined) -> None:
        raise {"dead": PermanentError, "retried": RuntimeError}[event.case]

    async with transport.broker() as broker:
        policy = RetryPolicy(immediate_retries=0, first_delay=1.0)
        consumer = Consumer(broker, event_map=event_map, group=GROUP, retry=policy, on_handled=reports.put_nowait)
        async with consuming(consumer), asyncio.timeout(60):
            await broker.send_message(message("retried", PLAIN, key="a", headers={"tenant": "7"}))
            await broker.send_message(message("dead", HEADED, key="b", headers={"tenant": "8"}))
            outcomes = {handled.message_id: handled.outcome for handled in (await reports.get(), await reports.get())}

        assert outcomes == {PLAIN: "retried", HEADED: "dead_lettered"}
        await peer("listen", **transport.dead)
        dead = await peer("read", name=transport.dead["name"])
        if transport.name != "streams":  # which keeps it in diator's own form; other groups have their own copy
            await peer("listen", **transport.retries)
            retried = await peer("read", name=transport.retries["name"])

    assert (dead["event"]["id"], dead["event"]["case"], dead["key"]) == (str(HEADED), "dead", "b")
    about = dead["headers"]
    assert about["tenant"] == "8"
    assert about["diator-dlq-reason"].startswith("permanent: PermanentError in ")
    assert about["diator-dlq-consumer-group"] == GROUP
    assert about["diator-dlq-attempts"] == "1"
    assert about["diator-dlq-version"] == "1"
    assert datetime.fromisoformat(about["diator-dlq-last-failed-at"]).tzinfo == UTC
    assert "UserJoined" in about["diator-dlq-source"]
    if transport.name != "streams":
        assert (retried["event"]["id"], retried["event"]["case"], retried["key"]) == (str(PLAIN), "retried", "a")
        name, value = {"rabbitmq": ("diator-attempt", "1"), "kafka": ("diator-retry-attempt", "2")}[transport.name]
        assert (retried["headers"]["tenant"], str(retried["headers"][name])) == ("7", value)


@pytest.mark.parametrize("transport", STORING, indirect=True)
async def test_a_dead_letter_that_it_moves_back_is_a_first_delivery(peer, transport):
    """If that fails, too, the last headers of its dead letter are those of this delivery."""
    event_map, reports, errors = EventMap(), asyncio.Queue(), [PermanentError, ValueError]

    @event_map.handler
    async def fail(event: UserJoined) -> None:
        raise errors.pop(0)

    async with transport.broker() as broker:
        policy = RetryPolicy(immediate_retries=0, delayed_retries=0)
        consumer = Consumer(broker, event_map=event_map, group=GROUP, retry=policy, on_handled=reports.put_nowait)
        async with consuming(consumer), asyncio.timeout(60):
            await broker.send_message(message("dead", HEADED, key="b", headers={"tenant": "8"}))
            first = await reports.get()
            await peer("listen", **transport.dead)
            await peer("move", **transport.dead, to=transport.back)
            second = await reports.get()
            dead = await peer("read", name=transport.dead["name"])

    for each in (first, second):
        assert (each.outcome, each.attempt, each.message_id) == ("dead_lettered", 1, HEADED)
    assert (dead["event"]["id"], dead["key"], dead["headers"]["tenant"]) == (str(HEADED), "b", "8")
    assert dead["headers"]["diator-dlq-reason"].startswith("retries-exhausted: ValueError in ")


# -- what it sends -------------------------------------------------------------------------------------------------


async def test_diator_reads_the_documented_form(peer, transport):
    which = "documented-pubsub" if transport.name == "pubsub" else "documented"
    group = None if transport.name == "pubsub" else GROUP
    read = {}
    async with transport.broker() as broker, broker.subscribe([TOPIC], group=group, prefetch=3) as deliveries:
        sent = (await peer("send", which=which, **transport.source))["sent"]
        async with asyncio.timeout(60):
            async for delivery in deliveries:
                SCHEMA.validate(json.loads(delivery.body))
                received = decode(delivery.body, headers=delivery.headers)
                read[received.payload["case"]] = (received.key, received.headers)
                await delivery.ack()
                if len(read) == len(sent):
                    break

    assert read == {
        "plain": (None, {}),
        "key": ("Schlüssel", {}),
        "headers": ("7", {"tenant": "7", "traceparent": "00-ab-cd-01"}),
    }


#: Why a message is not handled: the beginning of the reason. All other messages are handled.
NO_MESSAGE, NO_JSON, UNFIT = (
    f"undecodable: {what}"
    for what in (
        "the body is not a message: ",
        "the body is not a message: JSON is malformed",
        "the payload does not fit UserJoined: ",
    )
)
EMPTY = "undecodable: the body is empty"
NO_PROPERTIES = "undecodable: these properties of RabbitMQ cannot be decoded: "
REASONS = {
    "pubsub": {
        "bytes": NO_JSON,
    },
    "bodies": {
        "urn-id": NO_MESSAGE + "Invalid UUID - at `$.message_id`",
        "braced-id": NO_MESSAGE + "Invalid UUID - at `$.message_id`",
        "ulid": NO_MESSAGE + "Invalid UUID - at `$.message_id`",
        "number-id": NO_MESSAGE + "Expected `uuid`, got `int` - at `$.message_id`",
        "null-type": NO_MESSAGE + "Expected `str`, got `null` - at `$.message_type`",
        "other-name": "mismatch: ",
        "camel-case": NO_MESSAGE + "Object missing required field `message_type`",
        "go-names": NO_MESSAGE + "Object missing required field `message_name`",
        "text-payload": UNFIT + "Expected `object`, got `str`",
        "list": NO_MESSAGE + "Expected `object`, got `array`",
        "null": NO_MESSAGE + "Expected `object`, got `null`",
        "empty": EMPTY,
        "number-as-text": UNFIT + "Expected `int`, got `str` - at `$.user_id`",
        "whole-number-as-float": UNFIT + "Expected `int`, got `float` - at `$.user_id`",
        "fraction": UNFIT + "Expected `int`, got `float` - at `$.user_id`",
        "boolean-as-number": UNFIT + "Expected `int`, got `bool` - at `$.user_id`",
        "not-a-number": NO_JSON,
        "date-only": UNFIT + "Invalid RFC3339 encoded datetime - at `$.joined_at`",
        "epoch": UNFIT + "Expected `datetime | null`, got `int` - at `$.joined_at`",
        "zone-name": UNFIT + "Invalid RFC3339 encoded datetime - at `$.joined_at`",
        "mail-date": UNFIT + "Invalid RFC3339 encoded datetime - at `$.joined_at`",
        "year-10000": UNFIT + "Invalid RFC3339 encoded datetime - at `$.joined_at`",
        "base64-url": UNFIT + "a value is invalid - at `$.photo`",
        "buffer": UNFIT + "Expected `bytes | null`, got `object` - at `$.photo`",
        "lone-surrogate": NO_MESSAGE,
        "byte-order-mark": NO_JSON,
        "utf-16": NO_JSON,
        "latin-1": NO_MESSAGE + "it is not valid UTF-8",
        "trailing-zeros": NO_JSON,
    },
    "streams": {"no-body": EMPTY},
    "rabbitmq": {
        "garbage-with-headers": NO_JSON,
        "empty": EMPTY,
        "gzip": "undecodable: the body is compressed (gzip)",
        "large": "undecodable: the body has 2,",
        "microseconds": NO_PROPERTIES + "timestamp",
        "microseconds-header": NO_PROPERTIES + "headers",
        "nested-tables": NO_PROPERTIES + "headers",
        "binary-correlation-id": NO_PROPERTIES + "correlation-id",
        "latin-1-header-name": NO_PROPERTIES + "headers",
        "time-before-1970": NO_PROPERTIES + "timestamp",
        "zero-time": NO_PROPERTIES + "headers",
    },
    "kafka": {
        "null-value": EMPTY,
        "empty-value": EMPTY,
        "schema-registry": NO_JSON,
    },
}
#: What a handler receives.
VALUES = {
    "no-event-id": ("event_id", UUID("9f62e977-8a1c-4b7e-a0d5-6c1f2f3b9e11")),
    "no-event-timestamp": ("event_timestamp", None),
    "escaped-text": ("case", "escaped-text"),
    "beyond-53-bits": ("user_id", 2**53 + 1),
    "beyond-64-bits": ("user_id", 2**64 + 1),
    "long-number": ("user_id", 10**200 - 1),
    "largest-integer": ("user_id", 2**63 - 1),
    "large-number-as-text": ("account", Decimal(2**63)),
    "decimal-as-text": ("balance", Decimal("12.30")),
    "decimal-as-number": ("balance", Decimal("12.3")),
    "milliseconds": ("joined_at", datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)),
    "microseconds": ("joined_at", datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)),
    "nanoseconds": ("joined_at", datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)),
    "nanoseconds-and-offset": ("joined_at", datetime(2026, 1, 2, 1, 4, 5, 678_901, tzinfo=UTC)),
    "offset": ("joined_at", datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)),
    "base64": ("photo", b"\x00\xff"),
    "bytes": ("photo", b"\x00\xff"),
    "not-unicode": ("note", "gr\ufffdn"),
    "html": ("note", "<a & b> \u2028"),
}


@pytest.mark.parametrize(
    ("transport", "which"),
    [*((name, name) for name in ("pubsub", *STORING)), ("streams", "bodies")],
    indirect=["transport"],
)
async def test_no_message_that_it_sends_stops_another(peer, transport, which):
    event_map, events, reports = EventMap(), {}, asyncio.Queue()

    @event_map.handler
    async def handle(event: UserJoined) -> None:
        events[event.case] = event

    group, once = None if transport.name == "pubsub" else GROUP, RetryPolicy(delayed_retries=0)
    async with transport.broker() as broker:
        consumer = Consumer(broker, event_map=event_map, group=group, retry=once, on_handled=reports.put_nowait)
        async with consuming(consumer):
            answer = await peer("send", which=which, **transport.source)
            sent = {case: (body, headers) for case, body, headers in answer["sent"]}
            async with asyncio.timeout(60):
                handled = [await reports.get() for _ in sent]

    expected = {case: reason for case, reason in REASONS[which].items() if case in sent}
    reasons = sorted(each.reason for each in handled if each.outcome != "acked")
    assert events.keys() == sent.keys() - expected.keys(), reasons
    values = {
        case: getattr(events[case], field) for case, (field, _) in VALUES.items() if which == "bodies" and case in sent
    }
    assert values == {case: VALUES[case][1] for case in values}

    if transport.name == "pubsub":  # which has no dead-letter queue
        assert [reason.startswith(NO_JSON) for reason in reasons] == [True]
        return
    await peer("listen", **transport.dead)
    answers = [await peer("read", name=transport.dead["name"], raw=True) for _ in expected]
    letters = {answer["body"]: answer["headers"] for answer in answers}
    assert sorted(letter["diator-dlq-reason"] for letter in letters.values()) == reasons
    for case, reason in expected.items():
        body, headers = sent[case]
        assert letters[body]["diator-dlq-reason"].startswith(reason), case
        assert case != "garbage-with-headers" or headers.items() <= letters[body].items()


@pytest.mark.parametrize("transport", STORING, indirect=True)
async def test_what_it_sends_is_the_same_after_a_retry(peer, transport):
    """Each message is retried once and then dead-lettered: the peer reads what it has sent, typed headers included."""
    which = {"streams": "bodies"}.get(transport.name, transport.name)
    event_map, reports, dead = EventMap(), asyncio.Queue(), []

    @event_map.handler
    async def fail(event: UserJoined) -> None:
        raise RuntimeError

    async with transport.broker() as broker:
        policy = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.1, retry_undecodable=False)
        consumer = Consumer(broker, event_map=event_map, group=GROUP, retry=policy, on_handled=reports.put_nowait)
        async with consuming(consumer), asyncio.timeout(60):
            sent = (await peer("send", which=which, **transport.source))["sent"]
            while len(dead) < len(sent):
                if (report := await reports.get()).outcome == "dead_lettered":
                    dead.append(report)

    await peer("listen", **transport.dead)
    letters = [await peer("read", name=transport.dead["name"], raw=True) for _ in sent]
    assert sorted(str(letter["body"]) for letter in letters) == sorted(str(body) for _, body, _ in sent)
    retried = {each["body"]: each for each in letters if each["headers"]["diator-dlq-attempts"] == "2"}
    assert len(retried) == len(sent) - sum(case in REASONS[which] for case, _, _ in sent)
    for case, body, headers in sent:
        if transport.name == "rabbitmq" and body in retried and case != "attempts":  # whose headers are not a sender's
            received = {"key": retried[body].get("key"), **retried[body]["headers"]}
            assert {name: received.get(name) for name in headers} == headers, case


@pytest.mark.parametrize("transport", ["kafka"], indirect=True)
async def test_a_key_has_one_partition_in_every_language(peer, transport):
    keys = ["7", "a key", "Schlüssel", "日本語", "😀", str(PLAIN), "k" * 1_000]
    async with transport.broker() as broker:
        for number, key in enumerate(keys, 1):
            await broker.send_message(message("ours", UUID(int=number), key=key))
    await peer("send", which="keys", keys=keys, **transport.source)
    await peer("listen", **transport.source)

    partitions = defaultdict(list)
    for _ in range(2 * len(keys)):
        answer = await peer("read", name=transport.source["name"])
        partitions[answer["key"]].append(answer["partition"])

    assert partitions.keys() == set(keys)
    assert all(len(found) == 2 and len(set(found)) == 1 for found in partitions.values()), partitions
    assert len({partition for partition, _ in partitions.values()}) > 1
