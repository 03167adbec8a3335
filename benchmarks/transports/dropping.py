"""The SDK of OpenTelemetry as in production, except that its exporters drop what they are given."""

from collections.abc import Sequence

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult


class _Spans(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class _Metrics(MetricExporter):
    def export(self, metrics_data: MetricsData, timeout_millis: float = 0, **_: object) -> MetricExportResult:
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: object) -> None:
        """Have nothing to end."""


def providers(*, max_queue_size: int | None = 100_000) -> tuple[TracerProvider, MeterProvider]:
    """
    Return what an instrument needs. None: the default of the SDK.

    With a longer queue than the default, no span is dropped before its export, which would be cheaper.
    """
    tracers = TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(_Spans(), max_queue_size=max_queue_size))
    return tracers, MeterProvider([PeriodicExportingMetricReader(_Metrics())])
