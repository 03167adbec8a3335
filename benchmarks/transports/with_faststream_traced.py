from dropping import providers
from faststream.redis.opentelemetry import RedisTelemetryMiddleware
from with_faststream_redis import Streams


class Traced(Streams):
    plain = Streams

    def __init__(self, url: str, name: str) -> None:
        tracers, meters = providers()
        self.middlewares = (RedisTelemetryMiddleware(tracer_provider=tracers, meter_provider=meters),)
        super().__init__(url, name)
