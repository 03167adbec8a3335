"""Consumers in separate processes, and the files in which their handlers record events."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

WORKER = Path(__file__).with_name("consuming_worker.py")
ROOT = WORKER.parents[2]


class Ledger:
    """
    The record that the handlers of one process write.

    Attributes:
        begun: The number of each event whose handler has started, with the time.
        ended: The number of each event whose handler has finished, with the time.
        gaps: The reported gaps, from and until when.
        handled: How many times each event was handled to the end.
    """

    def __init__(self, file: Path) -> None:
        self._lines = file.open("x+")
        self._half = ""  # a line whose rest is not written yet
        self.begun: list[tuple[int, float]] = []
        self.ended: list[tuple[int, float]] = []
        self.gaps: list[tuple[float, float]] = []
        self.handled: Counter[int] = Counter()

    def read(self) -> "Ledger":
        """Read what was written since the last call, and return this ledger."""
        while not self._lines.closed and (part := self._lines.readline()):
            self._half += part
            if not self._half.endswith("\n"):
                break
            what, first, at = self._half.split()
            self._half = ""  # a line whose rest is not written yet
            if what == "gap":
                self.gaps.append((float(first), float(at)))
            elif what == "begin":
                self.begun.append((int(first), float(at)))
            else:
                self.ended.append((int(first), float(at)))
                self.handled[int(first)] += 1
        return self

    def close(self) -> None:
        self.read()
        self._lines.close()


async def until(holds, *, within=60.0) -> None:
    """Wait until *holds* is true, which another process brings about."""
    async with asyncio.timeout(within):
        while not holds():  # noqa: ASYNC110  # another process changes the condition
            await asyncio.sleep(0.01)


@asynccontextmanager
async def consuming(
    address: str, prefix: str, folder: Path, *, seconds: float = 0.001, careless: bool = False
) -> AsyncIterator[tuple[Process, Ledger]]:
    """Start a process that consumes, and kill it at the end if it still runs."""
    file = folder / uuid4().hex
    ledger = Ledger(file)
    more = ["careless"] if careless else []
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.consuming_worker"),
        *(address, prefix, file, str(seconds), *more),
        stderr=PIPE,
        cwd=ROOT,
    )
    try:
        yield process, ledger
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        ledger.close()


async def kill(process: Process) -> None:
    """Kill *process*, as a power cut would."""
    process.kill()
    await process.wait()


async def asked_to_end(process: Process) -> str:
    """Send SIGTERM to *process*, check that it exits with 0, and return its log."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(25):
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    return log.decode()
