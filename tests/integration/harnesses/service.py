"""The base of the harnesses of services: private containers, one to break and two with TLS and users."""

import bz2
import gzip
import json
import os
import ssl
import zlib
from abc import abstractmethod
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from diator.testing.conformance import Harness
from diator.testing.servers import Certificates
from tests.integration.private_services import PrivateServices

#: How many times as long as on a machine of its own a run may take. The suite multiplies its deadlines by it itself.
SCALE = float(os.environ.get("DIATOR_CONFORMANCE_SCALE", "1"))


class ServiceHarness(Harness):
    """
    A harness of a service.

    Attributes:
        url: The address that transports connect to.
        direct: The address of the same service without a proxy.
        backend: The name of the service in `tests.services`.
        breaking: The facilities that need a service which may be broken.
    """

    backend: str
    breaking = frozenset({"outages", "alarm"})

    def __init__(self):
        self.services = PrivateServices()
        self.certificates = None

    def stop(self):
        self.services.close()
        if self.certificates:
            self.certificates.close()

    def prepare(self, facility):
        if facility in self.breaking:
            self.services.get("breakable", self.backend)
        if facility == "security":
            self.certificates = self.certificates or Certificates()
            for certificate in ("server", "expired"):
                self.services.get(certificate, self.guarded_service(certificate))

    @abstractmethod
    def guarded_service(self, certificate):
        """Return a container with *certificate* that accepts only TLS and has three users."""

    def guarded(self, access):
        service = self.services["expired" if access == "expired" else "server"]
        port = urlsplit(service.url if "//" in service.url else f"//{service.url}").port
        host = "localhost" if access == "wrong host" else "127.0.0.1"
        authority = self.certificates.path / ("other.pem" if access == "unknown authority" else "ca.pem")
        entrance = Entrance(
            address=f"{host}:{port}",
            user=access.replace(" ", "-") if access.startswith("may not") else "granted",
            password="wrong" if access == "wrong password" else self.password,
            authority=None if access == "plain" else authority,
        )
        return self.entering(entrance)

    @abstractmethod
    def connecting_to(self, url):
        """Return a transport that connects to *url*."""

    @abstractmethod
    def entering(self, entrance):
        """Return a transport that connects with the address and credentials of *entrance*."""

    def transport(self):
        return self.connecting_to(self.url)

    @asynccontextmanager
    async def private(self):
        async with self.services["breakable"].breakable() as service:
            with self._at(service.url, service.url):
                yield service

    @contextmanager
    def _at(self, url, direct):
        before = self.url, self.direct
        self.url, self.direct = url, direct
        try:
            yield
        finally:
            self.url, self.direct = before


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """
    The address of a guarded service, with credentials.

    Attributes:
        address: The host and port.
        user: The name of the user.
        password: The password of the user.
        authority: The certificates to trust; None for a connection without TLS.
    """

    address: str
    user: str
    password: str
    authority: Path | None

    @property
    def ssl_context(self):
        return self.authority and ssl.create_default_context(cafile=self.authority)


def foreign_bodies(kind, body, limit):
    """Return what another program can store where a message has only a body."""
    if kind == "large":
        return [b" " * (limit + 1), body + b" " * limit]
    if kind == "compressed":
        return [gzip.compress(body), zlib.compress(body), bz2.compress(body), gzip.compress(bytes(10_000_000))]
    headers = {
        "metadata": ["text", [1], {"a": 1}, {"a": {"b": [None]}}, {"\udcff": "\udcff"}, {"key": ["k"]}],
        "headers": [None, {}, {"": "", "\0": "\n"}, {"key": "", "x" * 1_000: "y" * 10_000}, {"diator-dlq-reason": "r"}],
        "counters": [{name: "999"} for name in ("attempt", "attempts", "diator-attempt", "x-delivery-count")],
        "due times": [{"diator-due": due} for due in ("9" * 400, "-1", "nan", "soon", "1e400")],
    }[kind]
    return [json.dumps({**json.loads(body), "headers": each}).encode() for each in headers]
