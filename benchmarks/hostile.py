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
from time import perf_counter
from typing import Any, get_args

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
FLOOD = 10_000
MOST_MS, MOST_MIB, MOST_LINES, RATE = 20.0, 10.0, 100, 1 / 3
"""The targets: milliseconds and MiB for each message, log lines and the rate of a flood in rates of good messages."""


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
                _cell(f"{each['ms']:.2f}", f"{MOST_MS:g}", met=each["ms_met"]),
                f"{each['stall_ms']:.1f}",
                _cell(f"{each['mib']:.1f}", f"{MOST_MIB:g}", met=each["mib_met"]),
                ", ".join(f"{count} {outcome}" for outcome, count in each["outcomes"].items()),
            ]
            for kind, each in found["kinds"].items()
        ]
        head = ["messages of other programs", "number", "ms each", "longest stall, ms", "MiB beyond", "outcomes"]
        show(f"{transport}: what they cost a consumer", head, rows)
        poison = found["flood"]
        rate = _cell(f"{poison['ratio']:.2f}", f"{RATE:.2f}", met=poison["met"])
        lines = _cell(str(poison["lines"]), str(MOST_LINES), met=poison["lines_met"])
        row = [f"{poison['good']:,.0f}", f"{poison['poison']:,.0f}", rate, lines]
        show(
            f"{transport}: {flood:,} good and {flood:,} poison messages",
            ["good/s", "poison/s", "ratio", "log lines"],
            [row],
        )
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


async def _drained(run: ConsumerRun, count: int) -> tuple[float, float]:
    """Run the consumer until *count* messages are settled. Return the seconds, and the longest stall of the loop."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, perf_counter() - before - 0.001)

    running, watching = asyncio.create_task(run.run()), asyncio.create_task(watch())
    await run.until_handled(1)  # joining a group is not what is measured
    started = perf_counter()
    await run.until_settled(count)
    seconds = perf_counter() - started
    watching.cancel()
    run.consumer.stop()
    await running
    return seconds, longest


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
        seconds, stall = await _drained(run, count + 1)
        beyond = max(0.0, _peak_mib() - before - broker.bytes / 2**20)
        outcomes: dict[str, int] = {}
        for each in run.settled()[1:]:
            outcomes[each.outcome] = outcomes.get(each.outcome, 0) + 1
    finally:
        await broker.aclose()
    ms = 1000 * seconds / count
    return {
        "messages": count,
        "ms": ms,
        "ms_met": ms <= MOST_MS,
        "stall_ms": 1000 * stall,
        "mib": beyond,
        "mib_met": beyond <= MOST_MIB,
        "outcomes": outcomes,
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def _rate(harness: Harness, count: int, number: Any) -> float:
    """Return how many messages with *number* are settled in a second."""
    broker = harness.transport()
    try:
        run = await _collecting(broker, f"flood-{number}")
        for _ in range(0, count, 500):
            await asyncio.gather(*(broker.send_message(run.message(number)) for _ in range(500)))
        seconds, _ = await _drained(run, count)
    finally:
        await broker.aclose()
    return count / seconds


async def _measure(transport: str, flood: int) -> dict[str, Any]:
    harness = HARNESSES[transport]()
    harness.start()
    lines = _Lines()
    logger = logging.getLogger("diator")
    logger.propagate = False
    try:
        kinds = {}
        for kind in KINDS:
            try:
                kinds[kind] = await _cost(harness, kind)
            except EnvironmentMissing:
                continue
        good = await _rate(harness, flood, 1)
        logger.addHandler(lines)
        poison = await _rate(harness, flood, "poison")
    finally:
        harness.stop()
    ratio = poison / good
    found = {"good": good, "poison": poison, "ratio": ratio, "met": ratio >= RATE}
    return {"kinds": kinds, "flood": {**found, "lines": lines.count, "lines_met": lines.count <= MOST_LINES}}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measure(sys.argv[1], int(sys.argv[2])))))
