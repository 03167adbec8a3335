"""A store in the database of a program that uses SQLAlchemy: PostgreSQL or SQLite. Needs the extra `sqlalchemy`."""

from diator._extras import importing as _importing

with _importing("diator.outbox.sqlalchemy", "sqlalchemy", "sqlalchemy", "greenlet"):
    from diator.outbox.sqlalchemy._sessions import configure_sqlite
    from diator.outbox.sqlalchemy._store import SqlAlchemyStore

__all__ = ["SqlAlchemyStore", "configure_sqlite"]
