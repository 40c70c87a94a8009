"""Pure: a request's times by stage, and whether they met its objectives (field-notes: how goodput counts).

A token counts as emitted when it is in order at the router, since it is passed on at once.
"""

from dataclasses import dataclass, field

from router.request import TimelineReport
from tandem.slo import SloClass, Stage


@dataclass(frozen=True, slots=True)
class Pace:
    """When tokens that are told of together had come one by one: the first, and the longest gap since."""

    first_s: float
    longest_gap_s: float


@dataclass(slots=True)
class SampleTimes:
    """Emission times of one sample, in seconds on the router's clock."""

    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    longest_gap_s: float = 0.0
    longest_gap_before: int = 0
    """Count of tokens emitted before the longest gap."""

    def emitted(self, count: int, now_s: float) -> float | None:
        """Notes `count` tokens that came together; returns the gap before them, None for the first."""
        if self.tokens == 0:
            self.first_s = self.last_s = now_s
            self.tokens = count
            return None
        gap_s = now_s - self.last_s
        if gap_s > self.longest_gap_s:
            self.longest_gap_s = gap_s
            self.longest_gap_before = self.tokens
        self.last_s = now_s
        self.tokens += count
        return gap_s

    def paced(self, count: int, now_s: float, pace: Pace) -> float | None:
        """Notes `count` tokens that came one by one until now; returns the gap before the first of them."""
        gap_s = self.emitted(1, pace.first_s)
        if pace.longest_gap_s > self.longest_gap_s:
            self.longest_gap_s = pace.longest_gap_s
            self.longest_gap_before = self.tokens
        self.last_s = now_s
        self.tokens += count - 1
        return gap_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(slots=True)
class Timeline:
    """The stamps of one request; the first of each stage stays when the request is placed anew."""

    arrived_s: float
    samples: list[SampleTimes]
    prefill_sent_s: float | None = None
    first_token_s: float | None = None
    landed_s: float | None = None
    last_token_s: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    transports: list[str] = field(default_factory=list)
    handoff_bytes: int = 0
    replacements: int = 0

    def prefill_sent(self, worker: str, now_s: float) -> None:
        """A prefill worker was given the prompt."""
        self.prefill_worker = worker
        if self.prefill_sent_s is None:
            self.prefill_sent_s = now_s

    def landed(self, worker: str, transport: str, moved_bytes: int, now_s: float) -> None:
        """A decode worker holds the KV."""
        self.decode_worker = worker
        self.transports.append(transport)
        self.handoff_bytes += moved_bytes
        if self.landed_s is None:
            self.landed_s = now_s

    def emitted(self, sample: int, count: int, now_s: float, pace: Pace | None = None) -> float | None:
        """Tokens of a sample became due to the client; returns the gap before them, if there was one."""
        if self.first_token_s is None:
            self.first_token_s = now_s if pace is None else pace.first_s
        self.last_token_s = now_s
        times = self.samples[sample]
        return times.emitted(count, now_s) if pace is None else times.paced(count, now_s, pace)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None before it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first, mean of the samples that have one; else 0."""
        values = [value for sample in self.samples if (value := sample.tpot_s) is not None]
        return sum(values) / len(values) if values else 0.0

    @property
    def longest_gap_s(self) -> float:
        """Longest gap between two emissions of a sample."""
        return max((sample.longest_gap_s for sample in self.samples), default=0.0)

    def durations_s(self, now_s: float) -> dict[Stage, float]:
        """Seconds in each stage; stages not reached are 0, the one under way counts until `now_s`."""
        sent_s = now_s if self.prefill_sent_s is None else self.prefill_sent_s
        first_s = now_s if self.first_token_s is None else max(self.first_token_s, sent_s)
        last_s = now_s if self.last_token_s is None else max(self.last_token_s, first_s)
        landed_s = first_s if self.landed_s is None else min(max(self.landed_s, first_s), last_s)
        return {
            Stage.QUEUE: sent_s - self.arrived_s,
            Stage.PREFILL: first_s - sent_s,
            Stage.HANDOFF: landed_s - first_s,
            Stage.DECODE: last_s - landed_s,
        }

    @property
    def reached(self) -> Stage:
        """The stage under way, or the last one when the request has ended."""
        if self.prefill_sent_s is None:
            return Stage.QUEUE
        if self.first_token_s is None:
            return Stage.PREFILL
        return Stage.HANDOFF if self.landed_s is None else Stage.DECODE

    def missed_by(self, slo: SloClass, now_s: float) -> Stage | None:
        """The stage that caused the first objective missed (TTFT, then gap, then TPOT); None if all are met.

        A late first token is blamed on the longer of queue and prefill; a gap after the first token, and a
        TPOT that would have held without the hand-off, on the hand-off; the rest on decoding.
        """
        spent = self.durations_s(now_s)
        if self.ttft_s is None or self.ttft_s > slo.ttft_s:
            return Stage.QUEUE if spent[Stage.QUEUE] >= spent[Stage.PREFILL] else Stage.PREFILL
        worst = max(self.samples, key=lambda sample: sample.longest_gap_s)
        if worst.longest_gap_s > slo.longest_gap_s:
            after_first = worst.longest_gap_before == 1 and self.landed_s is not None
            return Stage.HANDOFF if after_first else Stage.DECODE
        if self.tpot_s > slo.tpot_s:
            tokens = max(sample.tokens for sample in self.samples)
            without_handoff_s = self.tpot_s - spent[Stage.HANDOFF] / (tokens - 1)
            return Stage.HANDOFF if without_handoff_s <= slo.tpot_s else Stage.DECODE
        return None

    def report(self, slo: SloClass, now_s: float) -> TimelineReport:
        """The finished request's timeline."""
        spent = self.durations_s(now_s)
        missed = self.missed_by(slo, now_s)
        return TimelineReport(
            queue_s=spent[Stage.QUEUE],
            prefill_s=spent[Stage.PREFILL],
            handoff_s=spent[Stage.HANDOFF],
            decode_s=spent[Stage.DECODE],
            ttft_s=self.ttft_s or 0.0,
            tpot_s=self.tpot_s,
            longest_gap_s=self.longest_gap_s,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            transport=self.transports[-1] if self.transports else "",
            handoff_bytes=self.handoff_bytes,
            replacements=self.replacements,
            slo_met=missed is None,
            slo_missed_by="" if missed is None else missed.value,
        )
