"""Imports point down, and the core stands without any client library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diator

#: Top to bottom. A module may use what stands below it, never beside or above.
LAYERS = [
    "testing",
    "telemetry",
    "outbox",
    "mediator consumer",
    "_dispatcher _handling _running",
    "middlewares",
    "requests",
    "events",
    "_handlers",
    "container",
    "instruments",
    "context",
    "brokers",
    "retrying",
    "_options",
    "_deadlines _extras _hints _log _signals _text",
    "response exceptions",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
ROOT = Path(diator.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
#: A transport's folder or face, which nothing in the library imports but the faces below.
TRANSPORTS = {"brokers/kafka", "brokers/rabbitmq", "brokers/redis", "brokers/redis_streams.py", "brokers/memory.py"}
#: Each client library, and the folder of the one service, or the file, that imports it.
CLIENTS = {
    "aiokafka": "brokers/kafka/",
    "aio_pika": "brokers/rabbitmq/",
    "aiormq": "brokers/rabbitmq/",
    "pamqp": "brokers/rabbitmq/",
    "yarl": "brokers/rabbitmq/",
    "redis": "brokers/redis/",
    "rodi": "container/rodi.py",
    "dishka": "container/dishka.py",
    "opentelemetry": "telemetry/_opentelemetry.py",
    "prometheus_client": "telemetry/_prometheus.py",
    "sqlalchemy": "outbox/sqlalchemy/",
    "pydantic": None,
    "attr": None,
    "attrs": None,
}
#: A public module that shows what stands in another folder, and that folder.
FACES = {"brokers/redis_streams.py": "brokers/redis"}
#: Private modules that the two halves of the core share.
SHARED_MACHINERY = {"diator.events._emitter", "diator.events._event", "diator.events._headers"}
#: A program's older place for a name; it stands above everything.
MOVED = {"events/message_brokers/redis.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path):
    """Yield every module that *path* imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    """A module imports from its own part of the package or from a lower one."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports_of(path):
        if module.startswith("diator.") and name_of(path) not in MOVED:
            used = module.split(".")[1]
            assert used == part or DEPTH[used] > DEPTH[part], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_imported_for_types_only(path):
    """Such an import would hide a cycle."""
    assert "TYPE_CHECKING:" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_folder_of_a_service_imports_its_client_library(path):
    for module in imports_of(path):
        client = module.split(".")[0]
        if client in CLIENTS:
            folder = CLIENTS[client] or "nowhere"
            assert name_of(path).startswith(folder), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", sorted(ROOT.joinpath("brokers").rglob("*.py")), ids=name_of)
def test_a_transport_imports_nothing_of_another_transport(path):
    """Code for two transports stands in `diator/brokers/`, which imports no transport."""
    own = next((each for each in TRANSPORTS if name_of(path).startswith(each)), None)
    for module in imports_of(path):
        used = module.removeprefix("diator.").replace(".", "/")
        for transport in TRANSPORTS:
            if f"{used}/".startswith(f"{transport.removesuffix('.py')}/"):
                allowed = {own, FACES.get(name_of(path))}
                assert transport in allowed, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_private_module_is_imported_only_inside_its_folder(path):
    """`diator/a/_b.py` belongs to `diator/a/`; a face, and code below the same folder, may import it."""
    for module in imports_of(path):
        parts = module.split(".")
        private = next((index for index, part in enumerate(parts) if part.startswith("_")), None)
        if parts[0] != "diator" or private in (None, 1):
            continue
        folder = "/".join(parts[1:private])
        allowed = name_of(path).startswith(f"{folder}/") or FACES.get(name_of(path)) == folder
        assert allowed or module in SHARED_MACHINERY, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    "module",
    ["mediator", "events", "requests", "brokers", "brokers.memory", "brokers.codec", "container", "middlewares"],
)
def test_the_core_loads_no_client_library(module):
    program = f"import sys, diator.{module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"

    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT.parent
    )

    assert not CLIENTS.keys() & {*loaded.stdout.split()}
