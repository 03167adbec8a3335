"""The services: by their address, otherwise in containers on the host's network, bound to loopback."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

from tests.services import BACKENDS, Backend, wait_for

STARTING = 120
"""Seconds until a new container must respond."""


@contextmanager
def running(name: str) -> Generator[str, None, None]:
    """
    Return the address of a service: the one in the environment, otherwise that of a container for this run.

    The in-memory broker has none.

    The container uses the host's network, since a published port would halve the rate of round trips.
    """
    if name == "memory":
        yield ""
        return
    backend = BACKENDS[name]
    if address := os.environ.get(backend.variable):
        yield address
        return
    port = _free_port()
    address = backend.url.format(port=port)
    environment, command = _SETTINGS[name](backend, port)
    print(f"starting {backend.image}", file=sys.stderr)
    variables = [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]
    started = subprocess.run(
        ["docker", "run", "--detach", "--rm", "--network", "host", *variables, backend.image, *command],
        check=True,
        capture_output=True,
        text=True,
    )
    container = started.stdout.strip()
    try:
        logging.disable(logging.ERROR)  # the clients log each failed attempt
        try:
            wait_for(backend, address, within=STARTING)
        finally:
            logging.disable(logging.NOTSET)
        yield address
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", container], check=True, capture_output=True)


def _redis(backend: Backend, port: int) -> tuple[dict[str, str], list[str]]:
    return {}, [*str(backend.command).split(), "--bind", "127.0.0.1", "--port", str(port)]


def _rabbitmq(_: Backend, port: int) -> tuple[dict[str, str], list[str]]:
    environment = {
        "RABBITMQ_NODENAME": f"benchmark{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(_free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": "/tmp/no-plugins",  # their ports may be in use
    }
    return environment, []


def _kafka(backend: Backend, port: int) -> tuple[dict[str, str], list[str]]:
    controller, behind = _free_port(), _free_port()
    ports = {"port": port, "behind": behind, "proxied": behind}  # no client is behind a proxy here
    environment = {
        **{key: value.format(**ports) for key, value in backend.environment.items()},
        "KAFKA_LISTENERS": f"PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{behind},CONTROLLER://127.0.0.1:{controller}",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@127.0.0.1:{controller}",
    }
    return environment, []


def _postgres(backend: Backend, port: int) -> tuple[dict[str, str], list[str]]:
    return dict(backend.environment), ["postgres", "-c", "listen_addresses=127.0.0.1", "-c", f"port={port}"]


_SETTINGS = {"redis": _redis, "rabbitmq": _rabbitmq, "kafka": _kafka, "postgres": _postgres}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
