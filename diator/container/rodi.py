"""Build handlers with a `rodi.Container`. Needs the extra `rodi`."""

from __future__ import annotations

from typing import TypeVar, cast

from diator._extras import importing, require_internals
from diator._hints import name_of
from diator._options import check_type
from diator.container.base import AnyClass, Build, Shared
from diator.context import MessageContext, needed_message
from diator.exceptions import ConfigurationError, ResolutionError

with importing(__name__, "rodi", "rodi"):
    import rodi

T = TypeVar("T")

# rodi's documentation has no way to ask how a type is registered, or to resolve in a scope that is kept.
INTERNALS = {
    "rodi": (
        "Container.__iter__",
        "Container.provider",
        "DecoratorResolver.life_style",
        "DynamicResolver.life_style",
        "FactoryResolver.life_style",
        "InstanceResolver",
        "ServiceLifeStyle.SINGLETON",
        "Services.__contains__",
        "Services.create_scope",
        "Services.get",
    )
}
require_internals("rodi", INTERNALS)


class RodiContainer:
    """
    Resolves handlers from a rodi container, in one rodi scope for each send.

    The handlers must be registered there. A registration after the first send of its type has no effect.
    """

    def __init__(self) -> None:
        self._external_container: rodi.Container | None = None

    @property
    def external_container(self) -> rodi.Container:
        """The attached container. ConfigurationError if none is attached."""
        if self._external_container is None:
            raise ConfigurationError("no rodi container is attached; call attach_external_container first")
        return self._external_container

    def attach_external_container(self, container: rodi.Container) -> None:
        """
        Build all objects with *container*. Register `MessageContext` there, unless the program has done so.

        Raises:
            ConfigurationError: It is not a container of rodi.
        """
        check_type("container", container, rodi.Container, is_needed=True)
        self._external_container = container
        if MessageContext not in container:
            container.add_transient_by_factory(_message_for, MessageContext)

    async def resolve(self, type_: AnyClass[T], /) -> T:
        """Return a *type_*, in a rodi scope of its own. ResolutionError if it is not registered or cannot be built."""
        return self.factory(cast("type[T]", type_))({})

    def is_shared(self, type_: type) -> bool:
        """Return whether *type_* is a singleton. Handlers that raise events must not be."""
        resolver = next((found for registered, found in self.external_container if registered is type_), None)
        if isinstance(resolver, (rodi.DynamicResolver, rodi.FactoryResolver, rodi.DecoratorResolver)):
            return resolver.life_style is rodi.ServiceLifeStyle.SINGLETON
        return isinstance(resolver, rodi.InstanceResolver)

    def factory(self, type_: type[T], /) -> Build[T]:
        """Return a function that builds a *type_*, see `CompilingResolver.factory`. rodi closes nothing."""
        try:
            services = self.external_container.provider
        except rodi.DIException as error:
            raise ResolutionError([name_of(type_)], f"rodi cannot build its services: {error}") from error
        if type_ not in services:
            problem = f"{name_of(type_)} is not registered in the attached rodi container; register it there"
            raise ResolutionError([name_of(type_)], problem)
        get, scope_class = services.get, type(services.create_scope())

        def build(shared: Shared) -> T:
            scope: rodi.ActivationScope | None = shared.get(self) if shared else None
            if scope is None:
                scope = shared[self] = scope_class(services)
            return get(type_, scope)

        return build


def _message_for(_: rodi.ActivationScope, asking: type) -> MessageContext:
    return needed_message(asking)
