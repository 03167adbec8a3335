"""The older place of the event classes, which are in `diator.events`."""

from diator.events import DomainEvent, ECSTEvent, Event, NotificationEvent

__all__ = ["DomainEvent", "ECSTEvent", "Event", "NotificationEvent"]
