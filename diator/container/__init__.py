"""Build handlers: diator's own container, and the protocol for other containers."""

from diator.container._builtin import Container, Lifetime
from diator.container.base import CompilingResolver, Resolver, ScopingResolver, Shared

__all__ = ["CompilingResolver", "Container", "Lifetime", "Resolver", "ScopingResolver", "Shared"]
