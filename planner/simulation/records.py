"""Pure: what became of each simulated request, in columns, and what that says of the objectives."""

import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

from planner.workloads.workload import SimRequest
from router.timeline import Timeline
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


_TIMES = tuple(name for name in COLUMNS if name.endswith("_s"))
_COUNTS = ("prompt_tokens", "output_tokens", "replacements", "cached_tokens")
_NAMES = ("slo_class", "outcome", "prefill_worker", "decode_worker", "slo_missed_by")
_NOTHING_SPENT = dict.fromkeys(Stage, math.nan)


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many requests, from number `first` on, may miss their objectives before a run has shown enough."""

    missed: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended: with its timeline unless it was refused, and so many tokens written."""

    at_s: float
    timeline: Timeline | None
    tokens: int = 0
    cached_tokens: int = 0
    error: TandemError | None = None


class Records:
    """One row for each request offered; columns are in order of the requests' ends."""

    def __init__(self, classes: Sequence[SloClass], allowance: Allowance | None = None) -> None:
        self.classes = {slo.name: slo for slo in classes}
        self._first = sys.maxsize if allowance is None else allowance.first
        self._may_miss = 0 if allowance is None else allowance.missed
        self._numbers = array("q")
        self._times = array("d")
        self._counts = array("i")
        self._names = array("H")
        self._append_number = self._numbers.append
        self._append_times = self._times.extend
        self._append_counts = self._counts.extend
        self._append_names = self._names.extend
        self._name_codes: dict[str, int] = {}
        self._known_names: list[str] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, asked: SimRequest, ended: Ended) -> None:
        """A request ended, or was refused."""
        timeline, now_s = ended.timeline, ended.at_s
        ttft_s, tpot_s, gap_s, missed = math.nan, math.nan, math.nan, Stage.QUEUE.value
        spent, workers, replaced = _NOTHING_SPENT, ("", ""), 0
        if timeline is not None:
            spent = timeline.durations_s(now_s)
            stage = timeline.missed_by(self.classes[asked.slo_class], now_s)
            missed = "" if stage is None else stage.value
            if timeline.ttft_s is not None:
                ttft_s, tpot_s, gap_s = timeline.ttft_s, timeline.tpot_s, timeline.longest_gap_s
            workers, replaced = (timeline.prefill_worker, timeline.decode_worker), timeline.replacements
            if ended.error is not None and not missed:
                missed = timeline.reached.value
        if missed and asked.number >= self._first:
            self._may_miss -= 1
        code = self._code
        outcome = FINISHED if ended.error is None else type(ended.error).__name__
        self._append_number(asked.number)
        self._append_times((asked.at_s, ttft_s, tpot_s, gap_s, *spent.values(), now_s))
        self._append_counts((asked.prompt_tokens, ended.tokens, replaced, ended.cached_tokens))
        self._append_names(
            (code(asked.slo_class), code(outcome), code(workers[0]), code(workers[1]), code(missed))
        )

    @property
    def overdrawn(self) -> bool:
        """Whether more requests have missed their objectives than are allowed."""
        return self._may_miss < 0

    @property
    def numbers(self) -> Sequence[int]:
        """The requests' numbers."""
        return self._numbers

    @property
    def times(self) -> Mapping[str, Sequence[float]]:
        """The columns of seconds; nan where there is no value."""
        return {name: self._times[at :: len(_TIMES)] for at, name in enumerate(_TIMES)}

    @property
    def counts(self) -> Mapping[str, Sequence[int]]:
        """The columns of numbers of tokens, and of placements anew."""
        return {name: self._counts[at :: len(_COUNTS)] for at, name in enumerate(_COUNTS)}

    def names(self, name: str) -> list[str]:
        """A column of names."""
        return [self._known_names[code] for code in self._codes(name)]

    def column(self, name: str) -> Sequence[float] | Sequence[int] | Sequence[str]:
        """Any column of COLUMNS."""
        if name == "number":
            return self._numbers
        if name in _NAMES:
            return self.names(name)
        return self.times[name] if name in _TIMES else self.counts[name]

    def _codes(self, name: str) -> Sequence[int]:
        return self._names[_NAMES.index(name) :: len(_NAMES)]

    def csv_lines(self) -> Iterator[str]:
        """Header and rows, in order of the requests' numbers; nan where there is no value."""
        yield ",".join(COLUMNS) + "\n"
        columns = [self.column(name) for name in COLUMNS]
        for row in sorted(range(len(self)), key=self._numbers.__getitem__):
            yield ",".join([str(column[row]) for column in columns]) + "\n"

    def times_of(self, name: str, slo_class: str) -> list[float]:
        """The values of a column of times of one class; requests without one are left out."""
        wanted = self._name_codes.get(slo_class)
        kept = [code == wanted for code in self._codes("slo_class")]
        return [value for value in compress(self.times[name], kept) if not math.isnan(value)]

    def good(self, slo_class: str) -> tuple[int, int]:
        """Requests of a class that met all their objectives, and all that were offered."""
        wanted, met = self._name_codes.get(slo_class), self._name_codes.get("")
        pairs = zip(self._codes("slo_class"), self._codes("slo_missed_by"), strict=True)
        missed_by = [missed for code, missed in pairs if code == wanted]
        return sum(missed == met for missed in missed_by), len(missed_by)

    def _code(self, name: str) -> int:
        code = self._name_codes.get(name)
        if code is None:
            code = self._name_codes[name] = len(self._known_names)
            self._known_names.append(name)
        return code
