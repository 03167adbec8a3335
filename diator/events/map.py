"""The older place of `EventMap`, which is in `diator.events`."""

from diator.events import EventMap

__all__ = ["EventMap"]
