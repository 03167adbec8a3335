"""
The measurements of every library: publishing, draining, and latency between two processes.

Every library creates, encodes, decodes and handles the same event.
"""

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol, Self

NICKNAME = "Ada"
GREETING = "welcome to the meeting, make yourself at home and mute, please"

Reply = Callable[[dict[str, Any]], None]
Handle = Callable[[Any], Awaitable[None]]
Settled = Callable[[], None]
Finished = Callable[[], Awaitable[None]]


class Transport(Protocol):
    """One library, used as its documentation shows. Entering connects and declares the destination."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def send(self, number: int) -> None:
        """Send the event *number*, and return when the service has confirmed it."""

    def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AbstractAsyncContextManager[Finished]:
        """
        Handle each event, acknowledge it, and then call *settled*.

        On entry it is ready to receive. The result waits until the service has received every acknowledgement.
        """


async def publish(transport: Transport, reply: Reply, *, callers: int, seconds: float) -> None:
    """Publish from *callers* tasks, each of which awaits its receipt before it sends the next message."""
    sent = 0

    async def call(end: float) -> None:
        nonlocal sent
        while perf_counter() < end:
            sent += 1
            await transport.send(sent)

    async def all_call(seconds: float) -> None:
        end = perf_counter() + seconds
        await asyncio.gather(*(call(end) for _ in range(callers)))

    await all_call(seconds / 5)  # opens the connections
    unmeasured, started, used = sent, perf_counter(), process_time()
    await all_call(seconds)
    measured, took, used = sent - unmeasured, perf_counter() - started, process_time() - used
    reply({"sent": sent, "per_second": measured / took, "cpu_microseconds": used / measured * 1e6})


async def fill(transport: Transport, reply: Reply, *, callers: int, messages: int) -> None:
    """Send *messages* messages, numbered from 0."""
    numbers = iter(range(messages))

    async def call() -> None:
        for number in numbers:
            await transport.send(number)

    await asyncio.gather(*(call() for _ in range(callers)))
    reply({"sent": messages})


async def pace(transport: Transport, reply: Reply, *, messages: int, per_second: float) -> None:
    """Send *messages* messages at a fixed rate, however long each send takes."""
    started = perf_counter()
    async with asyncio.TaskGroup() as sending:
        for number in range(messages):
            await asyncio.sleep(max(0, started + number / per_second - perf_counter()))
            sending.create_task(transport.send(number))
    reply({"sent": messages})


async def flood(
    transport: Transport, reply: Reply, *, messages: int, at_once: int, per_second: float, marks: Sequence[int]
) -> None:
    """Send *messages* messages, several at once, at a limited rate, and measure the memory at each of the *marks*."""
    resident = []
    for first in range(0, messages, at_once):
        due = perf_counter() + at_once / per_second
        await asyncio.gather(*(transport.send(number) for number in range(first, first + at_once)))
        resident += [_resident_mib() for mark in marks if first < mark <= first + at_once]
        await asyncio.sleep(max(0, due - perf_counter()))
    reply({"resident_mib": resident})


async def consume(
    transport: Transport,
    reply: Reply,
    *,
    messages: int,
    concurrency: int,
    pause: float = 0.0,
    marks: Sequence[int] = (),
    is_filled: bool = True,
) -> None:
    """
    Handle *messages* messages. The clock runs from the first handler until the last acknowledgement is received.

    Unless *is_filled*, this process sends them before that.

    Handlers wait *pause* seconds. The memory is measured at each of the *marks* (numbers of messages).
    """
    if not is_filled:
        await fill(transport, lambda _: None, callers=64, messages=messages)
        gc.collect()
        gc.freeze()
    times = bytearray(messages)
    waited: list[float] = []
    resident: list[float] = []
    began = used = 0.0
    count = 0
    enough = asyncio.Event()

    async def handle(event: Any) -> None:
        nonlocal began, used
        now = perf_counter()
        if not began:
            began, used = now, process_time()
        if not marks:
            waited.append(now - event.sent_at)
        times[event.number] += 1
        if pause:
            await asyncio.sleep(pause)

    def settled() -> None:
        nonlocal count
        count += 1
        if count in marks:
            resident.append(_resident_mib())
        if count == messages:
            enough.set()

    async with transport.consuming(handle, settled, concurrency) as finished:
        reply({"ready": True})
        await enough.wait()
        await finished()
        took, used = perf_counter() - began, process_time() - used
    waited.sort()
    reply(
        {
            "per_second": messages / took,
            "cpu_microseconds": used / messages * 1e6,
            "lost": times.count(0),
            "repeated": sum(each > 1 for each in times),
            "p50_ms": waited[len(waited) // 2] * 1e3 if waited else None,
            "p99_ms": waited[len(waited) * 99 // 100] * 1e3 if waited else None,
            "resident_mib": resident,
        }
    )


async def trace(transport: Any, reply: Reply, *, rounds: int, messages: int) -> None:
    """
    Send *messages* messages and handle them, with telemetry and without, in each of the *rounds*.

    Many are sent at once. Otherwise the slower sender is the one whose messages the client cannot take together.
    """
    used: dict[str, list[float]] = {"plain": [], "traced": []}
    async with transport.plain(transport.url, f"{transport.name}-plain") as plain, AsyncExitStack() as stack:
        slices = []
        for each in (plain, transport):
            done, consuming = _counting(messages)
            finished = await stack.enter_async_context(consuming(each))
            stack.push_async_callback(finished)
            slices.append((each, done))
        for number in range(rounds + 1):  # the first one opens the connections
            for (each, done), found in zip(slices, used.values(), strict=True):
                done.clear()
                began = process_time()
                await fill(each, lambda _: None, callers=64, messages=messages)
                await done.wait()
                if number:
                    found.append((process_time() - began) / messages * 1e6)
    reply(used)


async def steady(transport: Any, reply: Reply, *, messages: int, at_once: int, marks: Sequence[int]) -> None:
    """Send *messages* messages and handle them, *at_once* at a time, and measure the memory at each of the *marks*."""
    resident = []
    done, consuming = _counting(at_once)
    async with consuming(transport) as finished:
        for sent in range(at_once, messages + 1, at_once):
            done.clear()
            await fill(transport, lambda _: None, callers=1, messages=at_once)
            await done.wait()
            if sent in marks:
                resident.append(_resident_mib())
        await finished()
    reply({"resident_mib": resident})


def _counting(messages: int) -> tuple[asyncio.Event, Callable[[Transport], AbstractAsyncContextManager[Finished]]]:
    """Return an event that is set after every *messages* messages, and what consumes them."""
    done, count = asyncio.Event(), 0

    async def handle(_: Any) -> None: ...

    def settled() -> None:
        nonlocal count
        count += 1
        if count % messages == 0:
            done.set()

    return done, lambda transport: transport.consuming(handle, settled, 1)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


WORKLOADS = {
    "publish": publish,
    "fill": fill,
    "pace": pace,
    "flood": flood,
    "consume": consume,
    "trace": trace,
    "steady": steady,
}


async def nothing() -> None:
    """Return at once: each acknowledgement was awaited already."""


async def end(task: asyncio.Task[None]) -> None:
    """Cancel *task* until it has ended: `asyncio.wait_for` of Python 3.11, which clients use, can forget it once."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
