"""Other libraries, other languages and older versions of diator, each in its own environment."""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import venv
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

PINS = {
    "older_diator": ["diator[redis]==0.1.2", "redis==8.1.0"],
    "faststream_peer": ["faststream[redis,rabbit,kafka]==0.7.8"],
    "traced_peer": [
        "faststream[rabbit,otel]==0.7.8",
        "opentelemetry-instrumentation-aio-pika==0.66b1",
        "opentelemetry-sdk==1.45.1",
    ],
}
#: What the peers in other languages need on the `PATH`.
TOOLCHAINS = {"node": "npm", "go": "go"}
PROGRAMS = Path(__file__).parent / "integration" / "peers"


class MissingToolchain(Exception):
    """A peer cannot be built; the text says why."""


def required() -> set[str]:
    """
    Return the languages that `DIATOR_REQUIRE_PEERS` requires: without their toolchains a run fails.

    Raises:
        ValueError: It names an unknown language.
    """
    names = set(os.environ.get("DIATOR_REQUIRE_PEERS", "").replace(",", " ").split())
    if unknown := names - TOOLCHAINS.keys():
        raise ValueError(f"DIATOR_REQUIRE_PEERS: {unknown} not among {set(TOOLCHAINS)}")
    return names


def command(peer: str, cache: Path) -> list[str]:
    """
    Return the command that runs *peer*; install in *cache* what it needs if that is not there yet.

    Raises:
        MissingToolchain: *peer* is a language, and its toolchain is not on the `PATH`.
    """
    if peer in TOOLCHAINS and not shutil.which(TOOLCHAINS[peer]):
        raise MissingToolchain(f"{TOOLCHAINS[peer]} is not on the PATH")
    install: Callable[[Path], list[str]] = {"node": _node, "go": _go}.get(peer, lambda cache: _python(peer, cache))
    with (cache / f"{peer}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes may need it at the same time
        return install(cache)


def _python(peer: str, cache: Path) -> list[str]:
    folder = cache / f"{peer}-{sys.implementation.cache_tag}"
    python, installed = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PINS[peer])
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS[peer]]
        subprocess.run(pip, check=True)
        installed.write_text(wanted)
    # Isolated, so that it imports its own libraries and none of ours.
    return [str(python), "-I", str(PROGRAMS / f"{peer}.py")]


def _node(cache: Path) -> list[str]:
    folder = cache / "node"  # Node.js looks for libraries beside the program
    shutil.copytree(PROGRAMS / "node", folder, dirs_exist_ok=True)
    installed, wanted = folder / "installed", (folder / "package-lock.json").read_text()
    if not installed.exists() or installed.read_text() != wanted:
        npm = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        subprocess.run(npm, cwd=folder, check=True, stdout=sys.stderr)
        installed.write_text(wanted)
    return ["node", str(folder / "peer.js")]


def _go(cache: Path) -> list[str]:
    # Without optimization it compiles in two thirds of the time, and without cgo it needs no C compiler.
    build = ["go", "build", "-mod=readonly", "-buildvcs=false", "-gcflags=all=-N -l", "-o", str(cache / "go-peer"), "."]
    subprocess.run(build, cwd=PROGRAMS / "go", env={**os.environ, "CGO_ENABLED": "0"}, check=True)
    return [str(cache / "go-peer")]


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[Process]:
    """Run a peer, and kill it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=2**24)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def finished(process: Process, given: str = "") -> None:
    """Write its input, and wait until it has finished."""
    await process.communicate(given.encode())
    assert process.returncode == 0


async def next_line(process: Process) -> list[str]:
    """Return the words of its next line."""
    async with asyncio.timeout(20):
        line = await process.stdout.readline()
    assert line, "it has ended"
    return line.decode().strip().split(maxsplit=1)


async def answer(process: Process, do: str, **options: Any) -> dict[str, Any]:
    """Return the answer of a peer in another language to a command."""
    process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, "it has ended; its last words are on the standard error"
    answered: dict[str, Any] = json.loads(line)
    return answered
