"""The older place of `Message` and `MessageBroker`, which are in `diator.brokers`."""

from diator.brokers import Message, MessageBroker

__all__ = ["Message", "MessageBroker"]
