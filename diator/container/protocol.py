"""The older protocol of a container. A container of one's own needs only `resolve`: see `diator.container.Resolver`."""

from typing import Protocol, TypeVar

T = TypeVar("T")
External = TypeVar("External")


class Container(Protocol[External]):
    """A container that builds objects with another one, which is attached to it."""

    @property
    def external_container(self) -> External:
        """The attached container."""
        ...

    def attach_external_container(self, container: External) -> None:
        """Build all objects with *container*."""
        ...

    async def resolve(self, type_: type[T]) -> T:
        """Return an object of *type_* with all of its dependencies."""
        ...


__all__ = ["Container"]
