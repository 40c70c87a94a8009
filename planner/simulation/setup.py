"""Pure: what a simulation is told: the workers, the router's limits, and what goes wrong when."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.handoffs.words import SourceTimes
from planner.latency import LatencyModel, PieceModel, TransferModel
from planner.simulation.records import Allowance
from tandem.errors import InvalidRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass


def never_late() -> float:
    """A step ends when it is due."""
    return 0.0


class SimRole(Enum):
    """What a simulated worker does; COLOCATED reads prompts and writes tokens on the same blocks."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. `pool_blocks` blocks of `block_size` tokens; `node` decides whether KV stays in a machine.

    `policy` is a colocated worker's batching, by its name in batching.py. `whole_prompts` makes a
    prefill worker batch as DistServe does: up to `token_budget` tokens, no prompt split. `left_s` is asked
    when a step is due, by prefill workers and in single decode steps: seconds that it still needs, because
    something has slowed it since it began; 0 ends it.
    """

    worker_id: WorkerId
    role: SimRole
    latency: LatencyModel
    pool_blocks: int
    node: str = ""
    block_size: int = 16
    token_budget: int = 2048
    max_batch: int = 256
    max_waiting: int = 4096
    prefix_cache: bool = False
    policy: str = "sarathi"
    whole_prompts: bool = False
    left_s: Callable[[], float] = never_late


@dataclass(frozen=True, slots=True)
class EarlyFetch:
    """KV of prompts of `min_tokens` or more moves while they are read, as with cluster.yaml's
    overlap_min_tokens.

    A block has `layers` parts of `layer_bytes`, which become ready one after the other in the step that ends
    a prompt, evenly over its time.
    """

    min_tokens: int
    layers: int
    layer_bytes: int
    model: PieceModel


@dataclass(frozen=True, slots=True)
class Hops:
    """What messages take, in seconds: `front_door_s` of a request between its client and the router, there
    and back; one way from the router to a worker, and from a worker to the router.

    Reports of load and prefix caches, which are sent anyway every now and then, are heard at once.
    """

    front_door_s: float = 0.0
    to_worker_s: float = 0.0
    to_router_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouterRules:
    """The router's limits, as in RouterConfig; seconds and tokens."""

    slo_classes: tuple[SloClass, ...]
    dispatch: str = "least_loaded"
    context_tokens: int = 131_072
    max_queued: int = 1_000_000
    max_active: int = 1_000_000
    max_replacements: int = 16
    request_timeout_s: float = 600.0
    park_requests_s: float = 30.0
    prefill_window_tokens: int = 16_384
    decode_window_legs: int = 16
    load_interval_s: float = 0.5


class Drive(Enum):
    """What a simulation drives: counts as long as nothing fails, the full objects in runs of steps, or in
    single steps as the live workers do. All three give the same records.
    """

    AUTO = "auto"
    RUNS = "runs"
    STEPS = "steps"


class FaultKind(Enum):
    """What can go wrong or be ordered."""

    DEATH = "death"
    REVIVAL = "revival"
    FLIP = "flip"
    TRANSFER = "transfer failure"


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s`: the worker dies, comes back as a new life, changes its role, or a pull of it fails.

    A pull fails that is under way at the worker at the time, else its next one. REVIVAL of a worker that
    lives and DEATH or FLIP of one that is dead change nothing.
    """

    at_s: float
    kind: FaultKind
    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Setup:
    """A simulation but for its requests.

    `transfer_attempts` is how many transports a pull tries. `flip_s` is how long a drained worker takes to
    change its role. No more requests come once those that missed their objectives exceed the `allowance`.
    Without `early`, KV moves when it is whole.
    """

    workers: tuple[WorkerSpec, ...]
    router: RouterRules
    transfer: TransferModel
    faults: tuple[Fault, ...] = ()
    times: SourceTimes = field(default_factory=SourceTimes)
    transfer_attempts: int = 2
    flip_s: float = 1.0
    drive: Drive = Drive.AUTO
    keep_timeline: bool = False
    allowance: Allowance | None = None
    early: EarlyFetch | None = None
    hops: Hops = Hops()

    def classes(self) -> Mapping[str, SloClass]:
        """The SLO classes by name."""
        return {slo.name: slo for slo in self.router.slo_classes}


def check(setup: Setup) -> None:
    """Raises InvalidRequest unless somebody reads prompts, somebody writes tokens, and names are unique."""
    names = [spec.worker_id for spec in setup.workers]
    if len(set(names)) < len(names):
        raise InvalidRequest("Two workers have the same name.", "workers")
    roles = {spec.role for spec in setup.workers}
    if SimRole.COLOCATED in roles and len(roles) > 1:
        raise InvalidRequest("Colocated workers can't be mixed with prefill or decode workers.", "workers")
    if SimRole.COLOCATED not in roles:
        for needed in (SimRole.PREFILL, SimRole.DECODE):
            if needed not in roles:
                raise InvalidRequest(f"There is no {needed.value} worker; at least one is needed.", "workers")
    for fault in setup.faults:
        if fault.worker_id not in names:
            raise InvalidRequest(
                f"The fault at {fault.at_s:g} s names no worker of the simulation.", "faults"
            )
    if not setup.router.slo_classes:
        raise InvalidRequest("There is no SLO class; at least one is needed.", "classes")
