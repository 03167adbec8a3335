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
    "mediator consumer",
    "_dispatcher _handling",
    "middlewares",
    "requests",
    "events",
    "_handlers",
    "brokers container",
    "_deadlines _hints retrying",
    "response exceptions",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
ROOT = Path(diator.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
#: Each client library, and the one file that imports it. A transport's helper may share its library.
CLIENTS = {
    "redis": {"brokers/redis.py", "brokers/redis_streams.py", "brokers/_redis_client.py"},
    "aiormq": {"brokers/_rabbitmq_channel.py"},
    "pamqp": {"brokers/_rabbitmq_channel.py"},
    "aio_pika": set(),
    "aiokafka": {
        "brokers/_kafka_batch.py",
        "brokers/_kafka_client.py",
        "brokers/_kafka_connection.py",
        "brokers/_kafka_findings.py",
        "brokers/_kafka_member.py",
        "brokers/_kafka_sending.py",
        "brokers/_kafka_subscription.py",
    },
    "rodi": {"container/rodi.py"},
    "dishka": {"container/dishka.py"},
    "pydantic": set(),
    "attr": set(),
    "attrs": set(),
}
#: A program's older place for a name; it stands above everything.
MOVED = {"events/message_brokers/redis.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path):
    """Every module that *path* imports, wherever in the file."""
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
    """Such an import is a sign of a cycle in the ideas."""
    assert "TYPE_CHECKING:" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_client_library_is_imported_where_it_belongs(path):
    for module in imports_of(path):
        assert name_of(path) in CLIENTS.get(module.split(".")[0], {name_of(path)})


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
