"""The libraries, their versions, and their environments."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".benchmarks" / str(sys.implementation.cache_tag)


@dataclass(frozen=True, kw_only=True)
class Library:
    """
    A row of the table.

    Without *pins* it is measured as installed in the running environment. *targets* are the highest
    acceptable ratios, on Python 3.11.
    """

    name: str
    adapter: str
    worker: str = "worker"
    """The folder of the measuring program."""
    module: str = ""
    pins: tuple[str, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """Return the command that starts its worker."""
        worker = str(Path(__file__).parent / self.worker)
        # Isolated, so that it imports only the pinned libraries, whatever PYTHONPATH contains.
        return [self.python, *(["-I"] if self.pins else []), worker, self.adapter]

    @property
    def python(self) -> str:
        """Return the interpreter with the library installed; install it if necessary."""
        if not self.pins:
            return sys.executable
        folder = CACHE / self.adapter.partition(":")[0]
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        installed, wanted = folder / "pins.txt", "\n".join(self.pins)
        if not installed.exists() or installed.read_text() != wanted:
            print(f"installing {' '.join(self.pins)}", file=sys.stderr)
            venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
            pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, *self.pins], check=True)
            installed.write_text(wanted)
        return str(python)


MESSAGES = {"W7e": 0.40, "W7d": 0.55}
OWN_CONTAINER = {"W0": 2.0, "W1": 2.5, "W2": 2.4, "W3": 2.1, "W4": 2.0, "W5": 2.4, "W6": 1.2}
RODI = {"W0": 2.0, "W1": 6.0, "W2": 4.2, "W3": 3.3, "W4": 3.7, "W5": 4.0, "W6": 1.4}

PYTHON_CQRS = (
    "python-cqrs==5.3.0",
    "dataclass-wizard==0.39.1",
    "dependency-injector==4.49.1",
    "di[anyio]==0.79.2",
    "orjson==3.13.0",
)

LIBRARIES = {
    library.name: library
    for library in [
        Library(name="by hand", adapter="by_hand:workloads"),
        Library(
            name="diator",
            adapter="with_diator:own_container",
            module="diator.mediator",
            targets=OWN_CONTAINER | MESSAGES,
        ),
        Library(name="diator with own events", adapter="with_diator:own_events", targets=OWN_CONTAINER | MESSAGES),
        Library(name="diator without events", adapter="with_diator:no_events_declared"),
        Library(name="diator with rodi", adapter="with_diator:with_rodi", targets=RODI | MESSAGES),
        Library(name="kerux", adapter="with_kerux:workloads", module="kerux", pins=("kerux==0.1.1",)),
        Library(
            name="mediatr",
            adapter="with_mediatr:workloads",
            module="mediatr",
            pins=("mediatr==1.3.2",),
        ),
        Library(
            name="python-cqrs with di",
            adapter="with_python_cqrs:di",
            module="cqrs",
            pins=PYTHON_CQRS,
        ),
        Library(
            name="python-cqrs with dependency-injector",
            adapter="with_python_cqrs:dependency_injector",
            pins=PYTHON_CQRS,
        ),
        Library(
            name="diator 0.1.2 with rodi",
            adapter="with_diator_0_1_2:workloads",
            module="diator.mediator",
            pins=("diator==0.1.2", "orjson==3.13.0", "rodi==2.1.0"),
        ),
    ]
}


# -- transports -------------------------------------------------------------------------------------------------


def as_here(*names: str) -> tuple[str, ...]:
    """Pin the clients to the versions of the running environment, which the other libraries use too."""
    return tuple(f"{name}=={metadata.version(name)}" for name in names if _is_installed(name))


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


BROKER_LIBRARIES = {
    library.name: library
    for library in [
        Library(name="raw", adapter="raw", worker="transports"),
        Library(name="diator", adapter="with_diator", worker="transports"),
        Library(
            name="faststream",
            adapter="with_faststream",
            worker="transports",
            pins=(
                "faststream[redis,rabbit,kafka,otel]==0.7.8",
                *as_here("redis", "hiredis", "aio-pika", "aiormq", "aiokafka", "orjson", "opentelemetry-sdk"),
            ),
        ),
    ]
}
"""The plain clients and diator are measured as installed in the running environment."""

# -- outboxes ---------------------------------------------------------------------------------------------------

OUTBOX_LIBRARIES = {
    library.name: library
    for library in [
        Library(name="by hand", adapter="by_hand", worker="outboxes"),
        Library(name="diator", adapter="with_diator", worker="outboxes"),
        Library(
            name="txoutbox",
            adapter="with_txoutbox",
            worker="outboxes",
            pins=("txoutbox[postgres]==0.2.2", *as_here("asyncpg", "aio-pika", "aiormq")),
        ),
        Library(
            name="python-cqrs",
            adapter="with_python_cqrs",
            worker="outboxes",
            pins=("python-cqrs[sqlalchemy,rabbit,pydantic]==5.3.0", *as_here("asyncpg")),  # it needs SQLAlchemy 2.0
        ),
    ]
}
"""An outbox in PostgreSQL, with a relay to RabbitMQ."""
