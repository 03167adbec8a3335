"""The particulars of `RodiContainer`."""

import pytest

from diator.events import EventHandler
from diator.exceptions import ConfigurationError, ResolutionError
from diator.mediator import Mediator
from tests.unit.doubles import Api, Join, MeetingChanged, requests_of

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


class NoteHandler(EventHandler[MeetingChanged]):
    """Has no constructor, so rodi reads the annotations of the class and of its bases, in the names of this module."""

    async def handle(self, event: MeetingChanged) -> None: ...


async def test_builds_a_handler_without_a_constructor():
    container = attached(lambda external: external.register(NoteHandler))

    assert isinstance(await container.resolve(NoteHandler), NoteHandler)


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
