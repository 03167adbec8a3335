"""A consumer in the process of a web server: a signal ends both, and the consumer finishes its work."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("web_server.py")
ROOT = PROGRAM.parents[2]


def serve(how, *signals, loop="asyncio"):
    """Run the program, and send it *signals* once a handler has begun. Return what it says, and its exit code."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.web_server", how, loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as process:
        watchdog = threading.Timer(20, process.kill)
        watchdog.start()
        said = []
        while (line := process.stdout.readline().strip()) and line != "begun":
            said.append(line)
        for number in signals:
            process.send_signal(number)
        said += [line.strip() for line in process.stdout]
        process.wait()
        watchdog.cancel()
    return [line for line in said if line != "begun"], process.returncode


#: uvicorn raises the signal once more when it has ended, and ignores that if it is KeyboardInterrupt.
ENDS = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 0}


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("how", ["run", "enter"])
def test_a_signal_ends_the_server_and_its_consumer_gracefully(how, number):
    said, code = serve(how, number)

    assert (said, code) == (["server shuts down", "handled", "acked", "consumer ended"], ENDS[number])


@pytest.mark.parametrize("number", ENDS)
def test_two_consumers_in_one_server_end_with_it(number):
    said, code = serve("two", number)

    assert (said[0], sorted(said[1:]), code) == (
        "server shuts down",
        ["acked", "acked", "consumer ended", "handled", "handled"],
        ENDS[number],
    )


@pytest.mark.parametrize("number", ENDS)
def test_a_consumer_that_is_older_than_the_server_ends_when_the_server_has(number):
    """The server replaces the handler of the consumer, restores it at its end, and raises the signal once more."""
    said, code = serve("before", number)

    assert (said, code) == (["server shuts down", "handled", "acked", "consumer ended"], 0)


@pytest.mark.parametrize("number", ENDS)
def test_a_server_whose_consumer_has_ended_ends_too(number):
    said, code = serve("end", number)

    assert (said, code) == (["consumer ended", "server shuts down"], ENDS[number])


def test_with_uvloop_too():
    pytest.importorskip("uvloop", reason="it is optional for uvicorn, and not for every platform")
    said, code = serve("run", signal.SIGTERM, loop="uvloop")

    assert (said, code) == (["server shuts down", "handled", "acked", "consumer ended"], -signal.SIGTERM)
