"""Private services of a harness: the ones that scenarios break, and the guarded ones."""

import asyncio

from diator.testing.conformance import EnvironmentMissing
from diator.testing.servers import Server
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


class PrivateService(Server):
    """A container that runs already."""

    _runs = True

    def __init__(self, service: Service) -> None:
        self._service = service
        self.url = service.url
        service.let_go()

    async def run(self, command: str) -> None:
        """Run *command* in the container."""
        await self._do(lambda: self._service.run(command))

    def remove(self):
        self._service.remove()
        self._service.let_go()

    def _start(self):
        self._service.start()

    def _stop(self):
        self._service.stop()

    def _kill(self):
        self._service.kill()

    def _pause(self):
        self._service.pause()

    def _resume(self):
        self._service.unpause()

    async def _do(self, what):
        await asyncio.to_thread(what)
        self._service.let_go()  # a scenario leaves nothing open
