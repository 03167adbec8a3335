"""
The contract between diator and a message broker, and `Message`, which every broker sends.

Each transport is a module of this package: `diator.brokers.memory`, `redis`, `redis_streams`, `rabbitmq` and `kafka`.
The one in memory needs no extra; each other one needs the extra with the name of its service.
"""

from diator.brokers.message import Codec, Json, Message
from diator.brokers.sending import BatchMessageBroker, MessageBroker

__all__ = ["BatchMessageBroker", "Codec", "Json", "Message", "MessageBroker"]
