"""
Instruments for telemetry: `OpenTelemetry` (extra `opentelemetry`) and `Prometheus` (extra `prometheus`).

A program passes one of them as `instrument=…` to a mediator, an emitter or a consumer. See `docs/telemetry.md`.
"""

from contextlib import suppress as _suppress
from typing import Never as _Never

from diator.exceptions import MissingExtra as _MissingExtra

with _suppress(_MissingExtra):
    from diator.telemetry._opentelemetry import OpenTelemetry
with _suppress(_MissingExtra):
    from diator.telemetry._prometheus import Prometheus

__all__ = ["OpenTelemetry", "Prometheus"]


def __getattr__(name: str) -> _Never:
    if name in __all__:
        raise _MissingExtra(f"diator.telemetry.{name}", name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
