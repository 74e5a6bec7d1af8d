"""Counters for Prometheus: vLLM's names under `gemcut:`.

What the engine counts is read off its last `Stats` at each scrape; what the front end sees is counted as it
passes. Engines that died keep their share of the totals.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Totals
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gemcut.outputs import RequestOutput, Stats
from gemcut.server.engine_client import CAUSES, EngineClient

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self.registry = CollectorRegistry()
        labels, registry = ["model_name"], self.registry

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"gemcut:{name}", help, labels, registry=registry, buckets=buckets)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _WHOLE)
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token.", _WHOLE)
        self._decode = histogram("request_decode_time_seconds", "From first to last token.", _WHOLE)
        self._success = Counter(
            "gemcut:request_success", "Requests that ended.", [*labels, "finished_reason"], registry=registry
        )
        self._prompt = Counter("gemcut:prompt_tokens", "Prompt tokens.", labels, registry=registry)
        self._generated = Counter("gemcut:generation_tokens", "Tokens written.", labels, registry=registry)
        self._http = Counter(
            "gemcut:http_requests", "Answers by route and status.", ["path", "status"], registry=registry
        )
        self._model = model
        self._between = _Intervals(model)
        registry.register(self._between)
        registry.register(_EngineCounters(client, model))

    def count(self, output: RequestOutput) -> None:
        """A request that ended."""
        times, usage = output.timings, output.usage
        self._first.observe(times.first_token_s)
        self._whole.observe(times.total_s)
        self._queue.observe(times.queue_s)
        self._prefill.observe(max(0.0, times.first_token_s - times.queue_s))
        self._decode.observe(max(0.0, times.total_s - times.first_token_s))
        self._prompt.labels(self._model).inc(usage.prompt_tokens)
        self._generated.labels(self._model).inc(usage.completion_tokens)
        for answer in output.outputs:
            self._success.labels(self._model, answer.finish_reason).inc()

    def count_answer(self, path: str, status: int) -> None:
        """An HTTP answer. path: of a route, never what a client made up."""
        self._http.labels(path, str(status)).inc()

    def clock(self) -> Clock:
        """A clock for one stream."""
        return Clock(self._between)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Clock:
    """Measures the time between news of one stream."""

    def __init__(self, between: _Intervals) -> None:
        self._between = between
        self._last_s: float | None = None

    def tick(self, num_deltas: int, num_answers: int) -> None:
        """News came; one observation for each token of each answer, as if they had come evenly."""
        now = time.monotonic()
        if self._last_s is not None:
            steps = max(1, num_deltas // num_answers)
            self._between.observe((now - self._last_s) / steps, num_deltas)
        self._last_s = now


class _Intervals(Collector):
    """The one histogram that is fed with every token: prometheus_client's takes ten times as long."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts = [0] * (len(_BETWEEN) + 1)  # the last: longer than all bounds
        self._sum_s = 0.0

    def observe(self, seconds: float, times: int) -> None:
        """So many intervals more, all of this length."""
        self._counts[bisect_left(_BETWEEN, seconds)] += times
        self._sum_s += seconds * times

    def collect(self) -> Iterator[Metric]:
        made = HistogramMetricFamily(
            "gemcut:inter_token_latency_seconds", "Between news of a stream.", labels=["model_name"]
        )
        bounds = [*(floatToGoString(bound) for bound in _BETWEEN), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        made.add_metric([self._model], buckets, self._sum_s)
        yield made


@dataclass(frozen=True, slots=True)
class _Family:
    """A counter of the engine under its public name."""

    field: str
    name: str
    help: str
    label: str = ""


_COUNTERS = (
    _Family("preemptions", "num_preemptions", "Sequences that lost their pages to others."),
    _Family("prefix_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    _Family("prefix_hits", "prefix_cache_hits", "Prompt tokens found there."),
    _Family("encoder_hits", "mm_cache_hits", "Media that were there encoded."),
    _Family("steps", "engine_steps", "Forward passes."),
)
_LABELLED = (
    _Family("graph_replays", "graph_replays", "CUDA graphs that were replayed.", "kind"),
    _Family("eager_forwards", "eager_forwards", "Forward passes without a graph.", "reason"),
    _Family("dropped_graphs", "dropped_graphs", "Graphs that the engine goes without.", "reason"),
)


class _EngineCounters(Collector):
    """Reads the engine's counters when they are asked for."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client, self._model = client, model

    def collect(self) -> Iterator[Metric]:
        client, labels = self._client, ["model_name"]
        stats = client.stats

        def total(field: str) -> int:
            return client.past[field] + (0 if stats is None else getattr(stats, field))

        def gauge(name: str, help: str, value: float) -> Metric:
            made = GaugeMetricFamily(f"gemcut:{name}", help, labels=labels)
            made.add_metric([self._model], value)
            return made

        def counter(name: str, help: str, value: float) -> Metric:
            made = CounterMetricFamily(f"gemcut:{name}", help, labels=labels)
            made.add_metric([self._model], value)
            return made

        yield gauge("engine_up", "1 if the engine answers.", int(client.is_ready))
        yield gauge("num_requests_running", "Sequences that run.", 0 if stats is None else stats.running)
        yield gauge("num_requests_waiting", "Sequences that wait.", 0 if stats is None else stats.waiting)
        yield gauge("kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", _usage(stats))
        for family in _COUNTERS:
            yield counter(family.name, family.help, total(family.field))
        for family in _LABELLED:
            yield self._by_label(family)
        queries = total("encoder_hits") + total("encoder_misses")
        yield counter("mm_cache_queries", "Media looked up in the encoder cache.", queries)
        yield counter("engine_restarts", "Engines that died and were replaced.", client.num_restarts)
        yield self._kills()
        yield counter("bad_frames", "Frames between the processes that were dropped.", client.bad_frames)

    def _kills(self) -> Metric:
        help = "Engines that were killed: a step did not end, or no sign of life came."
        made = CounterMetricFamily("gemcut:engine_kills", help, labels=["model_name", "cause"])
        for cause in CAUSES:
            made.add_metric([self._model, cause], self._client.kills[cause])
        return made

    def _by_label(self, family: _Family) -> Metric:
        totals: Totals[str] = Totals()
        for key, count in self._client.past.items():
            if isinstance(key, tuple) and key[0] == family.field:
                totals[key[1]] += count
        if self._client.stats is not None:
            totals.update(getattr(self._client.stats, family.field))
        made = CounterMetricFamily(f"gemcut:{family.name}", family.help, labels=["model_name", family.label])
        for label, count in sorted(totals.items()):
            made.add_metric([self._model, label], count)
        return made


def _usage(stats: Stats | None) -> float:
    if stats is None:
        return 0.0
    shares = [used / sum(pages) for pages in (stats.full_pages, stats.sliding_pages) if (used := pages[2])]
    return max(shares, default=0.0)
