"""
The services of the integration tests: found by their address in the environment, otherwise started in containers.

``python tests/services.py redis postgres -- COMMAND`` runs a command with their addresses in its environment.
"""

import asyncio
import fcntl
import gc
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from uuid import uuid4

# testcontainers reads these variables when it is imported. Its own reaper is an image that would have to be pulled;
# `_REAPER` below does the same work. Addresses are loopback ones even if the tests run in a container.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
os.environ.setdefault("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")

#: Seconds until a new container must respond (a cold JVM on a busy laptop), and until a given address must.
STARTING, ANSWERING = 90, 10

#: The label of the containers. Its value names the run, so that closing one `Services` removes no others.
_LABEL = "diator-tests"
#: Removes the containers with that label as soon as the process closes the pipe, even if the process was killed.
_REAPER = """
import sys
sys.stdin.read()
import docker
try:
    engine = docker.from_env()
except docker.errors.DockerException:
    sys.exit()  # without an engine no container was started
while containers := engine.containers.list(all=True, filters={"label": sys.argv[1]}, ignore_removed=True):
    for container in containers:
        try:
            container.remove(force=True, v=True)
        except docker.errors.APIError:
            pass  # somebody else is removing it
"""


class MissingService(Exception):
    """A service is not available; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A service: the variable of its address, its container, and the probe that shows that it responds."""

    name: str
    variable: str
    image: str
    url: str
    port: int | None = None  # inside the container; None: the same as outside
    command: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    frugal: Mapping[str, str] = field(default_factory=dict)  # environment with which it starts fast and runs slower
    probe: Callable[[str], Awaitable[object]]


async def _probe_redis(url: str) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as client:
        await client.ping()


async def _probe_rabbitmq(url: str) -> None:
    import aio_pika

    async with await aio_pika.connect(url):
        pass


async def _probe_kafka(servers: str) -> None:
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    try:
        await admin.start()
        await admin.describe_cluster()
    finally:
        await admin.close()


async def _probe_postgres(url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        await connection.execute("select 1")
    finally:
        await connection.close()


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="redis",
            variable="DIATOR_TEST_REDIS_URL",
            image=os.environ.get("DIATOR_REDIS_IMAGE", "redis:8"),
            url="redis://127.0.0.1:{port}/0",
            port=6379,
            # Confirmed writes survive a kill: Redis writes the log before it replies.
            command="redis-server --save '' --appendonly yes",
            probe=_probe_redis,
        ),
        Backend(
            name="rabbitmq",
            variable="DIATOR_TEST_RABBITMQ_URL",
            image=os.environ.get("DIATOR_RABBITMQ_IMAGE", "rabbitmq:4-management"),
            url="amqp://guest:guest@127.0.0.1:{port}/",
            port=5672,
            probe=_probe_rabbitmq,
        ),
        Backend(
            name="kafka",
            variable="DIATOR_TEST_KAFKA_SERVERS",
            image=os.environ.get("DIATOR_KAFKA_IMAGE", "apache/kafka:4.3.1"),
            # Kafka redirects clients to the advertised address, so the port is the same inside and outside.
            url="127.0.0.1:{port}",
            # All settings, since the public image drops its defaults once one of them is given.
            environment={
                "KAFKA_NODE_ID": "1",
                "KAFKA_PROCESS_ROLES": "broker,controller",
                # A proxy must listen at the advertised address: clients of `behind` are redirected to `proxied`.
                "KAFKA_LISTENERS": "PLAINTEXT://:{port},PROXIED://:{behind},CONTROLLER://:9093",
                "KAFKA_ADVERTISED_LISTENERS": "PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{proxied}",
                "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT",
                "KAFKA_INTER_BROKER_LISTENER_NAME": "PLAINTEXT",
                "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
                "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
                "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
                "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
                "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
                "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR": "1",
                "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR": "1",
                "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            },
            # It takes half of the processor time to start, and a Kafka of the tests lives for minutes.
            frugal={
                "KAFKA_JVM_PERFORMANCE_OPTS": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
                "KAFKA_HEAP_OPTS": "-Xms128m -Xmx512m",
            },
            probe=_probe_kafka,
        ),
        Backend(
            name="postgres",
            variable="DIATOR_TEST_POSTGRES_URL",
            image=os.environ.get("DIATOR_POSTGRES_IMAGE", "postgres:17"),
            url="postgresql://postgres:postgres@127.0.0.1:{port}/postgres",
            port=5432,
            environment={"POSTGRES_PASSWORD": "postgres"},
            probe=_probe_postgres,
        ),
    )
}


class Service:
    """
    A service in its own container, on a loopback port that never changes.

    If the service redirects clients to an advertised address, as Kafka does, the port `behind` advertises the port
    `proxied`, at which a test may start a proxy.

    Each method blocks until it has taken effect, so a coroutine calls it with ``asyncio.to_thread``.
    """

    def __init__(self, backend: Backend, label: str) -> None:
        from docker.errors import APIError
        from testcontainers.core.container import DockerContainer

        port, self.behind, self.proxied = _free_port(), _free_port(), _free_port()
        self.url = backend.url.format(port=port)
        self._backend = backend
        ports = {"port": port, "behind": self.behind, "proxied": self.proxied}
        container = DockerContainer(backend.image).with_kwargs(labels={_LABEL: label})
        container.ports = {str(backend.port or port): ("127.0.0.1", port)}
        if any("{behind}" in value for value in backend.environment.values()):
            container.ports[str(self.behind)] = ("127.0.0.1", self.behind)
        environment = {name: value.format(**ports) for name, value in backend.environment.items()}
        container.with_envs(**environment, **backend.frugal)
        if backend.command:
            container.with_command(backend.command)
        try:
            self._container = container.start().get_wrapped_container()
        except APIError as error:
            raise MissingService(f"no container of {backend.image}: {error.explanation}") from error
        self._wait()

    def start(self) -> None:
        """Restart the service with its data, and wait until it responds."""
        self._container.start()
        self._wait()

    def stop(self) -> None:
        """Stop the service gracefully."""
        self._container.stop()

    def kill(self) -> None:
        """Kill the service, as a power cut would."""
        self._container.kill()
        self._container.wait()

    def pause(self) -> None:
        """Freeze the service: its connections stay open, and it does not respond."""
        self._container.pause()

    def unpause(self) -> None:
        """Resume a frozen service."""
        self._container.unpause()

    def run(self, command: str) -> None:
        """Run *command* in the container, and raise `RuntimeError` if it fails."""
        code, output = self._container.exec_run(command)
        if code:
            raise RuntimeError(f"{command}: {output.decode(errors='replace')}")

    def let_go(self) -> None:
        """Close the connection to the container engine; the next call opens it again."""
        self._container.client.close()

    def remove(self) -> None:
        """Remove the container and its data, in any state."""
        self._container.remove(force=True, v=True)

    def _wait(self) -> None:
        try:
            wait_for(self._backend, self.url, within=STARTING)
        except TimeoutError as error:
            last_words = self._container.logs(tail=5).decode(errors="replace")
            raise MissingService(f"{error}; its last words: {last_words!r}") from error


class Services:
    """
    The services of one test run: each is looked for once, when a test first asks for it.

    A run of several processes has one set of services. The process that controls the run calls `share`, the others
    make theirs with `Services(shared=…)`: whichever process needs a service first looks for it, and writes what it
    found into a folder. All containers live until the controlling process calls `close`, or dies.
    """

    def __init__(self, *, shared: Mapping[str, str] | None = None) -> None:
        self._locks = {name: Lock() for name in BACKENDS}
        self._urls: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._preparing = Lock()
        self._label = shared["label"] if shared else uuid4().hex
        self._folder = Path(shared["folder"]) if shared else None
        self._is_borrowed = shared is not None
        self._engine: bool | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    def share(self) -> dict[str, str]:
        """Return what other processes need to use the same services."""
        if self._folder is None:
            self._folder = Path(mkdtemp(prefix="diator-services-"))
            self._reaper = self._reaper or _reaper(self._label)
        return {"label": self._label, "folder": str(self._folder)}

    def url(self, name: str) -> str:
        """
        Return the address of a service that answers.

        Raises:
            MissingService: There is none, and why.
        """
        with self._locks[name]:
            if name not in self._urls and name not in self._missing:
                with self._found_by_any_process(name):
                    if name not in self._urls and name not in self._missing:
                        self._find(BACKENDS[name])
        if name in self._missing:
            raise MissingService(self._missing[name])
        return self._urls[name]

    def look_for(self, names: Iterable[str]) -> None:
        """Look for several services at the same time. `url` raises for the missing ones."""
        with ThreadPoolExecutor() as threads:
            for found in [threads.submit(self.url, name) for name in names]:
                with suppress(MissingService):
                    found.result()

    def private(self, backend: str | Backend) -> Service:
        """
        Start a service for one test, which may break it. *backend* is a name in `BACKENDS`, or a backend.

        Raises:
            MissingService: No container can be started.
        """
        self._prepare()
        return Service(BACKENDS[backend] if isinstance(backend, str) else backend, self._label)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the *names* that were looked for and not found."""
        return [name for name in names if name in self._missing]

    def summary(self) -> str:
        """Return one line: the services that took part, the missing ones with the reason, and the unused ones."""
        for name in BACKENDS:
            self._read(name)
        took_part = [f"{name} ({source})" for name, source in sorted(self._sources.items())]
        missing = [f"{name} ({reason})" for name, reason in sorted(self._missing.items())]
        unasked = sorted(BACKENDS.keys() - self._urls.keys() - self._missing.keys())
        parts = {"took part": took_part or ["none"], "missing": missing, "not asked for": unasked}
        said = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        return "services: " + "; ".join(said)

    def close(self) -> None:
        """Remove all containers of this run."""
        for name in BACKENDS:
            self._read(name)
        if self._reaper:
            self._reaper.communicate()
        if self._folder and not self._is_borrowed:
            shutil.rmtree(self._folder)
            self._folder = None

    @contextmanager
    def _found_by_any_process(self, name: str) -> Iterator[None]:
        """Let one process at a time look for a service, and share the result with the other processes."""
        if self._folder is None:
            yield
            return
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read(name)
            yield
            found = {"url": self._urls.get(name), "source": self._sources.get(name), "missing": self._missing.get(name)}
            self._note(name).write_text(json.dumps(found))

    def _read(self, name: str) -> None:
        """Read the result of another process of this run."""
        if self._folder is None or not self._note(name).exists():
            return
        found = json.loads(self._note(name).read_text())
        if found["missing"] is not None:
            self._missing[name] = found["missing"]
        else:
            self._urls[name], self._sources[name] = found["url"], found["source"]

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _find(self, backend: Backend) -> None:
        try:
            if url := os.environ.get(backend.variable):
                wait_for(backend, url, within=ANSWERING)
                source = backend.variable
            else:
                url, source = self.private(backend.name).url, f"container {backend.image}"
        except (MissingService, TimeoutError, ImportError) as error:
            self._missing[backend.name] = str(error)
        else:
            self._urls[backend.name], self._sources[backend.name] = url, source

    def _prepare(self) -> None:
        """Check once that a container engine responds, and that the containers will be removed at the end."""
        with self._preparing:
            if self._engine is None:
                self._engine = _engine_answers()
            if not self._engine:
                raise MissingService("no container engine answers")
            if not self._is_borrowed:  # otherwise the run's reaper removes them
                self._reaper = self._reaper or _reaper(self._label)


def required() -> set[str]:
    """
    Return the services that `DIATOR_REQUIRE_BACKENDS` requires: without them a run fails.

    Raises:
        ValueError: It names an unknown service.
    """
    names = set(os.environ.get("DIATOR_REQUIRE_BACKENDS", "").replace(",", " ").split())
    if unknown := names - BACKENDS.keys():
        raise ValueError(f"DIATOR_REQUIRE_BACKENDS: {unknown} not among {set(BACKENDS)}")
    return names


def _engine_answers() -> bool:
    import docker

    try:
        docker.from_env().close()
    except docker.errors.DockerException:
        answers = False
    else:
        answers = True
    # The client leaves its socket open if no engine responds. That warning must not fail a test.
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()
    return answers


def _reaper(label: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _REAPER, f"{_LABEL}={label}"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # so that an interrupt from the keyboard does not end it
    )


def wait_for(backend: Backend, url: str, *, within: float) -> None:
    """Wait until the service responds in its own protocol. Errors do not contain the password of *url*."""

    async def ask() -> None:
        refusal: BaseException | None = None
        try:
            async with asyncio.timeout(within):
                while True:
                    try:
                        async with asyncio.timeout(5):
                            return await backend.probe(url)
                    except ImportError:
                        raise
                    except Exception as error:  # each client has its own errors
                        refusal = error
                    await asyncio.sleep(0.1)
        except TimeoutError:
            reason = type(refusal).__name__
            raise TimeoutError(f"no answer within {within} s, {reason}") from refusal

    # In its own thread, so that the caller may be in a running event loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, ask()).result()


def _free_port() -> int:
    """
    Return a free port outside of the ephemeral range.

    Otherwise the system could assign the port of a container that is stopped for a moment to another connection.
    """
    for port in random.sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise MissingService("no free port between 20000 and 32767")


def main(arguments: list[str]) -> int:
    """Run a command with the addresses of the available services in its environment; required ones must be there."""
    names, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    services, found = Services(), {}
    try:
        for name in names:
            try:
                found[BACKENDS[name].variable] = services.url(name)
            except MissingService:
                if name in required():
                    raise
        return subprocess.run(command, env={**os.environ, **found}, check=False).returncode
    finally:
        services.close()
        sys.stdout.write(f"{services.summary()}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
