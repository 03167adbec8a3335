"""`MessageContext` and `current_message`: what a handler knows about its message, and that it is always its own."""

import asyncio
import gc
import json
import logging
from dataclasses import FrozenInstanceError, dataclass
from datetime import UTC, datetime
from uuid import UUID

import pytest

from diator.brokers import Message, memory
from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode
from diator.brokers.memory import MemoryMessageBroker
from diator.container import Container
from diator.context import ContextFilter, MessageContext, current_message
from diator.events import DomainEvent, EventEmitter, EventHandler, EventMap, Events
from diator.exceptions import BrokerUnavailable, ResolutionError, UsageError
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from tests.unit.consumer.helpers import JOINED, ONCE, consumer_of, quick
from tests.unit.doubles import MeetingChanged, Scripted, UserJoined, body_of, running, until


class Ask(Request[object]): ...


class Noted(DomainEvent): ...


def message(**options) -> Message:
    sent = UserJoined(user_id=7)
    payload = {"event_id": str(sent.event_id), "event_timestamp": "2026-03-07T09:26:02Z", "user_id": 7}
    return Message.create(message_name="UserJoined", payload=payload, **options)


async def handled(*handlers, sent=None, count=1, **options):
    """Consume *sent*, and return the outcomes."""
    broker, outcomes = MemoryMessageBroker(), []
    for each in [message()] if sent is None else sent:
        await broker.send_message(each)
    on_handled = options.pop("on_handled", lambda _: None)

    def note(each):
        outcomes.append(each)
        on_handled(each)

    consumer, _ = consumer_of(broker, *handlers, on_handled=note, **options)
    async with running(consumer) as run:
        await until(lambda: len(outcomes) >= count or run.done())
    return outcomes


async def test_a_function_asks_for_it_as_for_its_events():
    seen = []

    async def welcome(event: UserJoined, context: MessageContext, events: Events) -> None:
        seen.append(context)

    sent = message(key="7", headers={"tenant": "42"})
    [outcome] = await handled(welcome, sent=[sent], group="billing")

    assert outcome.outcome == "acked"
    assert seen == [
        MessageContext(
            message_id=sent.message_id,
            message_type="notification_event",
            message_name="UserJoined",
            group="billing",
            key="7",
            headers={"tenant": "42"},
            attempt=1,
            redelivered=False,
            sent_at=None,
        )
    ]
    assert seen[0].topic == JOINED
    assert isinstance(seen[0].topic, Topic)


async def test_it_has_the_topic_of_an_event_of_another_kind_and_any_size():
    """A broker may allow larger messages than others do."""
    seen = []

    async def on_changed(event: MeetingChanged, context: MessageContext) -> None:
        seen.append((context.topic, context.message_id))

    broker = MemoryMessageBroker(max_message_bytes=4 * MAX_MESSAGE_BYTES)
    events = [MeetingChanged(), MeetingChanged(title="x" * 2 * MAX_MESSAGE_BYTES)]
    for event in events:
        await EventEmitter(message_broker=broker).emit(event)
    consumer, _ = consumer_of(broker, on_changed)
    async with running(consumer):
        await until(lambda: len(seen) == 2)

    assert seen == [(Topic("ecst_event", "MeetingChanged"), event.event_id) for event in events]


async def test_a_class_takes_it_in_its_constructor_and_so_does_what_it_depends_on():
    class Audit:
        def __init__(self, context: MessageContext) -> None:
            self.context = context

    class Welcome(EventHandler[UserJoined]):
        def __init__(self, context: MessageContext, audit: Audit, *, perhaps: MessageContext | None = None) -> None:
            self.contexts = [context, audit.context, perhaps]

        async def handle(self, event: UserJoined) -> None:
            seen.extend(self.contexts)

    seen = []
    container = Container()
    container.register(Audit)
    sent = message()
    await handled(Welcome, sent=[sent], container=container)

    assert [context.message_id for context in seen] == [sent.message_id] * 3


async def test_everything_below_a_handler_knows_its_message():
    requests, events, seen = RequestMap(), EventMap(), {}

    async def around(message, handle):
        seen["middleware"] = current_message()
        return await handle(message)

    @requests.handler
    async def ask(request: Ask, context: MessageContext, raised: Events) -> object:
        seen["nested send"] = context
        raised.append(Noted())
        return None

    @events.handler
    async def note(event: Noted, context: MessageContext) -> None:
        seen["domain event"] = context

    mediator = Mediator(requests, event_map=events)

    async def later() -> None:
        await asyncio.sleep(0)
        seen["task"] = current_message()

    async def welcome(event: UserJoined, raised: Events) -> None:
        raised.append(Noted())
        await mediator.send(Ask())
        await asyncio.create_task(later())
        seen["thread"] = await asyncio.to_thread(current_message)
        asyncio.get_running_loop().call_soon(lambda: seen.update(callback=current_message()))
        await asyncio.sleep(0)

    sent = message()
    emitter = EventEmitter(events)
    await handled(welcome, sent=[sent], middlewares=[around], event_emitter=emitter)

    assert {*seen} == {"middleware", "nested send", "domain event", "task", "thread", "callback"}
    assert {context.message_id for context in seen.values()} == {sent.message_id}


async def test_each_of_many_concurrent_handlers_has_its_own():
    left = 64
    together = asyncio.Event()
    wrong = []

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        nonlocal left
        left -= 1
        if not left:
            together.set()
        await together.wait()  # all of them are there at once
        now = current_message()
        if now != context or context.headers["number"] != context.key:
            wrong.append((now, context))

    sent = [message(key=str(number), headers={"number": str(number)}) for number in range(64)]
    await handled(welcome, sent=sent, count=64, concurrency=64)

    assert left == 0
    assert wrong == []


async def test_a_task_that_outlives_its_handler_keeps_its_message():
    go_on, seen, tasks = asyncio.Event(), [], []

    async def later() -> None:
        await go_on.wait()
        seen.append(current_message().message_id)

    async def welcome(event: UserJoined) -> None:
        tasks.append(asyncio.create_task(later()))

    sent = [message(), message()]
    await handled(welcome, sent=sent, count=2)
    go_on.set()
    await asyncio.gather(*tasks)

    assert seen == [each.message_id for each in sent]


async def test_a_message_is_handled_until_its_outcome_is_reported(monkeypatch):
    """No other message and none that waits: a log line of the transport would name the wrong one."""
    reported, while_waiting = [], []
    wait = memory._Subscription.__anext__

    def waiting(subscription):
        while_waiting.append(current_message())
        return wait(subscription)

    monkeypatch.setattr(memory._Subscription, "__anext__", waiting)

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        if context.key == "fails":
            raise TimeoutError

    sent = [message(), message(key="fails"), message()]
    await handled(
        welcome,
        sent=sent,
        count=4,
        retry=quick(delayed_retries=1),
        on_handled=lambda handled: reported.append((handled.outcome, current_message())),
    )

    first, failed, last = (each.message_id for each in sent)
    assert sorted((outcome, context.message_id, context.attempt) for outcome, context in reported) == sorted(
        [("acked", first, 1), ("retried", failed, 1), ("acked", last, 1), ("dead_lettered", failed, 2)]
    )
    assert {*while_waiting} == {None}
    assert current_message() is None


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_consumer_that_waits_keeps_no_delivery_alive(concurrency):
    async def welcome(event: UserJoined) -> None: ...

    broker, outcomes = MemoryMessageBroker(), []
    consumer, _ = consumer_of(broker, welcome, concurrency=concurrency, on_handled=outcomes.append)
    async with running(consumer):
        sent = [message(key="kept alive?") for _ in range(8)]
        for each in sent:
            await broker.send_message(each)
        await until(lambda: len(outcomes) == len(sent))
        await asyncio.sleep(0)
        gc.collect()
        alive = [each for each in gc.get_objects() if type(each) is Delivery and b"kept alive?" in each.body]

    assert alive == []


class Own:
    """The codec of a program: the id is in a header, and the body is the payload."""

    def encode(self, message, /, *, headers_in_body):
        return message.payload_json

    def headers(self, message, /, *, attribute_prefix):
        return {}

    def decode(self, body, headers, topic, /):
        if body == b"garbage":
            raise KeyError("no id")
        return Message(
            message_type=topic.message_type,
            message_name=topic.message_name,
            message_id=A_UUID,
            payload_json=body,
            headers={"tenant": "42"},
        )


async def test_the_codec_of_the_consumer_reads_the_headers():
    broker, seen = MemoryMessageBroker(), []

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        seen.append((context.message_id, context.headers))

    broker._put(JOINED, message().payload_json)
    broker._put(JOINED, b"garbage")
    consumer, _ = consumer_of(
        broker, welcome, codec=Own(), on_handled=lambda handled: seen.append(current_message() is None)
    )
    async with running(consumer):
        await until(lambda: len(seen) == 3)

    assert seen == [(A_UUID, {"tenant": "42"}), False, True]


async def test_each_of_many_dead_letters_is_reported_with_its_own():
    async def welcome(event: UserJoined) -> None:
        raise TimeoutError

    seen = []
    sent = [message() for _ in range(20)]
    await handled(
        welcome,
        sent=sent,
        count=20,
        concurrency=4,
        retry=ONCE,
        on_handled=lambda handled: seen.append((handled.message_id, current_message().message_id)),
    )

    assert [reported for reported, _ in seen] == [context for _, context in seen]
    assert {reported for reported, _ in seen} == {each.message_id for each in sent}


async def test_a_dead_letter_that_cannot_be_stored_is_logged_with_its_own(caplog):
    async def fail(event: UserJoined) -> None:
        raise LookupError

    caplog.handler.addFilter(adds_fields := ContextFilter())
    refusing = {"dead_letter": BrokerUnavailable("away")}
    broker = Scripted(*(body_of(UserJoined(user_id=n)) for n in range(3)), failing=refusing)
    consumer, reports = consumer_of(broker, fail, retry=ONCE)
    async with running(consumer):
        await until(lambda: len(reports) == 3)
    caplog.handler.removeFilter(adds_fields)

    logged = [record.message_id for record in caplog.records if "could not be settled" in record.getMessage()]
    assert sorted(logged) == sorted(str(each.message_id) for each in reports)


async def test_what_is_still_being_dead_lettered_at_the_end_is_reported_with_its_own(caplog):
    """And what the consumer logs after that is about no message."""

    async def fail(event: UserJoined) -> None:
        raise LookupError

    class Stuck(Scripted):
        async def dead_letter_all(self, reasons, /):
            await asyncio.Event().wait()

    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(adds_fields := ContextFilter())
    reports = []
    consumer, _ = consumer_of(
        Stuck(*(body_of(UserJoined(user_id=n)) for n in range(3))),
        fail,
        retry=ONCE,
        on_handled=lambda each: reports.append((each.outcome, each.message_id, current_message().message_id)),
    )
    running_ = asyncio.create_task(consumer.run())
    await until(lambda: consumer.health().in_flight == 3)
    running_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running_
    caplog.handler.removeFilter(adds_fields)

    assert [outcome for outcome, _, _ in reports] == ["unsettled"] * 3
    assert all(own == of_context for _, own, of_context in reports)
    assert "stopped consuming" in caplog.records[-1].getMessage()
    assert caplog.records[-1].message_id is None


@pytest.mark.parametrize("body", [b"", b"garbage", b'{"message_type": "a"}'])
async def test_a_message_that_cannot_be_decoded_has_no_context(body):
    broker, seen = MemoryMessageBroker(), []

    async def welcome(event: UserJoined) -> None: ...

    await broker.send_message(message())
    broker._put(JOINED, body)
    consumer, _ = consumer_of(
        broker, welcome, on_handled=lambda handled: seen.append((handled.outcome, current_message() is None))
    )
    async with running(consumer):
        await until(lambda: len(seen) == 2)

    assert seen == [("acked", False), ("dead_lettered", True)]


async def test_each_attempt_is_counted_and_each_immediate_retry_has_the_context():
    seen = []

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        seen.append((context.attempt, context.redelivered, current_message() == context))
        raise TimeoutError

    async def other(event: UserJoined, context: MessageContext) -> None:
        seen.append("other")

    await handled(welcome, other, count=2, retry=quick(immediate_retries=1, delayed_retries=1))

    first, second = (1, False, True), (2, True, True)
    assert seen == [first, "other", first, second, "other", second]


async def context_of(monkeypatch, sent, **changes) -> MessageContext:
    """Return the context of a delivery in which the transport has set *changes*."""
    receive, contexts = memory._Subscription.receive_nowait, []

    def receive_changed(subscription):
        delivery = receive(subscription)
        if delivery is not None:
            for name, value in changes.items():
                setattr(delivery, name, value)
        return delivery

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        contexts.append(context)

    monkeypatch.setattr(memory._Subscription, "receive_nowait", receive_changed)
    await handled(welcome, sent=[sent], retry=ONCE)
    return contexts[0]


@pytest.mark.parametrize(
    ("attempt", "flag", "redelivered"), [(1, False, False), (1, True, True), (2, False, True), (2, True, True)]
)
async def test_a_service_may_say_that_it_has_delivered_the_message_before(monkeypatch, attempt, flag, redelivered):
    context = await context_of(monkeypatch, message(), attempt=attempt, redelivered=flag)

    assert (context.attempt, context.redelivered) == (attempt, redelivered)


def garbage():
    return int("garbage")


@pytest.mark.parametrize(
    ("time", "sent_at"),
    [
        (1_772_875_562.5, datetime(2026, 3, 7, 9, 26, 2, 500_000, UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (None, None),
        (2**63, None),
        (-(2**63), None),
        (1e300, None),
        (float("nan"), None),
        (float("inf"), None),
        (garbage, None),
    ],
)
async def test_the_time_of_the_service_is_shown_and_no_time_is_an_error(monkeypatch, time, sent_at):
    def sent_at_of(subscription, delivery):
        return time() if callable(time) else time

    monkeypatch.setattr(memory._Subscription, "sent_at", sent_at_of, raising=False)

    assert (await context_of(monkeypatch, message())).sent_at == sent_at


@pytest.mark.parametrize("of_service", [{}, {"tenant": "1"}])
async def test_headers_in_the_body_are_shown_below_those_of_the_service(monkeypatch, of_service):
    sent = json.loads(encode(message()))
    sent["headers"] = {"tenant": "0", "number": 7, "flag": True, "no": None, "key": "k"}

    context = await context_of(monkeypatch, message(), headers=of_service, body=json.dumps(sent).encode())

    assert context.headers == {"tenant": "0", "number": "7", "flag": "true"} | of_service
    assert context.key == "k"


async def test_it_is_frozen_and_shows_no_content(monkeypatch):
    context = await context_of(monkeypatch, message(key="canary", headers={"tenant": "canary"}))

    with pytest.raises(FrozenInstanceError):
        context.attempt = 2
    with pytest.raises(TypeError, match="does not support item assignment"):
        context.headers["tenant"] = "43"
    assert "canary" not in repr(context)
    assert str(context.message_id) in repr(context)


A_UUID = UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize("bad", ["", "x" * 256, "two\nlines", "\ud800", "\x1b[31m"])
def test_a_forged_correlation_id_is_none(bad):
    context = MessageContext(message_id=A_UUID, headers={"correlation-id": bad, "causation-id": bad})

    assert (context.correlation_id, context.causation_id) == (str(A_UUID), None)


def test_ids_come_from_the_headers():
    context = MessageContext(headers={"correlation-id": "a b", "causation-id": "é" * 255})

    assert (context.correlation_id, context.causation_id) == ("a b", "é" * 255)


# -- outside of any message ------------------------------------------------------------------------------------------


class Perhaps(RequestHandler[Ask, object]):
    def __init__(self, context: MessageContext | None) -> None:
        self.context = context

    async def handle(self, request: Ask) -> object:
        return self.context


class Needing(Perhaps):
    def __init__(self, context: MessageContext) -> None:
        super().__init__(context)


async def perhaps(request: Ask, context: MessageContext | None) -> object:
    return context


async def by_default(request: Ask, context: MessageContext = None) -> object:  # type: ignore[assignment]
    return context


async def needing(request: Ask, context: MessageContext) -> object:
    return context


def asking(handler, container=None):
    requests = RequestMap()
    requests.bind(Ask, handler)
    return Mediator(requests, container)


@pytest.mark.parametrize("handler", [perhaps, by_default, Perhaps])
async def test_outside_of_a_message_a_handler_that_allows_none_gets_none(handler):
    assert await asking(handler).send(Ask()) is None


@pytest.mark.parametrize("handler", [perhaps, by_default, Perhaps, needing, Needing])
async def test_a_request_that_a_message_causes_has_its_context(handler):
    mediator, seen = asking(handler), []

    async def welcome(event: UserJoined) -> None:
        seen.append(await mediator.send(Ask()))

    sent = message()
    await handled(welcome, sent=[sent])

    assert [context.message_id for context in seen] == [sent.message_id]


@pytest.mark.parametrize("handler", [needing, Needing])
async def test_outside_of_a_message_a_handler_that_needs_one_is_told_what_to_do(handler):
    with pytest.raises(UsageError, match=rf"^{handler.__name__} needs a MessageContext.* `MessageContext \| None`"):
        await asking(handler).send(Ask())


@pytest.mark.parametrize("lifetime", ["transient", "scoped"])  # the second is not compiled
async def test_outside_of_a_message_what_needs_one_and_its_handler_are_named(lifetime):
    class Audit:
        def __init__(self, context: MessageContext) -> None:
            self.context = context

    class Indirectly(Perhaps):
        def __init__(self, audit: Audit) -> None:
            super().__init__(audit.context)

    async def indirectly(request: Ask, audit: Audit) -> object:
        return audit.context

    container = Container()
    container.register(Audit, lifetime=lifetime)
    audit = Audit.__qualname__
    with pytest.raises(
        UsageError, match=f"^{audit}, which {Indirectly.__qualname__} depends on, needs a MessageContext"
    ):
        await asking(Indirectly, container).send(Ask())
    with pytest.raises(UsageError, match=f"^{audit} needs a MessageContext"):
        await asking(indirectly, container).send(Ask())
    with pytest.raises(UsageError, match=r"^the program needs a MessageContext"):
        await container.resolve(MessageContext)


# -- with diator's container -----------------------------------------------------------------------------------------


async def test_a_program_may_register_its_own():
    mine, container = MessageContext(), Container()
    container.register_instance(MessageContext, mine)

    for handler in (needing, Needing, perhaps, Perhaps, by_default):
        assert await asking(handler, container).send(Ask()) is mine


@dataclass
class Keeping:
    context: MessageContext | None


class OfKeeping(RequestHandler[Ask, object]):
    def __init__(self, keeping: Keeping) -> None: ...

    async def handle(self, request: Ask) -> object: ...


def test_a_singleton_cannot_keep_the_context_of_one_message():
    container = Container()
    container.register(Keeping, lifetime="singleton")

    with pytest.raises(ResolutionError, match=r"MessageContext is another.*current_message\(\)"):
        asking(OfKeeping, container)


async def test_a_scoped_dependency_has_that_of_its_unit_of_work():
    container, seen = Container(), []
    container.register(Keeping, lifetime="scoped")

    async def welcome(event: UserJoined, keeping: Keeping) -> None:
        seen.append(keeping.context.message_id)

    sent = [message(), message()]
    await handled(welcome, sent=sent, count=2, container=container)

    assert seen == [each.message_id for each in sent]


async def test_a_container_with_one_method_serves_functions():
    class Resolving:
        async def resolve(self, type_, /):
            raise AssertionError(f"asked for {type_}")

    assert await asking(perhaps, Resolving()).send(Ask()) is None
    with pytest.raises(UsageError, match=r"^needing needs"):
        await asking(needing, Resolving()).send(Ask())


# -- with others -----------------------------------------------------------------------------------------------------


class Welcome(EventHandler[UserJoined]):
    """Has the context by its constructor, from any container."""

    seen: list[UUID] = []  # noqa: RUF012  # not its own

    def __init__(self, context: MessageContext) -> None:
        self.context = context

    async def handle(self, event: UserJoined) -> None:
        self.seen.append(self.context.message_id)


async def check_container(container, asked, match=None):
    Welcome.seen.clear()
    sent = [message(), message()]
    outcomes = await handled(Welcome, sent=sent, count=2, container=container, retry=ONCE)

    assert [each.error for each in outcomes] == [None, None]
    assert Welcome.seen == [each.message_id for each in sent]
    requests = RequestMap()
    requests.bind(Ask, Needing)
    with pytest.raises(asked, match=match):
        await Mediator(requests, container).send(Ask())


async def test_rodi_builds_it():
    rodi = pytest.importorskip("rodi")
    from diator.container.rodi import RodiContainer  # noqa: PLC0415  # needs the extra

    external = rodi.Container()
    external.register(Welcome)
    external.register(Needing)
    container = RodiContainer()
    container.attach_external_container(external)
    RodiContainer().attach_external_container(external)  # once more: it is registered already

    await check_container(container, UsageError, match=r"^Needing needs a MessageContext")


async def test_rodi_uses_that_of_the_program():
    rodi = pytest.importorskip("rodi")
    from diator.container.rodi import RodiContainer  # noqa: PLC0415  # needs the extra

    mine, external, container = MessageContext(), rodi.Container(), RodiContainer()
    external.add_instance(mine)
    external.register(Needing)
    container.attach_external_container(external)

    assert await asking(Needing, container).send(Ask()) is mine


async def test_dishka_passes_it_on():
    dishka = pytest.importorskip("dishka")
    from diator.container.dishka import DishkaContainer  # noqa: PLC0415  # needs the extra

    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.from_context(MessageContext)
    provider.provide(Welcome)
    provider.provide(Needing)
    external = dishka.make_async_container(provider)

    await check_container(DishkaContainer(external), dishka.exceptions.NoContextValueError)
    await external.close()
