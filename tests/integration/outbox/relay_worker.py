"""A relay in a process of its own, which may kill itself between a send and its report."""

import asyncio
import os
import signal
import sys

from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.outbox import Outbox, Relay
from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import engine_of


class Dying(SqlAlchemyStore):
    """A store whose process dies when the relay wants to report the first results."""

    async def finish(self, *_, **__):
        os.kill(os.getpid(), signal.SIGKILL)


async def main(database: str, url: str, prefix: str, when: str) -> None:
    engine = engine_of(database)
    store = (Dying if when == "before the report" else SqlAlchemyStore)(engine)
    async with RabbitMQMessageBroker(url, prefix, timeout=2.0) as broker:
        await Relay(Outbox(store, broker), lease=5.0).run()
    await engine.dispose()


asyncio.run(main(*sys.argv[1:]))
