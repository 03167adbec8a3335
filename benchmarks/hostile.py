"""What messages of other programs cost a consumer, and how fast it dead-letters a flood of them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple, get_args

from benchmarks import services
from benchmarks.memory import resident_mib
from benchmarks.reports import marked, show
from diator.brokers.base import Delivery, OnGap, ReadableBroker, Topic, Transport
from diator.brokers.codec import encode
from diator.testing.conformance import EnvironmentMissing, Foreign, Harness
from diator.testing.conformance._consuming import ConsumerRun, Happened
from tests.integration.harnesses import KafkaHarness, RabbitMQHarness, RedisStreamHarness

HARNESSES: dict[str, type[Harness]] = {
    "streams": RedisStreamHarness,
    "rabbitmq": RabbitMQHarness,
    "kafka": KafkaHarness,
}
TRANSPORTS = {"streams": "redis", "rabbitmq": "rabbitmq", "kafka": "kafka"}
"""The service of each transport. Redis Pub/Sub has nothing beside a body, and no dead letters."""

KINDS = ["good", *(kind for kind in get_args(Foreign) if kind != "due times")]
FLOOD, ROUNDS = 10_000, 3
MOST_MS, MOST_MIB, MOST_LINES, RATE = 20.0, 10.0, 100, 1 / 3
"""The targets: milliseconds of CPU and MiB for each message, log lines, and the rate of poison by that of good ones."""


def measure(transports: Collection[str], *, flood: int = FLOOD) -> dict[str, Any]:
    """Measure, print the tables, and return the results of each transport."""
    results: dict[str, Any] = {}
    for transport in transports:
        with services.running(TRANSPORTS[transport]) as address:
            variable = services.BACKENDS[TRANSPORTS[transport]].variable
            command = [sys.executable, "-m", "benchmarks.hostile", transport, str(flood)]
            done = subprocess.run(
                command, env={**os.environ, variable: address}, stdout=subprocess.PIPE, text=True, check=True
            )
        results[transport] = found = json.loads(done.stdout.splitlines()[-1])
        rows = [
            [
                kind,
                str(each["messages"]),
                f"{each['ms']:.1f}",
                _cell(f"{each['cpu_ms']:.1f}", f"{MOST_MS:g}", met=each["cpu_met"]),
                f"{each['stall_ms']:.1f}",
                _cell(f"{each['mib']:.1f}", f"{MOST_MIB:g}", met=each["mib_met"]),
                ", ".join(f"{count} {outcome}" for outcome, count in each["outcomes"].items()),
            ]
            for kind, each in found["kinds"].items()
        ]
        head = ["messages of other programs", "number", "ms each", "CPU ms each", "longest stall, ms"]
        head += ["MiB beyond", "outcomes"]
        show(f"{transport}: what they cost a consumer", head, rows)
        poison = found["flood"]
        ratio = f"{poison['ratio']:.2f} ({poison['lowest']:.2f}-{poison['highest']:.2f})"
        row = [
            f"{poison['good']['rate']:,.0f}/s ({poison['good']['cpu_us']:.0f})",
            f"{poison['poison']['rate']:,.0f}/s ({poison['poison']['cpu_us']:.0f})",
            _cell(ratio, f"{RATE:.2f}", met=poison["met"]),
            _cell(str(poison["lines"]), str(MOST_LINES), met=poison["lines_met"]),
        ]
        title = f"{transport}: {flood:,} good and {flood:,} poison messages, {ROUNDS} rounds"
        show(title, ["good (CPU µs)", "poison (CPU µs)", "ratio", "log lines"], [row])
    return results


def _cell(text: str, target: str, *, met: bool) -> str:
    return marked(text, target=target, met=met)


def smoke(transports: Collection[str]) -> list[str]:
    """Run everything once, tiny. Return what failed."""
    results = measure(transports, flood=100)
    return [
        f"{transport}: {kind} was not settled"
        for transport, found in results.items()
        for kind, each in found["kinds"].items()
        if not each["outcomes"]
    ]


# -- in a process of its own -------------------------------------------------------------------------------------


class _Weighed:
    """A broker that counts the bytes of the bodies that it delivers."""

    def __init__(self, broker: Transport) -> None:
        self.transport = broker
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async def weigh(deliveries: AsyncIterator[Delivery]) -> AsyncIterator[Delivery]:
            async for delivery in deliveries:
                self.bytes += len(delivery.body)
                yield delivery

        async with self.transport.subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield weigh(deliveries)


async def _handle(event: Happened) -> None:
    """Accept the event."""


class _Lines(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


async def _collecting(broker: ReadableBroker, name: str) -> ConsumerRun:
    """Return a consumer whose group collects messages from now on."""
    run = ConsumerRun(broker, name, _handle)  # type: ignore[arg-type]
    async with broker.subscribe([run.topic], group=run.group):
        return run


class _Drained(NamedTuple):
    """What it took to settle messages: seconds, seconds of CPU in this process, and the longest stall of the loop."""

    seconds: float
    cpu: float
    stall: float


async def _drained(run: ConsumerRun, count: int) -> _Drained:
    """Run the consumer until *count* messages are settled."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, perf_counter() - before - 0.001)

    running, watching = asyncio.create_task(run.run()), asyncio.create_task(watch())
    await run.until_handled(1)  # joining a group is not what is measured
    started, cpu = perf_counter(), process_time()
    await run.until_settled(count)
    seconds, cpu = perf_counter() - started, process_time() - cpu
    watching.cancel()
    run.consumer.stop()
    await running
    return _Drained(seconds, cpu, longest)


async def _cost(harness: Harness, kind: str) -> dict[str, Any]:
    broker = _Weighed(harness.transport())
    try:
        run = await _collecting(broker, f"hostile-{kind.replace(' ', '-')}")
        await broker.send_message(run.message(0))
        if kind == "good":
            count = 20
            for number in range(count):
                await broker.send_message(run.message(number))
        else:
            body = encode(run.message(0))
            count = await harness.send_foreign(broker.transport, run.topic, run.group, kind, body)  # type: ignore[arg-type]
        gc.collect()
        _reset_peak()
        before = resident_mib(os.getpid())
        drained = await _drained(run, count + 1)
        beyond = max(0.0, _peak_mib() - before - broker.bytes / 2**20)
        outcomes: dict[str, int] = {}
        for each in run.settled()[1:]:
            outcomes[each.outcome] = outcomes.get(each.outcome, 0) + 1
    finally:
        await broker.aclose()
    cpu_ms = 1000 * drained.cpu / count
    return {
        "messages": count,
        "ms": 1000 * drained.seconds / count,
        "cpu_ms": cpu_ms,
        "cpu_met": cpu_ms <= MOST_MS,
        "stall_ms": 1000 * drained.stall,
        "mib": beyond,
        "mib_met": beyond <= MOST_MIB,
        "outcomes": outcomes,
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def _drain(harness: Harness, count: int, number: Any, name: str) -> _Drained:
    """Settle so many messages with *number*."""
    broker = harness.transport()
    try:
        run = await _collecting(broker, name)
        for _ in range(0, count, 500):
            await asyncio.gather(*(broker.send_message(run.message(number)) for _ in range(500)))
        return await _drained(run, count)
    finally:
        await broker.aclose()


async def _flood(harness: Harness, count: int) -> dict[str, Any]:
    """Settle good and poison messages in turn. A ratio is that of one round."""
    lines, logger = _Lines(), logging.getLogger("diator")
    found: dict[str, list[_Drained]] = {"good": [], "poison": []}
    logger.addHandler(lines)
    for each in range(ROUNDS):
        for kind, number in ("good", 1), ("poison", "poison"):
            found[kind].append(await _drain(harness, count, number, f"flood-{kind}-{each}"))
    ratios = [good.seconds / poison.seconds for good, poison in zip(*found.values(), strict=True)]
    each_lines = lines.count // ROUNDS
    return {
        **{
            kind: {
                "rate": median(count / each.seconds for each in drained),
                "cpu_us": median(1e6 * each.cpu / count for each in drained),
            }
            for kind, drained in found.items()
        },
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "met": median(ratios) >= RATE,
        "lines": each_lines,
        "lines_met": each_lines <= MOST_LINES,
    }


async def _measure(transport: str, flood: int) -> dict[str, Any]:
    harness = HARNESSES[transport]()
    harness.start()
    logging.getLogger("diator").propagate = False
    try:
        kinds = {}
        for kind in KINDS:
            try:
                kinds[kind] = await _cost(harness, kind)
            except EnvironmentMissing:
                continue
        return {"kinds": kinds, "flood": await _flood(harness, flood)}
    finally:
        harness.stop()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measure(sys.argv[1], int(sys.argv[2])))))
