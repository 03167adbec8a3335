"""Consumers in their own processes: signals and exit codes."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import diator
from diator.consumer import Consumer
from tests.unit.consumer.helpers import JOIN, Slow, consumer_of, on_joined, outcomes
from tests.unit.doubles import (
    Scripted,
    body_of,
    events_of,
    holding,
    running,
    until,
)

PROGRAM = """
import asyncio, sys
from diator.brokers.base import Topic
from diator.consumer import Consumer
from tests.unit.doubles import UserJoined, events_of, holding

JOINED = Topic("notification_event", "UserJoined")

async def on_joined(event: UserJoined) -> None:
    print("begun", flush=True)
    await asyncio.sleep({seconds})
    {then}
    print("done", flush=True)

async def consume(broker):
    consumers = [Consumer(broker, event_map=events_of(on_joined), group=group) for group in {groups}]
    await asyncio.gather(*[consumer.run() for consumer in consumers])
    print("ended", flush=True)

async def attempts(broker):
    async with broker.subscribe({{JOINED}}, group="diator") as deliveries:
        print("attempts", [(await anext(deliveries)).attempt for _ in range(2)], flush=True)

broker = asyncio.run(holding(UserJoined(), UserJoined()))
try:
    asyncio.run(consume(broker))
finally:
    asyncio.run(attempts(broker)) if {look} else None
"""


def program(*signals, seconds=0.3, then="", groups=("diator",), look=False):
    """Run the program, and send it *signals* once handlers have begun. Return its output and exit code."""
    source = PROGRAM.format(seconds=seconds, then=then, groups=groups, look=look)
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(diator.__file__).parents[1],
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        said = [process.stdout.readline()]
        for number in signals:
            process.send_signal(number)
        said += process.stdout
        errors = process.stderr.read()
        watchdog.cancel()
    return [line.strip() for line in said], errors, process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_running_handlers(number):
    assert program(number) == (["begun", "done", "ended"], "", 0)


def test_a_second_signal_stops_at_once():
    said, _, code = program(signal.SIGTERM, signal.SIGINT, seconds=60, look=True)

    assert (said, code) == (["begun", "ended", "attempts [2, 1]"], 0)


def test_a_signal_stops_all_consumers_of_the_process():
    said, errors, code = program(signal.SIGTERM, groups=("diator", "other"))

    assert (said[-1], errors, code) == ("ended", "", 0)


def test_a_handler_that_exits_ends_the_process_and_its_message_is_redelivered():
    said, _, code = program(seconds=0, then="sys.exit(3)", look=True)

    assert (said, code) == (["begun", "attempts [2, 1]"], 3)


@pytest.mark.parametrize(("signals", "outcome"), [(1, "acked"), (2, "unsettled")])
async def test_the_first_signal_is_graceful_and_the_second_one_is_not(signals, outcome):
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)
    run = asyncio.create_task(consumer.run())
    await until(lambda: slow.begun)
    for _ in range(signals):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
    slow.gate.set()
    await run

    assert outcomes(reports) == [outcome]


@pytest.mark.parametrize("in_a_thread", [False, True])
async def test_it_runs_without_support_for_signals(in_a_thread, monkeypatch):
    """Only the main thread can handle signals, and in some interpreters that are embedded not even that."""

    def no_signals(*_):
        raise ValueError("signal only works in main thread of the main interpreter")

    async def run():
        reports = []
        consumer = Consumer(Scripted(body_of(JOIN)), event_map=events_of(on_joined), on_handled=reports.append)
        asyncio.get_running_loop().call_later(0.01, consumer.stop)
        with monkeypatch.context() as patch:
            if not in_a_thread:
                patch.setattr(signal, "signal", no_signals)
            await consumer.run()
        return outcomes(reports)

    assert await (asyncio.to_thread(asyncio.run, run()) if in_a_thread else run()) == ["acked"]


async def test_afterwards_the_earlier_signal_handlers_are_back():
    """For any number of consumers, and in any order of their ends."""

    def ours(*_): ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        consumers = [consumer_of(Scripted(), on_joined)[0] for _ in range(2)]
        running = [asyncio.create_task(consumer.run()) for consumer in consumers]
        for consumer, run in zip(consumers, running, strict=True):
            await asyncio.sleep(0.01)
            assert signal.getsignal(signal.SIGTERM) is not ours
            consumer.stop()
            await run
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_with_signals_off_the_handlers_of_the_program_stay():
    called = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, called.set)
    try:
        consumer, _ = consumer_of(Scripted(), on_joined)
        async with running(consumer):
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(1):
                await called.wait()
            assert consumer.health().receiving
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
