"""Events: those handled here, those that travel, their handlers, and what sends each of them on its way."""

from diator._handlers import Events
from diator.events._emitter import EventEmitter
from diator.events._event import DomainEvent, ECSTEvent, Event, NotificationEvent
from diator.events._handler import EventHandler, EventMap

__all__ = [
    "DomainEvent",
    "ECSTEvent",
    "Event",
    "EventEmitter",
    "EventHandler",
    "EventMap",
    "Events",
    "NotificationEvent",
]
