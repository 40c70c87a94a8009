"""Edge: a worker's Prometheus metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.leg import CommunicatorNumbers, LoadNumbers
from engine.step import StepPlan, StepResult
from engine.worker_process.transfer_metrics import TransferMetrics
from tandem.metrics_server import metrics_served
from tandem.worker_config import WorkerConfig

STEP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
HANDOFF_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class WorkerMetrics:
    """All metrics of one worker, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.address = ""
        """host:port that serves them; empty when none does."""
        self._blocks = Gauge(
            "tandem_worker_kv_blocks",
            "KV blocks by state: total, free, allocated, referenced, unaccounted (allocated - referenced).",
            ["state"],
            registry=self.registry,
        )
        self._sequences = Gauge(
            "tandem_worker_sequences",
            "Sequences by state: waiting (legs), running, parked (legs).",
            ["state"],
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "tandem_worker_step_seconds",
            "Duration of a step.",
            buckets=STEP_BUCKETS_S,
            registry=self.registry,
        )
        self._batch = Histogram(
            "tandem_worker_batch_sequences",
            "Sequences in a step.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self._tokens = Counter(
            "tandem_worker_tokens",
            "Tokens by kind: fed (computed), drawn (sampled).",
            ["kind"],
            registry=self.registry,
        )
        self._guesses = Counter(
            "tandem_worker_guessed_tokens",
            "Guesses of speculative decoding by outcome: accepted, rejected.",
            ["outcome"],
            registry=self.registry,
        )
        self.dropped = Counter(
            "tandem_worker_dropped_legs",
            "Legs that ended unfinished, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.handoff_seconds = Histogram(
            "tandem_worker_handoff_seconds",
            "Parts of a hand-off: reserve, accept, ready, queue, move, verify, commit.",
            ["part"],
            buckets=HANDOFF_BUCKETS_S,
            registry=self.registry,
        )
        self.handoff_bytes = Counter(
            "tandem_worker_handoff_bytes",
            "KV bytes pulled, by transport.",
            ["transport"],
            registry=self.registry,
        )
        self.early_fetches = Counter(
            "tandem_worker_early_fetches",
            "Pulls that were to begin before the prompt was read, by outcome: started, lost.",
            ["outcome"],
            registry=self.registry,
        )
        self.transfer_faults = Counter(
            "tandem_worker_transfer_faults",
            "Hand-offs that failed, by fault.",
            ["fault"],
            registry=self.registry,
        )
        self.transfers = TransferMetrics(self.registry)
        self._communicators = Gauge(
            "tandem_worker_nccl_communicators",
            "NCCL communicators by state: open, abandoned (an opening call that never returned).",
            ["state"],
            registry=self.registry,
        )
        self._communicator_bytes = Gauge(
            "tandem_worker_nccl_bytes",
            "Device memory that open NCCL communicators and their staging took.",
            registry=self.registry,
        )

    def observe_load(self, load: LoadNumbers) -> None:
        """Takes the gauges from a load."""
        self._blocks.labels("total").set(load.total_blocks)
        self._blocks.labels("free").set(load.free_blocks)
        self._blocks.labels("allocated").set(load.allocated_blocks)
        self._blocks.labels("referenced").set(load.referenced_blocks)
        self._blocks.labels("unaccounted").set(load.allocated_blocks - load.referenced_blocks)
        self._sequences.labels("waiting").set(load.waiting_legs)
        self._sequences.labels("running").set(load.running_sequences)
        self._sequences.labels("parked").set(load.parked_legs)

    def observe_communicators(self, numbers: CommunicatorNumbers) -> None:
        """Takes the gauges of NCCL."""
        self._communicators.labels("open").set(numbers.open)
        self._communicators.labels("abandoned").set(numbers.abandoned)
        self._communicator_bytes.set(numbers.bytes)

    def observe_step(self, plan: StepPlan, result: StepResult) -> None:
        """Counts one step."""
        self._step_seconds.observe(result.compute_s)
        self._batch.observe(len(plan.slices))
        self._tokens.labels("fed").inc(sum(len(piece.token_ids) for piece in plan.slices))
        self._tokens.labels("drawn").inc(len(result.tokens))

    def observe_guesses(self, guesses: int, accepted: int) -> None:
        """Counts the guesses that a step verified, and how many of them held."""
        self._guesses.labels("accepted").inc(accepted)
        self._guesses.labels("rejected").inc(guesses - accepted)

    @classmethod
    @contextmanager
    def open(cls, config: WorkerConfig) -> Iterator["WorkerMetrics"]:
        """Metrics, served over HTTP at config.metrics_port (if any) until the block ends."""
        metrics = cls()
        with metrics_served(metrics.registry, config.bind_host, config.metrics_port) as port:
            if port is not None:
                metrics.address = f"{config.advertise_host}:{port}"
            yield metrics
