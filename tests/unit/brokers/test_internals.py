"""
Names of client libraries that no documentation promises: where diator may use them, and what happens if one is gone.

Each list is `INTERNALS` of the module that uses its names.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import diator
from diator._extras import require_internals, supported
from diator.exceptions import IncompatibleClient

ROOT = Path(diator.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
#: Each client library of whose internals diator makes use, and the modules that alone may do so.
GUARDED = {
    "redis": ["diator.brokers.redis._client"],
    "aiormq": ["diator.brokers.rabbitmq._client"],
    "aiokafka": [
        "diator.brokers.kafka._client",
        "diator.brokers.kafka._consumer",
        "diator.brokers.kafka._fetched",
    ],
    "rodi": ["diator.container.rodi"],
}
GUARDED_MODULES = [(client, module) for client, modules in GUARDED.items() for module in modules]
#: Clients whose range must have an end, though diator uses only public names of some.
BOUNDED = [*GUARDED, "aio-pika", "pamqp"]


def path_of(module):
    return ROOT.parent.joinpath(*module.split(".")).with_suffix(".py")


def internals_of(client, module):
    """Return the names with their modules. The import checks them, and its error has the name that is gone."""
    pytest.importorskip(client)
    listed = importlib.import_module(module).INTERNALS
    return [(where, name) for where, names in listed.items() for name in names]


# -- where they may be used --------------------------------------------------------------------------------------

#: Private names that diator's own modules use of each other.
OWN = {*PROJECT["tool"]["ruff"]["lint"]["flake8-self"]["extend-ignore-names"]}
#: The other modules that can have objects of a client library: tests/unit/test_layers.py checks that no more do.
UNGUARDED = sorted(
    {
        *(path for service in ("kafka", "rabbitmq", "redis") for path in (ROOT / "brokers" / service).glob("*.py")),
        ROOT / "container" / "dishka.py",
    }
    - {path_of(module) for _, module in GUARDED_MODULES}
)


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_uses(path):
    """Every private name that *path* takes from something else than `self` and `cls`, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            if not of_itself and not _is_super(node.value):
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        }:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield f"{node.func.id}(…, {name.value!r})", node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("diator"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((part, node.lineno) for part in parts if is_private(part))


def _is_super(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def defined_in(path):
    """Every private name that a class or function of *path* itself has."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


@pytest.mark.parametrize("path", UNGUARDED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_else_uses_a_private_name_of_a_client(path):
    """A new one goes behind a function of a guarded module, and into its list."""
    of_clients = {part for name in every_internal() for part in name.split(".")}
    own = (OWN | {*defined_in(path)}) - of_clients

    assert [f"line {line}: {name}" for name, line in private_uses(path) if name not in own] == []
    assert "SLF001" not in path.read_text()


def every_internal():
    """All names of all lists, as they are written: the client libraries need not be installed."""
    for _, module in GUARDED_MODULES:
        text = path_of(module).read_text().partition("\nINTERNALS = ")[2].partition("\nrequire_internals(")[0]
        yield from re.findall(r'"([\w.]+)"', text)


@pytest.mark.parametrize(("client", "module"), GUARDED_MODULES, ids=[module for _, module in GUARDED_MODULES])
def test_a_guarded_module_lists_the_private_names_that_it_uses_and_no_other(client, module):
    names = [name for _, name in internals_of(client, module)]

    used = {name for name, _ in private_uses(path_of(module))}

    assert used - OWN <= {part for name in names for part in name.split(".")}
    used_in_its_folder = {word for path in path_of(module).parent.glob("*.py") for word in words_of(path)}
    last = {name.rpartition(".")[2] for name in names}
    assert {name for name in last if not name.endswith("__")} <= used_in_its_folder


def words_of(path):
    """Every identifier in the code of *path*, which strings are not."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("attr", "id", "name"):
            yield getattr(node, field, None)


# -- if one is gone ----------------------------------------------------------------------------------------------


def remove(monkeypatch, where, name):
    """Take a name away from its library. For a class there is a stand-in, without the methods that assign it."""
    owner, _, attribute = name.partition(".")
    module = importlib.import_module(where)
    if not attribute:
        monkeypatch.delattr(module, owner)
        return
    members = {}
    for base in reversed(getattr(module, owner).__mro__):
        for key, member in vars(base).items():
            code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
            assigns = code is not None and attribute in code.co_names
            if not assigns and key not in {attribute, "__dict__", "__weakref__", "__slots__"}:
                members[key] = member
    monkeypatch.setattr(module, owner, type(owner, (), members))


@pytest.mark.parametrize(("client", "module"), GUARDED_MODULES, ids=[module for _, module in GUARDED_MODULES])
def test_each_name_is_missed_when_it_is_gone(client, module, monkeypatch):
    """An import of the transport runs this check, which names the library, its version, and the remedy."""
    for where, name in internals_of(client, module):
        require_internals(client, {where: [name]})
        with monkeypatch.context() as patch:
            remove(patch, where, name)
            with pytest.raises(IncompatibleClient, match=rf"^{client} [\d.]+ has no {where}\.{name}, ") as raised:
                require_internals(client, {where: [name]})
        assert (raised.value.version, raised.value.attribute) == (version(client), f"{where}.{name}")


@pytest.mark.parametrize(
    ("client", "module", "gone"),
    [
        ("redis", "diator.brokers.redis", "redis.asyncio.connection:AbstractConnection.should_reconnect"),
        ("redis", "diator.brokers.redis_streams", "redis.asyncio.connection:ConnectionPool.get_connection"),
        ("redis", "diator.events.message_brokers.redis", "redis.asyncio.connection:AbstractConnection.read_response"),
        ("aiormq", "diator.brokers.rabbitmq", "aiormq.connection:Connection.ready"),
        ("aiormq", "diator.brokers.rabbitmq", "aiormq.connection:TransportFactory"),
        ("pamqp", "diator.brokers.rabbitmq", "pamqp.header:ContentHeader"),
        ("aiokafka", "diator.brokers.kafka", "aiokafka.producer.sender:Sender._send_produce_req"),
        ("aiokafka", "diator.brokers.kafka", "aiokafka.consumer.fetcher:Fetcher._create_fetch_waiter"),
        ("aiokafka", "diator.brokers.kafka", "aiokafka.protocol.group:LeaveGroupRequest"),
        ("rodi", "diator.container.rodi", "rodi:Services.create_scope"),
        ("rodi", "diator.container.rodi", "rodi:InstanceResolver"),
    ],
)
def test_a_transport_whose_client_lacks_a_name_is_not_imported(client, module, gone):
    pytest.importorskip(client)
    where, _, name = gone.partition(":")
    program = f"import {where} as library; del library.{name}; import {module}"

    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT.parent)

    assert run.returncode == 1
    said = run.stderr.splitlines()[-1]
    assert said.startswith(f"diator.exceptions.IncompatibleClient: {client} {version(client)} has no {where}.{name}, ")
    assert f"pip install '{supported(client)}'" in said


def test_a_module_of_a_client_that_is_gone():
    pytest.importorskip("aiormq")
    program = "import sys, aiormq; sys.modules['aiormq.connection'] = None; import diator.brokers.rabbitmq"

    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT.parent)

    said = run.stderr.splitlines()[-1]
    assert said.startswith(
        f"diator.exceptions.IncompatibleClient: aiormq {version('aiormq')} has no aiormq.connection, "
    )


# -- how they are looked for -------------------------------------------------------------------------------------


class Base:
    annotated: int
    constant = 1

    def __init__(self) -> None:
        self.assigned = self.assigned_too = 0
        self.other = Base()
        self.other.elsewhere = 1

    def later(self) -> None:
        self.assigned_later = 1

    @property
    def computed(self) -> int:
        return self.loaded

    def promised(self): ...

    promised.__isabstractmethod__ = True


class Derived(Base):
    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    "name", ["constant", "assigned", "assigned_too", "assigned_later", "computed", "later", "slot", "other", "__init__"]
)
def test_a_name_that_a_class_has(name):
    require_internals("diator", {__name__: [f"Derived.{name}"]})


@pytest.mark.parametrize(
    "name", ["Derived.annotated", "Derived.loaded", "Derived.promised", "Derived.no", "Gone", "Gone.no"]
)
def test_a_name_that_a_class_has_not(name):
    """An annotation can be stale, an attribute that is read may be anybody's, and an abstract method does nothing."""
    with pytest.raises(IncompatibleClient, match=re.escape(name)):
        require_internals("diator", {__name__: [name]})


def test_a_module_that_is_gone():
    with pytest.raises(IncompatibleClient, match=r"diator \S+ has no diator\.gone\.Name"):
        require_internals("diator", {"diator.gone": ["Name"]})


def test_a_library_that_is_in_no_requirement_is_named_all_the_same():
    with pytest.raises(IncompatibleClient, match=r"^unheard-of of an unknown version has no .*'unheard-of'"):
        require_internals("unheard-of", {"unheard_of": ["Name"]})


# -- versions ----------------------------------------------------------------------------------------------------


def requirements():
    optional = PROJECT["project"]["optional-dependencies"]
    found = [Requirement(text) for texts in optional.values() for text in texts]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.parametrize("client", BOUNDED)
def test_a_client_whose_internals_are_used_has_a_ceiling(client):
    requirement = requirements()[client]

    assert [each.operator for each in requirement.specifier if each.operator in {"<", "<=", "==", "~="}] == ["<"]
    told = [Requirement(text) for text in requires("diator") if Requirement(text).name == client]
    assert [each.specifier for each in told] == [requirement.specifier], "pyproject.toml has changed: install it again"


@pytest.mark.parametrize("client", BOUNDED)
def test_the_installed_client_is_within_its_range(client):
    pytest.importorskip(client.replace("-", "_"))

    assert version(client) in requirements()[client].specifier
