"""Headers of messages that are sent: sources, classes, single events, correlation; and what is refused, and where."""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pydantic
import pytest

from diator.brokers import Message
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import MAX_HEADER_BYTES
from diator.consumer import Consumer
from diator.context import ContextFilter, MessageContext, correlated, correlation, current_message
from diator.events import DomainEvent, EventEmitter, EventMap, Events, NotificationEvent, WithHeaders
from diator.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    EventsNotSent,
    MessageTooLarge,
    NotAnEvent,
)
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from diator.testing import Recorder
from tests.unit.consumer.helpers import consumer_of, quick
from tests.unit.doubles import UserJoined, running, until

CANARY = "canary-4711"


class Native(Recorder):
    """A broker whose service has headers of its own."""

    capabilities = Capabilities(headers="native")


class InBody(Recorder):
    capabilities = Capabilities(headers="envelope")


def tenant(event):
    return {"tenant": "42"}


def region(event):
    return {"region": event.region if hasattr(event, "region") else "eu"}


class Join(Request[None]): ...


def joining(*raised):
    requests = RequestMap()

    @requests.handler
    async def join(request: Join, events: Events) -> None:
        for event, headers in raised:
            events.append(event, headers=headers)

    return requests


async def headers_of(event, *, broker=None, **options):
    """Return the headers of the message that an emitter sends."""
    broker = Recorder() if broker is None else broker
    await EventEmitter(message_broker=broker, **options).emit(event)
    return dict(broker.messages[-1].headers)


async def test_each_source_is_called_with_the_event_and_the_last_one_counts():
    seen = []

    def user(event):
        seen.append(event)
        return {"user": str(event.user_id), "tenant": "7"}

    joined = UserJoined(user_id=7)

    assert await headers_of(joined, headers=[tenant, user]) == {"tenant": "7", "user": "7"}
    assert seen == [joined]


async def test_a_mediator_passes_them_to_its_emitter_and_calls_them_inside_the_unit_of_work():
    steps, recorder = [], Recorder()

    def noting(event):
        steps.append("source")
        return {"tenant": "42"}

    async def transaction(request, handle):
        await handle(request)
        steps.append("commit")

    joined = UserJoined(user_id=7)
    mediator = Mediator(joining((joined, None)), message_broker=recorder, headers=[noting], middlewares=[transaction])
    await mediator.send(Join())

    assert steps == ["source", "commit"]
    assert recorder.one(UserJoined, headers={"tenant": "42"}) == joined


@dataclass(frozen=True, kw_only=True)
class Invoiced(NotificationEvent):
    message_headers: ClassVar[dict[str, str]] = {"region": "region", "number": "number", "owner": "owner"}

    region: str = "eu"
    number: int = 7
    owner: UUID | None = None


async def test_a_class_may_name_fields_as_headers():
    assert await headers_of(Invoiced()) == {"region": "eu", "number": "7"}
    owner = uuid4()
    expected = {"region": "us", "number": "7", "owner": str(owner)}
    assert await headers_of(Invoiced(region="us", owner=owner)) == expected


async def test_one_event_may_have_headers_of_its_own_which_count_most():
    recorder, joined, invoiced = Recorder(), UserJoined(user_id=7), Invoiced()
    raised = [(joined, {"tenant": "1"}), (invoiced, {"region": "asia"}), (joined, None)]
    await Mediator(joining(*raised), message_broker=recorder, headers=[tenant]).send(Join())

    assert [dict(each.headers) for each in recorder.messages] == [
        {"tenant": "1"},
        {"tenant": "42", "region": "asia", "number": "7"},
        {"tenant": "42"},
    ]


async def test_a_handler_class_raises_an_event_with_headers():
    class Handler(RequestHandler[Join, None]):
        async def handle(self, request: Join) -> None:
            self.events.append(WithHeaders(UserJoined(user_id=7), {"tenant": "1"}))
            self.events.append(UserJoined(user_id=8), headers={"tenant": "2"})  # type: ignore[call-arg]

    recorder, requests = Recorder(), RequestMap()
    requests.bind(Join, Handler)
    await Mediator(requests, message_broker=recorder).send(Join())

    assert recorder.one(UserJoined, headers={"tenant": "1"}).user_id == 7
    assert recorder.one(UserJoined, headers={"tenant": "2"}).user_id == 8


async def test_an_error_names_the_event_itself():
    class Refusing(Recorder):
        async def send_message(self, message):
            raise BrokerUnavailable("no")

    joined = UserJoined(user_id=7)
    with pytest.raises(EventsNotSent) as raised:
        await Mediator(joining((joined, {"tenant": "1"})), message_broker=Refusing()).send(Join())

    assert [*raised.value.events] == [joined]


class Noted(DomainEvent): ...


NOT_SENT = "headers were passed with {}, which is not an integration event"


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (Noted(), NOT_SENT.format("Noted")),
        (7, "an object of int was raised, which is neither"),
        (Join(), "an object of Join was raised, which is neither"),
        (
            WithHeaders(UserJoined(user_id=7), {}),
            "headers were passed with a WithHeaders, which has headers already; pass all of them once$",
        ),
    ],
)
async def test_headers_of_what_is_not_sent_are_refused(event, problem):
    with pytest.raises(NotAnEvent, match=f"^{problem}"):
        await EventEmitter(message_broker=Recorder()).emit(WithHeaders(event, {"tenant": "1"}))


async def test_a_consumer_adds_headers_to_what_its_handlers_raise():
    broker, followed = MemoryMessageBroker(), []

    @dataclass(frozen=True, kw_only=True)
    class Welcomed(NotificationEvent): ...

    async def welcome(event: UserJoined, events: Events) -> None:
        events.append(Welcomed(), headers={"own": "1"})

    async def follow(event: Welcomed, context: MessageContext) -> None:
        followed.append(dict(context.headers))

    await EventEmitter(message_broker=broker).emit(UserJoined(user_id=7))
    consumer, reports = consumer_of(broker, welcome, follow, headers=[tenant])
    async with running(consumer):
        await until(lambda: len(reports) == 2)

    assert followed == [{"tenant": "42", "own": "1"}]


def test_sources_beside_an_emitter_are_refused():
    emitter = EventEmitter()
    with pytest.raises(ConfigurationError, match="pass"):
        Mediator(RequestMap(), event_emitter=emitter, headers=[tenant])
    events = EventMap()

    @events.handler
    async def welcome(event: UserJoined) -> None: ...

    with pytest.raises(ConfigurationError) as refused:
        Consumer(MemoryMessageBroker(), event_map=events, event_emitter=emitter, headers=[tenant])

    assert str(refused.value) == (
        "headers or outbox was passed together with event_emitter; pass it to the EventEmitter"
    )


async def asynchronous(event):
    return {}


@pytest.mark.parametrize(
    "wrong", [tenant, {"tenant": "1"}, "a text", [{"tenant": CANARY}], [asynchronous], [dict], [7], 7]
)
def test_what_is_not_a_list_of_sources_is_refused_at_once(wrong):
    with pytest.raises(ConfigurationError, match="header") as raised:
        EventEmitter(headers=wrong)
    assert CANARY not in str(raised.value)


@pytest.mark.parametrize(
    "declared",
    [{"region": "nothing"}, ["region"], "region", {"Region": "region"}, {"diator-x": "region"}, {7: "region"}],
)
async def test_a_class_whose_headers_cannot_be_is_refused(declared):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(NotificationEvent):
        message_headers: ClassVar[Any] = declared
        region: str = "eu"

    with pytest.raises(NotAnEvent, match=r"Wrong\.message_headers"):
        await EventEmitter(message_broker=Recorder()).emit(Wrong())


async def test_a_field_of_that_name_is_a_field():
    @dataclass(frozen=True, kw_only=True)
    class Sent(NotificationEvent):
        message_headers: dict[str, str] = field(default_factory=dict)

    assert await headers_of(Sent(message_headers={"region": "eu"})) == {}


# -- what is refused -------------------------------------------------------------------------------------------------


def fail(event):
    raise LookupError(CANARY)


WRONG = {
    "raises": fail,
    "no mapping": lambda _: CANARY,
    "none": lambda _: None,
    "a coroutine": asynchronous.__call__,
    "a pair": lambda _: [(CANARY, CANARY)],
    "no text as a value": lambda _: {"tenant": 7},
    "none as a value": lambda _: {"tenant": None},
    "bytes": lambda _: {"tenant": CANARY.encode()},
    "no text as a name": lambda _: {7: CANARY},
    "no Unicode": lambda _: {"tenant": f"{CANARY}\ud800"},
    "a name that is not Unicode": lambda _: {f"{CANARY}\ud800": ""},
    "upper case": lambda _: {"Tenant": CANARY},
    "an empty name": lambda _: {"": CANARY},
    "a space": lambda _: {"a tenant": CANARY},
    "a line break": lambda _: {f"{CANARY}\n": CANARY},
    "a long name": lambda _: {CANARY * 30: ""},
    "reserved for the key": lambda _: {"key": CANARY},
    "reserved for diator": lambda _: {"diator-attempt": "7"},
    "a large value": lambda _: {"tenant": CANARY * 100_000},
    "many": lambda _: {f"h{number}": "" for number in range(10_000)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("broker", [Recorder, Native, InBody])
async def test_a_source_is_refused_inside_the_unit_of_work_by_its_name(wrong, broker):
    def its_name(event):
        return wrong(event)

    committed, recorder = [], broker()

    async def transaction(request, handle):
        await handle(request)
        committed.append(request)

    requests = joining((UserJoined(user_id=7), None))
    mediator = Mediator(requests, message_broker=recorder, headers=[tenant, its_name], middlewares=[transaction])
    with pytest.raises(EncodingError, match="its_name") as raised:
        await mediator.send(Join())

    assert (committed, recorder.messages) == ([], [])
    assert CANARY not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("none", "headers must be a dictionary of texts, and it is None"),
        ("a coroutine", "headers must be a dictionary of texts, and it is an object of coroutine"),
        ("no text as a value", "names and values must be text, and one is an object of int"),
        ("none as a value", "names and values must be text, and one is None"),
        ("no text as a name", "names and values must be text, and one is an object of int"),
    ],
)
async def test_an_error_says_what_the_headers_are_instead(wrong, problem):
    emitter = EventEmitter(message_broker=Recorder(), headers=[WRONG[wrong]])
    with pytest.raises(EncodingError, match=f": {problem}$"):
        await emitter.emit(UserJoined(user_id=7))


@pytest.mark.parametrize("wrong", [each for each in WRONG if each not in ("raises", "none", "a coroutine")])
async def test_headers_of_one_event_are_refused_in_the_same_way(wrong):
    recorder = Recorder()
    mediator = Mediator(joining((UserJoined(user_id=7), WRONG[wrong](None))), message_broker=recorder)
    with pytest.raises(EncodingError, match="UserJoined, its own headers") as raised:
        await mediator.send(Join())

    assert recorder.messages == []
    assert CANARY not in str(raised.value)


async def test_all_headers_together_have_a_limit():
    half = MAX_HEADER_BYTES // 2 - 100
    assert (
        len(await headers_of(UserJoined(user_id=7), headers=[lambda _: {"a": "x" * half}, lambda _: {"b": "x" * half}]))
        == 2
    )
    with pytest.raises(EncodingError, match=r"UserJoined\.headers"):
        await headers_of(UserJoined(user_id=7), headers=[lambda _, name=name: {name: "x" * half} for name in "abc"])


async def test_a_header_that_the_service_reserves_is_refused_before_the_commit():
    class Particular(Native):
        def check_message(self, message):
            if "x-death" in message.headers:
                raise EncodingError("UserJoined.headers", "it is reserved")

    recorder = Particular()
    for given in ({"headers": [lambda _: {"x-death": "7"}]},):
        with pytest.raises(EncodingError, match="reserved"):
            await headers_of(UserJoined(user_id=7), broker=recorder, **given)
    with pytest.raises(EncodingError, match="reserved"):
        await EventEmitter(message_broker=recorder).emit(WithHeaders(UserJoined(user_id=7), {"x-death": "7"}))
    assert recorder.messages == []


# -- correlation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "correlates"), [(Native, True), (InBody, False), (Recorder, False)])
async def test_messages_are_correlated_where_headers_are_the_services_own(broker, correlates):
    joined = UserJoined(user_id=7)

    expected = {"correlation-id": str(joined.event_id)} if correlates else {}
    assert await headers_of(joined, broker=broker()) == expected
    assert await headers_of(joined, broker=broker(), headers=[tenant]) == {**expected, "tenant": "42"}


@pytest.mark.parametrize("broker", [Native, InBody, Recorder])
async def test_a_program_asks_for_the_correlation_elsewhere(broker):
    joined = UserJoined(user_id=7)

    assert await headers_of(joined, broker=broker(), headers=[correlation]) == {"correlation-id": str(joined.event_id)}


@dataclass(frozen=True, kw_only=True)
class Renamed(NotificationEvent):
    """Its id is not where diator looks for it first."""

    event_id: UUID = field(default_factory=uuid4)
    a: int = 1


async def test_the_id_is_that_of_the_event_wherever_it_stands_in_the_payload():
    from diator.events import Event  # noqa: PLC0415

    class Aliased(pydantic.BaseModel, Event):
        message_type: ClassVar[str] = "notification_event"
        first: int = 1
        event_id: UUID = pydantic.Field(default_factory=uuid4)
        event_timestamp: datetime = pydantic.Field(default_factory=lambda: datetime.now(UTC))

    for event in (Renamed(), Aliased()):
        expected = {"correlation-id": str(event.event_id)}
        assert await headers_of(event, broker=Native()) == expected
        assert await headers_of(event, broker=Native(), headers=[tenant]) == {**expected, "tenant": "42"}


async def test_a_long_correlation_id_that_does_not_fit_is_refused_inside_the_unit_of_work():
    broker = MemoryMessageBroker(max_message_bytes=1_200)
    mediator = Mediator(joining((UserJoined(user_id=7), None)), message_broker=broker, headers=[correlation])
    await mediator.send(Join())

    with correlated("\U0001d538" * 255), pytest.raises(MessageTooLarge):
        await mediator.send(Join())


async def test_a_block_at_the_edge_of_a_program_correlates_what_is_sent_in_it():
    with correlated("request-7") as given:
        assert given == "request-7"
        assert await headers_of(UserJoined(user_id=7), broker=Native()) == {"correlation-id": "request-7"}
        with correlated() as inner:
            assert await headers_of(UserJoined(user_id=7), broker=Native()) == {"correlation-id": inner}
        together = await asyncio.gather(*(headers_of(UserJoined(user_id=1), broker=Native()) for _ in range(3)))
        assert together == [{"correlation-id": "request-7"}] * 3
    assert UUID(inner).version == 4
    joined = UserJoined(user_id=7)
    assert await headers_of(joined, broker=Native()) == {"correlation-id": str(joined.event_id)}


@pytest.mark.parametrize("text", [lambda id_: id_.hex, lambda id_: id_.urn], ids=["hex", "urn"])
async def test_an_id_that_a_class_writes_in_another_way_is_the_correlation_id_and_nothing_of_the_payload_is(text):
    class Joined(pydantic.BaseModel):
        message_type: ClassVar[str] = "notification_event"
        event_id: UUID = pydantic.Field(default_factory=uuid4)
        event_timestamp: datetime = pydantic.Field(default_factory=lambda: datetime.now(UTC))
        name: str = CANARY

        @pydantic.field_serializer("event_id")
        def _written(self, value: UUID) -> str:
            return text(value)

    joined = Joined()
    assert await headers_of(joined, broker=Native()) == {"correlation-id": str(joined.event_id)}


@pytest.mark.parametrize("bad", ["", "x" * 256, "two\nlines", "\ud800", "\x00", 7, b"id", UUID(int=7)])
def test_a_bad_correlation_id_is_refused(bad):
    with pytest.raises(ConfigurationError, match="1 to 255") as raised, correlated(bad):
        pass
    assert not bad or str(bad) not in str(raised.value)


@dataclass(frozen=True, kw_only=True)
class Hop(NotificationEvent):
    left: int


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("edge", [None, "request-7"])
async def test_ids_go_through_any_number_of_hops(concurrency, edge):
    """Of 8 chains at once, each handler fails once, and the consumer runs inside of another block."""
    seen, chains = {}, 8

    async def hop(event: Hop, context: MessageContext, events: Events) -> None:
        seen.setdefault(context.correlation_id, []).append((event.left, context.causation_id, str(context.message_id)))
        if event.left:
            events.append(Hop(left=event.left - 1))
        if context.attempt == 1:
            raise TimeoutError

    broker = MemoryMessageBroker()
    options = {"headers": [correlation]}
    with correlated("the wrong one"):
        consumer, reports = consumer_of(broker, hop, concurrency=concurrency, retry=quick(delayed_retries=1), **options)
        async with running(consumer):
            for number in range(chains):
                emitter = EventEmitter(message_broker=broker, **options)
                first = Hop(left=3)
                with correlated(f"{edge} {number}" if edge else str(first.event_id)):
                    await emitter.emit(first)
            await until(lambda: len(reports) == chains * 4 * 2)

    assert len(seen) == chains
    assert (edge is None) or {*seen} == {f"{edge} {number}" for number in range(chains)}
    for correlation_id, deliveries in seen.items():
        hops = [deliveries[index] for index in range(0, 8, 2)]
        assert deliveries[1::2] == hops  # each attempt has the same ids
        assert [left for left, _, _ in hops] == [3, 2, 1, 0]
        assert [cause for _, cause, _ in hops] == [None, *(message_id for _, _, message_id in hops[:-1])]
        assert edge or correlation_id == hops[0][2]


async def test_a_block_inside_of_a_handler_is_for_what_is_sent_there():
    recorder = Native()
    emitter = EventEmitter(message_broker=recorder)

    async def welcome(event: UserJoined) -> None:
        with correlated("inner"):
            await emitter.emit(UserJoined(user_id=8))

    broker = MemoryMessageBroker()
    joined = UserJoined(user_id=7)
    await EventEmitter(message_broker=broker).emit(joined)
    consumer, reports = consumer_of(broker, welcome)
    async with running(consumer):
        await until(lambda: reports)

    assert dict(recorder.messages[0].headers) == {"correlation-id": "inner", "causation-id": str(joined.event_id)}


@pytest.mark.parametrize("forged", ["", "x" * 100_000, "a\nb"])
async def test_a_forged_correlation_id_is_not_passed_on(forged):
    recorder, broker = Native(), MemoryMessageBroker()
    emitter = EventEmitter(message_broker=recorder)

    async def welcome(event: UserJoined) -> None:
        await emitter.emit(UserJoined(user_id=8))

    payload = {"event_timestamp": "2026-03-07T09:26:02Z", "user_id": 7}
    sent = Message.create(message_name="UserJoined", payload=payload, headers={"correlation-id": forged})
    await broker.send_message(sent)
    consumer, reports = consumer_of(broker, welcome)
    async with running(consumer):
        await until(lambda: reports)

    assert reports[0].outcome == "acked"
    own = str(sent.message_id)
    assert dict(recorder.messages[0].headers) == {"correlation-id": own, "causation-id": own}


# -- logs ------------------------------------------------------------------------------------------------------------


async def test_log_records_have_the_ids_of_their_message():
    records = []

    class Keeping(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler, log = Keeping(), logging.getLogger("diator")
    handler.addFilter(ContextFilter())
    own = logging.getLogger("tests.of.headers")
    for logger in (log, own):
        logger.addHandler(handler)
    try:
        own.warning("before")
        with correlated("request-7"):
            own.warning("at the edge")

        async def welcome(event: UserJoined) -> None:
            own.warning("handled")
            own.warning("handled", extra={"group": "theirs"})
            raise TimeoutError

        broker, joined = MemoryMessageBroker(), UserJoined(user_id=7)
        await EventEmitter(message_broker=broker, headers=[correlation]).emit(joined)
        consumer, reports = consumer_of(broker, welcome, group="billing", retry=quick())
        async with running(consumer):
            await until(lambda: reports)
    finally:
        for logger in (log, own):
            logger.removeHandler(handler)

    names = ("message_id", "correlation_id", "attempt", "group")
    shown = {record.getMessage(): tuple(getattr(record, name) for name in names) for record in records}
    message_id = str(joined.event_id)
    assert shown["before"] == (None, None, None, None)
    assert shown["at the edge"] == (None, "request-7", None, None)
    assert [record.group for record in records if record.getMessage() == "handled"] == ["billing", "theirs"]
    [dead] = [ids for text, ids in shown.items() if "is dead-lettered" in text]
    assert dead == (message_id, message_id, 1, "billing")
    assert current_message() is None


class Chatty:
    """A codec that logs whenever it is asked."""

    def __init__(self):
        self.asked = 0

    def encode(self, message, /, *, headers_in_body):
        return message.payload_json

    def headers(self, message, /, *, attribute_prefix):
        return {}

    def decode(self, body, headers, topic, /):
        self.asked += 1
        logging.getLogger("tests.of.headers").warning("decoding")
        return Message(message_type=topic[0], message_name=topic[1], message_id=uuid4(), payload_json=body)


async def test_a_codec_that_logs_is_not_asked_for_ever():
    log, handler = logging.getLogger("tests.of.headers"), logging.StreamHandler()
    handler.addFilter(ContextFilter())
    log.addHandler(handler)
    try:

        async def welcome(event: UserJoined) -> None:
            assert current_message() is not None

        broker = MemoryMessageBroker()
        await EventEmitter(message_broker=broker, codec=Chatty()).emit(UserJoined(user_id=7))
        chatty = Chatty()
        consumer, reports = consumer_of(broker, welcome, codec=chatty)
        async with running(consumer):
            await until(lambda: reports)
    finally:
        log.removeHandler(handler)

    assert [each.outcome for each in reports] == ["acked"]
    assert chatty.asked < 10


# -- the recorder ----------------------------------------------------------------------------------------------------


async def test_a_recorder_finds_events_by_headers():
    recorder = Recorder()
    emitter = EventEmitter(message_broker=recorder, headers=[lambda event: {"tenant": str(event.user_id), "a": "b"}])
    for user_id in (1, 2):
        await emitter.emit(UserJoined(user_id=user_id))

    assert recorder.one(UserJoined, headers={"tenant": "2"}).user_id == 2
    assert len(recorder.events(UserJoined, headers={"a": "b"})) == 2
    recorder.none(UserJoined, headers={"tenant": "3"})
    recorder.none(UserJoined, headers={"tenant": "2"}, user_id=1)
    with pytest.raises(
        AssertionError, match=r"expected one UserJoined with headers=\{'tenant': '3'\}, got 0.*'tenant': '1'"
    ):
        recorder.one(UserJoined, headers={"tenant": "3"})
    with pytest.raises(AssertionError, match="expected no UserJoined with user_id=1, headers="):
        recorder.none(UserJoined, headers={"a": "b"}, user_id=1)
