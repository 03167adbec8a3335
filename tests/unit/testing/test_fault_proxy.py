"""Tests of the proxy that injects faults."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from diator.testing.fault_proxy import FaultProxy, Flow


@asynccontextmanager
async def echo():
    """Start a service that echoes its input, and a proxy in front of it."""

    async def answer(reader, writer):
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
        except ConnectionError:
            pass
        finally:
            writer.close()

    service = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with service, FaultProxy("127.0.0.1", service.sockets[0].getsockname()[1]) as proxy:
        yield proxy


@asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_cut_after_breaks_the_connection_once_after_the_given_bytes():
    async with echo() as proxy:
        proxy.cut_after(1000, Flow.TO_SERVER)
        async with connected(proxy) as (reader, writer):
            writer.write(b"x" * 600)
            assert await reader.readexactly(600)
            writer.write(b"x" * 600)
            with pytest.raises(ConnectionError):
                await reader.readexactly(600)
        assert proxy.passed[Flow.TO_SERVER] == 1000

        async with connected(proxy) as (reader, writer):
            writer.write(b"x" * 5000)
            assert await reader.readexactly(5000)


async def test_a_black_hole_counts_the_bytes_that_it_loses():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        proxy.black_hole(Flow.TO_CLIENT)
        writer.write(b"x" * 100)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)

        assert (proxy.passed[Flow.TO_SERVER], proxy.lost[Flow.TO_CLIENT]) == (100, 100)


async def test_delay_lasts_until_heal():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        time = asyncio.get_running_loop().time
        proxy.delay(0.05, 0.01)
        began = time()
        writer.write(b"x")
        await reader.readexactly(1)
        assert 0.08 <= time() - began <= 0.12  # once in each direction

        await proxy.heal()
        began = time()
        writer.write(b"x")
        await reader.readexactly(1)
        assert time() == began


async def test_black_hole_existing_affects_only_open_connections():
    async with echo() as proxy, connected(proxy) as (old_reader, old_writer), connected(proxy) as (_, idle):
        old_writer.write(b"x")
        await old_reader.readexactly(1)
        proxy.black_hole_existing()
        await proxy.heal()
        old_writer.write(b"x")
        idle.close()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(old_reader.read(1), 0.05)

        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"


async def test_reject_counts_the_connections_until_heal():
    async with echo() as proxy:
        proxy.reject()
        async with connected(proxy) as (reader, _):
            with pytest.raises(ConnectionError):
                await reader.read(1)
        assert (proxy.accepted, proxy.connections) == (1, 0)

        await proxy.heal()
        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
