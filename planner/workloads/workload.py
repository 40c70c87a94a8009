"""Pure: the requests of a simulation: when each comes, how long its prompt and answer are, its class."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

from planner.workloads.arrivals import Draws
from planner.workloads.traces import MOONCAKE_BLOCK_TOKENS, TraceRow, check_sorted
from tandem.errors import InvalidRequest

UNIQUE_FROM = 1 << 31
"""Token ids from here on belong to one prompt alone; those below to blocks that prompts share."""


class SimRequest(NamedTuple):
    """One request; `at_s` counts from the simulation's start. `prefix_ids` as in TraceRow."""

    number: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str
    prefix_ids: tuple[int, ...] = ()


class LengthDraws(Draws, Protocol):
    """The part of random.Random that draws lengths and classes; the caller seeds it."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def randrange(self, start: int, stop: int) -> int:
        """Uniform in [start, stop)."""
        ...

    def lognormvariate(self, mu: float, sigma: float) -> float:
        """The exponential of a normal draw."""
        ...


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lengths in tokens with this mean and coefficient of variation, cut to [1, most]."""

    mean: float
    variation: float
    most: int

    def draw(self, draws: LengthDraws) -> int:
        """One length. Raises InvalidRequest unless mean and variation are positive."""
        if not (self.mean > 0 and self.variation > 0 and self.most >= 1):
            raise InvalidRequest("A lognormal length needs positive mean, variation and limit.", "lengths")
        spread = math.log(1.0 + self.variation**2)
        drawn = draws.lognormvariate(math.log(self.mean) - spread / 2, math.sqrt(spread))
        return max(1, min(self.most, round(drawn)))


def fixed_lengths(prompt_tokens: int, output_tokens: int) -> Iterator[TraceRow]:
    """Endless equal rows. Raises InvalidRequest unless both lengths are at least 1."""
    if prompt_tokens < 1 or output_tokens < 1:
        raise InvalidRequest("Prompt and answer need at least one token each.", "lengths")
    return repeat(TraceRow(None, prompt_tokens, output_tokens))


def lognormal_lengths(prompt: Lognormal, output: Lognormal, draws: LengthDraws) -> Iterator[TraceRow]:
    """Endless rows with independent lengths."""
    while True:
        yield TraceRow(None, prompt.draw(draws), output.draw(draws))


def empirical_lengths(rows: Sequence[TraceRow], draws: LengthDraws) -> Iterator[TraceRow]:
    """Endless rows drawn with replacement, prompt and answer together, without times or prefixes."""
    if not rows:
        raise InvalidRequest("The trace is empty: no lengths can be drawn from it.", "trace")
    while True:
        row = rows[draws.randrange(0, len(rows))]
        yield TraceRow(None, row.prompt_tokens, row.output_tokens)


def rate_scaled(rows: Sequence[TraceRow], rate_rps: float | None) -> list[float]:
    """A trace's own times from its first request on, stretched to a mean rate; None keeps them.

    Raises InvalidRequest for a trace that is empty, unsorted or without times, and for a rate that isn't
    positive.
    """
    if not rows:
        raise InvalidRequest("The trace is empty: at least one request is needed.", "trace")
    times_s = [row.arrived_s for row in rows if row.arrived_s is not None]
    if len(times_s) < len(rows):
        raise InvalidRequest("The trace has no arrival times: arrivals and a rate are needed.", "trace")
    check_sorted(rows)
    start_s, span_s = times_s[0], times_s[-1] - times_s[0]
    if rate_rps is None:
        return [time_s - start_s for time_s in times_s]
    if not (rate_rps > 0 and math.isfinite(rate_rps)):
        raise InvalidRequest(f"The rate must be positive and finite, not {rate_rps:g}.", "rate")
    if span_s <= 0:
        raise InvalidRequest("All requests of the trace come at once: its rate can't be scaled.", "trace")
    stretch = (len(times_s) - 1) / rate_rps / span_s
    return [(time_s - start_s) * stretch for time_s in times_s]


def requests(
    rows: Iterable[TraceRow], times_s: Iterable[float], class_shares: Mapping[str, float], draws: LengthDraws
) -> Iterator[SimRequest]:
    """One request for each row and time, as long as there are both; nothing is kept.

    A row without a prompt or an answer is read as one of one token. Raises InvalidRequest for shares that are
    not all positive.
    """
    classes = _classes(class_shares, draws)
    for number, (row, at_s) in enumerate(zip(rows, times_s, strict=False)):
        prompt, output = max(1, row.prompt_tokens), max(1, row.output_tokens)
        yield SimRequest(number, at_s, prompt, output, classes(), row.prefix_ids)


def prompt_ids(request: SimRequest, shared: bool) -> Sequence[int]:
    """Token ids of a prompt, equal where prefix ids are equal and unique elsewhere.

    Unless `shared` prompts are compared with each other, only their number matters.
    """
    if not shared:
        return range(request.prompt_tokens)
    known: list[int] = []
    for identity in request.prefix_ids:
        start = identity * MOONCAKE_BLOCK_TOKENS % UNIQUE_FROM
        known.extend(range(start, start + MOONCAKE_BLOCK_TOKENS))
    rest = max(0, request.prompt_tokens - len(known))
    # Ids come again after 2^31 prompt tokens, when the pools have long forgotten them.
    start = UNIQUE_FROM + request.number * 4099 % (UNIQUE_FROM - rest)
    return (*known[: request.prompt_tokens], *range(start, start + rest))


def _classes(shares: Mapping[str, float], draws: LengthDraws) -> Callable[[], str]:
    if not shares or not all(share > 0 and math.isfinite(share) for share in shares.values()):
        raise InvalidRequest("Every SLO class needs a positive share of the requests.", "classes")
    names, total = list(shares), sum(shares.values())
    if len(names) == 1:
        return lambda: names[0]

    def drawn() -> str:
        left = draws.random() * total
        for name in names:
            left -= shares[name]
            if left < 0:
                return name
        return names[-1]

    return drawn
