"""What is raised in a unit of work is stored in its transaction, and in no other one."""

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest

from diator.brokers.cloudevents import CloudEvents
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.container import Container
from diator.events import EventEmitter, Events, NotificationEvent, Scheduled, WithHeaders
from diator.exceptions import (
    BindingError,
    ConfigurationError,
    EncodingError,
    EventHandlersFailed,
    MessageTooLarge,
    NotAnEvent,
    NotCommitted,
    ResolutionError,
    UnsupportedCapability,
    UsageError,
)
from diator.mediator import Mediator
from diator.outbox import Outbox, UnitOfWork
from diator.requests import Request, RequestHandler
from tests.unit.doubles import Join, Noticed, Recorder, Unencodable, UserJoined, events_of, mediator_of, requests_of
from tests.unit.outbox.ledger import Ledger, Transaction


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def outbox(ledger):
    return Outbox(ledger, to=MemoryMessageBroker())


def container_of(resource):
    container = Container()
    container.register(Transaction, resource)
    return container


async def join(request: Join, transaction: Transaction, events: Events) -> str:
    transaction.rows.append(request.user_id)
    events.append(UserJoined(user_id=request.user_id))
    return "joined"


class JoinHandler(RequestHandler[Join, str]):
    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction

    async def handle(self, request: Join) -> str:
        self.transaction.rows.append(request.user_id)
        self.events.append(UserJoined(user_id=request.user_id))
        return "joined"


async def notice(event: Noticed, transaction: Transaction, events: Events) -> None:
    transaction.rows.append(event)
    events.append(UserJoined())


async def refuse(event: Noticed) -> None:
    raise LookupError


@pytest.mark.parametrize("handler", [join, JoinHandler])
async def test_messages_are_stored_in_the_transaction_of_the_handler(ledger, outbox, handler):
    mediator = mediator_of(handler, container=container_of(ledger.transaction), message_broker=outbox)

    assert await mediator.send(Join(user_id=7)) == "joined"
    assert await mediator.send(Join(user_id=8)) == "joined"

    assert (ledger.rows, ledger.names, ledger.begun) == ([7, 8], ["UserJoined"] * 2, 2)


@pytest.mark.parametrize("handler", [join, JoinHandler])
async def test_a_commit_that_fails_leaves_nothing_and_reaches_the_caller(ledger, outbox, handler):
    mediator = mediator_of(handler, container=container_of(ledger.transaction), message_broker=outbox)
    ledger.failing = OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        await mediator.send(Join())

    assert (ledger.rows, ledger.messages) == ([], [])


async def test_a_handler_of_a_domain_event_that_fails_rolls_all_back(ledger, outbox):
    async def join_and_notice(request: Join, transaction: Transaction, events: Events) -> str:
        events += [UserJoined(), Noticed()]
        transaction.rows.append(1)
        return ""

    container = container_of(ledger.transaction)
    mediator = mediator_of(join_and_notice, on_events=[refuse], container=container, message_broker=outbox)

    with pytest.raises(EventHandlersFailed):
        await mediator.send(Join())

    assert (ledger.rows, ledger.messages) == ([], [])


async def test_domain_event_handlers_share_the_transaction(ledger, outbox):
    async def only_notices(request: Join, events: Events) -> str:
        events.append(Noticed())
        return ""

    container = container_of(ledger.transaction)
    mediator = mediator_of(only_notices, on_events=[notice], container=container, message_broker=outbox)

    await mediator.send(Join())

    assert (len(ledger.rows), ledger.names, ledger.begun) == (1, ["UserJoined"], 1)


async def test_a_handler_that_uses_no_transaction_stores_its_events_in_one_of_their_own(ledger, outbox):
    async def ping(request: Join, events: Events) -> str:
        events += [UserJoined(), UserJoined()]
        return "pong"

    class Ping(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.append(UserJoined())
            return "pong"

    for handler, stored in ((ping, 2), (Ping, 3)):
        mediator = mediator_of(handler, container=container_of(ledger.transaction), message_broker=outbox)
        assert await mediator.send(Join()) == "pong"
        assert len(ledger.messages) == stored
    assert ledger.begun == 2


async def test_emitting_opens_a_transaction_of_its_own(ledger, outbox):
    emitter = EventEmitter(events_of(notice), container_of(ledger.transaction), outbox)

    await emitter.emit(UserJoined())
    await emitter.emit(WithHeaders(UserJoined(), {"region": "eu"}))
    await emitter.emit(Noticed())

    assert (ledger.names, ledger.begun) == (["UserJoined"] * 3, 3)
    assert [message.headers.get("region") for message, _ in ledger.messages] == [None, "eu", None]


async def test_a_nested_send_is_a_unit_of_work_of_its_own(ledger, outbox):
    @dataclass(frozen=True)
    class Outer(Request[None]):
        pass

    async def outer(request: Outer, transaction: Transaction, events: Events) -> None:
        await mediator.send(Join(user_id=1))
        transaction.rows.append("outer")
        events.append(UserJoined(user_id=2))
        raise LookupError

    mediator = mediator_of(join, outer, container=container_of(ledger.transaction), message_broker=outbox)

    with pytest.raises(LookupError):
        await mediator.send(Outer())

    assert (ledger.rows, ledger.names) == ([1], ["UserJoined"])


async def test_concurrent_units_of_work_have_transactions_of_their_own(ledger, outbox):
    mediator = mediator_of(join, container=container_of(ledger.transaction), message_broker=outbox)

    await asyncio.gather(*(mediator.send(Join(user_id=number)) for number in range(20)))

    assert (sorted(ledger.rows), len(ledger.messages), ledger.begun) == ([*range(20)], 20, 20)


# -- a container without scopes --------------------------------------------------------------------------------------


def with_unit_of_work(ledger, outbox, handler):
    unit_of_work = UnitOfWork(ledger.begin)
    mediator = mediator_of(
        handler, container=container_of(unit_of_work.session), message_broker=outbox, middlewares=[unit_of_work]
    )
    return mediator, unit_of_work


async def test_a_middleware_may_open_the_transaction(ledger, outbox):
    mediator, _ = with_unit_of_work(ledger, outbox, join)

    await asyncio.gather(*(mediator.send(Join(user_id=number)) for number in range(5)))

    assert (sorted(ledger.rows), len(ledger.messages), ledger.begun) == ([*range(5)], 5, 5)


async def test_the_edge_of_a_program_may_open_the_transaction(ledger, outbox):
    unit_of_work = UnitOfWork(ledger.begin)
    mediator = mediator_of(join, container=container_of(unit_of_work.session), message_broker=outbox)

    async with unit_of_work.begin():
        await mediator.send(Join(user_id=1))
        await mediator.send(Join(user_id=2))
        assert ledger.messages == []

    assert (ledger.rows, len(ledger.messages), ledger.begun) == ([1, 2], 2, 1)


async def test_without_a_unit_of_work_the_error_says_how_to_begin_one(ledger, outbox):
    unit_of_work = UnitOfWork(ledger.begin)
    mediator = mediator_of(join, container=container_of(unit_of_work.session), message_broker=outbox)

    with pytest.raises(UsageError, match=r"middlewares.*async with unit_of_work.begin"):
        await mediator.send(Join())

    assert ledger.messages == []


# -- what cannot be kept is refused ----------------------------------------------------------------------------------


async def test_a_transaction_that_nobody_commits_is_an_error(ledger, outbox):
    mediator = mediator_of(join, container=container_of(ledger.uncommitted), message_broker=outbox)

    for _ in range(2):
        with pytest.raises(NotCommitted, match=r"UserJoined.*Transaction.*sessions.begin\(\)"):
            await mediator.send(Join())


async def test_emitting_into_a_transaction_that_nobody_commits_is_an_error(ledger, outbox):
    emitter = EventEmitter(None, container_of(ledger.uncommitted), outbox)

    with pytest.raises(NotCommitted, match="UserJoined"):
        await emitter.emit(Scheduled(WithHeaders(UserJoined(), {}), after=1))


async def test_a_store_need_not_know_whether_a_transaction_was_committed(outbox):
    ledger = Ledger(knows=False)
    container = container_of(ledger.uncommitted)
    mediator = mediator_of(join, container=container, message_broker=Outbox(ledger, MemoryMessageBroker()))

    assert await mediator.send(Join()) == "joined"


async def test_a_session_that_is_new_each_time_is_refused(ledger, outbox):
    container = container_of(lambda: Transaction(ledger))
    mediator = mediator_of(join, container=container, message_broker=outbox)

    for _ in range(2):
        with pytest.raises(ConfigurationError) as refused:
            await mediator.send(Join())
        assert str(refused.value) == (
            "the container returns a new Transaction each time; register it as scoped, so that the handlers of a unit "
            "of work, the outbox and the inbox have the same one"
        )


async def test_one_session_for_all_units_of_work_is_refused_when_wired(ledger, outbox):
    container = Container()
    container.register_instance(Transaction, Transaction(ledger))

    with pytest.raises(ConfigurationError) as refused:
        mediator_of(join, container=container, message_broker=outbox)

    assert str(refused.value) == (
        "Transaction is registered as a singleton, and Outbox needs one for each unit of work; register it as scoped"
    )


async def test_a_session_that_is_not_registered_is_refused_when_wired(outbox):
    async def ping(request: Join, events: Events) -> str:
        return ""

    with pytest.raises(ResolutionError) as refused:
        mediator_of(ping, message_broker=outbox)

    assert refused.value.path == ("Outbox", "Transaction")
    assert str(refused.value).splitlines()[0] == (
        "Outbox stores in the Transaction of a unit of work, which is not registered; register it as scoped"
    )


async def test_a_container_need_not_tell_what_is_registered(ledger, outbox):
    class Resolving:
        def __init__(self):
            self.transaction = Transaction(ledger)

        async def resolve(self, type_, /):
            return self.transaction

    resolving = Resolving()
    await EventEmitter(None, resolving, outbox).emit(UserJoined())

    assert len(resolving.transaction.messages) == 1


async def test_a_session_that_is_not_registered_is_refused_by_an_emitter_alone(outbox):
    with pytest.raises(ResolutionError) as refused:
        await EventEmitter(None, Container(), outbox).emit(UserJoined())

    assert refused.value.path == ("Outbox", "Transaction")


async def test_an_emitter_without_a_container_says_what_it_needs(outbox):
    with pytest.raises(ConfigurationError, match=r"^this EventEmitter has no container.* in a handler$"):
        await EventEmitter(message_broker=outbox).emit(UserJoined())


async def test_a_session_of_another_type_is_refused(ledger, outbox):
    async def something():
        yield "text"

    emitter = EventEmitter(None, container_of(something), outbox)

    with pytest.raises(
        ConfigurationError, match=r"the Transaction of a unit of work, and it was given an object of str"
    ):
        await emitter.emit(UserJoined())


async def test_an_emitter_with_another_container_than_the_handlers_is_refused(ledger, outbox):
    emitter = EventEmitter(None, container_of(ledger.transaction), outbox)

    with pytest.raises(ConfigurationError) as refused:
        Mediator(requests_of(join), container_of(ledger.transaction), emitter)

    assert str(refused.value) == (
        "this EventEmitter stores in the transaction of the handlers, and has another container than they; pass no "
        "container to it"
    )


async def test_an_outbox_sends_nothing_itself(outbox):
    message = (await stored(outbox, UserJoined()))[0]

    with pytest.raises(UsageError, match=rf"UserJoined {message.message_id} was passed to an Outbox"):
        await outbox.send_message(message)


@pytest.mark.parametrize("to", [None, MemoryMessageBroker, object(), Outbox(Ledger(), Recorder())])
async def test_an_outbox_needs_a_broker_that_sends(ledger, to):
    with pytest.raises(ConfigurationError, match="to must be the broker that sends"):
        Outbox(ledger, to)


@pytest.mark.parametrize("store", [None, Ledger, object(), MemoryMessageBroker(), Outbox(Ledger(), Recorder())])
async def test_an_outbox_needs_a_store(store):
    with pytest.raises(ConfigurationError, match="store must be a store"):
        Outbox(store, Recorder())


async def stored(outbox, *events, **options):
    ledger = outbox.messages
    emitter = EventEmitter(None, container_of(ledger.transaction), outbox, **options)
    for event in events:
        await emitter.emit(event)
    return [message for message, _ in ledger.messages]


async def test_what_the_broker_would_refuse_rolls_the_work_back(ledger, outbox):
    async def too_much(request: Join, transaction: Transaction, events: Events) -> str:
        transaction.rows.append(1)
        events.append(Named(name="x" * 20_000_000))
        return ""

    async def unencodable(request: Join, transaction: Transaction, events: Events) -> str:
        transaction.rows.append(1)
        events.append(Unencodable())
        return ""

    for handler, error in ((too_much, MessageTooLarge), (unencodable, EncodingError)):
        mediator = mediator_of(handler, container=container_of(ledger.transaction), message_broker=outbox)
        with pytest.raises(error):
            await mediator.send(Join())
    assert (ledger.rows, ledger.messages) == ([], [])


@dataclass(frozen=True, kw_only=True)
class Named(NotificationEvent):
    name: str


class Picky(Recorder):
    """A broker that knows what its service refuses."""

    capabilities = MemoryMessageBroker().capabilities

    def check_message(self, message) -> None:
        if message.message_name == "Named":
            raise BindingError("refused")


async def test_the_outbox_asks_its_broker(ledger):
    with pytest.raises(BindingError, match="refused"):
        await stored(Outbox(ledger, Picky()), Named(name=""))


async def test_a_wrapped_outbox_stores_what_the_wrapper_makes_of_messages(ledger, outbox):
    class Marked(Wrapped):
        def outgoing(self, message):
            return replace(message, headers={**message.headers, "region": "eu"})

    await EventEmitter(None, container_of(ledger.transaction), Marked(outbox)).emit(UserJoined())

    assert [message.headers["region"] for message, _ in ledger.messages] == ["eu"]


async def test_the_codec_is_that_of_the_outbox(ledger):
    codec = CloudEvents(source="/shop")
    outbox = Outbox(ledger, MemoryMessageBroker(), codec=codec)

    [message] = await stored(outbox, UserJoined())

    assert (message.codec, message.time) == (codec, message.time)
    with pytest.raises(ConfigurationError) as refused:
        EventEmitter(None, None, outbox, codec=codec)

    assert str(refused.value) == "codec was passed together with an outbox, which sends; pass it to the Outbox"


async def test_another_broker_that_stores_in_a_transaction_has_diators_codec(ledger):
    class Storing(Recorder):
        transactional = True
        session_type = Transaction

        async def store(self, messages, due, session, /):
            self.sent += messages

    storing = Storing()
    await EventEmitter(None, container_of(ledger.transaction), storing).emit(UserJoined())

    assert [message.codec for message in storing.sent] == [None]


# -- scheduled -------------------------------------------------------------------------------------------------------

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


async def test_an_event_may_be_stored_for_later(ledger, outbox):
    async def later(request: Join, transaction: Transaction, events: Events) -> str:
        events.append(UserJoined(user_id=0))
        events.append(UserJoined(user_id=1), at=NOON)
        events.append(UserJoined(user_id=2), after=90, headers={"region": "eu"})
        events.append(UserJoined(user_id=3), after=timedelta(days=1))
        events.append(UserJoined(user_id=4), after=-1)
        return ""

    mediator = mediator_of(later, container=container_of(ledger.transaction), message_broker=outbox)

    await mediator.send(Join())

    due = [due for _, due in ledger.messages]
    assert due == [None, NOON, timedelta(seconds=90), timedelta(days=1), timedelta(0)]
    assert ledger.messages[2][0].headers["region"] == "eu"


async def test_what_was_stored_for_later_may_be_cancelled(ledger, outbox):
    event = UserJoined()
    await stored(outbox, Scheduled(event, at=NOON), UserJoined())

    async with ledger.begin() as transaction:
        assert await outbox.cancel(event.event_id, transaction)
        assert not await outbox.cancel(event.event_id, transaction)
    with pytest.raises(ConfigurationError, match="Transaction"):
        await outbox.cancel(event.event_id, "session")
    async with ledger.begin() as transaction:
        with pytest.raises(UsageError, match="message_id must be the event_id of an event, and it is an object of str"):
            await outbox.cancel(str(event.event_id), transaction)

    assert len(ledger.messages) == 1


@pytest.mark.parametrize("broker", [Recorder(), MemoryMessageBroker()])
async def test_scheduling_needs_an_outbox(broker):
    with pytest.raises(UnsupportedCapability) as refused:
        await EventEmitter(None, None, broker).emit(Scheduled(UserJoined(), after=1))

    assert str(refused.value) == (
        f"{type(broker).__name__} does not promise an outbox (has no, needed is yes), which a scheduled event needs; "
        "pass an Outbox as message_broker, whose relay sends the event when it is due"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "a scheduled event needs either at or after"),
        ({"at": NOON, "after": 1}, "a scheduled event needs either at or after"),
        ({"at": NOON.replace(tzinfo=None)}, "the time `at` of a scheduled event must be a datetime with a time zone"),
        ({"at": "tomorrow"}, "the time `at` of a scheduled event must be a datetime with a time zone"),
        ({"after": "1"}, "the time `after` of a scheduled event must be seconds or a timedelta"),
        ({"after": float("nan")}, "the time `after` of a scheduled event must be seconds or a timedelta"),
        ({"after": 1e300}, "the time `after` of a scheduled event must be seconds or a timedelta"),
        ({"after": timedelta.max}, "the time `after` of a scheduled event must be at most 36,500 days"),
        ({"after": 3.2e9}, "the time `after` of a scheduled event must be at most 36,500 days"),
    ],
)
async def test_a_time_that_is_none_is_refused_where_the_event_is_raised(options, problem):
    with pytest.raises(NotAnEvent, match=f"^{problem}$"):
        Scheduled(UserJoined(), **options)
    if options:
        with pytest.raises(NotAnEvent, match=f"^{problem}$"):
            Events().append(UserJoined(), **options)


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (Noticed(), "Noticed was scheduled, which is not an integration event"),
        (Scheduled(UserJoined(), after=1), "a Scheduled was scheduled again; pass its event"),
        (WithHeaders(Noticed(), {}), "headers were passed with Noticed, which is not an integration event"),
    ],
    ids=["domain event", "scheduled", "domain event with headers"],
)
async def test_only_an_integration_event_can_be_scheduled(outbox, event, problem):
    with pytest.raises(NotAnEvent) as refused:
        await stored(outbox, Scheduled(event, after=1))

    assert str(refused.value) == problem
