"""What builds handlers: diator's own container, and the protocol that any other one has to fulfil."""

from diator.container._builtin import Container, Lifetime
from diator.container.base import CompilingResolver, Resolver, ScopingResolver, Shared

__all__ = ["CompilingResolver", "Container", "Lifetime", "Resolver", "ScopingResolver", "Shared"]
