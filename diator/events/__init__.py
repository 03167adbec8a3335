"""Domain events and integration events, their handlers, and the emitter that handles or sends them."""

from diator._handlers import Events, Scheduled, WithHeaders
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
    "Scheduled",
    "WithHeaders",
]
