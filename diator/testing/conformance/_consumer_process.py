"""
A consumer in a separate process, which a scenario may kill.

The process writes `ready`, a line when a handler starts and when it finishes, and the attempt of each delivery. Each
line is one write, so that it survives the death of the process.
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

from diator.instruments import Handled
from diator.testing._suite.errors import Nonconformance, NotApplicable
from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._harness import Harness
from diator.testing.conformance._ledger import check_attempt

# -- in the scenario ---------------------------------------------------------------------------------------------


class ConsumerProcess:
    """
    A process that runs a consumer.

    Attributes:
        started: The numbers of the events whose handlers have started, in order.
        finished: The numbers of the events whose handlers have finished, in order.
    """

    def __init__(self, process: Process) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self._process = process
        self._attempts: list[int] = []
        self._ready = False
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def until(self, holds: Callable[[ConsumerProcess], bool]) -> None:
        """Wait until *holds* is true. Raise `Nonconformance` if the process ends before that."""
        while not holds(self):
            if self._reading.done():
                code = await self._process.wait()
                raise Nonconformance(
                    f"the consumer process ended with exit code {code}; its error is on standard error"
                )
            self._changed.clear()
            await self._changed.wait()

    async def ready(self) -> None:
        """Wait until the consumer is subscribed."""
        await self.until(lambda process: process._ready)  # noqa: SLF001

    def stop(self) -> None:
        """Stop the process where it is (SIGSTOP): it neither works nor ends, and its connections stay open."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the stopped process continue."""
        self._process.send_signal(signal.SIGCONT)

    def check(self) -> None:
        """Raise `Nonconformance` if a delivery had an attempt that cannot be."""
        for attempt in self._attempts:
            check_attempt(attempt)

    async def end(self, by: signal.Signals) -> int:
        """Send the signal *by* and return the exit code, which is negative if a signal killed the process."""
        if self._process.returncode is None:
            self._process.send_signal(by)
        await self._reading
        return await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  # for the type checker
        async for line in self._process.stdout:
            what, *number = line.decode().split()
            if what == "ready":
                self._ready = True
            elif what in {"begin", "end"}:
                (self.started if what == "begin" else self.finished).append(int(number[0]))
            elif what == "attempt":
                self._attempts.append(int(number[0]))
            self._changed.set()
        self._changed.set()


@asynccontextmanager
async def consumer_process(
    harness: Harness, name: str, group: str, *, seconds: float
) -> AsyncGenerator[ConsumerProcess, None]:
    """Run a consumer of the event *name* in a separate process. Each handler takes *seconds*."""
    kind = type(harness)
    if "<locals>" in kind.__qualname__:
        raise NotApplicable("this harness cannot be imported by another process")
    arguments = {
        "module": kind.__module__,
        "harness": kind.__qualname__,
        "name": name,
        "group": group,
        "seconds": seconds,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = (sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(arguments))
    process = await asyncio.create_subprocess_exec(*program, stdout=PIPE, env=environment)
    running = ConsumerProcess(process)
    try:
        yield running
    finally:
        await running.end(signal.SIGKILL)
    running.check()


# -- in the process ----------------------------------------------------------------------------------------------


class _Reporting(ConsumerRun):
    """Writes the attempt of each delivery."""

    def _note(self, handled: Handled) -> None:
        super()._note(handled)
        _write(f"attempt {handled.attempt}")


async def _consume(harness: Harness, arguments: Mapping[str, Any]) -> None:
    async def handle(event: Happened) -> None:
        _write(f"begin {event.number}")
        await asyncio.sleep(arguments["seconds"])
        _write(f"end {event.number}")

    broker = harness.transport()
    try:
        run = _Reporting(broker, arguments["name"], handle, group=arguments["group"], concurrency=4)
        running = asyncio.create_task(run.consumer.run())
        await run.consumer.ready()
        _write("ready")
        await running
    finally:
        await broker.aclose()


def main() -> None:
    """Run the consumer that the command line describes, until a signal ends it."""
    arguments = json.loads(sys.argv[1])
    harness: Harness = getattr(importlib.import_module(arguments["module"]), arguments["harness"])()
    harness.start()
    try:
        asyncio.run(_consume(harness, arguments))
    finally:
        harness.stop()


def _write(line: str) -> None:
    os.write(1, f"{line}\n".encode())
