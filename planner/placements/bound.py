"""Pure: about the most that a candidate reaches, from formulas alone; it decides which are simulated.

Prompts wait in a queue like M/D/1 (DistServe, OSDI'24, section 3): with utilisation rho and service D its
mean wait is rho D / (2 (1 - rho)), and a share rho of requests waits at all, taken as exponential.
Batching is granted for free, n workers count as one that is n times as fast. Decodes: by Little's law a
worker with a batch of B in steps of s seconds ends B / (s * output tokens) requests a second; B is the
largest batch whose step meets the time per token and whose KV fits.

So it errs to the optimistic side, but is no strict bound: it holds the mean decode step to the objective,
which only the share asked for must meet, a finite run begins empty, and 64 prompts stand for all. The search
grants it slack for that, and looks above it where a candidate reaches it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

from planner.latency import LatencyModel, PromptPart, StepShape
from planner.placements.placement import Candidate, Slo, WorkerKind
from planner.placements.space import Workers

_PROMPTS_TOGETHER = 32
_SAMPLED = 64
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests of a workload by (prompt tokens, output tokens), in the order they come."""

    pairs: tuple[tuple[int, int], ...]

    @property
    def longest_tokens(self) -> int:
        """Tokens of the largest request."""
        return max(prompt + output for prompt, output in self.pairs)

    @property
    def mean_output(self) -> float:
        """Output tokens of a request."""
        return sum(output for _, output in self.pairs) / len(self.pairs)

    @property
    def mean_context(self) -> float:
        """Tokens read for one output token, over all output tokens: long answers count more."""
        steps = sum(output for _, output in self.pairs) or 1
        return sum(output * (prompt + output / 2) for prompt, output in self.pairs) / steps

    @property
    def prompts(self) -> tuple[int, ...]:
        """Prompt lengths, ascending, at most 64 of them evenly taken."""
        ordered = sorted(prompt for prompt, _ in self.pairs)
        step = max(1, len(ordered) // _SAMPLED)
        return tuple(ordered[step // 2 :: step])


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """What one decode worker does at most, and whether memory rather than time holds its batch."""

    rate_rps: float
    batch: int
    step_s: float
    held_by_memory: bool


class Bounds:
    """Bounds of candidates under one workload and SLO; each kind of worker is looked at once."""

    def __init__(self, workers: Workers, lengths: Lengths, slo: Slo, max_batch: int) -> None:
        self._workers, self._lengths, self._slo, self._max_batch = workers, lengths, slo, max_batch
        self._decode: dict[WorkerKind, DecodeLimit] = {}
        self._prefill: dict[tuple[WorkerKind, int], float] = {}
        self._service: dict[WorkerKind, tuple[float, tuple[float, ...]]] = {}

    def rate_rps(self, candidate: Candidate) -> float:
        """Requests a second that the candidate hardly exceeds; 0 when it misses the SLO even when idle."""
        first_tokens = self.prefill_rps(candidate.prefill, candidate.prefill_workers)
        if candidate.decode is not None:
            return min(first_tokens, candidate.decode_workers * self.decode(candidate.decode).rate_rps)
        limit = self.decode(candidate.prefill)
        if limit.rate_rps == 0 or first_tokens == 0:
            return 0.0
        service_s, _ = self._services(candidate.prefill)
        return min(first_tokens, candidate.prefill_workers / (service_s + 1 / limit.rate_rps))

    def prefill_rps(self, kind: WorkerKind, count: int) -> float:
        """Rate at which the share asked for still meets the time to first token."""
        key = (kind, count)
        if key not in self._prefill:
            service_s, times = self._services(kind)
            reached = _prompt_attainment(service_s / count, times, self._slo.ttft_s)
            self._prefill[key] = _largest(reached, self._slo.attainment, count / service_s)
        return self._prefill[key]

    def idle_ttft_s(self, kind: WorkerKind) -> float:
        """The time to first token that the share asked for meets without any load."""
        times = sorted(self._services(kind)[1])
        return times[min(len(times) - 1, int(self._slo.attainment * len(times)))]

    def idle_tpot_s(self, kind: WorkerKind) -> float:
        """Time of a decode step of one sequence with the mean context."""
        return self._step_s(self._model(kind), 1)

    def decode(self, kind: WorkerKind) -> DecodeLimit:
        """The limit of a decode worker."""
        if kind not in self._decode:
            self._decode[kind] = self._decode_limit(kind)
        return self._decode[kind]

    def _decode_limit(self, kind: WorkerKind) -> DecodeLimit:
        model, context = self._model(kind), self._lengths.mean_context
        in_memory = int(self._workers.kv_tokens(kind) / context)
        most = max(1, min(self._max_batch, in_memory))
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._step_s(model, middle) <= self._slo.tpot_s:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            return DecodeLimit(0.0, 0, self._step_s(model, 1), held_by_memory=False)
        step_s = self._step_s(model, low)
        rate = low / (max(1.0, self._lengths.mean_output - 1) * step_s)
        return DecodeLimit(rate, low, step_s, low == in_memory < self._max_batch)

    def _step_s(self, model: LatencyModel, batch: int) -> float:
        return model.step_s(StepShape((), batch, int(batch * self._lengths.mean_context)))

    def _services(self, kind: WorkerKind) -> tuple[float, tuple[float, ...]]:
        """Time of a prompt within a large batch, and the times of single prompts."""
        if kind not in self._service:
            model, prompts = self._model(kind), self._lengths.prompts
            stride = max(1, len(prompts) // _PROMPTS_TOGETHER)
            spread = prompts[stride // 2 :: stride]
            # A trace of few requests stands for a stream of them.
            together = tuple([PromptPart(tokens) for tokens in spread] * -(-_PROMPTS_TOGETHER // len(spread)))
            service_s = model.stage_s(StepShape(together)) / len(together)
            single = tuple(model.step_s(StepShape((PromptPart(tokens),))) for tokens in prompts)
            self._service[kind] = (service_s, single)
        return self._service[kind]

    def _model(self, kind: WorkerKind) -> LatencyModel:
        model = self._workers.latency(kind)
        if model is None:
            raise ValueError(f"{kind} has no latency model")
        return model


def _prompt_attainment(service_s: float, times: Sequence[float], ttft_s: float) -> Callable[[float], float]:
    """Share of prompts whose wait and own time stay within the objective, as a function of the rate."""

    def reached(rate_rps: float) -> float:
        busy = rate_rps * service_s
        if busy >= 1:
            return 0.0
        decay = 2 * (1 - busy) / service_s
        met = (1 - busy * exp(-decay * (ttft_s - time_s)) for time_s in times if time_s <= ttft_s)
        return sum(met) / len(times)

    return reached


def _largest(reached: Callable[[float], float], asked: float, most: float) -> float:
    """Largest rate that reaches `asked`; 0 when none does."""
    if reached(0.0) < asked:
        return 0.0
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) >= asked else (low, middle)
    return low
