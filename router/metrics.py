"""Edge: what the router tells Prometheus, in a registry of its own."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.request import TimelineReport, TokenUsage
from router.role_counts import RoleCount
from router.slo_accounting import ClassGoodput
from router.worker_key import WorkerKey
from tandem.v1 import worker_pb2 as wpb

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


@dataclass(frozen=True, slots=True)
class RouterGauges:
    """What is read at the moment of a scrape; `loads` by worker."""

    queued: int
    active: int
    ready: bool
    loads: Sequence[tuple[WorkerKey, wpb.LoadSnapshot]]
    goodput: Sequence[ClassGoodput]
    roles: Sequence[RoleCount]


class GapHistogram(Collector):
    """Inter-token latency; counts by itself, since prometheus_client's observe is slow for every token."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TOKEN_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        """Counts one gap."""
        self._counts[bisect_left(TOKEN_BUCKETS_S, gap_s)] += 1
        self._sum_s += gap_s

    def collect(self) -> Iterable[Metric]:
        """The histogram as Prometheus wants it: cumulative counts."""
        family = HistogramMetricFamily("tandem_itl_seconds", "Gap between emissions of a sample.")
        cumulative, buckets = 0, []
        for bound, count in zip((*map(str, TOKEN_BUCKETS_S), "+Inf"), self._counts, strict=True):
            cumulative += count
            buckets.append((bound, float(cumulative)))
        family.add_metric([], buckets, self._sum_s)
        return [family]


class GaugeCollector(Collector):
    """Numbers that somebody else owns, read when scraped."""

    def __init__(self, read: Callable[[], RouterGauges]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Queue, readiness, workers by role, blocks of each worker, goodput of each class."""
        now = self._read()
        yield GaugeMetricFamily("tandem_queued_requests", "Requests waiting at the router.", now.queued)
        yield GaugeMetricFamily("tandem_active_requests", "Requests admitted and unfinished.", now.active)
        yield GaugeMetricFamily("tandem_ready", "Whether requests can be served now.", float(now.ready))
        blocks = GaugeMetricFamily(
            "tandem_router_worker_kv_blocks",
            "KV blocks of a worker as it last told this router.",
            labels=["worker", "state"],
        )
        batch = GaugeMetricFamily(
            "tandem_router_worker_sequences", "Sequences in the worker's batch.", labels=["worker"]
        )
        for key, load in now.loads:
            blocks.add_metric([key.worker_id, "allocated"], load.allocated_blocks)
            blocks.add_metric([key.worker_id, "referenced"], load.referenced_blocks)
            blocks.add_metric([key.worker_id, "free"], load.free_blocks)
            unaccounted = load.allocated_blocks - load.referenced_blocks
            blocks.add_metric([key.worker_id, "unaccounted"], unaccounted)
            batch.add_metric([key.worker_id], load.running_sequences)
        yield blocks
        yield batch
        yield from self._roles(now.roles)
        yield from self._goodput(now.goodput)

    @staticmethod
    def _roles(counts: Sequence[RoleCount]) -> Iterable[Metric]:
        workers = GaugeMetricFamily("tandem_workers", "Workers by role.", labels=["role", "state"])
        for count in counts:
            workers.add_metric([count.role.value, "actual"], count.actual)
            if count.desired is not None:
                workers.add_metric([count.role.value, "desired"], count.desired)
        yield workers

    @staticmethod
    def _goodput(figures: Sequence[ClassGoodput]) -> Iterable[Metric]:
        offered = CounterMetricFamily("tandem_slo_offered", "Requests offered.", labels=["slo_class"])
        good = CounterMetricFamily("tandem_slo_good", "Requests that met all.", labels=["slo_class"])
        rate = GaugeMetricFamily(
            "tandem_goodput_rps", "Good requests a second over the last minute.", labels=["slo_class"]
        )
        for figure in figures:
            offered.add_metric([figure.slo.name], figure.offered)
            good.add_metric([figure.slo.name], figure.good)
            rate.add_metric([figure.slo.name], figure.goodput_rps)
        yield offered
        yield good
        yield rate


class RouterMetrics:
    """All metrics of one router."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gaps = GapHistogram()
        self.registry.register(self.gaps)
        self.ttft = self._histogram("tandem_ttft_seconds", "Time to first token.", LATENCY_BUCKETS_S)
        self.tpot = self._histogram(
            "tandem_tpot_seconds", "Time per output token after the first.", TOKEN_BUCKETS_S
        )
        self.queue = self._histogram(
            "tandem_queue_seconds", "Arrival until sent to prefill.", LATENCY_BUCKETS_S
        )
        self.prefill = self._histogram("tandem_prefill_seconds", "From there to token 0.", LATENCY_BUCKETS_S)
        self.handoff = self._histogram(
            "tandem_handoff_seconds", "Token 0 until KV landed at decode.", LATENCY_BUCKETS_S
        )
        self.handoff_bytes = Counter("tandem_handoff_bytes", "KV bytes moved.", registry=self.registry)
        self.handoffs = Counter(
            "tandem_handoffs", "Hand-offs that landed.", ["transport"], registry=self.registry
        )
        tokens = Counter("tandem_tokens", "Tokens served.", ["kind"], registry=self.registry)
        self._prompt_tokens = tokens.labels("prompt")
        self._completion_tokens = tokens.labels("completion")
        self._cached_tokens = tokens.labels("cached")
        self.requests = Counter(
            "tandem_requests", "Requests that ended.", ["slo_class", "outcome"], registry=self.registry
        )
        self.replacements = Counter(
            "tandem_replacements", "Legs placed anew.", ["reason"], registry=self.registry
        )
        self.slo_missed = Counter(
            "tandem_slo_missed", "SLO misses by stage.", ["slo_class", "stage"], registry=self.registry
        )
        self.calls = Counter("tandem_calls", "API calls that ended.", ["api", "code"], registry=self.registry)

    def observe_ended(self, usage: TokenUsage, timeline: TimelineReport) -> None:
        """A request ended, by whatever cause: what it used, and the stages that it reached."""
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._completion_tokens.inc(usage.completion_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        if not timeline.ttft_s:
            return
        self.ttft.observe(timeline.ttft_s)
        self.queue.observe(timeline.queue_s)
        self.prefill.observe(timeline.prefill_s)
        if timeline.decode_worker:
            self.handoff.observe(timeline.handoff_s)
        if timeline.tpot_s:
            self.tpot.observe(timeline.tpot_s)

    def observe_handoff(self, landed: wpb.KvLanded) -> None:
        """A hand-off landed."""
        self.handoffs.labels(landed.transport).inc()
        self.handoff_bytes.inc(landed.moved_bytes)

    def watch(self, read: Callable[[], RouterGauges]) -> None:
        """From now on these numbers are read at every scrape."""
        self.registry.register(GaugeCollector(read))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, about, buckets=buckets, registry=self.registry)
