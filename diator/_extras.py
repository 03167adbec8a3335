"""The client libraries that the extras install."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import CodeType, FunctionType

from diator.exceptions import DiatorError, IncompatibleClient, MissingExtra


@contextmanager
def importing(module: str, extra: str, *libraries: str) -> Generator[None, None, None]:
    """
    Import, inside this context, what *module* needs of client *libraries*, which *extra* installs.

    Raises:
        MissingExtra: A library is not installed.
        IncompatibleClient: A library has no module, class or function of the name that diator imports.
    """
    try:
        yield
    except ImportError as error:
        where = error.name or ""
        library = where.partition(".")[0]
        if library not in libraries or isinstance(error, DiatorError):
            raise
        try:
            import_module(library)
        except ModuleNotFoundError:
            raise MissingExtra(module, extra) from error
        name = re.match(r"cannot import name '(\w+)'", str(error))  # since Python 3.12 it is an attribute of the error
        raise _incompatible(library, f"{where}.{name[1]}" if name else where) from error


def require_internals(distribution: str, internals: Mapping[str, Sequence[str]]) -> None:
    """
    Check that a client library still has the private and undocumented names that diator uses.

    *internals* maps each module to its names: a class, a function, or `Class.attribute`. A transport calls this when it
    is imported. Without the check, a renamed attribute would be an AttributeError in the middle of a send, which looks
    like one of the errors that clients raise for a broken connection.

    Raises:
        IncompatibleClient: *distribution* lacks one of *internals*.
    """
    for module, names in internals.items():
        for name in names:
            if not _exists(module, *name.split(".")):
                raise _incompatible(distribution, f"{module}.{name}")


def supported(distribution: str) -> str:
    """Return the requirement by which diator's own metadata asks for *distribution*, such as `rodi<3,>=2.1`."""
    from importlib.metadata import PackageNotFoundError, requires  # noqa: PLC0415  # 10 ms, needed for an error only

    try:
        requirements = requires("diator") or []
    except PackageNotFoundError:  # a checkout that is on the path and not installed
        requirements = []
    for requirement in requirements:
        wanted = requirement.partition(";")[0].strip()
        found = re.match(r"[\w.-]+", wanted)
        if found and _normalized(found[0]) == _normalized(distribution):
            return wanted
    return distribution


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _incompatible(distribution: str, attribute: str) -> IncompatibleClient:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # as above

    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return IncompatibleClient(distribution, installed, attribute, supported(distribution))


def _exists(module: str, name: str, attribute: str | None = None) -> bool:
    try:
        found: object = getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        return False
    return attribute is None or (isinstance(found, type) and _has(found, attribute))


def _has(owner: type, name: str) -> bool:
    """
    Return whether objects of *owner* have the attribute *name*.

    Methods, properties, slots and class attributes are in the `__dict__` of the class or a base. An abstract method
    does not count: it is only a promise. Attributes of an object are not there. To build an object would need a running
    event loop and arguments that differ between versions, and an annotation can outlive its attribute. So this function
    searches the code of the methods of the class and its bases for an assignment.
    """
    for base in owner.__mro__:
        if name in vars(base) and not getattr(vars(base)[name], "__isabstractmethod__", False):
            return True
    return any(_assigns(code, name) for code in _methods(owner))


def _methods(owner: type) -> Iterator[CodeType]:
    for base in owner.__mro__:
        for member in vars(base).values():
            function = inspect.unwrap(member) if isinstance(member, FunctionType) else member  # a decorated __init__
            if isinstance(function, FunctionType):
                yield function.__code__


def _assigns(code: CodeType, name: str) -> bool:
    if name not in code.co_names:  # most code stops here; `co_names` also has names that are only loaded
        return False
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code))
