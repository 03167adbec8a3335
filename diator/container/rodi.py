"""Handlers built by a `rodi.Container`. Needs the extra `rodi`."""

from __future__ import annotations

from typing import TypeVar

from diator._hints import name_of
from diator.container.base import Build, Shared
from diator.exceptions import ConfigurationError, MissingExtra, ResolutionError

try:
    import rodi
except ModuleNotFoundError as _missing:
    raise MissingExtra(__name__, "rodi") from _missing

T = TypeVar("T")


class RodiContainer:
    """
    Resolves handlers from a rodi container, in one rodi scope a send.

    The handlers have to be registered there. What is registered after the first send of a type is not seen by it.
    """

    def __init__(self) -> None:
        self._external_container: rodi.Container | None = None

    @property
    def external_container(self) -> rodi.Container:
        """The attached container. ConfigurationError if there is none yet."""
        if self._external_container is None:
            raise ConfigurationError("no rodi container is attached; call attach_external_container first")
        return self._external_container

    def attach_external_container(self, container: rodi.Container) -> None:
        """Resolve from *container* from now on."""
        self._external_container = container

    async def resolve(self, type_: type[T], /) -> T:
        """Give a *type_*, in a rodi scope of its own. ResolutionError if it is not registered or cannot be built."""
        return self.factory(type_)({})

    def is_shared(self, type_: type) -> bool:
        """Tell whether everybody gets one and the same *type_*, which handlers must not be."""
        registered = self.external_container._map.get(type_)  # noqa: SLF001  # rodi has no public way to ask
        lifestyle = getattr(registered, "life_style", None)
        return isinstance(registered, rodi.InstanceResolver) or lifestyle is rodi.ServiceLifeStyle.SINGLETON

    def factory(self, type_: type[T], /) -> Build[T]:
        """See `CompilingResolver.factory`: rodi never waits, and has nothing to close."""
        try:
            services = self.external_container.provider
        except rodi.DIException as error:
            raise ResolutionError([name_of(type_)], f"rodi cannot build its services: {error}") from error
        if type_ not in services:
            problem = f"{name_of(type_)} is not registered in the attached rodi container"
            raise ResolutionError([name_of(type_)], problem)
        get, scope_class = services.get, type(services.create_scope())

        def build(shared: Shared) -> T:
            scope: rodi.ActivationScope | None = shared.get(self) if shared else None
            if scope is None:
                scope = shared[self] = scope_class(services)
            return get(type_, scope)

        return build
