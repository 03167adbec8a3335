"""What a slow key costs the other keys: 64 handlers at once, and one of 100 keys has half of the messages."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar
from uuid import uuid4

from benchmarks import services
from benchmarks.reports import marked, show
from diator.brokers.base import Transport
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent

TRANSPORTS: dict[str, str | None] = {"memory": None, "streams": "redis", "rabbitmq": "rabbitmq", "kafka": "kafka"}
"""The service of each transport."""

HANDLERS, KEYS, SLOW_SECONDS = 64, 100, 0.02
OTHERS = 600
"""How many messages the other keys have; the slow key has as many."""
PER_SECOND = 200
"""How many of them are sent in a second."""
MOST_WAIT, LEAST_RATE = 2.0, 0.8
"""The targets: the others' median wait and rate, in those of a run without the slow key."""


@dataclass(frozen=True, kw_only=True)
class Moved(NotificationEvent):
    message_key: ClassVar[str] = "room"
    room: str
    number: int
    sent_at: float


def measure(transports: Collection[str], *, rounds: int = 3, others: int = OTHERS) -> dict[str, Any]:
    """Measure, print the table, and return the results of each transport."""
    results: dict[str, Any] = {}
    rows = []
    for transport in transports:
        service = TRANSPORTS[transport]
        with nullcontext("") if service is None else services.running(service) as address:
            command = [sys.executable, "-m", "benchmarks.skew", transport, address, str(rounds), str(others)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[transport] = found = figures(*json.loads(done.stdout.splitlines()[-1]))
        wait, rate = found["wait"], found["rate"]
        rows.append(
            [
                transport,
                f"{wait['without_ms']:.2f} ms",
                f"{wait['with_ms']:.2f} ms",
                marked(f"{wait['ratio']:.2f}", target=f"{MOST_WAIT:g}", met=wait["met"]),
                marked(f"{rate['ratio']:.2f}", target=f"{LEAST_RATE:g}", met=rate["met"]),
            ]
        )
    head = ["transport", "median wait", "with a slow key", "ratio", "ratio of the rates"]
    show("the messages of the other keys", head, rows)
    return results


def figures(without: Sequence[dict[str, Any]], with_slow_key: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the runs *without* a slow key and *with_slow_key*, one of each in each round."""
    pairs = [*zip(without, with_slow_key, strict=True)]
    wait = statistics.median(slow["wait_ms"] / quick["wait_ms"] for quick, slow in pairs)
    rate = statistics.median(slow["per_second"] / quick["per_second"] for quick, slow in pairs)
    return {
        "wait": {
            "without_ms": statistics.median(run["wait_ms"] for run in without),
            "with_ms": statistics.median(run["wait_ms"] for run in with_slow_key),
            "ratio": wait,
            "met": round(wait, 2) <= MOST_WAIT,
        },
        "rate": {"ratio": rate, "met": round(rate, 2) >= LEAST_RATE},
        "faults": [fault for run in (*without, *with_slow_key) for fault in run["faults"]],
    }


def smoke(transports: Collection[str]) -> list[str]:
    """Run everything once, tiny. Return what went wrong."""
    results = measure(transports, rounds=1, others=100)
    return [f"{transport}: {fault}" for transport, found in results.items() for fault in found["faults"]]


# -- in a process of its own -------------------------------------------------------------------------------------


async def _run(broker: Transport, others: int, slow: int) -> dict[str, Any]:
    """Send *others* messages of 99 keys, and *slow* ones of the slow key. Return the figures of the others."""
    waits: list[float] = []
    handled: dict[str, list[int]] = {}
    ended = perf_counter()
    enough = asyncio.Event()
    events = EventMap()

    @events.handler
    async def handle(event: Moved) -> None:
        nonlocal ended
        handled.setdefault(event.room, []).append(event.number)
        if event.room == "slow":
            await asyncio.sleep(SLOW_SECONDS)
            return
        ended = perf_counter()
        if event.number >= 0:
            waits.append(ended - event.sent_at)
        if len(waits) == others:
            enough.set()

    emitter = EventEmitter(EventMap(), message_broker=broker)

    async def send(room: str, number: int) -> None:
        await emitter.emit(Moved(room=room, number=number, sent_at=perf_counter()))

    group = uuid4().hex
    consumer = Consumer(broker, event_map=events, group=group, concurrency=HANDLERS)
    running = asyncio.create_task(consumer.run(signals=False))
    await consumer.ready()
    while "first" not in handled:  # connections are made, partitions assigned
        await send("first", -1)
        await asyncio.sleep(0.1)
    began = perf_counter()
    async with asyncio.TaskGroup() as sending:
        for number in range(others):
            await asyncio.sleep(max(0.0, began + number / PER_SECOND - perf_counter()))
            sending.create_task(send(f"room-{number % (KEYS - 1)}", number))
            if number < slow:
                sending.create_task(send("slow", number))
    async with asyncio.timeout(120):
        await enough.wait()
    consumer.stop()
    consumer.stop()
    await running
    faults = [f"the messages of {room} out of order" for room, numbers in handled.items() if numbers != sorted(numbers)]
    del handled["first"]
    faults += [f"a message of {room} was handled twice" for room, each in handled.items() if len({*each}) < len(each)]
    return {"wait_ms": statistics.median(waits) * 1e3, "per_second": others / (ended - began), "faults": faults}


def _broker(transport: str, address: str, prefix: str) -> Transport:
    """Return a broker. Its client library is imported here, since the unit tests of the figures have none."""
    match transport:
        case "streams":
            from diator.brokers.redis_streams import RedisStreamMessageBroker  # noqa: PLC0415

            return RedisStreamMessageBroker.from_url(address, prefix)
        case "rabbitmq":
            from diator.brokers.rabbitmq import RabbitMQMessageBroker  # noqa: PLC0415

            return RabbitMQMessageBroker(address, prefix)
        case "kafka":
            from diator.brokers.kafka import KafkaMessageBroker  # noqa: PLC0415

            return KafkaMessageBroker(address, prefix)
        case _:
            return MemoryMessageBroker()


async def _measure(transport: str, address: str, rounds: int, others: int) -> list[list[dict[str, Any]]]:
    runs: list[list[dict[str, Any]]] = [[], []]
    for _ in range(rounds):
        for slow, found in zip((0, others), runs, strict=True):
            async with _broker(transport, address, f"skew-{uuid4().hex[:8]}") as broker:
                found.append(await _run(broker, others, slow))
    return runs


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))))
