"""Prometheus metrics of a server."""

from collections.abc import Iterator
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from atv.serving.requests import Serving


class Meter:
    """Prometheus metrics of a server."""

    def __init__(self, engine: Serving) -> None:
        self._engine, self.registry = engine, CollectorRegistry()
        self.requests = Counter("atv_requests", "Requests by model and end", ["model", "end"], registry=self.registry)
        self.seconds = Histogram(
            "atv_request_seconds", "Seconds of a request, waiting included", ["model"], registry=self.registry
        )
        self.registry.register(cast(Any, self))

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's own numbers."""
        for name, value in self._engine.numbers().items():
            yield GaugeMetricFamily(f"atv_engine_{name}", f"The engine's {name.replace('_', ' ')}", value)
