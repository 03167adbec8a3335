"""
Another process of the program, which a scenario may kill.

The process does one thing, writes `ready`, and waits until it is killed, or for a line to do the next one.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias
from uuid import UUID

from diator.brokers.message import Message
from diator.outbox.store import Store
from diator.testing._suite.errors import Nonconformance, NotApplicable
from diator.testing.outbox._context import LONG, Context
from diator.testing.outbox._harness import Database, StoreHarness

Work: TypeAlias = Literal["store", "store and commit", "claim", "first time"]

# -- in the scenario ---------------------------------------------------------------------------------------------


class OtherProcess:
    """A process that does something with the same tables."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def ready(self) -> None:
        """Wait until it has done its work. Raise `Nonconformance` if it ends before that."""
        assert self._process.stdout is not None  # noqa: S101  # for the type checker
        if await self._process.stdout.readline() != b"ready\n":
            raise Nonconformance(f"the other process ended with exit code {await self._process.wait()}")

    async def proceed(self) -> None:
        """Let it continue, until it is ready again."""
        assert self._process.stdin is not None  # noqa: S101  # for the type checker
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()
        await self.ready()

    async def kill(self) -> None:
        """Kill it at once (SIGKILL)."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


@asynccontextmanager
async def other_process(ctx: Context, work: Work, message: Message, **options: Any) -> AsyncGenerator[OtherProcess]:
    """Run another process that does *work* with *message*, and kill it at the end."""
    kind = type(ctx.harness)
    if "<locals>" in kind.__qualname__:
        raise NotApplicable("this harness cannot be imported by another process")
    arguments = {
        "module": kind.__module__,
        "harness": kind.__qualname__,
        "database": ctx.database.name,
        "work": work,
        "id": str(message.message_id),
        "key": message.key,
        **options,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = (sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(arguments))
    process = await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE, env=environment)
    other = OtherProcess(process)
    try:
        await other.ready()
        yield other
    finally:
        await other.kill()


# -- in the process ----------------------------------------------------------------------------------------------


async def _do(database: Database, store: Store[Any], arguments: Mapping[str, Any]) -> None:
    message = Message.create(
        message_name="Happened", payload={"number": 1}, message_id=UUID(arguments["id"]), key=arguments["key"]
    )
    if arguments["work"] == "claim":
        await store.claim(limit=100, lease=arguments["lease"], order="key", on_dead="block")
        await _turn()
        return
    if arguments["work"] == "store and commit":
        await _turn()
    async with database.session() as session:
        if arguments["work"] == "first time":
            await store.first_time(message.message_id, "group", "handler", session)
        else:
            await store.add([message], [None], session)
        if arguments["work"] != "store and commit":
            await _turn()
    await _turn()


async def _turn() -> None:
    """Say that the work is done, and wait for a line."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)


async def _run(harness: StoreHarness, arguments: Mapping[str, Any]) -> None:
    async with harness.reach(arguments["database"]) as database:
        store = database.store()
        async with asyncio.timeout(LONG):
            await _do(database, store, arguments)
        await store.close()


def main() -> None:
    """Do what the command line describes."""
    arguments = json.loads(sys.argv[1])
    harness: StoreHarness = getattr(importlib.import_module(arguments["module"]), arguments["harness"])()
    asyncio.run(_run(harness, arguments))
