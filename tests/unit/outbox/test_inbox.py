"""A consumer with an inbox: what a handler does in its transaction happens once."""

import asyncio
import contextlib
from datetime import timedelta

import pytest

from diator._hints import described
from diator.brokers.cloudevents import CloudEvents
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.container import Container
from diator.events import EventEmitter, EventHandler, Events
from diator.exceptions import ConfigurationError, NotCommitted, ResolutionError
from diator.outbox import Inbox, Outbox, UnitOfWork
from diator.retrying import CommittedTooEarly
from tests.unit.consumer.helpers import ONCE, consume, consumer_of, outcomes, quick
from tests.unit.doubles import WEAK, Noticed, Scripted, UserJoined, events_of, holding, running, until
from tests.unit.outbox.ledger import Ledger, Transaction

JOIN = UserJoined()


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def container(ledger):
    container = Container()
    container.register(Transaction, ledger.transaction)
    return container


async def on_joined(event: UserJoined, transaction: Transaction) -> None:
    transaction.rows.append("on_joined")


async def also_on_joined(event: UserJoined, transaction: Transaction) -> None:
    transaction.rows.append("also_on_joined")


class Joined(EventHandler[UserJoined]):
    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction

    async def handle(self, event: UserJoined) -> None:
        self.transaction.rows.append("Joined")
        self.events.append(UserJoined())


async def twice():
    """Return a broker that holds the same message twice."""
    return await holding(JOIN, JOIN)


async def test_a_duplicate_is_acknowledged_without_a_call(ledger, container):
    reports = await consume(await twice(), on_joined, count=2, container=container, inbox=Inbox(ledger))

    assert (outcomes(reports), ledger.rows) == (["acked", "duplicate"], ["on_joined"])
    assert [report.reason for report in reports] == [None, None]
    assert ledger.notes == {(JOIN.event_id, "diator", "on_joined")}


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_a_failure_leaves_no_note(ledger, container, concurrency):
    failing = [LookupError(), LookupError(), None, None]

    async def fails_twice(event: UserJoined, transaction: Transaction) -> None:
        transaction.rows.append(1)
        if error := failing.pop(0):
            raise error

    reports = await consume(
        await holding(JOIN),
        fails_twice,
        container=container,
        inbox=Inbox(ledger),
        retry=quick(immediate_retries=1, delayed_retries=1),
        count=2,
        concurrency=concurrency,
    )

    assert (outcomes(reports), ledger.rows) == (["retried", "acked"], [1])


async def test_each_handler_of_an_event_has_a_note_of_its_own(ledger, container):
    failing = [LookupError(), None]

    async def fails_once(event: UserJoined, transaction: Transaction) -> None:
        if error := failing.pop(0):
            raise error
        transaction.rows.append("fails_once")

    reports = await consume(
        await twice(),
        on_joined,
        fails_once,
        also_on_joined,
        container=container,
        inbox=Inbox(ledger),
        retry=quick(delayed_retries=1),
        count=3,
    )

    assert sorted(outcomes(reports)) == ["acked", "duplicate", "retried"]
    assert sorted(ledger.rows) == ["also_on_joined", "fails_once", "on_joined"]


@pytest.mark.parametrize("handlers", [[on_joined, also_on_joined], [also_on_joined, on_joined]])
async def test_a_delivery_is_a_duplicate_only_if_each_handler_had_succeeded(ledger, container, handlers):
    broker, inbox = await holding(JOIN), Inbox(ledger)
    await consume(broker, on_joined, container=container, inbox=inbox)
    await EventEmitter(None, None, broker).emit(JOIN)

    reports = await consume(broker, *handlers, container=container, inbox=inbox)

    assert (outcomes(reports), ledger.rows) == (["acked"], ["on_joined", "also_on_joined"])


async def test_groups_do_not_share_their_notes(ledger, container):
    for group in ("billing", "mail"):
        broker = await twice_in(group)
        await consume(broker, on_joined, count=2, container=container, inbox=Inbox(ledger), group=group)

    assert ledger.rows == ["on_joined"] * 2


async def test_an_inbox_may_name_its_group(ledger, container):
    for group in ("billing", "mail"):
        broker = await twice_in(group)
        await consume(broker, on_joined, container=container, inbox=Inbox(ledger, group="shop"), group=group)

    assert ledger.rows == ["on_joined"]


async def twice_in(group):
    broker = MemoryMessageBroker()
    consumer, _ = consumer_of(broker, on_joined_without_transaction, group=group)
    async with running(consumer):
        await until(lambda: consumer.health().receiving)
    for _ in range(2):
        await EventEmitter(None, None, broker).emit(JOIN)
    return broker


async def on_joined_without_transaction(event: UserJoined) -> None: ...


async def test_a_handler_that_asks_for_no_transaction_has_a_note_too(ledger, container):
    calls = []

    async def calling(event: UserJoined) -> None:
        calls.append(event)

    reports = await consume(await twice(), calling, count=2, container=container, inbox=Inbox(ledger))

    assert (outcomes(reports), len(calls)) == (["acked", "duplicate"], 1)


async def test_events_of_a_handler_are_stored_with_its_note(ledger, container):
    broker = await twice()
    outbox = Outbox(ledger, broker)

    reports = await consume(broker, Joined, count=2, container=container, inbox=Inbox(ledger), outbox=outbox)

    assert (outcomes(reports), ledger.rows, ledger.names) == (["acked", "duplicate"], ["Joined"], ["UserJoined"])
    assert ledger.begun == 2


async def test_an_outbox_without_an_inbox_stores_the_events_of_a_handler(ledger, container):
    broker = await holding(JOIN)

    await consume(broker, Joined, container=container, outbox=Outbox(ledger, broker))

    assert (ledger.rows, ledger.names, ledger.begun) == (["Joined"], ["UserJoined"], 1)


async def test_a_consumer_reads_with_its_codec_and_its_outbox_writes_with_its_own(ledger, container):
    broker, codec = MemoryMessageBroker(), CloudEvents(source="/shop")
    await EventEmitter(None, None, broker, codec=codec).emit(JOIN)

    reports = await consume(broker, Joined, container=container, codec=codec, outbox=Outbox(ledger, broker))

    assert outcomes(reports) == ["acked"]
    assert [message.codec for message, _ in ledger.messages] == [None]


async def test_a_transaction_that_nobody_commits_fails_the_delivery(ledger):
    container = Container()
    container.register(Transaction, ledger.uncommitted)
    broker = await holding(JOIN)

    [report] = await consume(
        broker, Joined, container=container, outbox=Outbox(ledger, broker), inbox=Inbox(ledger), retry=ONCE
    )

    assert (report.outcome, type(report.error)) == ("dead_lettered", NotCommitted)


async def test_a_transaction_that_nobody_commits_fails_the_delivery_without_any_event(ledger):
    container = Container()
    container.register(Transaction, ledger.uncommitted)

    [report] = await consume(await holding(JOIN), on_joined, container=container, inbox=Inbox(ledger), retry=ONCE)

    assert (report.outcome, type(report.error), ledger.rows) == ("dead_lettered", NotCommitted, [])
    assert "handled UserJoined was rolled back" in str(report.error)


async def test_a_store_that_cannot_know_whether_a_transaction_was_committed_is_trusted():
    ledger, container = Ledger(knows=False), Container()
    container.register(Transaction, ledger.uncommitted)

    [report] = await consume(await holding(JOIN), on_joined, container=container, inbox=Inbox(ledger), retry=ONCE)

    assert report.outcome == "acked"


async def test_a_middleware_may_swallow_the_error_of_a_handler_whose_transaction_is_rolled_back(ledger, container):
    async def fails(event: UserJoined, transaction: Transaction) -> None:
        raise LookupError

    async def swallow(event, handle):
        with contextlib.suppress(LookupError):
            await handle(event)

    [report] = await consume(
        await holding(JOIN), fails, container=container, inbox=Inbox(ledger), retry=ONCE, middlewares=[swallow]
    )

    assert (report.outcome, ledger.notes) == ("acked", set())


async def test_a_handler_that_commits_and_then_fails_is_not_taken_for_a_duplicate(ledger):
    container = Container()
    container.register(Transaction, ledger.uncommitted)

    async def commits(event: UserJoined, transaction: Transaction) -> None:
        transaction.commit()
        raise LookupError

    [report] = await consume(
        await holding(JOIN), commits, container=container, inbox=Inbox(ledger), retry=quick(immediate_retries=1)
    )

    assert (report.outcome, type(report.error)) == ("dead_lettered", CommittedTooEarly)
    assert type(report.error.__cause__) is LookupError


async def test_a_handler_that_commits_and_raises_events_is_not_taken_for_a_duplicate(ledger):
    container, broker = Container(), await holding(JOIN)
    container.register(Transaction, ledger.uncommitted)

    async def commits(event: UserJoined, transaction: Transaction, events: Events) -> None:
        events.append(UserJoined())
        transaction.commit()

    [report] = await consume(
        broker,
        commits,
        container=container,
        outbox=Outbox(ledger, broker),
        inbox=Inbox(ledger),
        retry=quick(immediate_retries=1),
    )

    assert (report.outcome, type(report.error)) == ("dead_lettered", CommittedTooEarly)
    assert "commits has committed its transaction by itself" in str(report.error)


async def test_a_session_that_is_new_each_time_fails_the_delivery(ledger):
    container = Container()
    container.register(Transaction, lambda: Transaction(ledger))

    [report] = await consume(await holding(JOIN), on_joined, container=container, inbox=Inbox(ledger), retry=ONCE)

    assert (report.outcome, type(report.error)) == ("dead_lettered", ConfigurationError)
    assert "a new Transaction each time" in str(report.error)


async def test_middlewares_surround_a_duplicate(ledger):
    unit_of_work = UnitOfWork(ledger.begin)
    container = Container()
    container.register(Transaction, unit_of_work.session)

    reports = await consume(
        await twice(),
        on_joined,
        count=2,
        container=container,
        inbox=Inbox(ledger),
        middlewares=[unit_of_work],
    )

    assert (outcomes(reports), ledger.rows, ledger.begun) == (["acked", "duplicate"], ["on_joined"], 2)


# -- what would lose events is refused -------------------------------------------------------------------------------


async def raising(event: UserJoined, events: Events) -> None: ...


WOULD_LOSE = (
    "and a process that dies before they are sent would lose them: the inbox lets no handler run again; pass the "
    "outbox as well, as in Consumer(…, outbox=…)"
)


class Bare:
    """A handler without a base class, whose class does not tell that it raises events."""

    def __init__(self) -> None:
        self.events = [UserJoined()]

    async def handle(self, event: UserJoined) -> None: ...


@pytest.mark.parametrize("handler", [raising, Joined])
def test_an_inbox_without_an_outbox_is_refused_if_a_handler_can_raise_events(ledger, container, handler):
    broker = MemoryMessageBroker()

    with pytest.raises(ConfigurationError) as refused:
        consumer_of(broker, handler, container=container, inbox=Inbox(ledger))
    assert str(refused.value) == f"{handler.__name__} can raise events, {WOULD_LOSE}"

    nobody_sends = EventEmitter(events_of(handler))
    assert consumer_of(broker, handler, container=container, inbox=Inbox(ledger), event_emitter=nobody_sends)


async def test_events_that_the_class_did_not_tell_of_roll_the_note_back(ledger, container):
    [report] = await consume(await holding(JOIN), Bare, container=container, inbox=Inbox(ledger), retry=ONCE)

    assert (report.outcome, type(report.error)) == ("dead_lettered", ConfigurationError)
    assert str(report.error) == f"Bare raised events, {WOULD_LOSE}"
    assert ledger.notes == set()


async def test_domain_events_need_no_outbox(ledger, container):
    async def joining(event: UserJoined, events: Events) -> None:
        events.append(Noticed())

    async def noticing(event: Noticed, transaction: Transaction) -> None:
        transaction.rows.append("noticed")

    emitter = EventEmitter(events_of(noticing))
    reports = await consume(
        await twice(), joining, count=2, container=container, inbox=Inbox(ledger), event_emitter=emitter
    )

    assert (outcomes(reports), ledger.rows) == (["acked", "duplicate"], ["noticed"])


def test_stores_with_other_sessions_are_refused(ledger, container):
    class Other(Ledger):
        session_type = Ledger

    container.register(Ledger, Other)
    broker = MemoryMessageBroker()

    with pytest.raises(ConfigurationError) as refused:
        consumer_of(broker, on_joined, container=container, inbox=Inbox(Other()), outbox=Outbox(ledger, broker))

    assert str(refused.value) == (
        "the inbox uses the transaction of a Ledger and the outbox that of a Transaction; an event would be lost "
        "between the two, so make both of one store"
    )


def test_a_session_that_is_not_registered_is_refused(ledger):
    with pytest.raises(ResolutionError, match="Transaction of a unit of work, which is not registered"):
        consumer_of(MemoryMessageBroker(), on_joined_without_transaction, inbox=Inbox(ledger))


def test_a_transport_without_groups_needs_a_name(ledger, container):
    broker = Scripted(capabilities=WEAK)

    with pytest.raises(ConfigurationError) as refused:
        consumer_of(broker, on_joined, container=container, inbox=Inbox(ledger))

    assert str(refused.value) == (
        "an inbox notes which group has handled a message, and this transport has no groups; name the program in "
        "Inbox(…, group=…)"
    )
    assert consumer_of(broker, on_joined, container=container, inbox=Inbox(ledger, group="shop"))


def test_handlers_with_one_name_are_refused(ledger, container):
    def make():
        async def handler(event: UserJoined) -> None: ...

        return handler

    with pytest.raises(ConfigurationError) as refused:
        consumer_of(MemoryMessageBroker(), make(), on_joined, make(), container=container, inbox=Inbox(ledger))

    name = make().__qualname__
    assert str(refused.value) == (
        "two handlers of UserJoined have the same name, and an inbox would take them for one; rename one of on_joined, "
        f"{name}, {name}"
    )


@pytest.mark.parametrize("part", [object(), Ledger(), MemoryMessageBroker(), Outbox])
def test_an_outbox_must_be_one(container, part):
    with pytest.raises(ConfigurationError) as refused:
        consumer_of(MemoryMessageBroker(), on_joined, container=container, outbox=part)

    assert str(refused.value) == (
        f"outbox must be an Outbox, or another broker that stores in a transaction, and it is {described(part)}"
    )


@pytest.mark.parametrize("part", [object(), MemoryMessageBroker(), Inbox, Ledger()])
def test_an_inbox_must_be_one(container, part):
    with pytest.raises(ConfigurationError) as refused:
        consumer_of(MemoryMessageBroker(), on_joined, container=container, inbox=part)

    assert str(refused.value) == f"inbox must be an Inbox, and it is {described(part)}"


def test_an_outbox_and_an_emitter_are_not_passed_together(ledger, container):
    broker = MemoryMessageBroker()

    with pytest.raises(ConfigurationError, match="pass it to the EventEmitter"):
        Consumer(
            broker,
            event_map=events_of(on_joined),
            container=container,
            event_emitter=EventEmitter(),
            outbox=Outbox(ledger, broker),
        )


@pytest.mark.parametrize(
    "options", [{"group": ""}, {"group": 1}, {"keep": 7}, {"keep": timedelta(hours=1)}, {"keep": timedelta(-1)}]
)
def test_options_of_an_inbox_are_checked(ledger, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Inbox(ledger, **options)


# -- the tables ----------------------------------------------------------------------------------------------------


class Unchecked(Ledger):
    """Its tables are missing, or its database is down."""

    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    async def check(self) -> None:
        raise self.error


async def test_a_consumer_does_not_start_without_the_tables(container):
    """Otherwise each message would fail until it is dead-lettered."""
    store = Unchecked(ConfigurationError("the table is missing"))
    consumer, _ = consumer_of(await holding(JOIN), on_joined, container=container, inbox=Inbox(store))

    with pytest.raises(ConfigurationError, match="missing"):
        await consumer.run()


async def test_a_database_that_is_down_does_not_stop_a_consumer(container, caplog):
    store = Unchecked(ConnectionRefusedError())

    reports = await consume(await holding(JOIN), on_joined, container=container, inbox=Inbox(store))

    assert outcomes(reports) == ["acked"]
    assert "the tables of the inbox were not checked: ConnectionRefusedError; the consumer starts" in caplog.messages


# -- old notes -------------------------------------------------------------------------------------------------------


class Pruned(Ledger):
    """It has *left* old notes, and fails once."""

    def __init__(self, left) -> None:
        super().__init__()
        self.left, self.calls, self.fails = left, [], True

    async def prune(self, *, keep, limit):
        self.calls.append((keep, limit))
        if self.fails:
            self.fails = False
            raise OSError
        pruned = min(limit, self.left)
        self.left -= pruned
        return pruned


async def test_old_notes_are_deleted_while_a_consumer_runs(caplog):
    store, container = Pruned(12_000), Container()
    container.register(Transaction, store.transaction)
    inbox = Inbox(store, keep=timedelta(days=2))
    consumers = [consumer_of(MemoryMessageBroker(), on_joined, container=container, inbox=inbox)[0] for _ in range(2)]

    async with running(consumers[0]):
        async with running(consumers[1]):
            await asyncio.sleep(1)
        while store.left:  # noqa: ASYNC110  # the clock is virtual
            await asyncio.sleep(600)
    called = len(store.calls)
    await asyncio.sleep(24 * 3600)

    assert {*store.calls} == {(timedelta(days=2), 5_000)}
    assert len(store.calls) == called
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "old notes of the inbox were not deleted: OSError; it is tried again"
    ]


class SlowToStop(Ledger):
    """Its database takes a while to undo what was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled, self.undone = asyncio.Event(), asyncio.Event()

    async def prune(self, *, keep, limit):
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.undone.wait()


async def test_the_end_of_an_inbox_hides_no_cancellation():
    store = SlowToStop()

    async def use():
        async with Inbox(store):
            await asyncio.sleep(24 * 3600)

    using = asyncio.create_task(use())
    await store.cancelled.wait()
    using.cancel()
    await asyncio.sleep(1)
    store.undone.set()
    await asyncio.wait({using})

    assert using.cancelled()
