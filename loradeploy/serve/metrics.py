"""The metrics at /metrics, in Prometheus' text format, with names like vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.bank import BankStatistics
    from loradeploy.runtime.capture.replays import CaptureStatistics
    from loradeploy.runtime.engine.statistics import EngineStatistics, Moment
    from loradeploy.runtime.engine.submission import Submission

_LONG: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_SHORT: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64)

# By the engine's name: metric name, help text, buckets.
_TIMES: Final[dict[Moment, tuple[str, str, tuple[float, ...]]]] = {
    "queue": ("request_queue_time_seconds", "Seconds that requests waited.", _LONG),
    "first_token": ("time_to_first_token_seconds", "Seconds until the first token.", _LONG),
    "inter_token": ("inter_token_latency_seconds", "Seconds between two tokens.", _SHORT),
    "request": ("e2e_request_latency_seconds", "Seconds until the answer was complete.", _LONG),
    "step": ("step_time_seconds", "Seconds of one run of the graph that decodes.", _SHORT),
    "prefill": ("prefill_time_seconds", "Seconds of one run that reads a prompt's part.", _LONG),
}


_Figure = tuple[str, str, int]  # name, help, value


class Metrics:
    """The metrics of one service, in a separate registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._times = {
            moment: Histogram(_named(name), text, buckets=buckets, registry=self._registry)
            for moment, (name, text, buckets) in _TIMES.items()
        }
        self._load = Histogram(
            _named("adapter_load_time_seconds"),
            "Seconds to read an adapter of the adapter root.",
            buckets=_LONG,
            registry=self._registry,
        )
        self._responses = Counter(
            _named("http_responses"), "Answers by status.", ["status"], registry=self._registry
        )
        self._texts = Counter(
            _named("encoder_texts"), "Texts that an encoder was run on.", registry=self._registry
        )
        self._runs = Counter(
            _named("encoder_runs"),
            "Runs of an encoder, which requests share.",
            registry=self._registry,
        )

    def observe(self, moment: Moment, seconds: float, submission: Submission | None) -> None:
        """Record a duration of the engine; used as its observer."""
        self._times[moment].observe(seconds)

    def adapter_loaded(self, seconds: float) -> None:
        """Record the time it took to read an adapter."""
        self._load.observe(seconds)

    def responded(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(str(status)).inc()

    def encoded(self, texts: int, seconds: float) -> None:
        """Count the texts of a request to an encoder, and record its duration."""
        self._texts.inc(texts)
        self._times["request"].observe(seconds)

    def watch_engine(self, statistics: Callable[[], EngineStatistics]) -> None:
        """Add an engine's statistics, read at each scrape."""
        self._registry.register(_Collector(lambda: _of_engine(statistics())))

    def encoder_ran(self) -> None:
        """Count a run of an encoder."""
        self._runs.inc()

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Add the numbers of waiting and running requests of an encoder."""
        for name, text, value in (
            ("num_requests_waiting", "Requests that wait.", waiting),
            ("num_requests_running", "Requests that run.", running),
        ):
            Gauge(_named(name), text, registry=self._registry).set_function(value)

    def watch_adapters(self, statistics: Callable[[], BankStatistics]) -> None:
        """Add the adapter bank's statistics, read at each scrape."""
        self._registry.register(_Collector(lambda: _of_bank(statistics())))

    def watch_captures(self, statistics: Callable[[], CaptureStatistics | None]) -> None:
        """Add the statistics of captured runs, read at each scrape; zeros without captures."""
        self._registry.register(_Collector(lambda: _of_captures(statistics())))

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._registry)


class _Collector:
    """Metrics that are computed at each scrape."""

    def __init__(self, make: Callable[[], Iterator[Metric]]) -> None:
        self._make = make

    def collect(self) -> Iterator[Metric]:
        return self._make()


def _named(name: str) -> str:
    return f"loradeploy:{name}"


def _families(gauges: Sequence[_Figure], counters: Sequence[_Figure]) -> Iterator[Metric]:
    for name, text, value in gauges:
        yield GaugeMetricFamily(_named(name), text, value)
    for name, text, value in counters:
        yield CounterMetricFamily(_named(name), text, value)


def _of_engine(now: EngineStatistics) -> Iterator[Metric]:
    gauges = (
        ("num_requests_waiting", "Requests that wait.", now.waiting),
        ("num_requests_running", "Requests that run.", now.running),
        ("num_rows_running", "Texts that the next step generates.", now.rows),
        ("num_rows_max", "Texts that can be generated together.", now.slots),
        ("prefix_cache_bytes", "Bytes of the prefix cache.", now.prefix_bytes),
    )
    counters = (
        ("requests", "Requests that were taken.", now.submitted),
        ("requests_refused", "Requests that were refused, as too many waited.", now.refused),
        ("prompt_tokens", "Tokens of prompts.", now.prompt_tokens),
        ("generation_tokens", "Generated tokens.", now.generated_tokens),
        ("prefix_cache_hit_tokens", "Tokens of prompts in the prefix cache.", now.cached_tokens),
        ("prefix_cache_evictions", "Blocks that left the prefix cache.", now.prefix_evictions),
        ("steps", "Runs of the graph that decoded.", now.steps),
        ("one_adapter_steps", "Those whose rows had one adapter.", now.one_adapter_steps),
    )
    yield from _families(gauges, counters)
    ended = CounterMetricFamily(
        _named("request_success"), "Texts that ended, by reason.", labels=["finished_reason"]
    )
    for reason, count in now.finished.items():
        ended.add_metric([reason], count)
    yield ended
    failed = CounterMetricFamily(
        _named("request_failure"), "Requests that failed, by error.", labels=["error"]
    )
    for error, count in now.failed.items():
        failed.add_metric([error], count)
    yield failed
    yield _batch_sizes(now.batch_sizes)


def _batch_sizes(counts: dict[int, int]) -> HistogramMetricFamily:
    buckets = [
        (str(float(most)), sum(count for size, count in counts.items() if size <= most))
        for most in _ROWS
    ]
    return HistogramMetricFamily(
        _named("batch_size"),
        "Rows of a step.",
        buckets=[*buckets, ("+Inf", sum(counts.values()))],
        sum_value=sum(size * count for size, count in counts.items()),
    )


def _of_bank(now: BankStatistics) -> Iterator[Metric]:
    gauges = (
        ("adapters_registered", "Names of adapters.", now.registered),
        ("adapters_resident", "Adapters and blends in memory.", now.resident),
        ("adapter_bytes", "Their bytes in host memory.", now.host_bytes),
    )
    counters = (
        ("adapter_cache_hits", "Uses of an adapter that was in memory.", now.hits),
        ("adapter_cache_misses", "Uses of an adapter that had to be read.", now.misses),
        ("adapter_cache_evictions", "Adapters that left memory.", now.evictions),
    )
    yield from _families(gauges, counters)


def _of_captures(now: CaptureStatistics | None) -> Iterator[Metric]:
    made, replayed, refused = (0, 0, 0) if now is None else (now.made, now.replayed, now.refused)
    counters = (
        ("graph_captures", "Runs that the device recorded, of 64 at most.", made),
        ("graph_replays", "Runs that it replayed.", replayed),
        ("graph_captures_refused", "Runs that came again with no recording left.", refused),
    )
    yield from _families((), counters)
