"""
A consumer in a process of its own, which a scenario may kill.

It writes `ready`, and a line for each event when its handler begins and when it ends. A line is one write, so that what
was written survives the process.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._harness import Harness
from diator.testing.conformance._ledger import Nonconformance, NotApplicable

# -- the scenario's half -----------------------------------------------------------------------------------------


class ConsumerProcess:
    """
    A process that consumes.

    Attributes:
        started, finished: The numbers of the events whose handlers began, and ended, in their order.
    """

    def __init__(self, process: Process) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self._process = process
        self._ready = False
        self._said = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    async def until(self, holds: Callable[[ConsumerProcess], bool]) -> None:
        """Wait until *holds*. `Nonconformance` if the process ends before."""
        while not holds(self):
            if self._listening.done():
                raise Nonconformance(f"the consumer's process has ended, with {await self._process.wait()}")
            self._said.clear()
            await self._said.wait()

    async def ready(self) -> None:
        """Wait until it is subscribed."""
        await self.until(lambda member: member._ready)  # noqa: SLF001

    async def end(self, by: signal.Signals) -> int:
        """Send it a signal, and give its exit code; negative if a signal has killed it."""
        if self._process.returncode is None:
            self._process.send_signal(by)
        await self._listening
        return await self._process.wait()

    async def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  # for the type checker
        async for line in self._process.stdout:
            what, *number = line.decode().split()
            if what == "ready":
                self._ready = True
            elif what in {"begin", "end"}:
                (self.started if what == "begin" else self.finished).append(int(number[0]))
            self._said.set()
        self._said.set()


@asynccontextmanager
async def consumer_process(
    harness: Harness, name: str, group: str, *, seconds: float
) -> AsyncGenerator[ConsumerProcess, None]:
    """Run a consumer of the event *name* in a process of its own; each handler takes *seconds*."""
    kind = type(harness)
    if "<locals>" in kind.__qualname__:
        raise NotApplicable("this harness cannot be imported by another process")
    told = {"module": kind.__module__, "harness": kind.__qualname__, "name": name, "group": group, "seconds": seconds}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = (sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(told))
    process = await asyncio.create_subprocess_exec(*program, stdout=PIPE, env=environment)
    running = ConsumerProcess(process)
    try:
        yield running
    finally:
        await running.end(signal.SIGKILL)


# -- the process -------------------------------------------------------------------------------------------------


async def _consume(harness: Harness, told: Mapping[str, Any]) -> None:
    async def handle(event: Happened) -> None:
        _write(f"begin {event.number}")
        await asyncio.sleep(told["seconds"])
        _write(f"end {event.number}")

    broker = harness.transport()
    try:
        run = ConsumerRun(broker, told["name"], handle, group=told["group"], concurrency=4)
        running = asyncio.create_task(run.consumer.run())
        await run.ready(running)
        _write("ready")
        await running
    finally:
        await broker.aclose()


def main() -> None:
    """Consume as the command line says, until a signal comes."""
    told = json.loads(sys.argv[1])
    harness: Harness = getattr(importlib.import_module(told["module"]), told["harness"])()
    harness.start()
    try:
        asyncio.run(_consume(harness, told))
    finally:
        harness.stop()


def _write(line: str) -> None:
    os.write(1, f"{line}\n".encode())
