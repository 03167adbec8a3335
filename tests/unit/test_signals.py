"""The signal handlers of consumers, beside those of a program."""

import asyncio
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from diator._signals import stopping_on_signals

pytestmark = pytest.mark.real_time
ROOT = Path(__file__).parents[2]
BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def restored():
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def calls():
    return []


async def turn():
    """Let the loop call what a signal handler has scheduled."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def raised(number=signal.SIGTERM):
    signal.raise_signal(number)
    await turn()


@pytest.mark.parametrize("number", BOTH)
async def test_a_handler_from_before_is_called_too(number, calls):
    signal.signal(number, lambda *arguments: calls.append(("before", arguments[0])))
    with stopping_on_signals(lambda: calls.append("stop")):
        await raised(number)
    await raised(number)

    assert calls == [("before", number), "stop", ("before", number)]


@pytest.mark.parametrize("number", BOTH)
async def test_a_handler_of_the_loop_from_before_is_called_too(number, calls):
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, calls.append, "loop")
    try:
        with stopping_on_signals(lambda: calls.append("stop")):
            signal.raise_signal(number)
            await asyncio.sleep(0.01)
        assert sorted(calls) == ["loop", "stop"]
        signal.raise_signal(number)
        await asyncio.sleep(0.01)
    finally:
        loop.remove_signal_handler(number)

    assert sorted(calls) == ["loop", "loop", "stop"]


async def test_an_ignored_signal_stops_the_consumer_and_is_ignored_again_afterwards(calls):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stopping_on_signals(lambda: calls.append("stop")):
        await raised()
    await raised()

    assert calls == ["stop"]


def test_the_handlers_of_python_and_of_asyncio_are_replaced(calls):
    """They would raise KeyboardInterrupt, or cancel what `asyncio.run` runs: neither is graceful."""

    async def main():
        with stopping_on_signals(lambda: calls.append("stop")):
            await raised(signal.SIGINT)
            await raised(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    asyncio.run(main())  # it installs a handler of its own

    assert calls == ["stop"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("first_to_end", [0, 1])
async def test_all_consumers_of_a_process_are_stopped_and_the_last_one_restores(first_to_end, calls):
    def before(*_):
        calls.append("before")

    signal.signal(signal.SIGTERM, before)
    stacks = [ExitStack(), ExitStack()]
    for number, stack in enumerate(stacks):
        stack.enter_context(stopping_on_signals(lambda number=number: calls.append(number)))
    await raised()
    stacks[first_to_end].close()
    await raised()
    stacks[1 - first_to_end].close()

    assert calls == ["before", 0, 1, "before", 1 - first_to_end]
    assert signal.getsignal(signal.SIGTERM) is before


async def test_a_handler_that_the_program_installs_meanwhile_stays(calls):
    """As a web server does that starts after the consumer. The server calls and restores what was there before it."""
    consuming = ExitStack()
    consuming.enter_context(stopping_on_signals(lambda: calls.append("stop")))
    server = signal.signal(signal.SIGTERM, lambda *_: calls.append("server"))
    await raised()
    assert calls == ["server"]

    with stopping_on_signals(lambda: calls.append("inner")):  # a second consumer, in the lifespan of the server
        await raised()
    assert calls == ["server", "server", "inner"]

    signal.signal(signal.SIGTERM, server)  # the server ends, and raises the signal once more, as uvicorn does
    await raised()
    assert calls == ["server", "server", "inner", "stop"]
    consuming.close()


@pytest.mark.parametrize("outer", [True, False])
async def test_a_handler_that_is_restored_after_its_consumers_have_ended_passes_the_signal_on(outer, calls):
    if outer:
        signal.signal(signal.SIGTERM, lambda *_: calls.append("before"))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def server(*_):
        calls.append("server")

    with stopping_on_signals(lambda: calls.append("stop")):
        ours = signal.signal(signal.SIGTERM, server)
    assert signal.getsignal(signal.SIGTERM) is server

    signal.signal(signal.SIGTERM, ours)
    await raised()

    assert calls == ["before"] * outer


def test_without_consumers_the_default_action_is_taken(calls):
    async def main():
        with stopping_on_signals(lambda: calls.append("stop")):
            return signal.signal(signal.SIGINT, signal.SIG_IGN)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours = asyncio.run(main())
    signal.signal(signal.SIGINT, ours)

    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


RESTORED = """
import asyncio, signal
from diator._signals import stopping_on_signals

async def main():
    with stopping_on_signals(print):
        return signal.signal(signal.SIGTERM, signal.SIG_IGN)

signal.signal(signal.SIGTERM, asyncio.run(main()))
signal.raise_signal(signal.SIGTERM)
print("alive")
"""


def test_without_consumers_sigterm_ends_the_process():
    ended = subprocess.run(
        [sys.executable, "-c", RESTORED], check=False, capture_output=True, text=True, cwd=ROOT, timeout=20
    )

    assert (ended.stdout, ended.returncode) == ("", -signal.SIGTERM)


async def test_in_another_thread_nothing_is_done(calls):
    before = [signal.getsignal(number) for number in BOTH]
    seen = []

    async def main():
        with stopping_on_signals(lambda: calls.append("stop")):
            seen.extend(signal.getsignal(number) for number in BOTH)

    thread = threading.Thread(target=asyncio.run, args=[main()])
    thread.start()
    thread.join()

    assert seen == before


async def test_a_handler_that_was_not_installed_from_python_stays(monkeypatch, calls):
    """It can be neither called nor restored: the signal belongs to the program that embeds Python."""
    installed = []
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda _: None)
        patch.setattr(signal, "signal", lambda *arguments: installed.append(arguments))
        with stopping_on_signals(lambda: calls.append("stop")):
            pass

    assert installed == []


def test_a_loop_that_is_closed_meanwhile_does_no_harm(calls):
    signal.signal(signal.SIGTERM, lambda *_: calls.append("before"))
    loop = asyncio.new_event_loop()
    consuming = ExitStack()

    async def main():
        consuming.enter_context(stopping_on_signals(lambda: calls.append("stop")))

    loop.run_until_complete(main())
    loop.close()
    signal.raise_signal(signal.SIGTERM)
    consuming.close()

    assert calls == ["before"]
