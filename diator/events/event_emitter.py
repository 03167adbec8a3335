"""The older place of `EventEmitter`, which is in `diator.events`."""

from diator.events import EventEmitter

__all__ = ["EventEmitter"]
