from dropping import providers
from with_diator_redis import Streams

from diator.telemetry import OpenTelemetry


class Traced(Streams):
    plain = Streams

    def __init__(self, url: str, name: str) -> None:
        tracers, meters = providers()
        self.instrument = OpenTelemetry(tracer_provider=tracers, meter_provider=meters)
        super().__init__(url, name)
