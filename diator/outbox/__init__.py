"""
A transactional outbox and inbox: nothing is lost between the program's own database and a message broker.

An `Outbox` stores messages in the transaction of the handler that raised their events, and a `Relay` sends them
afterwards. An `Inbox` notes in the transaction of a handler that it handles a message, so that a duplicate has no
effect. A store keeps both: `diator.outbox.sqlalchemy` for PostgreSQL and SQLite, `diator.outbox.memory` for tests.
"""

from diator.outbox._inbox import Inbox
from diator.outbox._outbox import Outbox
from diator.outbox._relay import Relay, Relayed, RelayHealth
from diator.outbox._unit_of_work import UnitOfWork

__all__ = ["Inbox", "Outbox", "Relay", "RelayHealth", "Relayed", "UnitOfWork"]
