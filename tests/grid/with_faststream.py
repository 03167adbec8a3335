"""The programs of the grid with FastStream: a commit, then a publish; and a subscriber."""

import asyncio
import json
import sys
from functools import partial
from typing import Any

from faststream.rabbit import RabbitBroker

from tests.grid.ledger import BeforeCommit, Fate, Settings, effects, engine_of, say, unreliably, work, work_under_keys


async def send(settings: Settings) -> None:
    engine, fate = engine_of(settings), Fate(settings.dies_at)
    broker = RabbitBroker(settings.address, logger=None)  # it would log to stdout, which belongs to `say`

    async def do(key: str, number: int, before_commit: BeforeCommit) -> None:
        try:
            async with engine.begin() as connection:
                await connection.execute(work.insert(), {"key": key, "number": number})
                await before_commit()
        except Exception as error:  # noqa: BLE001  # the program goes on, and the grid reads what was committed
            say("failed", key=key, number=number, error=type(error).__name__)
            return
        fate.step()
        publish = partial(broker.publish, {"key": key, "number": number}, queue=settings.name)
        try:
            await unreliably(publish, settings.fails, Fate(None))
        except Exception as error:  # noqa: BLE001
            say("confirmed", key=key, number=number, unsent=type(error).__name__)
        else:
            say("confirmed", key=key, number=number)

    async with broker:
        await work_under_keys(settings, do)
    await engine.dispose()


async def consume(settings: Settings) -> None:
    engine, fate = engine_of(settings), Fate(settings.dies_at)
    broker = RabbitBroker(settings.address, logger=None)  # it would log to stdout, which belongs to `say`

    @broker.subscriber(settings.name)
    async def on_worked(body: dict[str, Any]) -> None:
        async with engine.begin() as connection:
            await connection.execute(effects.insert(), body)
        fate.step()
        say("handled", outcome="handled")

    async with broker:
        await broker.start()
        say("ready")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run({"send": send, "consume": consume}[sys.argv[1]](Settings(**json.loads(sys.argv[2]))))
