"""Other libraries and older versions of diator, each in its own environment."""

import asyncio
import fcntl
import subprocess
import sys
import venv
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PINS = {
    "older_diator": ["diator[redis]==0.1.2", "redis==8.1.0"],
    "faststream_peer": ["faststream[redis,rabbit,kafka]==0.7.8"],
}
PROGRAMS = Path(__file__).parent / "integration" / "peers"


def interpreter(peer: str, cache: Path) -> Path:
    """Return the Python with *peer* installed; install it in *cache* if it is not there yet."""
    folder = cache / f"{peer}-{sys.implementation.cache_tag}"
    python, installed = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PINS[peer])
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes may need it at the same time
        if not installed.exists() or installed.read_text() != wanted:
            venv.create(folder, clear=True, with_pip=True)
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS[peer]]
            subprocess.run(command, check=True)
            installed.write_text(wanted)
    return python


@asynccontextmanager
async def running(python: Path, peer: str, *arguments: str) -> AsyncIterator[Process]:
    """Run the program of *peer*, and kill it at the end if it still runs."""
    # Isolated, so that it imports its own libraries and none of ours.
    process = await asyncio.create_subprocess_exec(
        python, "-I", PROGRAMS / f"{peer}.py", *arguments, stdin=PIPE, stdout=PIPE
    )
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
