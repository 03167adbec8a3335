"""An event loop whose time passes at once, and only while nothing is left to do. No test measures the machine."""

import asyncio
import selectors


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """
    An event loop with a clock of its own. Where others wait for the next timer, it sets its clock to that timer's time.

    It waits for files and threads only while it has no timers at all, so that a test with sockets, processes or
    threads needs the real time: `pytest.mark.real_time`. If there are none of these either, nothing can ever wake it:
    the test fails at once, instead of waiting forever.
    """

    def __init__(self) -> None:
        self._now = 1_000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads without a time limit, which would be over at once."""
        await super().shutdown_default_executor()

    def has_no_threads(self) -> bool:
        """Return whether no thread has been started with `asyncio.to_thread`."""
        return self._default_executor is None

    def advance(self, seconds: float) -> None:
        """Set the clock forward."""
        self._now += seconds


class _Selector(selectors.DefaultSelector):
    """Never waits where a timer is set."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is not None:
            self._loop.advance(timeout)
            return ready
        if len(self.get_map()) == 1 and self._loop.has_no_threads():  # the one file is the event loop's own
            raise RuntimeError("every task waits for another one, and nothing is left that could wake them")
        return super().select()
