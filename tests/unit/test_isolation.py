"""Tests use their own names on a shared server, and a private server for commands that affect all of it."""

import ast
import re
from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parents[1] / "integration"
MODULES = sorted(INTEGRATION.rglob("*.py"))
#: Commands that configure, empty or stop a whole server, or close connections of others.
FOR_A_WHOLE_SERVER = re.compile(
    r"\bflush_?(all|db)\b|\bswapdb\b|config_(set|resetstat|rewrite)\b|config['\"], ['\"](set|resetstat|rewrite)"
    r"|(script|function)_?['\", ]*(flush|kill)\b|client_pause\b|client_kill\(|client_kill_filter\((?!_id=)"
    r"|\.(shutdown|failover|replicaof|slaveof|bgrewriteaof|acl_load)\(|path=['\"]/\d|url\}?/[1-9]\d?['\"]|\bdb=[1-9]"
    r"|rabbitmqctl|alter_configs",
    re.IGNORECASE,
)
#: Functions with a private server, although no fixture's name shows it.
OWN = {
    "harnesses/rabbitmq.py::alarm",  # inside of `private`
    "harnesses/redis.py::alarm",  # likewise
    "redis/test_access.py::test_sentinel",  # `watched` starts all three servers
}


def functions_of(tree):
    """Yield the functions of a module, and the methods of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node)


def parameters_of(function):
    return {each.arg for each in (*function.args.args, *function.args.kwonlyargs)}


def has_a_server_of_its_own(name, parameters):
    """Return whether *name* requests a private service, itself or through its fixtures."""
    asked = {name}
    while more := {each for one in asked for each in parameters.get(one, ())} - asked:
        asked |= more
    return any(each.startswith("private") for each in asked)


def offences(source, fixtures=""):
    """Yield the functions of *source* with a command for a whole server that others may use."""
    functions = [*functions_of(ast.parse(fixtures)), *functions_of(ast.parse(source))]
    parameters = {each.name: parameters_of(each) for each in functions}
    for function in functions_of(ast.parse(source)):
        body = ast.unparse(function)
        if FOR_A_WHOLE_SERVER.search(body) and not has_a_server_of_its_own(function.name, parameters):
            yield function.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(INTEGRATION).as_posix())
def test_commands_for_a_whole_server_need_a_private_one(path):
    conftest = path.with_name("conftest.py")
    fixtures = conftest.read_text() if conftest.exists() else ""
    name = path.relative_to(INTEGRATION).as_posix()

    assert not {f"{name}::{function}" for function in offences(path.read_text(), fixtures)} - OWN


@pytest.mark.parametrize(
    "command",
    [
        "await admin.flushdb()",
        "await admin.execute_command('FLUSHALL')",
        "urlsplit(redis_url)._replace(path='/9')",
        "Redis.from_url(redis_url, db=9)",
        "Redis.from_url(f'{redis_url}/9')",
        "await admin.config_set('maxmemory', 1)",
        "await admin.execute_command('CONFIG', 'SET', 'maxmemory', 1)",
        "await admin.script_flush()",
        "await admin.client_kill_filter(_type='normal')",
        "await admin.shutdown()",
        "await service.run('rabbitmqctl stop_app')",
    ],
)
def test_a_command_for_the_whole_of_a_shared_server_is_found(command):
    test = f"async def test_it(admin, redis_url):\n    {command}"

    assert [*offences(test, "async def admin(redis_url): ...")] == ["test_it"]
    assert not [*offences(test, "async def admin(private_redis): ...")]
