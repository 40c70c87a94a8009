"""Pure: what became of each simulated request, in columns, and what that says of the objectives."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from statistics import NormalDist

from planner.workload import SimRequest
from router.session import Session
from tandem.errors import TandemError
from tandem.slo import SloClass, Stage

COLUMNS = (
    "number",
    "arrived_s",
    "prompt_tokens",
    "output_tokens",
    "slo_class",
    "outcome",
    "ttft_s",
    "tpot_s",
    "longest_gap_s",
    "queue_s",
    "prefill_s",
    "handoff_s",
    "decode_s",
    "ended_s",
    "replacements",
    "cached_tokens",
    "prefill_worker",
    "decode_worker",
    "slo_missed_by",
)
"""The columns of the records, in order; times in seconds; docs/simulator.md."""

FINISHED = "finished"


class Records:
    """One row for each request offered, in order of their ends."""

    def __init__(self, classes: Sequence[SloClass]) -> None:
        self.classes = {slo.name: slo for slo in classes}
        self.numbers = array("q")
        self.times = {name: array("d") for name in COLUMNS if name.endswith("_s")}
        self.counts = {
            name: array("i") for name in ("prompt_tokens", "output_tokens", "replacements", "cached_tokens")
        }
        self.names = {
            name: array("H")
            for name in ("slo_class", "outcome", "prefill_worker", "decode_worker", "slo_missed_by")
        }
        self._name_codes: dict[str, int] = {}
        self._known_names: list[str] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def add(
        self, asked: SimRequest, session: Session | None, error: TandemError | None, now_s: float
    ) -> None:
        """A request ended, or was refused (no session)."""
        slo = self.classes[asked.slo_class]
        spent: Mapping[Stage, float] = {}
        ttft_s, tpot_s, gap_s, missed = math.nan, math.nan, math.nan, Stage.QUEUE.value
        workers, written, replaced, cached = ("", ""), 0, 0, 0
        if session is not None:
            timeline = session.timeline
            spent = timeline.durations_s(now_s)
            stage = timeline.missed_by(slo, now_s)
            missed = "" if stage is None else stage.value
            if timeline.ttft_s is not None:
                ttft_s, tpot_s, gap_s = timeline.ttft_s, timeline.tpot_s, timeline.longest_gap_s
            workers = timeline.prefill_worker, timeline.decode_worker
            written, replaced = len(session.samples[0].tokens), timeline.replacements
            cached = session.usage_cached_tokens
            if error is not None and not missed:
                missed = timeline.reached.value
        self.numbers.append(asked.number)
        times, counts, names, code = self.times, self.counts, self.names, self._code
        times["arrived_s"].append(asked.at_s)
        times["ttft_s"].append(ttft_s)
        times["tpot_s"].append(tpot_s)
        times["longest_gap_s"].append(gap_s)
        for stage_spent in Stage:
            times[f"{stage_spent.value}_s"].append(spent.get(stage_spent, math.nan))
        times["ended_s"].append(now_s)
        counts["prompt_tokens"].append(asked.prompt_tokens)
        counts["output_tokens"].append(written)
        counts["replacements"].append(replaced)
        counts["cached_tokens"].append(cached)
        names["slo_class"].append(code(asked.slo_class))
        names["outcome"].append(code(FINISHED if error is None else type(error).__name__))
        names["prefill_worker"].append(code(workers[0]))
        names["decode_worker"].append(code(workers[1]))
        names["slo_missed_by"].append(code(missed))

    def column(self, name: str) -> Sequence[float] | Sequence[int] | Sequence[str]:
        """A column in order of the ends."""
        if name == "number":
            return self.numbers
        if name in self.names:
            return [self._known_names[code] for code in self.names[name]]
        return self.times[name] if name in self.times else self.counts[name]

    def csv_lines(self) -> Iterator[str]:
        """Header and rows, in order of the requests' numbers; nan where there is no value."""
        yield ",".join(COLUMNS) + "\n"
        columns = [self.column(name) for name in COLUMNS]
        for row in sorted(range(len(self)), key=self.numbers.__getitem__):
            yield ",".join([str(column[row]) for column in columns]) + "\n"

    def times_of(self, name: str, slo_class: str) -> list[float]:
        """A column of times of one class's requests that have a first token."""
        wanted = self._name_codes.get(slo_class)
        kept = [code == wanted for code in self.names["slo_class"]]
        return [value for value in compress(self.times[name], kept) if not math.isnan(value)]

    def good(self, slo_class: str) -> tuple[int, int]:
        """Requests of a class that met all their objectives, and all that were offered."""
        wanted, met = self._name_codes.get(slo_class), self._name_codes.get("")
        pairs = zip(self.names["slo_class"], self.names["slo_missed_by"], strict=True)
        missed_by = [missed for code, missed in pairs if code == wanted]
        return sum(missed == met for missed in missed_by), len(missed_by)

    def _code(self, name: str) -> int:
        code = self._name_codes.get(name)
        if code is None:
            code = self._name_codes[name] = len(self._known_names)
            self._known_names.append(name)
        return code


@dataclass(frozen=True, slots=True)
class Attainment:
    """Share of offered requests that were good, with the Wilson score interval of the confidence asked."""

    good: int
    offered: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Good over offered; 0 when none was offered."""
        return self.good / self.offered if self.offered else 0.0


def attainment(good: int, offered: int, confidence: float = 0.95) -> Attainment:
    """With Wilson's interval (Wilson 1927), which holds near 0 and 1, too."""
    if offered == 0:
        return Attainment(0, 0, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = good / offered, z * z / offered
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / offered + weight / (4 * offered)) / (1 + weight)
    return Attainment(good, offered, max(0.0, middle - half), min(1.0, middle + half))


def quantile(values: Iterable[float], share: float) -> float:
    """The value that this share of the values doesn't exceed, interpolated; nan without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
