"""Servers that a harness starts, and its certificates."""

import asyncio
import os
import shutil
import socket
import ssl
import sys
from pathlib import Path

import pytest

from diator.testing.conformance import EnvironmentMissing, Harness
from diator.testing.servers import Certificates, ServerProcess

pytestmark = pytest.mark.real_time

#: Answers each connection with what it has stored, and writes a farewell when it is stopped in an orderly way.
PROGRAM = """
import pathlib, signal, socket, sys
port, stored = int(sys.argv[1]), pathlib.Path(sys.argv[2])
def stop(*_):
    stored.write_text(stored.read_text() + "bye ")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
stored.write_text((stored.read_text() if stored.exists() else "") + "hello ")
server = socket.create_server(("127.0.0.1", port))
while True:
    client, _ = server.accept()
    client.sendall(stored.read_bytes())
    client.close()
"""
PATIENCE = 30.0


@pytest.fixture
def server(tmp_path):
    server = ServerProcess(sys.executable, "-c", PROGRAM, "{port}", str(tmp_path / "stored"), within=PATIENCE)
    yield server
    server.close()


async def answer(server, within=PATIENCE):
    async with asyncio.timeout(within):
        reader, writer = await asyncio.open_connection(*server.address)
        try:
            return (await reader.read()).decode()
        finally:
            writer.close()


async def test_a_server_keeps_its_address_and_data_when_it_is_stopped_or_killed_and_started(server):
    server.up()
    server.up()
    address = server.address
    await server.stop()
    await server.stop()
    with pytest.raises(ConnectionRefusedError):
        await answer(server)
    await server.start()
    await server.kill()
    await server.kill()
    with pytest.raises(ConnectionRefusedError):
        await answer(server)
    await server.start()

    assert server.address == address
    assert await answer(server) == "hello bye hello hello "


async def test_a_paused_server_accepts_and_does_not_answer(server):
    server.up()
    await server.pause()
    await server.pause()
    waiting = asyncio.create_task(answer(server))
    assert not (await asyncio.wait([waiting], timeout=0.2))[0]
    await server.resume()
    await server.resume()

    assert await waiting == "hello "


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_paused_server_can_be_ended(server, how):
    await server.start()
    await server.pause()
    await getattr(server, how)()
    await server.start()

    assert await answer(server) == ("hello bye hello " if how == "stop" else "hello hello ")


@pytest.mark.parametrize("fault", ["stop", "kill", "pause"])
async def test_a_scenario_may_leave_the_server_broken(server, fault):
    async with server.breakable() as broken:
        assert broken is server
        assert (await answer(server)).endswith("hello ")
        await getattr(server, fault)()
    assert (await answer(server)).endswith("hello ")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["a-program-that-is-not-there"], "cannot be started"),
        ([sys.executable, "-c", "print('no config'); raise SystemExit(3)"], "its last words: .*no config"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], "does not answer at port"),
    ],
)
def test_a_server_that_does_not_start_is_a_missing_environment(command, reason):
    server = ServerProcess(*command, within=0.5)
    with pytest.raises(EnvironmentMissing, match=reason):
        server.up()
    server.close()


def test_a_closed_server_is_gone(server):
    server.up()
    server.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(server.address, PATIENCE):
        pass


async def test_a_server_has_a_folder_of_its_own():
    files = {"stored": "port {port} in {folder} "}
    server = ServerProcess(sys.executable, "-c", PROGRAM, "{port}", "{folder}/stored", files=files, within=PATIENCE)
    server.up()
    said = await answer(server)
    folder = Path(said.split()[3])
    assert said == f"port {server.address[1]} in {folder} hello "
    await server.kill()
    await server.start()
    assert await answer(server) == f"{said}hello "
    server.close()
    assert not folder.exists()  # noqa: ASYNC240  # nothing else runs


async def test_child_processes_find_the_server_of_their_parent(monkeypatch):
    monkeypatch.delenv("TEST_SERVER_PORT", raising=False)
    command = (sys.executable, "-c", PROGRAM, "{port}", "{folder}/stored")
    server = ServerProcess(*command, shared="TEST_SERVER_PORT", within=PATIENCE)
    server.up()
    assert os.environ["TEST_SERVER_PORT"] == str(server.address[1])

    found = ServerProcess("there is no such program", shared="TEST_SERVER_PORT")
    found.up()
    assert found.address == server.address
    found.close()
    assert await answer(server) == "hello "  # a child ends nothing

    server.close()
    assert "TEST_SERVER_PORT" not in os.environ


async def test_a_harness_breaks_its_breakable_server(server):
    class Breaking(Harness):
        name = "breaking"

        def transport(self):
            raise AssertionError("not used")

    harness = Breaking()
    harness.service_address = harness.address = ("127.0.0.1", 1)
    with pytest.raises(NotImplementedError):
        await harness.private().__aenter__()
    harness.breakable = server
    async with harness.private() as service:
        assert (harness.service_address, harness.address) == (server.address, server.address)
        await service.kill()
    assert harness.address == ("127.0.0.1", 1)
    assert await answer(server) == "hello hello "  # it is repaired


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")
async def test_only_the_right_certificate_of_the_right_authority_is_trusted():
    certificates = Certificates()

    async def greet(_, writer):
        writer.write(b"hello")
        writer.close()

    async def greeted(certificate, authority, host="127.0.0.1"):
        serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving.load_cert_chain(certificates.path / f"{certificate}.pem", certificates.path / f"{certificate}.key")
        trusting = ssl.create_default_context(cafile=certificates.path / f"{authority}.pem")
        async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=serving) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=host)
            try:
                return await reader.read()
            finally:
                writer.close()

    assert await greeted("server", "ca") == b"hello"
    for wrong in (("server", "other"), ("expired", "ca"), ("server", "ca", "localhost")):
        with pytest.raises(ssl.SSLCertVerificationError):
            await greeted(*wrong)
    assert "BEGIN CERTIFICATE" in certificates.read("ca.pem")
    certificates.close()
    assert not certificates.path.exists()
