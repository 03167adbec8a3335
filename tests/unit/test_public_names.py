"""The names that can be imported, and the error if an extra is missing."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diator

ROOT = Path(diator.__file__).parent
PUBLIC = sorted(
    ".".join(["diator", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if not any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(ROOT).parts)
)
CLIENTS = {
    "redis": "redis",
    "rabbitmq": "aiormq",
    "kafka": "aiokafka",
    "rodi": "rodi",
    "dishka": "dishka",
    "sqlalchemy": "sqlalchemy",
}
OPTIONAL = {name: extra for name in PUBLIC for extra in CLIENTS if extra in name.rsplit(".", 1)[-1].split("_")}


#: The instruments, each with its extra and what it imports: their module can be imported without.
INSTRUMENTS = {"OpenTelemetry": ("opentelemetry", "opentelemetry"), "Prometheus": ("prometheus", "prometheus_client")}


def imported(name):
    """Return the module *name*. Skip the test if its client library is not installed."""
    if name in OPTIONAL:
        pytest.importorskip(CLIENTS[OPTIONAL[name]])
    if name == "diator.telemetry":
        for _, library in INSTRUMENTS.values():
            pytest.importorskip(library)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_all_names_of_a_module_are_listed(name):
    """`__all__` is sorted, names what exists, and misses nothing that the module defines."""
    module = imported(name)
    if not hasattr(module, "__all__"):
        return

    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and getattr(value, "__module__", None) == name
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert [*module.__all__] == sorted(module.__all__)
    assert {*module.__all__} <= vars(module).keys()
    assert defined <= {*module.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_package_lists_its_names(name):
    module = imported(name)

    reexports = [
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__.startswith("diator.") and not key.startswith("_")
    ]
    if hasattr(module, "__path__") and reexports:
        assert {*module.__all__} >= {*reexports}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_module_has_a_docstring(name):
    assert inspect.getdoc(imported(name))


def test_there_is_a_version():
    assert diator.__version__


#: Every public name of diator 0.0.3, in every place, except those of the README's table.
SEED = """
diator.container.protocol: Container
diator.container.rodi: RodiContainer
diator.events: DomainEvent Event EventEmitter EventHandler EventMap NotificationEvent ECSTEvent
diator.events.event: DomainEvent Event NotificationEvent ECSTEvent
diator.events.event_emitter: EventEmitter
diator.events.event_handler: EventHandler
diator.events.map: EventMap
diator.events.message_brokers.protocol: Message MessageBroker
diator.events.message_brokers.redis: Message RedisMessageBroker
diator.mediator: Mediator
diator.middlewares: BaseMiddleware Middleware
diator.middlewares.base: BaseMiddleware Middleware
diator.requests: Request RequestHandler RequestMap
diator.requests.map: RequestHandlerDoesNotExist RequestMap
diator.requests.request: Request
diator.requests.request_handler: RequestHandler
diator.response: Response
"""


@pytest.mark.parametrize("line", SEED.split("\n")[1:-1])
def test_the_names_of_the_older_diator_still_exist(line):
    module, names = line.split(":")

    offered = imported(module)

    assert all(inspect.isclass(getattr(offered, name)) for name in names.split())


@pytest.mark.parametrize(
    ("older", "newer", "name"),
    [
        ("diator.events.message_brokers.redis", "diator.brokers.redis", "RedisMessageBroker"),
        ("diator.events.message_brokers.redis", "diator.brokers", "Message"),
        ("diator.events.message_brokers.protocol", "diator.brokers", "Message"),
        ("diator.events.event", "diator.events", "NotificationEvent"),
        ("diator.requests.map", "diator.requests", "RequestMap"),
    ],
)
def test_an_older_place_has_the_same_class(older, newer, name):
    assert getattr(imported(older), name) is getattr(imported(newer), name)


def without(library, program):
    """Run *program* where *library* cannot be imported, and return the last line of its errors."""
    program = f"import sys; sys.modules[{library!r}] = None; {program}"
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 1
    return run.stderr.splitlines()[-1]


@pytest.mark.parametrize(("name", "extra"), OPTIONAL.items(), ids=OPTIONAL)
def test_a_missing_extra_names_the_command_that_installs_it(name, extra):
    error = without(CLIENTS[extra], f"import {name}")
    assert error.startswith("diator.exceptions.MissingExtra: diator.")
    assert error.endswith(f"needs an extra that is not installed: pip install 'diator[{extra}]'")


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_missing_extra_of_an_instrument_is_named_when_it_is_used(name):
    extra, library = INSTRUMENTS[name]
    error = without(library, f"import diator.telemetry; from diator.telemetry import {name}")
    assert error.startswith(f"diator.exceptions.MissingExtra: diator.telemetry.{name} ")
    assert error.endswith(f"pip install 'diator[{extra}]'")
