"""
What carries events between processes: the contract and the message. Each transport is a module beside them.

`diator.brokers.memory` needs nothing but diator, `diator.brokers.redis` the extra of its name.
"""

from diator.brokers.message import Json, Message
from diator.brokers.sending import BatchMessageBroker, MessageBroker

__all__ = ["BatchMessageBroker", "Json", "Message", "MessageBroker"]
