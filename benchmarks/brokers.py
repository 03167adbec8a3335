"""The transports of diator beside the plain clients and FastStream, with equal guarantees."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks import destinations
from benchmarks.destinations import Destination, soon
from benchmarks.environments import BROKER_LIBRARIES, Library
from benchmarks.reports import marked, show
from benchmarks.services import running

WORKLOADS = {
    "P1": "1 task publishes, and awaits each receipt",
    "P64": "64 tasks publish, each awaits its own receipts",
    "P512": "512 tasks publish, each awaits its own receipts",
    "C1": "waiting messages drained, 1 handler at a time",
    "C64": "waiting messages drained, up to 64 handlers at once",
    "C64s": "the same, and each handler waits for 2 ms",
    "L": "200 messages a second from another process: from the call of publish to the start of the handler",
    "M": "memory and what is held, at 200,000 and at 1,000,000 messages; diator alone",
}
MEASURED = [name for name in WORKLOADS if name != "M"]
PUBLISHING = {"P1": 1, "P64": 64, "P512": 512}
DRAINING = {"C1": (1, 0.0), "C64": (64, 0.0), "C64s": (64, 0.002)}
PER_SECOND = 200
HANDLERS = 64
FLOOD_PER_SECOND = 12_000
"""A rate that the reader can follow: Redis disconnects a slower Pub/Sub reader."""
GROWTH = 4.0
"""MiB that a sender or a consumer may grow by from 200,000 messages to a million."""
MOST_HELD = 500
"""Deliveries that may be unsettled: 64 in flight, the prefetched ones, and two batches of acknowledgements."""
DEADLINE = 120.0
"""The time limit of a measurement in seconds; FastStream needs half a minute to drain RabbitMQ."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """A transport: its service, the destination of diator's messages, and the targets."""

    service: str
    class_name: str
    look: Callable[[str, str], AbstractAsyncContextManager[Destination]]
    diator: str
    """diator's name for the destination *name*."""
    keeps: bool = True
    """Whether it stores messages for later readers."""
    targets: Mapping[str, tuple[float, float]]
    """The lowest ratios of diator to the plain client and to FastStream; empty if diator alone is measured."""

    @property
    def is_inside(self) -> bool:
        """Whether it is in the process of its consumer, so that only draining can be measured."""
        return self.service == "memory"

    def has(self, library: Library, workload: str) -> bool:
        """Return whether *workload* can be measured with *library*."""
        return not self.is_inside or (library.name == "diator" and workload in DRAINING)

    def destination(self, library: Library, name: str) -> str:
        return self.diator.format(name=name) if library.name == "diator" else name


TRANSPORTS = {
    "memory": Transport(
        service="memory",
        class_name="Memory",
        look=destinations.memory,
        diator="{name}",
        targets={},
    ),
    "redis": Transport(
        service="redis",
        class_name="PubSub",
        look=destinations.pubsub,
        keeps=False,
        diator="{name}:notification_event:UserJoined",
        targets={
            "P1": (1, 0.95),
            "P64": (4.5, 5.5),
            "P512": (6, 8),
            "C1": (0.7, 8),
            "C64": (0.9, 10),
            "C64s": (0.9, 4),
        },
    ),
    "streams": Transport(
        service="redis",
        class_name="Streams",
        look=destinations.streams,
        diator="{name}:notification_event:UserJoined",
        targets={"P1": (1, 1.05), "P64": (4.5, 5.5), "P512": (6, 8.5), "C1": (9, 16), "C64": (6, 20), "C64s": (3, 7)},
    ),
    "rabbitmq": Transport(
        service="rabbitmq",
        class_name="RabbitMQ",
        look=destinations.rabbitmq,
        diator="{name}:notification_event:UserJoined:benchmark",
        targets={
            "P1": (1, 0.95),
            "P64": (1.2, 1.35),
            "P512": (1.2, 1.5),
            "C1": (2.5, 10),
            "C64": (1.8, 3),
            "C64s": (2, 2.5),
        },
    ),
    "kafka": Transport(
        service="kafka",
        class_name="Kafka",
        look=destinations.kafka,
        diator="{name}.notification_event.UserJoined",
        targets={
            "P1": (1, 1.05),
            "P64": (1, 1.6),
            "P512": (1.8, 3.5),
            "C1": (0.8, 40),
            "C64": (0.8, 13),
            "C64s": (1.1, 18),
        },
    ),
}
SLOWER = {"p50_ms": 1.1, "p99_ms": 1.5}
"""The highest ratios of latencies to those of the plain client."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The size of each measurement."""

    rounds: int = 3
    seconds: float = 1.5
    """The duration of each publishing measurement."""
    messages: int = 20_000
    """How many messages are drained."""
    paced: int = 800
    flood: int = 1_000_000


QUICK = Effort(rounds=1, seconds=0.3, messages=2_000, paced=100, flood=20_000)
SMOKE = Effort(rounds=1, seconds=0.2, messages=200, paced=20, flood=2_000)
AT_ONCE = 4
"""How many workloads a smoke run runs at the same time."""


def compare(
    transports: Iterable[str], libraries: Iterable[str], workloads: Iterable[str], effort: Effort
) -> dict[str, Any]:
    """Measure, print the tables, and return the figures by transport, workload and library."""
    return asyncio.run(_compare([*transports], [BROKER_LIBRARIES[name] for name in libraries], [*workloads], effort))


def smoke(transports: Iterable[str], libraries: Iterable[str], workloads: Iterable[str]) -> list[str]:
    """Run each workload once with few messages, and return which messages were lost, duplicated or not acknowledged."""
    return asyncio.run(_smoke([*transports], [BROKER_LIBRARIES[name] for name in libraries], [*workloads]))


async def _smoke(transports: list[str], libraries: list[Library], workloads: list[str]) -> list[str]:
    faults: list[str] = []
    for service in dict.fromkeys(TRANSPORTS[name].service for name in transports):
        with running(service) as url:
            for name in transports:
                if TRANSPORTS[name].service == service:
                    measured = _Measuring(TRANSPORTS[name], url, SMOKE)
                    await measured.once(libraries, workloads)
                    faults += measured.faults
                    print(f"{name}: {len(measured.runs)} workloads ran", file=sys.stderr)
    return faults


async def _compare(
    transports: list[str], libraries: list[Library], workloads: list[str], effort: Effort
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for library in libraries:
        if any(TRANSPORTS[name].has(library, workload) for name in transports for workload in workloads):
            library.python  # installed before anything is measured  # noqa: B018
    for name in transports:
        transport = TRANSPORTS[name]
        with running(transport.service) as url:
            measured = _Measuring(transport, url, effort)
            await measured.rounds(libraries, workloads)
            results[name] = table(name, transport, measured.runs, workloads)
            if "M" in workloads and not transport.is_inside and any(library.name == "diator" for library in libraries):
                results[name]["M"] = await measured.memory(BROKER_LIBRARIES["diator"])
        for fault in measured.faults:
            print(f"NOT AS IT SHOULD BE: {fault}")
        results[name]["faults"] = {"found": measured.faults, "met": not measured.faults}
    print("\n".join(f"{name:5} {WORKLOADS[name]}" for name in workloads))
    return results


class Worker:
    """One library on one transport in its own process, for one measurement."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def reply(self, *, within: float = DEADLINE) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            if line := await self.process.stdout.readline():
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise RuntimeError("the worker stopped; what it said is above")


class _Measuring:
    """All measurements of one transport."""

    def __init__(self, transport: Transport, url: str, effort: Effort) -> None:
        self._transport = transport
        self._url = url
        self._effort = effort
        self._numbers = count()
        self.runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.faults: list[str] = []

    async def rounds(self, libraries: list[Library], workloads: list[str]) -> None:
        measured = [name for name in workloads if name in MEASURED]
        for number in range(self._effort.rounds):
            for workload in random.sample(measured, k=len(measured)):
                for library in random.sample(libraries, k=len(libraries)):
                    if not self._transport.has(library, workload):
                        continue
                    told = f"{self._transport.class_name}: round {number + 1} of {self._effort.rounds}, {workload}"
                    print(f"\r\033[K{told}, {library.name}", end="", file=sys.stderr, flush=True)
                    self.runs[workload, library.name].append(await self._measure(library, workload))
        print(end="\r\033[K", file=sys.stderr)

    async def once(self, libraries: list[Library], workloads: list[str]) -> None:
        """Run everything once, several workloads at the same time."""
        free = asyncio.Semaphore(AT_ONCE)

        async def run(library: Library, workload: str) -> None:
            async with free:
                run = self._flood(library) if workload == "M" else self._measure(library, workload)
                self.runs[workload, library.name].append(await run)

        async with asyncio.TaskGroup() as running:
            for workload in workloads:
                for library in libraries:
                    if (workload != "M" or library.name == "diator") and self._transport.has(library, workload):
                        running.create_task(run(library, workload))

    async def _measure(self, library: Library, workload: str) -> dict[str, Any]:
        name = f"benchmark-{os.getpid()}-{next(self._numbers)}"
        where = self._transport.destination(library, name)
        what = f"{self._transport.class_name} {library.name} {workload}"
        async with self._transport.look(self._url, where) as destination:
            if callers := PUBLISHING.get(workload):
                return await self._published(library, name, destination, callers, what)
            if workload == "L":
                return await self._paced(library, name, destination, what)
            return await self._drained(library, name, destination, workload, what)

    async def _published(
        self, library: Library, name: str, destination: Destination, callers: int, what: str
    ) -> dict[str, Any]:
        options = {"callers": callers, "seconds": self._effort.seconds}
        async with self._worker(library, name, "publish", options) as worker:
            run = await worker.reply()
        if self._transport.class_name == "PubSub":
            # A reader would share the cores with the measured process, so the callers send once more, to one reader.
            sent = 512
            async with destinations.heard(self._url, self._transport.destination(library, name)) as bodies:
                await self._fill(library, name, sent, callers)
            self._expect(len(bodies), sent, what, "messages came")
            self._expect(len({*bodies}), sent, what, "different messages came")
        else:
            self._expect(await soon(destination.stored, run["sent"]), run["sent"], what, "messages are there")
        return run

    async def _fill(self, library: Library, name: str, messages: int, callers: int = 64) -> None:
        async with self._worker(library, name, "fill", {"callers": callers, "messages": messages}) as worker:
            await worker.reply()

    async def _drained(
        self, library: Library, name: str, destination: Destination, workload: str, what: str
    ) -> dict[str, Any]:
        (concurrency, pause), messages = DRAINING[workload], self._effort.messages
        options = {"messages": messages, "concurrency": concurrency, "pause": pause}
        if self._transport.is_inside:
            options["is_filled"] = False
        elif self._transport.keeps:
            await self._fill(library, name, messages)
        async with self._worker(library, name, "consume", options) as worker:
            await worker.reply()
            if not self._transport.keeps:
                # The reader is stopped while the messages arrive, so that they wait in the service.
                worker.process.send_signal(signal.SIGSTOP)
                try:
                    await self._fill(library, name, messages)
                finally:
                    worker.process.send_signal(signal.SIGCONT)
            run = await worker.reply()
        await self._check(run, destination, what)
        return run

    async def _paced(self, library: Library, name: str, destination: Destination, what: str) -> dict[str, Any]:
        messages = self._effort.paced
        async with self._worker(library, name, "consume", {"messages": messages, "concurrency": 64}) as worker:
            await worker.reply()
            async with self._worker(library, name, "pace", {"messages": messages, "per_second": PER_SECOND}) as pacing:
                await pacing.reply()
                run = await worker.reply()
        await self._check(run, destination, what)
        return run

    async def _check(self, run: dict[str, Any], destination: Destination, what: str) -> None:
        self._expect(run["lost"], 0, what, "lost")
        self._expect(run["repeated"], 0, what, "repeated")
        self._expect(await soon(destination.left, 0), 0, what, "not acknowledged")

    def _expect(self, found: int, expected: int, what: str, counted: str) -> None:
        if found != expected:
            self.faults.append(f"{what}: {found:,} {counted}, and not {expected:,}")

    async def memory(self, library: Library) -> dict[str, Any]:
        """Measure and show the memory of sender and consumer over a million messages."""
        messages, marks = self._effort.flood, self._marks
        print(f"{self._transport.class_name} {library.name} M, {messages:,} messages", file=sys.stderr)
        flooded = await self._flood(library)
        rows, results = [], {}
        for side in ("sender", "consumer"):
            before, after = flooded[side]
            met = after - before <= GROWTH
            results[side] = {"resident_mib": [before, after], "met": met}
            grown = marked(f"{after - before:+.2f}", target=f"{GROWTH}", met=met)
            rows.append([side, f"{before:.1f}", f"{after:.1f}", grown])
        if (most_held := flooded["most_held"]) is not None:
            met = most_held <= MOST_HELD
            results["held"] = {"most": most_held, "met": met}
            rows.append(["most held unsettled", "", "", marked(str(most_held), target=str(MOST_HELD), met=met)])
        show(f"resident MiB in {messages:,} messages", ["", *(f"after {mark:,}" for mark in marks), "growth"], rows)
        return results

    @property
    def _marks(self) -> list[int]:
        return [self._effort.flood // 5, self._effort.flood]

    async def _flood(self, library: Library) -> dict[str, Any]:
        """Send many messages to a reader that keeps up; return the memory of both, and the most deliveries held."""
        name, what = f"benchmark-{os.getpid()}-flat", f"{self._transport.class_name} {library.name} M"
        messages, marks = self._effort.flood, self._marks
        reading = {"messages": messages, "concurrency": HANDLERS, "marks": marks}
        sending = {"messages": messages, "at_once": 100, "per_second": FLOOD_PER_SECOND, "marks": marks}
        async with (
            self._transport.look(self._url, self._transport.destination(library, name)) as destination,
            self._worker(library, name, "consume", reading) as reader,
        ):
            await reader.reply()
            async with self._worker(library, name, "flood", sending) as sender:
                watching = asyncio.create_task(self._most_held(destination))
                try:
                    sent = await sender.reply(within=10 * DEADLINE)
                    read = await reader.reply(within=10 * DEADLINE)
                finally:
                    watching.cancel()
                most_held = await watching
            self._expect(read["lost"], 0, what, "lost")
            self._expect(read["repeated"], 0, what, "repeated")
        return {"sender": sent["resident_mib"], "consumer": read["resident_mib"], "most_held": most_held}

    @staticmethod
    async def _most_held(destination: Destination) -> int | None:
        """Return the highest number of unsettled deliveries, or None if the service does not report it."""
        most = None
        with suppress(asyncio.CancelledError):
            while True:
                held = await destination.held()
                most = held if held is None else max(held, most or 0)
                await asyncio.sleep(0.1)
        return most

    @asynccontextmanager
    async def _worker(
        self, library: Library, name: str, do: str, options: Mapping[str, Any]
    ) -> AsyncGenerator[Worker, None]:
        process = await asyncio.create_subprocess_exec(
            *library.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            order = {
                "service": self._transport.service,
                "transport": self._transport.class_name,
                "url": self._url,
                "name": name,
                "do": do,
                "options": options,
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
            yield Worker(process)
            async with asyncio.timeout(DEADLINE):
                await process.wait()  # its unacknowledged messages are requeued when it has ended
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def table(
    name: str, transport: Transport, runs: Mapping[tuple[str, str], list[dict[str, Any]]], workloads: list[str]
) -> dict[str, Any]:
    """Print the figures of one transport, and return them."""
    libraries = [library for library in BROKER_LIBRARIES if any(key[1] == library for key in runs)]
    others = [library for library in libraries if library != "diator"] if "diator" in libraries else []
    rows, results = [], {}
    for workload in (each for each in workloads if each in MEASURED):
        measured = {library: runs[workload, library] for library in libraries}
        if not all(measured.values()):
            continue
        kinds = ["p50_ms", "p99_ms"] if workload == "L" else ["per_second"]
        for kind in kinds:
            row = f"L {kind[:3]}" if workload == "L" else workload
            values = {library: [run[kind] for run in measured[library]] for library in libraries}
            results[row] = {
                library: {
                    kind: statistics.median(values[library]),
                    "runs": values[library],
                    "cpu_microseconds": statistics.median(run.get("cpu_microseconds", 0) for run in measured[library]),
                }
                for library in libraries
            }
            cells = [row]
            cells += [_rate(results[row][library], kind) for library in libraries]
            for position, other in enumerate(["raw", "faststream"]):
                if other in others:
                    target = _target(transport, workload, kind, position)
                    figures = _ratio(values["diator"], values[other], target, lower=kind.endswith("_ms"))
                    results[row][f"diator/{other}"] = figures
                    cells.append(_cell(figures))
            rows.append(cells)
    heads = [*libraries, *(f"diator/{other}" for other in ("raw", "faststream") if other in others)]
    if rows:
        show(f"{name}: messages a second (microseconds of CPU), and ratios of one round", ["workload", *heads], rows)
    return results


def _target(transport: Transport, workload: str, kind: str, position: int) -> float | None:
    if workload == "L":
        return None if position else SLOWER[kind]
    return transport.targets[workload][position]


def _ratio(ours: list[float], theirs: list[float], target: float | None, *, lower: bool) -> dict[str, Any]:
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    met = None if target is None else round(ratio, 2) <= target if lower else round(ratio, 2) >= target
    return {"ratio": ratio, "ratios": ratios, "target": target, "met": met}


def _rate(figures: dict[str, Any], kind: str) -> str:
    if kind.endswith("_ms"):
        return f"{figures[kind]:.2f} ms"
    return f"{figures[kind]:,.0f}/s ({figures['cpu_microseconds']:.0f})"


def _cell(figures: dict[str, Any]) -> str:
    ratios = figures["ratios"]
    text = f"{figures['ratio']:.2f}" + (f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else "")
    if figures["met"] is None:
        return text
    return marked(text, target=f"{figures['target']:g}", met=figures["met"])
