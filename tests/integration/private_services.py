"""Private services of a harness: the ones that scenarios break, and the guarded ones."""

import asyncio
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diator.testing.conformance import EnvironmentMissing
from tests.services import Backend, MissingService, Service, Services


class PrivateServices:
    """The containers of one harness: each is started when it is first asked for, and all are removed together."""

    def __init__(self):
        self._services = Services()
        self._running: dict[str, PrivateService] = {}

    def get(self, name: str, backend: str | Backend) -> "PrivateService":
        """Return the service called *name*; start it from *backend* if there is none. Blocks."""
        if name not in self._running:
            try:
                self._running[name] = PrivateService(self._services.private(backend))
            except MissingService as missing:
                raise EnvironmentMissing(str(missing)) from missing
        return self._running[name]

    def __getitem__(self, name: str) -> "PrivateService":
        return self._running[name]

    def close(self) -> None:
        for each in self._running.values():
            each.remove()
        self._running.clear()
        self._services.close()


class PrivateService:
    """A container that implements `Outages` and is repaired before the next scenario."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._runs = True
        self._paused = False
        self.url = service.url
        service.let_go()

    async def stop(self):
        await self._end(self._service.stop)

    async def kill(self):
        await self._end(self._service.kill)

    async def start(self):
        if not self._runs:
            await self._do(self._service.start)
            self._runs = True

    async def pause(self):
        if not self._paused:
            await self._do(self._service.pause)
            self._paused = True

    async def resume(self):
        if self._paused:
            await self._do(self._service.unpause)
            self._paused = False

    async def run(self, command: str) -> None:
        """Run *command* in the container."""
        await self._do(lambda: self._service.run(command))

    @asynccontextmanager
    async def breakable(self):
        """Let a scenario break it, and repair it afterwards."""
        try:
            yield self
        finally:
            await self.resume()
            await self.start()

    def remove(self):
        self._service.remove()
        self._service.let_go()

    async def _end(self, how):
        await self.resume()
        if self._runs:
            await self._do(how)
            self._runs = False

    async def _do(self, how):
        await asyncio.to_thread(how)
        self._service.let_go()  # a scenario leaves nothing open


class Certificates:
    """
    A certificate authority for one run and its certificates for 127.0.0.1, by file stems: `server` and `expired`.

    `ca.pem` is the authority's own certificate, `other.pem` that of another authority.
    """

    def __init__(self) -> None:
        self._directory = TemporaryDirectory(prefix="diator-certificates-")
        for authority in ("ca", "other"):
            _openssl(self.path, f"req -x509 {_KEY} -keyout {authority}.key -out {authority}.pem -subj /CN={authority}")
        for name, days in {"server": 2, "expired": -1}.items():
            names = "-addext subjectAltName=IP:127.0.0.1"
            _openssl(self.path, f"req -new {_KEY} -keyout {name}.key -out {name}.csr -subj /CN={name} {names}")
            signing = f"-CA ca.pem -CAkey ca.key -copy_extensions copy -days {days}"
            _openssl(self.path, f"x509 -req -in {name}.csr {signing} -out {name}.pem")

    @property
    def path(self) -> Path:
        return Path(self._directory.name)

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def close(self) -> None:
        self._directory.cleanup()


_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def _openssl(directory: Path, command: str) -> None:
    try:
        subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)
    except FileNotFoundError as error:
        raise EnvironmentMissing("there is no openssl command") from error
