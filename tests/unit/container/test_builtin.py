"""diator's own container: lifetimes, factories, resources, and errors that show the path."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Protocol

import pytest

from diator.container import Container
from diator.events import EventEmitter, Events
from diator.exceptions import EventHandlersFailed, ResolutionError
from diator.mediator import Mediator
from diator.requests import RequestHandler
from tests.unit.doubles import Api, Join, MeetingChanged, Noticed, Recorder, events_of, mediator_of, requests_of

if TYPE_CHECKING:
    from decimal import Decimal


class Service:
    def __init__(self, api: Api) -> None:
        self.api = api


async def send(container, handler, **options):
    """Call *handler* once, with *container*."""
    return await Mediator(requests_of(handler), container, **options).send(Join())


def handling(needed):
    async def handle(command: Join, needed: needed) -> str:
        return needed

    return handle


@pytest.fixture
async def container():
    async with Container() as container:
        yield container


# -- lifetimes -------------------------------------------------------------------------------------------------------


class JoinHandler:
    """Depends on the same type in two ways."""

    def __init__(self, api: Api, service: Service) -> None:
        self.apis = [api, service.api]

    async def handle(self, request: Join):
        return self.apis


@pytest.mark.parametrize("lifetime", ["transient", "scoped", "singleton"])
@pytest.mark.parametrize("how", ["constructor", "function", "async function"])
async def test_lifetimes(container, lifetime, how):
    """Transient: a new object each time. Scoped: one per send. Singleton: one per container."""

    def make() -> Api:
        return Api()

    async def make_later() -> Api:
        await asyncio.sleep(0)
        return Api()

    factory = {"constructor": [], "function": [make], "async function": [make_later]}[how]
    container.register(Api, *factory, lifetime=lifetime)
    container.register(Service)
    mediator = Mediator(requests_of(JoinHandler), container)

    apis = {*await mediator.send(Join()), *await mediator.send(Join())}

    assert len(apis) == {"transient": 4, "scoped": 2, "singleton": 1}[lifetime]


async def test_the_default_lifetime_is_transient(container):
    container.register(Api)

    assert await container.resolve(Api) is not await container.resolve(Api)


async def test_a_registered_instance_is_used_unchanged(container):
    api = Api()
    container.register_instance(Api, api)
    container.register(Service)

    assert (await container.resolve(Service)).api is api
    assert await send(container, handling(Api)) is api


@pytest.mark.parametrize("waits", [False, True])
async def test_a_singleton_is_built_once_for_many_tasks(container, waits):
    made = []

    async def make() -> Api:
        await asyncio.sleep(0)
        made.append(Api())
        return made[-1]

    class Made(Api):
        def __init__(self) -> None:
            made.append(self)

    container.register(Api, make if waits else Made, lifetime="singleton")
    container.register(Service, lifetime="singleton")
    mediators = [Mediator(requests_of(handling(needed)), container) for needed in (Api, Service) for _ in range(20)]

    answers = await asyncio.gather(*(mediator.send(Join()) for mediator in mediators))

    assert len(made) == 1
    assert len(set(answers)) == 2


@pytest.mark.parametrize("instances", [1, 2])
async def test_a_singleton_may_need_registered_instances(container, instances):
    default = Service(Api())

    class Both:
        def __init__(self, api: Api, *, service: Service = default) -> None:
            self.needs = [api, service]

    class JoinHandler:
        def __init__(self, both: Both) -> None:
            self.both = both

        async def handle(self, request: Join):
            return self.both

    container.register_instance(Api, api := Api())
    service = default
    if instances == 2:
        container.register_instance(Service, service := Service(api))
    container.register(Both, lifetime="singleton")
    mediator = Mediator(requests_of(JoinHandler), container)

    first, second = await mediator.send(Join()), await mediator.send(Join())

    assert first is second
    assert first.needs == [api, service]


async def test_a_singleton_may_need_another(container):
    async def make() -> Api:
        return Api()

    container.register(Api, make, lifetime="singleton")
    container.register(Service, lifetime="singleton")

    service = await container.resolve(Service)

    assert service.api is await container.resolve(Api)


async def test_a_singleton_whose_factory_failed_is_built_again(container):
    outcomes = iter([TimeoutError(), Api()])

    async def make() -> Api:
        if isinstance(outcome := next(outcomes), Exception):
            raise outcome
        return outcome

    container.register(Api, make, lifetime="singleton")
    with pytest.raises(TimeoutError):
        await container.resolve(Api)

    assert isinstance(await container.resolve(Api), Api)


async def test_who_waits_for_a_singleton_whose_factory_fails_builds_it(container):
    calls = []

    async def make() -> Api:
        calls.append(1)
        await asyncio.sleep(0.01)
        if len(calls) == 1:
            raise TimeoutError
        return Api()

    container.register(Api, make, lifetime="singleton")
    failed, *built = await asyncio.gather(*(container.resolve(Api) for _ in range(3)), return_exceptions=True)

    assert isinstance(failed, TimeoutError)
    assert isinstance(built[0], Api)
    assert (built[0] is built[1], len(calls)) == (True, 2)


async def test_a_singleton_that_shows_itself_as_a_resource_stays_a_singleton(container):
    """Only a call shows that the lambda returns a generator."""
    closed = []

    async def make():
        yield Api()
        closed.append("closed")

    container.register(Api, lambda: make(), lifetime="singleton")  # noqa: PLW0108  # such a factory hides what it is
    for number in (1, 2):
        first, second = await container.resolve(Api), await container.resolve(Api)
        assert first is second
        await container.aclose()
        assert closed == ["closed"] * number


async def test_a_factory_may_resolve_further_objects(container):
    """Also while it builds a singleton."""

    async def make() -> Service:
        return Service(await container.resolve(Api))

    container.register(Api, lifetime="singleton")
    container.register(Service, make, lifetime="singleton")

    async with asyncio.timeout(1):
        service = await container.resolve(Service)

    assert service.api is await container.resolve(Api)


# -- factories -------------------------------------------------------------------------------------------------------


async def test_a_factory_receives_its_dependencies(container):
    async def make(api: Api, *, name: Annotated[str, "a name"], size: int | None) -> Service:
        service = Service(api)
        service.name, service.size = name, size
        return service

    container.register(Api)
    container.register_instance(str, "a")
    container.register_instance(int, 7)
    container.register(Service, partial(make))

    service = await container.resolve(Service)

    assert (type(service.api), service.name, service.size) == (Api, "a", 7)


async def test_every_kind_of_parameter_of_a_handler_is_passed(container):
    """One handler needs instances, by position and by name, and keeps a default; the other needs a new object too."""

    @dataclass
    class OfInstances:
        number: int
        skipped: bytes = b"default"
        text: str = "default"

        async def handle(self, request: Join):
            return self

    @dataclass
    class OfObjects(OfInstances):
        api: Api = field(kw_only=True)

    container.register_instance(int, 7)
    container.register_instance(str, "a")
    container.register(Api)

    for handler in (OfInstances, OfObjects):
        made = [await send(container, handler) for _ in range(2)]
        assert made[0] is not made[1]
        assert [(each.number, each.skipped, each.text) for each in made] == [(7, b"default", "a")] * 2


async def test_a_factory_may_be_an_object(container):
    class Factory:
        def __call__(self, api: Api) -> Service:
            return Service(api)

    container.register(Api)
    container.register(Service, Factory())

    assert isinstance((await container.resolve(Service)).api, Api)


@pytest.mark.parametrize("parameters", ["one", "several", "by position", "by name", "by both"])
async def test_every_kind_of_parameter_is_passed(container, parameters):
    class One:
        def __init__(self, api: Api) -> None:
            self.given = [api]

    class Several:
        def __init__(self, api: Api, text: str, *rest: int, **options: int) -> None:
            self.given = [api, text, *rest, *options]

    class ByPosition:
        def __init__(self, api: Api, text: str, /) -> None:
            self.given = [api, text]

    class ByName:
        def __init__(self, *, api: Api) -> None:
            self.given = [api]

    class ByBoth:
        def __init__(self, api: Api, /, *, text: str) -> None:
            self.given = [api, text]

    classes = {"one": One, "several": Several, "by position": ByPosition, "by name": ByName, "by both": ByBoth}
    wanted = classes[parameters]
    container.register(Api)
    container.register_instance(str, "a")
    container.register(wanted)

    for made in (await container.resolve(wanted), await send(container, handling(wanted))):
        api, *text = made.given
        assert isinstance(api, Api)
        assert text == ([] if parameters in {"one", "by name"} else ["a"])


class Unfriendly(type):
    def __call__(cls, api: Api):
        return super().__call__(api)


class MadeByItsMetaclass(Service, metaclass=Unfriendly):
    pass


class MadeByItsNew(Service):
    def __new__(cls, api):
        return super().__new__(cls)


class Once:
    pass


def make_service(api: Api) -> Service:
    return Service(api)


@pytest.mark.parametrize("given", ["an object", "an instance", "a singleton"])
@pytest.mark.parametrize(
    ("type_", "factory", "is_new"),
    [
        (Service, Service, True),
        (MadeByItsNew, MadeByItsNew, False),
        (MadeByItsMetaclass, MadeByItsMetaclass, False),
        (Service, make_service, False),
        (Service, partial(Service), False),
    ],
)
def test_what_needs_nothing_of_the_send_is_built_by_a_plain_function(type_, factory, is_new, given):
    """A mediator then builds its handlers without an await. Only of new objects it knows the events at once."""
    container = Container()
    container.register(type_, factory)
    container.register(Once, lifetime="singleton")
    assert container.factory(Once).is_new is False
    if given == "an instance":
        container.register_instance(Api, Api())
    else:
        container.register(Api, lifetime="singleton" if given == "a singleton" else "transient")

    construction = container.factory(type_)
    first, second = construction({}), construction({})

    assert construction.is_new is is_new
    assert {type(first), type(second)} == {type_}
    assert first is not second
    assert (first.api is second.api) is (given != "an object")


@pytest.mark.parametrize("several", [False, True])
async def test_a_handler_may_need_registered_instances_alone(container, several):
    class One:
        def __init__(self, api: Api) -> None:
            self.given = [api]

        async def handle(self, request: Join):
            return self.given

    class Several(One):
        def __init__(self, api: Api, text: str) -> None:
            self.given = [api, text]

    container.register_instance(Api, api := Api())
    container.register_instance(str, "a")

    assert await send(container, Several if several else One) == [api, "a"][: 1 + several]


@pytest.mark.parametrize("how", ["awaited", "scoped", "resource", "unknown", "below"])
def test_what_has_to_be_awaited_or_belongs_to_the_send_is_not(how):
    async def make() -> Api:
        return Api()

    def yielding() -> Iterator[Api]:
        yield Api()

    factory = {"awaited": make, "resource": yielding, "unknown": lambda: Api()}.get(how, Api)  # noqa: PLW0108
    container = Container()
    container.register(Api, factory, lifetime="scoped" if how in {"scoped", "below"} else None)
    container.register(Service)

    assert container.factory(Service if how == "below" else Api) is None


@dataclass
class Settings:
    api: Api
    size: int = 10
    name: str | None = None


async def test_a_dependency_that_is_not_registered_keeps_its_default(container):
    container.register(Api)
    container.register(Settings)

    settings = await container.resolve(Settings)

    assert (settings.size, settings.name) == (10, None)


async def test_a_registered_dependency_replaces_a_default(container):
    container.register(Api)
    container.register(Settings)
    container.register_instance(int, 20)
    container.register_instance(str, "a")

    settings = await container.resolve(Settings)

    assert (settings.size, settings.name) == (20, "a")


async def test_a_function_handlers_default_is_kept_and_replaced_likewise(container):
    async def join(command: Join, size: int = 10) -> str:
        return size

    assert await send(container, join) == 10
    container.register_instance(int, 20)

    assert await send(container, join) == 20


# -- resources -------------------------------------------------------------------------------------------------------


class Session:
    """A resource that records how it was closed."""

    def __init__(self, log: list) -> None:
        self.log = log

    def close(self, error: object = None) -> None:
        self.log.append(error)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(error)

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        self.close(error)


def generator(log: list) -> Iterator[Session]:
    with Session(log) as session:
        yield session


async def async_generator(log: list) -> AsyncIterator[Session]:
    with Session(log) as session:
        yield session


def returning(log: list) -> AbstractContextManager[Session]:
    return Session(log)


def async_returning(log: list) -> AbstractAsyncContextManager[Session]:
    return Session(log)


RESOURCES = [
    generator,
    async_generator,
    contextmanager(generator),
    asynccontextmanager(async_generator),
    returning,
    async_returning,
]


@pytest.fixture
def log(container):
    log = []
    container.register_instance(list, log)
    return log


@pytest.fixture(params=RESOURCES, ids=["generator", "async generator", "@", "async @", "annotated", "async annotated"])
def resource(request):
    return request.param


async def working(command: Join, session: Session) -> str:
    return len(session.log)


async def test_a_resource_is_closed_at_the_end_of_the_send(container, log, resource):
    container.register(Session, resource)

    closed_by_then = await send(container, working)

    assert (closed_by_then, log) == (0, [None])


async def test_a_resource_receives_the_error_that_ended_the_send(container, log, resource):
    async def failing(command: Join, session: Session) -> str:
        raise TimeoutError

    container.register(Session, resource)

    with pytest.raises(TimeoutError) as caught:
        await send(container, failing)

    assert log == [caught.value]


async def test_a_resource_receives_the_cancellation_of_a_send(container, log, resource):
    async def waiting(command: Join, session: Session) -> str:
        started.set()
        await asyncio.Event().wait()

    started = asyncio.Event()
    container.register(Session, resource)
    sending = asyncio.create_task(send(container, waiting))
    await started.wait()
    sending.cancel()

    with pytest.raises(asyncio.CancelledError):
        await sending

    assert [type(error) for error in log] == [asyncio.CancelledError]


async def test_a_resource_that_is_a_singleton_is_closed_with_the_container(container, log, resource):
    container.register(Session, resource, lifetime="singleton")
    await send(container, working)
    assert log == []

    await container.aclose()

    assert log == [None]


async def test_the_end_of_its_block_closes_a_container():
    closed = []

    async def make():
        yield Api()
        closed.append("closed")

    async with Container() as container:
        container.register(Api, make, lifetime="singleton")
        await container.resolve(Api)
        assert closed == []

    assert closed == ["closed"]


async def test_after_closing_a_singleton_is_built_again(container, log):
    container.register(Session, generator, lifetime="singleton")
    first = await container.resolve(Session)
    await container.aclose()

    assert await container.resolve(Session) is not first


async def test_closing_twice_closes_once(container, log):
    container.register(Session, generator, lifetime="singleton")
    await container.resolve(Session)

    await container.aclose()
    await container.aclose()

    assert log == [None]


async def test_a_registered_instance_stays_open_and_registered(container):
    closed = []
    session = Session(closed)
    container.register_instance(Session, session)

    await container.aclose()

    assert await container.resolve(Session) is session
    assert closed == []


async def test_resources_are_closed_in_reverse_order(container):
    steps = []

    def connection() -> Iterator[Api]:
        yield Api()
        steps.append("connection")

    async def session(api: Api) -> AsyncIterator[Service]:
        yield Service(api)
        steps.append("session")

    container.register(Api, connection)
    container.register(Service, session)

    await send(container, handling(Service))

    assert steps == ["session", "connection"]


async def test_a_resource_cannot_swallow_an_error(container, log):
    """The handler failed: a transaction around the resource must receive the error, and the caller too."""

    def swallowing(session: Session) -> Iterator[Api]:
        with suppress(TimeoutError):
            yield Api()

    async def failing(command: Join, api: Api) -> str:
        raise TimeoutError

    container.register(Session, generator)
    container.register(Api, swallowing)

    with pytest.raises(TimeoutError) as caught:
        await send(container, failing)

    assert log == [caught.value]


@pytest.mark.parametrize("kind", [OSError, AttributeError])
async def test_an_error_of_closing_is_raised_by_the_send(container, kind):
    """After a commit that failed, nothing is sent."""

    def committing() -> Iterator[Api]:
        yield Api()
        raise kind("the commit failed")

    async def join(command: Join, api: Api, raised: Events) -> str:
        raised.append(MeetingChanged())

    container.register(Api, committing)
    broker = Recorder()

    with pytest.raises(kind, match="the commit failed"):
        await send(container, join, message_broker=broker)

    assert broker.sent == []


async def test_a_resource_receives_the_error_of_one_that_could_not_be_closed(container, log):
    def failing(session: Session) -> Iterator[Api]:
        yield Api()
        raise OSError("the commit failed")

    container.register(Session, generator)
    container.register(Api, failing)

    with pytest.raises(OSError, match="the commit failed") as caught:
        await send(container, handling(Api))

    assert log == [caught.value]


class Watching:
    """A context that records all that it receives."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.seen.append(error)


class WatchingLater(Watching):
    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.seen.append(error)


@pytest.mark.parametrize("context", [Watching, WatchingLater])
async def test_a_context_receives_the_error_with_its_class_and_its_place(container, log, context):
    def watching(log: list) -> AbstractContextManager[Api]:
        return context(log)

    async def join(command: Join, api: Api, *, fails: bool) -> str:
        if fails:
            raise TimeoutError

    container.register(Api, watching)
    container.register(bool, lambda: not log)

    with pytest.raises(TimeoutError) as caught:
        await send(container, join)
    await send(container, join)

    [(kind, error, trace), nothing] = log
    assert (kind, error, nothing) == (TimeoutError, caught.value, (None, None, None))
    assert isinstance(trace, TracebackType)


async def test_a_context_that_cannot_be_entered_is_not_left(container, log):
    class Closed(Watching):
        def __enter__(self):
            raise TimeoutError

    def opening(log: list, session: Session) -> AbstractContextManager[Api]:
        return Closed(log)

    container.register(Session, generator)
    container.register(Api, opening)

    with pytest.raises(TimeoutError) as caught:
        await send(container, handling(Api))

    assert log == [caught.value]  # that of the session, which had been opened


async def test_a_send_shares_its_scope_with_the_handlers_of_its_domain_events(container, log):
    """The scope is closed after them."""
    given = []

    async def join(command: Join, session: Session, raised: Events) -> str:
        given.append(session)
        raised.append(Noticed())

    async def on_noticed(event: Noticed, session: Session) -> None:
        assert log == []
        given.append(session)

    container.register(Session, generator)

    await send(container, join, event_map=events_of(on_noticed))

    assert given[0] is given[1]
    assert log == [None]


async def test_each_of_two_containers_has_a_scope_of_its_own_in_a_send():
    given, apis = [], [Api(), Api()]

    async def join(command: Join, api: Api, raised: Events) -> str:
        given.append(api)
        raised.append(Noticed())

    async def on_noticed(event: Noticed, api: Api) -> None:
        given.append(api)

    containers = [Container(), Container()]
    for container, api in zip(containers, apis, strict=True):
        container.register(Api, lambda api=api: api, lifetime="scoped")
    emitter = EventEmitter(events_of(on_noticed), containers[1])

    await Mediator(requests_of(join), containers[0], emitter).send(Join())

    assert given == apis


@pytest.mark.parametrize("kind", ["function", "class"])
async def test_a_scope_that_only_event_handlers_need_is_closed_after_the_last_of_them(container, log, kind):
    given = []

    async def join(command: Join, raised: Events) -> str:
        raised += [Noticed(), Noticed()]

    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.extend([Noticed(), Noticed()])

    async def on_noticed(event: Noticed, session: Session) -> None:
        assert log == []
        given.append(session)

    container.register(Session, generator)

    await send(container, join if kind == "function" else JoinHandler, event_map=events_of(on_noticed))

    assert given[0] is given[1]
    assert log == [None]


@pytest.mark.parametrize("scope_of_request", [False, True])
async def test_a_scope_receives_the_failure_of_event_handlers(container, log, scope_of_request):
    async def join(command: Join, raised: Events, session: Session | None = None) -> str:
        raised.append(Noticed())

    async def join_in_scope(command: Join, raised: Events, session: Session) -> str:
        raised.append(Noticed())

    async def on_noticed(event: Noticed, session: Session) -> None:
        raise TimeoutError

    container.register(Session, generator)

    with pytest.raises(EventHandlersFailed) as caught:
        await send(container, join_in_scope if scope_of_request else join, event_map=events_of(on_noticed))

    assert log == [caught.value]


async def test_each_attempt_of_a_retry_has_a_scope_of_its_own(container, log):
    sessions = []

    async def flaky(command: Join, session: Session) -> str:
        sessions.append(session)
        if len(sessions) == 1:
            raise TimeoutError
        return "done"

    async def twice(message, handle):
        try:
            return await handle(message)
        except TimeoutError:
            return await handle(message)

    container.register(Session, generator)

    await send(container, flaky, middlewares=[twice])

    assert sessions[0] is not sessions[1]
    assert [type(error) for error in log] == [TimeoutError, type(None)]


# -- types that cannot be built --------------------------------------------------------------------------------------


class Egg:
    def __init__(self, hen: "Hen") -> None: ...


class Hen:
    def __init__(self, egg: Egg) -> None: ...


class Farm:
    def __init__(self, hen: Hen) -> None: ...


class Abstract(ABC):
    @abstractmethod
    def work(self): ...


class OnlyAttributes(Protocol):
    open: bool


class WithoutHint:
    def __init__(self, api) -> None: ...


class OnlyForCheckers:
    def __init__(self, price: "Decimal") -> None: ...


class NeedsService:
    def __init__(self, service: Service) -> None:
        self.service = service


async def test_a_cycle_shows_its_path(container):
    container.register(Egg)
    container.register(Hen)

    with pytest.raises(ResolutionError) as caught:
        await container.resolve(Farm)

    problem, *path = str(caught.value).split("\n")
    assert problem == "Hen depends on itself; break the cycle"
    assert path == ["  └ Farm", "    └ Hen", "      └ Egg", "        └ Hen"]


async def test_a_missing_dependency_shows_its_path(container):
    container.register(Service)

    with pytest.raises(ResolutionError) as caught:
        await container.resolve(NeedsService)

    assert caught.value.path == ("NeedsService", "Service", "Api")
    assert str(caught.value) == (
        "Api is not registered; call register(Api, …) or register_instance\n"
        "  └ NeedsService\n    └ Service\n      └ Api"
    )


@pytest.mark.parametrize(
    ("type_", "problem"),
    [
        (Abstract, r"Abstract is abstract \(work\); register a factory for it"),
        (OnlyAttributes, r"OnlyAttributes is abstract \(a protocol\); register a factory for it"),
        (WithoutHint, "parameter 'api' of WithoutHint has no type hint"),
        (RuntimeError, "the parameters of RuntimeError cannot be inspected"),
        (OnlyForCheckers, "names? 'Decimal', .* outside of `if TYPE_CHECKING`"),
    ],
)
async def test_refused_when_registering_and_when_resolving(container, type_, problem):
    with pytest.raises(ResolutionError, match=problem) as registering:
        container.register(type_)

    with pytest.raises(ResolutionError, match=problem) as resolving:
        await container.resolve(type_)

    assert registering.value.path == resolving.value.path == (type_.__name__,)


def test_a_factory_cannot_be_abstract(container):
    with pytest.raises(ResolutionError, match=r"Abstract is abstract \(work\)"):
        container.register(OnlyAttributes, Abstract)


async def test_an_abstract_class_is_built_by_a_factory(container):
    class Concrete(Abstract):
        def work(self): ...

    container.register(Abstract, Concrete)

    assert isinstance(await container.resolve(Abstract), Concrete)


@pytest.mark.parametrize("again", [[], [Api()]], ids=["type", "instance"])
@pytest.mark.parametrize("before", [[], [Api()]], ids=["type", "instance"])
def test_a_type_is_registered_once(before, again):
    container = Container()

    def register(instance):
        return container.register_instance(Api, *instance) if instance else container.register(Api)

    register(before)

    with pytest.raises(ResolutionError, match=r"^Api is already registered; register it once\n.*Api$"):
        register(again)


def test_a_lifetime_that_does_not_exist_is_refused(container):
    problem = "must be one of transient, scoped, singleton, and it is 'request'"

    with pytest.raises(ResolutionError, match=problem) as caught:
        container.register(Session, lifetime="request")

    assert caught.value.path == ("Session",)


@pytest.mark.parametrize("certainly", [generator, async_generator, returning, async_returning])
async def test_a_resource_cannot_be_transient(container, certainly):
    problem = "Session is a resource, so its lifetime must be scoped or singleton"

    with pytest.raises(ResolutionError, match=problem) as caught:
        container.register(Session, certainly, lifetime="transient")

    assert caught.value.path == ("Session",)


async def test_a_scoped_type_needs_a_scope(container):
    container.register(Api, lifetime="scoped")
    container.register(Service)

    with pytest.raises(ResolutionError, match="Api is scoped, and no scope is open") as caught:
        await container.resolve(Service)

    assert caught.value.path == ("Service", "Api")


@pytest.mark.parametrize("between", [None, Service])
def test_a_singleton_cannot_depend_on_a_scoped_type(between):
    """The scope would end before the singleton. Refused at construction, also with a transient type between."""
    container = Container()
    container.register(Api, lifetime="scoped")
    if between is None:
        container.register(Service, lifetime="singleton")
    else:
        container.register(Service)
        container.register(NeedsService, lifetime="singleton")

    with pytest.raises(ResolutionError, match="Api is scoped, and a singleton depends on it"):
        mediator_of(handling((between and NeedsService) or Service), container=container)


async def test_a_registered_handler_has_its_lifetime(container):
    class Handler:
        async def handle(self, request: Join):
            return self

    container.register(Handler, lifetime="singleton")
    mediator = Mediator(requests_of(Handler), container)

    assert await mediator.send(Join()) is await mediator.send(Join())
