"""The particulars of `RodiContainer`."""

import pytest

from diator.exceptions import ConfigurationError, ResolutionError
from diator.mediator import Mediator
from tests.unit.doubles import Api, Join, requests_of

rodi = pytest.importorskip("rodi")

from diator.container.rodi import RodiContainer  # noqa: E402  # needs the extra


class JoinHandler:
    def __init__(self, api: Api) -> None:
        self.api = api

    async def handle(self, request: Join): ...


def attached(register=lambda external: None):
    external = rodi.Container()
    register(external)
    container = RodiContainer()
    container.attach_external_container(external)
    return container


def test_returns_the_attached_container():
    container, external = RodiContainer(), rodi.Container()

    container.attach_external_container(external)

    assert container.external_container is external


def test_a_container_must_be_attached():
    with pytest.raises(ConfigurationError, match="call attach_external_container first"):
        Mediator(requests_of(JoinHandler), RodiContainer())


def test_a_handler_must_be_registered():
    with pytest.raises(ResolutionError, match="JoinHandler is not registered in the attached rodi container"):
        Mediator(requests_of(JoinHandler), attached())


def test_a_type_that_rodi_cannot_build_is_refused_at_construction():
    with pytest.raises(ResolutionError, match="rodi cannot build its services"):
        Mediator(requests_of(JoinHandler), attached(lambda external: external.register(JoinHandler)))


async def test_resolves_in_a_scope_of_its_own():
    container = attached(lambda external: external.add_scoped(Api))

    assert await container.resolve(Api) is not await container.resolve(Api)
