"""What runs until it is stopped, alone or beside the other work of a program: a consumer, or a relay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Self

from diator._signals import stopping_on_signals
from diator.exceptions import UsageError

#: How long `run` waits for cancelled tasks to end, in seconds.
CANCEL_TIMEOUT = 5.0


class Running:
    """
    Runs once: by `run`, or as a context manager beside other work.

    A subclass writes `_run`, which calls `_set_ready` when the work has begun, and may override `_shut_down`.

    Args:
        name: What it is, for texts, such as "consumer".
        readiness: What has happened when it is ready, such as "had subscribed".
        drain_timeout: How long `_run_tasks` waits after `stop`, in seconds.
    """

    def __init__(self, name: str, readiness: str, drain_timeout: float) -> None:
        self._name = name
        self._readiness = readiness
        self._drain_timeout = drain_timeout
        self._started = False
        self._was_stopped = self._was_signalled = False
        self._ready = asyncio.Event()
        self._is_ready = False
        self._failure: Exception | None = None
        self._running: asyncio.Task[None] | None = None
        self._body: asyncio.Task[Any] | None = None
        self._is_body_cancelled = False
        self._stopping = asyncio.Event()
        self._stopping_at_once = asyncio.Event()

    async def _run(self) -> None:
        """Work until `_stopping` is set."""
        raise NotImplementedError

    async def run(self, *, signals: bool = True) -> None:
        """Work until `stop` is called. With *signals*, SIGTERM and SIGINT stop it."""
        self._start()
        with stopping_on_signals(self._stop_on_signal) if signals else contextlib.nullcontext():
            await self._run_once()

    def _start(self) -> None:
        if self._started:
            name = self._name
            raise UsageError(f"this {name} was run before, and a {name} runs once; create another {name.title()}")
        self._started = True

    async def _run_once(self) -> None:
        try:
            await self._run()
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    def _set_ready(self) -> None:
        self._is_ready = True
        self._ready.set()

    async def ready(self) -> None:
        """
        Wait until the work has begun. Another task calls `run`; it need not have begun.

        Raises:
            Exception: The error of `run`, if it ended before that.
            UsageError: It was stopped, or `run` was cancelled, before that.
        """
        await self._ready.wait()
        if not self._is_ready:
            raise self._failure or UsageError(f"the {self._name} was stopped before it {self._readiness}")

    async def __aenter__(self) -> Self:
        self._start()
        running = self._running = asyncio.create_task(self._run_once(), name=f"diator: {self._name}")
        try:
            await self.ready()
        except BaseException:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)  # `ready` has raised its error
            raise
        self._body = asyncio.current_task()
        running.add_done_callback(self._cancel_body)
        return self

    async def __aexit__(self, *_: object) -> None:
        body, self._body = self._body, None
        self._shut_down()
        try:
            if self._running is not None:
                await self._running  # if this task is cancelled, that one is, too
        finally:
            if self._is_body_cancelled and body is not None:
                body.uncancel()

    def _cancel_body(self, running: asyncio.Task[None]) -> None:
        """End the block of `async with`: nobody works any more, and `__aexit__` raises the error."""
        if self._body is not None and not running.cancelled() and running.exception() is not None:
            self._is_body_cancelled = self._body.cancel()

    def stop(self) -> None:
        """Start a graceful shutdown. A second call ends it at once."""
        if self._was_stopped:
            self._stopping_at_once.set()
        self._was_stopped = True
        self._shut_down()

    def _stop_on_signal(self) -> None:
        # Apart from `stop`: a web server calls it in its own shutdown, because of the same signal.
        if self._was_signalled:
            self._stopping_at_once.set()
        self._was_signalled = True
        self._shut_down()

    def _shut_down(self) -> None:
        self._stopping.set()

    async def _until_drained(
        self, tasks: Collection[asyncio.Task[None]], drain: Callable[[], Awaitable[object]]
    ) -> None:
        """Wait until one of *tasks* ends. After `stop`, wait for *drain* instead, at most *drain_timeout*."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        at_once = asyncio.ensure_future(self._stopping_at_once.wait())
        helpers: list[asyncio.Future[Any]] = [stopping, at_once]
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                drained = asyncio.ensure_future(drain())
                helpers.append(drained)
                await asyncio.wait({at_once, drained}, timeout=self._drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in helpers:
                each.cancel()
