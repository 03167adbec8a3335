"""Every line that diator logs has attributes for programs, and the page names each of them."""

import ast
import logging
import re
from functools import cache
from pathlib import Path

import pytest

import diator

ROOT = Path(diator.__file__).parent
LEVELS = {"info", "warning", "error", "critical", "exception"}
CALLS = LEVELS | {"debug", "log"}


@cache
def modules() -> dict[str, ast.Module]:
    """Return all modules of diator, apart from the suite's own and the saboteurs, which log what they should not."""
    paths = [path for path in ROOT.rglob("*.py") if "testing" not in path.relative_to(ROOT).parts]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@cache
def calls(module: ast.Module) -> list[ast.Call]:
    """Return the calls of loggers: of an object whose name ends in `logger`, `log` or `lines`."""
    found = [node for node in ast.walk(module) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call
        for call in found
        if call.func.attr in CALLS and re.search(r"(logger|log|lines|getLogger\(.*\))$", ast.unparse(call.func.value))
    ]


def lacks_fields(call: ast.Call) -> bool:
    """Return whether its record has no attributes, though it may be seen: `RepeatedLines` adds them by itself."""
    is_repeated = ast.unparse(call.func.value).endswith("lines")
    return call.func.attr != "debug" and not is_repeated and "extra" not in [each.arg for each in call.keywords]


def test_each_line_above_debug_has_fields():
    lines = {f"{name}:{call.lineno}": call for name, module in modules().items() for call in calls(module)}
    assert len(lines) > 40
    assert [where for where, call in lines.items() if lacks_fields(call)] == []


def test_nothing_is_logged_in_another_way():
    """Not through the root logger, and not by a warning or a print, which have no fields."""
    texts = {name: ast.unparse(module) for name, module in modules().items()}
    other = re.compile(r"\blogging\.(debug|info|warning|error|exception|critical|log)\(|\bwarnings\.warn|\bprint\(")
    assert [name for name, text in texts.items() if other.search(text)] == []


@pytest.mark.parametrize(
    ("line", "lacks"),
    [
        ("logger.warning('lost')", True),
        ("self._logger.info('lost')", True),
        ("logging.getLogger(__name__).error('lost')", True),
        ("logger.exception('lost')", True),
        ("logger.log(level, 'lost')", True),
        ("logger.debug('lost')", False),
        ("logger.warning('lost', extra=self.log_fields)", False),
        ("self.lines.log(level, 'lost', 'lost')", False),
    ],
)
def test_a_line_without_fields_is_found(line, lacks):
    assert [lacks_fields(call) for call in calls(ast.parse(line))] == [lacks]


def names() -> set[str]:
    """Return the names of all attributes: what stands for `extra`, `fields` and in the functions that return them."""
    found: set[str] = set()
    for module in [module for name, module in modules().items() if name == "context.py" or calls(module)]:
        for node in ast.walk(module):
            inside: ast.AST | None = None
            if isinstance(node, ast.keyword) and node.arg in ("extra", "fields"):
                inside = node.value
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(re.search(r"(extra|fields)$", ast.unparse(target)) for target in targets):
                    inside = node.value
            elif isinstance(node, ast.FunctionDef) and node.name.endswith("fields"):
                inside = node
            for each in ast.walk(inside) if inside is not None else ():
                if isinstance(each, ast.Dict):
                    found |= {key.value for key in each.keys if isinstance(key, ast.Constant)}
    return found


def test_the_page_names_each_attribute():
    page = (ROOT.parent / "docs" / "telemetry.md").read_text()
    logs = page[page.index("\n## Logs") : page.index("\n## An instrument of your own")]
    rows = [line.split("|")[1] for line in logs.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert names() >= {"broker", "group", "message_name", "error_type", "attempt", "seconds", "where", "more"}
    assert names() - told == set()


def test_no_attribute_is_one_of_logging_itself():
    """`logging` would raise a KeyError instead of logging the line."""
    assert names() & {*vars(logging.makeLogRecord({})), "message", "asctime"} == set()
