"""The older place of `EventHandler`, which is in `diator.events`."""

from diator.events import EventHandler

__all__ = ["EventHandler"]
