"""The promises of every container: diator's own, rodi's, dishka's, and one that a user writes."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from diator.container import Container
from diator.events import EventHandler
from diator.mediator import Mediator
from diator.requests import RequestHandler
from tests.unit.doubles import Api, Join, Noticed, Recorder, UserJoined, events_of, requests_of

seen: list[Api] = []


class JoinHandler(RequestHandler[Join, Api]):
    def __init__(self, api: Api) -> None:
        self.api = api

    async def handle(self, request: Join):
        self.events.append(UserJoined(user_id=request.user_id))
        self.events.append(Noticed())
        await asyncio.sleep(0)
        return self.api


class NoticedHandler(EventHandler[Noticed]):
    def __init__(self, api: Api) -> None:
        self.api = api

    async def handle(self, event: Noticed) -> None:
        seen.append(self.api)


class NeedsMore(RequestHandler[Join, Api]):
    def __init__(self, handler: JoinHandler, api: Api) -> None: ...

    async def handle(self, request: Join): ...


def own():
    container = Container()
    container.register(Api, lifetime="scoped")
    return container


def rodi():
    rodi = pytest.importorskip("rodi")
    from diator.container.rodi import RodiContainer  # noqa: PLC0415  # needs the extra

    external = rodi.Container()
    external.add_scoped(Api)
    external.register(JoinHandler)
    external.register(NoticedHandler)
    container = RodiContainer()
    container.attach_external_container(external)
    return container


def dishka():
    dishka = pytest.importorskip("dishka")
    from diator.container.dishka import DishkaContainer  # noqa: PLC0415  # needs the extra

    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.provide(Api)
    provider.provide(JoinHandler, cache=False)
    provider.provide(NoticedHandler, cache=False)
    return DishkaContainer(dishka.make_async_container(provider))


class ThreeLines:
    async def resolve(self, type_):
        return type_(Api())


@pytest.fixture(params=[own, rodi, dishka, ThreeLines], ids=lambda make: make.__name__)
def container(request):
    seen.clear()
    return request.param()


@pytest.fixture
def broker():
    return Recorder()


@pytest.fixture
def mediator(container, broker):
    return Mediator(requests_of(JoinHandler), container, event_map=events_of(NoticedHandler), message_broker=broker)


async def test_builds_handlers_with_their_dependencies(mediator):
    answer = await mediator.send(Join())

    assert isinstance(answer, Api)
    assert isinstance(seen[0], Api)


async def test_sends_share_no_objects(mediator, broker):
    """Each send has its own objects and events, also when many run at once."""
    answers = await asyncio.gather(*(mediator.send(Join(user_id=user)) for user in range(50)))

    assert len({id(answer) for answer in answers}) == 50
    assert sorted(message.payload["user_id"] for message in broker.sent) == [*range(50)]


@pytest.mark.parametrize("container", [own, rodi, dishka], indirect=True, ids=lambda make: make.__name__)
async def test_the_handlers_of_a_send_share_its_scope(mediator):
    answer = await mediator.send(Join())

    assert seen == [answer]


async def test_a_handler_that_cannot_be_built_is_not_called(container):
    """The error is that of the container, or of Python."""
    with pytest.raises(Exception, match=r"NeedsMore|missing|not registered|find factory|positional|'api'"):
        await Mediator(requests_of(NeedsMore), container).send(Join())


async def test_an_error_of_a_users_container_reaches_the_caller_unchanged():
    boom = RuntimeError("no database")

    class Failing:
        async def resolve(self, type_):
            raise boom

    with pytest.raises(RuntimeError) as caught:
        await Mediator(requests_of(JoinHandler), Failing()).send(Join())

    assert caught.value is boom


async def test_a_users_container_may_have_scopes():
    """The container may also be a dataclass, which is unhashable."""

    @dataclass
    class Scoping:
        steps: list[str] = field(default_factory=list)

        async def resolve(self, type_):
            self.steps.append("resolve")
            return type_(Api())

        @asynccontextmanager
        async def scope(self, shared):
            assert isinstance(shared, dict)  # the state of the send
            self.steps.append("open")
            yield self
            self.steps.append("close")

    container = Scoping()

    await Mediator(
        requests_of(JoinHandler), container, event_map=events_of(NoticedHandler), message_broker=Recorder()
    ).send(Join())

    assert container.steps == ["open", "resolve", "resolve", "close"]
