"""Servers and certificates for a harness: what scenarios stop, kill and pause, and what they reach by TLS."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic, sleep
from typing import IO, Self

from diator.testing._suite.environment import EnvironmentMissing

_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


class Server(ABC):
    """
    A server that scenarios may break: it implements `Outages`, and `breakable` repairs it after each scenario.

    A harness calls `up` and `down` outside of an event loop, such as in `Harness.prepare` and `Harness.stop`. A
    subclass says how the server is started, stopped and so on. Each of these methods returns when it has taken effect.
    """

    _runs = _is_paused = False

    def up(self) -> None:
        """
        Start the server with the data that it had, and wait until it answers.

        Raises:
            EnvironmentMissing: It cannot be started.
        """
        if not self._runs:
            self._start()
            self._runs = True

    def down(self, *, kill: bool = False) -> None:
        """Stop the server in an orderly way, or *kill* it."""
        self._set_paused(paused=False)
        if self._runs:
            (self._kill if kill else self._stop)()
            self._runs = False

    async def start(self) -> None:
        """See `Outages.start`."""
        await self._do(self.up)

    async def stop(self) -> None:
        """See `Outages.stop`."""
        await self._do(self.down)

    async def kill(self) -> None:
        """See `Outages.kill`."""
        await self._do(partial(self.down, kill=True))

    async def pause(self) -> None:
        """See `Outages.pause`."""
        await self._do(partial(self._set_paused, paused=True))

    async def resume(self) -> None:
        """See `Outages.resume`."""
        await self._do(partial(self._set_paused, paused=False))

    @asynccontextmanager
    async def breakable(self) -> AsyncGenerator[Self, None]:
        """Let a scenario break the server, and repair it afterwards: for `Harness.private`."""
        await self.start()
        try:
            yield self
        finally:
            await self.resume()
            await self.start()

    def _set_paused(self, *, paused: bool) -> None:
        if self._is_paused != paused and self._runs:
            (self._pause if paused else self._resume)()
            self._is_paused = paused

    async def _do(self, what: Callable[[], None]) -> None:
        await asyncio.to_thread(what)

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...

    @abstractmethod
    def _kill(self) -> None: ...

    @abstractmethod
    def _pause(self) -> None: ...

    @abstractmethod
    def _resume(self) -> None: ...


class ServerProcess(Server):
    """
    A server that runs as a process of this machine, on a loopback port of its own.

    Args:
        command: The program and its arguments. `{port}` in them is replaced by the port, and `{folder}` by a folder of
            the server's own, which `close` deletes.
        files: What is in this folder: names and texts, in which the same is replaced.
        shared: The name of a variable of the environment in which child processes find the server: their objects with
            the same *shared* are that server, and neither start nor stop it.
        within: How long the program may take to start or to stop, in seconds.

    Attributes:
        address: Its host and port. It answers when it accepts a connection there.
    """

    def __init__(
        self, *command: str, files: Mapping[str, str] | None = None, shared: str | None = None, within: float = 30.0
    ) -> None:
        self._shared = shared
        parents = os.environ.get(shared) if shared else None
        self._is_of_parent = parents is not None
        self.address: tuple[str, int] = ("127.0.0.1", int(parents) if parents else free_port())
        self._folder = TemporaryDirectory(prefix="diator-server-")
        self._command = [*map(self._filled, command)]
        for name, text in (files or {}).items():
            Path(self._folder.name, name).write_text(self._filled(text))
        self._within = within
        self._output: IO[bytes] = TemporaryFile()  # noqa: SIM115  # `close` closes it
        self._process: subprocess.Popen[bytes] | None = None

    def _filled(self, text: str) -> str:
        return text.replace("{port}", str(self.address[1])).replace("{folder}", self._folder.name)

    def up(self) -> None:
        """See `Server.up`."""
        if not self._is_of_parent:
            super().up()
            if self._shared:
                os.environ[self._shared] = str(self.address[1])

    def close(self) -> None:
        """Kill the server for good."""
        self.down(kill=True)
        self._output.close()
        self._folder.cleanup()
        if self._shared and not self._is_of_parent:
            os.environ.pop(self._shared, None)

    def _start(self) -> None:
        try:
            process = subprocess.Popen(self._command, stdout=self._output, stderr=subprocess.STDOUT)  # noqa: S603
        except OSError as error:
            raise EnvironmentMissing(f"{self._command[0]} cannot be started: {error}") from error
        self._process, until = process, monotonic() + self._within
        while process.poll() is None and monotonic() < until:
            with suppress(OSError), socket.create_connection(self.address, self._within):
                return
            sleep(0.02)
        self._kill()
        self._output.seek(0)
        last = self._output.read().decode(errors="replace").strip().splitlines()[-5:]
        raise EnvironmentMissing(
            f"{self._command[0]} does not answer at port {self.address[1]}; its last words: {last}"
        )

    def _stop(self) -> None:
        self._end(signal.SIGTERM)

    def _kill(self) -> None:
        self._end(signal.SIGKILL)

    def _pause(self) -> None:
        os.waitpid(self._signal(signal.SIGSTOP).pid, os.WUNTRACED)  # a busy machine stops its threads a little later

    def _resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        self._signal(how).wait(self._within)

    def _signal(self, number: signal.Signals) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it runs"  # noqa: S101
        self._process.send_signal(number)
        return self._process


class Certificates:
    """
    A certificate authority and its certificates for 127.0.0.1, as files: `server.pem` and `expired.pem`.

    Each has its key beside it, such as `server.key`. `ca.pem` is the authority's own certificate, which a client
    trusts; `other.pem` is that of another authority.

    Raises:
        EnvironmentMissing: There is no `openssl` command.
    """

    def __init__(self) -> None:
        self._directory = TemporaryDirectory(prefix="diator-certificates-")
        self.path: Path = Path(self._directory.name)
        for authority in ("ca", "other"):
            # Since Python 3.13, a client trusts no authority whose certificate does not say what its key is for.
            usage = "-addext keyUsage=critical,keyCertSign,cRLSign"
            files = f"-keyout {authority}.key -out {authority}.pem"
            self._openssl(f"req -x509 {_KEY} {files} -subj /CN={authority} {usage}")
        for name, days in {"server": 2, "expired": -1}.items():
            names = "-addext subjectAltName=IP:127.0.0.1"
            self._openssl(f"req -new {_KEY} -keyout {name}.key -out {name}.csr -subj /CN={name} {names}")
            signing = f"-CA ca.pem -CAkey ca.key -copy_extensions copy -days {days}"
            self._openssl(f"x509 -req -in {name}.csr {signing} -out {name}.pem")

    def read(self, name: str) -> str:
        """Return the text of the file *name*."""
        return (self.path / name).read_text()

    def close(self) -> None:
        """Delete the files."""
        self._directory.cleanup()

    def _openssl(self, command: str) -> None:
        try:
            subprocess.run(["openssl", *command.split()], cwd=self.path, check=True, capture_output=True)  # noqa: S603, S607
        except FileNotFoundError as error:
            raise EnvironmentMissing("there is no openssl command") from error


def free_port() -> int:
    """
    Return a free port of 127.0.0.1, outside of the range from which the system takes the ports of connections.

    Otherwise a connection could get the port of a server that is stopped for a moment.
    """
    for port in random.sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise EnvironmentMissing("no free port between 20000 and 32767")
