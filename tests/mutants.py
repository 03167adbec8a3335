"""
A plugin of pytest that runs the tests on each change which mutmut has made of a file: see `mutation.py`.

The tests are collected once. Each change is tried in a fork of this process, which takes no longer than its tests do.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from time import monotonic, process_time

import pytest
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.format_utils import mangled_name_from_mutant_name

#: A change may make a loop endless. A test may take so many times as long as without the change, and so much more, both
#: in seconds of work, so that it does not matter what else the machine does. pytest-timeout ends what only waits.
_TIMES, _MORE = 10, 1.0
#: Tests that work longer without a change, in seconds, are left out: they do thousands of times what others do, too.
_LONGEST = 0.2


class Tests:
    """The tests: how long each of them works, in seconds, and which of them call a function."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.items = {item.nodeid: item for item in items}
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.of: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def run(self, names: Iterable[str]) -> int:
        """Run tests one after the other, and return the number of the first one that failed, counted from 1; else 0."""
        items = [self.items[name] for name in names]
        for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True), 1):
            if limit := self.seconds.get(item.nodeid):
                signal.setitimer(signal.ITIMER_PROF, _MORE + _TIMES * limit)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return number
        return 0

    def measure(self) -> dict[str, object]:
        """Run all tests, and return what was found out about them."""
        seconds: dict[str, float] = {}
        set_mutant_under_test("stats")
        for name in self.items:
            state()._stats.clear()
            began = process_time()
            if self.run([name]):
                sys.stderr.write(f"{name} fails without a change, and is left out\n")
                self.failed.clear()
                continue
            seconds[name] = process_time() - began
            if seconds[name] <= _LONGEST:
                for function in state()._stats:
                    self.of.setdefault(function, []).append(name)
        for names in self.of.values():
            names.sort(key=seconds.__getitem__)
        return {"seconds": seconds, "of": self.of}


def pytest_runtestloop(session: pytest.Session) -> bool:
    mutants, found, minutes = Path(os.environ["MUTANTS"]), Path(os.environ["OUTCOMES"]), float(os.environ["MINUTES"])
    names = json.loads(mutants.read_text())
    until = monotonic() + 60 * minutes
    tests = Tests(session.items)
    session.config.pluginmanager.register(tests)
    gc.freeze()  # a collection in a fork would copy the memory of this process

    measured = found.with_suffix(".tests")
    if pid := os.fork():  # so that no test has run in this process
        os.waitpid(pid, 0)
    else:
        measured.write_text(json.dumps(tests.measure()))
        os._exit(0)
    for name, value in json.loads(measured.read_text()).items():
        setattr(tests, name, value)

    noticed: dict[str, bool | None] = dict.fromkeys(names)
    jobs, running = int(os.environ["JOBS"]), dict[int, tuple[str, list[str]]]()
    while names or running:
        while names and len(running) < jobs:
            running.update([begin(names.pop(0), tests)])
        pid, status = os.wait()
        name, tried = running.pop(pid)
        number = os.waitstatus_to_exitcode(status)
        noticed[name] = number != 0
        if 0 < number < 255:  # this test often notices the next change of the function, too
            latest = tests.of[mangled_name_from_mutant_name(name)]
            latest.remove(tried[number - 1])
            latest.insert(0, tried[number - 1])
        sys.stderr.write(f"{'.' if noticed[name] else 'S'}")
        if monotonic() > until:
            names.clear()
    found.write_text(json.dumps(noticed))
    return True


def begin(mutant: str, tests: Tests) -> tuple[int, tuple[str, list[str]]]:
    """Run the tests with a change in a fork: its exit code is the number of what failed. Return its id and tests."""
    names = [*tests.of.get(mangled_name_from_mutant_name(mutant), ())]
    pid = os.fork()
    if not pid:
        set_mutant_under_test(mutant)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            os._exit(min(tests.run(names), 255))
        finally:
            os._exit(255)
    return pid, (mutant, names)
