"""Pure: from what routers count since their start to the load of one window after the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.control.load_window import LoadWindow, RolePlacement
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role

MOST_LENGTHS = 256
"""Length pairs of a window, evenly taken."""
KEPT_ROUTERS = 64
"""Lives of routers whose totals are remembered while they do not answer."""


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One life of a worker as a router sees it; `busy_s` counts since its start.

    `serving`: it is attached and not draining.
    """

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    busy_s: float
    serving: bool


@dataclass(frozen=True, slots=True)
class RouterSample:
    """Totals of one life of a router since its start; (prompt, output) lengths since the last sample."""

    router_id: str
    offered: int
    settled: int
    good: int
    lengths: tuple[tuple[int, int], ...]
    workers: tuple[WorkerSample, ...]


class LoadWindows:
    """Remembers the last sample of each router and worker; told samples in order of time."""

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._routers: dict[str, RouterSample] = {}
        self._busy_s: dict[tuple[WorkerId, Incarnation], float] = {}
        self._lengths: tuple[tuple[int, int], ...] = ()

    @property
    def begun(self) -> bool:
        """Whether the next sample ends a window."""
        return self._began_s is not None

    def add(self, at_s: float, samples: Sequence[RouterSample]) -> LoadWindow | None:
        """The window since the last call; None for the first call, and when the clock did not go on.

        A life that was not seen before counts from its start. A window in which requests came and none ended
        has the lengths of the last one.
        """
        workers = _workers(samples)
        window = None
        if self._began_s is not None and at_s > self._began_s:
            window = self._window(self._began_s, at_s, samples, workers)
        self._began_s = at_s
        known = {**self._routers, **{sample.router_id: sample for sample in samples}}
        self._routers = dict(list(known.items())[-KEPT_ROUTERS:])
        self._busy_s = {(one.worker_id, one.incarnation): one.busy_s for one in workers}
        return window

    def _window(
        self, began_s: float, at_s: float, samples: Sequence[RouterSample], workers: Sequence[WorkerSample]
    ) -> LoadWindow:
        before = [self._routers.get(sample.router_id) for sample in samples]
        pairs = list(zip(samples, before, strict=True))
        offered = sum(now.offered - (was.offered if was else 0) for now, was in pairs)
        settled = sum(now.settled - (was.settled if was else 0) for now, was in pairs)
        good = sum(now.good - (was.good if was else 0) for now, was in pairs)
        self._lengths = _evenly([pair for sample in samples for pair in sample.lengths]) or self._lengths
        serving = [one for one in workers if one.serving]
        return LoadWindow(
            began_s=began_s,
            ended_s=at_s,
            arrived=offered,
            lengths=self._lengths if offered else (),
            attainment=good / settled if settled else None,
            prefill_busy=self._busy(serving, Role.PREFILL, at_s - began_s),
            decode_busy=self._busy(serving, Role.DECODE, at_s - began_s),
            placement=RolePlacement(
                sum(one.role is Role.PREFILL for one in serving),
                sum(one.role is Role.DECODE for one in serving),
            ),
        )

    def _busy(self, serving: Iterable[WorkerSample], role: Role, span_s: float) -> float:
        shares = [
            min(1.0, max(0.0, one.busy_s - self._busy_s.get((one.worker_id, one.incarnation), 0.0)) / span_s)
            for one in serving
            if one.role is role
        ]
        return sum(shares) / len(shares) if shares else 0.0


def _workers(samples: Iterable[RouterSample]) -> list[WorkerSample]:
    """Each life once; of what several routers see of it the latest, and serving for one is serving."""
    found: dict[tuple[WorkerId, Incarnation], WorkerSample] = {}
    for one in (worker for sample in samples for worker in sample.workers):
        key = (one.worker_id, one.incarnation)
        known = found.get(key, one)
        found[key] = WorkerSample(*key, one.role, max(one.busy_s, known.busy_s), one.serving or known.serving)
    return list(found.values())


def _evenly(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    stride = -(-len(pairs) // MOST_LENGTHS) or 1
    return tuple(pairs[::stride])
