"""The particulars of `DishkaContainer`."""

from collections.abc import AsyncIterator

import pytest

from diator.mediator import Mediator
from tests.unit.doubles import Api, Join, requests_of

dishka = pytest.importorskip("dishka")

from diator.container.dishka import DishkaContainer  # noqa: E402  # needs the extra


class Session:
    """A resource."""


async def failing(command: Join, session: Session) -> str:
    raise TimeoutError


async def working(command: Join, session: Session) -> str:
    return "done"


@pytest.fixture
def steps():
    return []


@pytest.fixture
async def container(steps):
    class Sessions(dishka.Provider):
        scope = dishka.Scope.REQUEST
        api = dishka.provide(Api, scope=dishka.Scope.APP)

        @dishka.provide
        async def session(self) -> AsyncIterator[Session]:
            error = yield Session()
            steps.append(error)

    container = dishka.make_async_container(Sessions())
    yield DishkaContainer(container)
    await container.close()


async def test_the_request_scope_ends_with_the_send(container, steps):
    await Mediator(requests_of(working), container).send(Join())

    assert steps == [None]


async def test_the_request_scope_receives_the_error_that_ended_it(container, steps):
    with pytest.raises(TimeoutError) as caught:
        await Mediator(requests_of(failing), container).send(Join())

    assert steps == [caught.value]


async def test_resolves_objects_of_the_app_scope(container):
    assert await container.resolve(Api) is await container.resolve(Api)
