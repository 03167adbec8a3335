"""Client libraries: whether the library of an extra is installed, and whether it is the library that diator knows."""

from __future__ import annotations

from importlib import import_module

from diator.exceptions import MissingExtra


def require_extra(module: str, extra: str, library: str) -> None:
    """
    Import *library*, which *module* needs.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import_module(library)
    except ModuleNotFoundError as missing:
        raise MissingExtra(module, extra) from missing
