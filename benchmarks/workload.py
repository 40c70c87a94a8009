"""Pure: plans the requests of a load: when each comes, what it asks, how much it wants."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from planner.workloads.arrivals import ArrivalProcess, Draws, arrival_times_s
from planner.workloads.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from tandem.errors import InvalidRequest

FIRST_PLAIN_TOKEN = 256
"""Ids below it are special tokens or single bytes in the vocabularies that we know."""


class TokenDraws(Draws, Protocol):
    """The part of random.Random that draws prompts and classes; the caller seeds it."""

    def randrange(self, start: int, stop: int) -> int:
        """Uniform in [start, stop)."""
        ...

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Fits a trace to a machine: lengths are multiplied by `scale`, then cut to the limits."""

    scale: float
    max_prompt_tokens: int
    max_output_tokens: int
    vocabulary_tokens: int

    def prompt_tokens(self, tokens: int) -> int:
        """At least one."""
        return max(1, min(self.max_prompt_tokens, round(tokens * self.scale)))

    def output_tokens(self, tokens: int) -> int:
        """At least one."""
        return max(1, min(self.max_output_tokens, round(tokens * self.scale)))


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request; `at_s` counts from the load's start."""

    at_s: float
    token_ids: tuple[int, ...]
    output_tokens: int
    slo_class: str


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come. `rate_rps` None keeps a trace's own times."""

    process: ArrivalProcess
    rate_rps: float | None
    variation: float = 1.0


def plan(
    rows: Sequence[TraceRow],
    arrivals: Arrivals,
    limits: LengthLimits,
    class_shares: Mapping[str, float],
    seeded: Callable[[str], TokenDraws],
) -> tuple[PlannedRequest, ...]:
    """One request a row. `seeded(name)` gives the source of randomness of that name, always the same one.

    A trace's own times are stretched so that the mean rate is `rate_rps`; rows without times get drawn ones.
    Raises InvalidRequest when rows have no times and no rate is given, or shares are not positive.
    """
    times_s = _times_s(rows, arrivals, seeded("arrivals"))
    classes = _classes(class_shares, seeded("classes"))
    return tuple(
        PlannedRequest(
            at_s,
            _prompt(row, number, limits, seeded),
            limits.output_tokens(row.output_tokens),
            next(classes),
        )
        for number, (row, at_s) in enumerate(zip(rows, times_s, strict=True))
    )


def _times_s(rows: Sequence[TraceRow], arrivals: Arrivals, draws: Draws) -> list[float]:
    own = [row.arrived_s for row in rows if row.arrived_s is not None]
    if len(own) < len(rows) or not rows:
        if arrivals.rate_rps is None:
            raise InvalidRequest("The load has no arrival times of its own: a rate is needed.", "rate")
        drawn = arrival_times_s(arrivals.process, arrivals.rate_rps, draws, arrivals.variation)
        return list(islice(drawn, len(rows)))
    start_s, span_s = own[0], own[-1] - own[0]
    if arrivals.rate_rps is None or span_s <= 0:
        return [time_s - start_s for time_s in own]
    stretch = (len(own) - 1) / arrivals.rate_rps / span_s
    return [(time_s - start_s) * stretch for time_s in own]


def _classes(shares: Mapping[str, float], draws: TokenDraws) -> Iterator[str]:
    total = sum(shares.values())
    if not 0 < total < math.inf or min(shares.values()) < 0:
        raise InvalidRequest("Class shares must be finite, not negative, and one positive.", "class")
    while True:
        left = draws.random() * total
        for name, share in shares.items():
            left -= share
            if left < 0:
                yield name
                break


def _prompt(
    row: TraceRow, number: int, limits: LengthLimits, seeded: Callable[[str], TokenDraws]
) -> tuple[int, ...]:
    """Random tokens; blocks of equal prefix ids are equal, so that a prefix cache sees what the trace had."""
    wanted = limits.prompt_tokens(row.prompt_tokens)
    block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * limits.scale))
    tokens: list[int] = []
    for identity in row.prefix_ids:
        if len(tokens) >= wanted:
            break
        tokens += _tokens(block_tokens, limits.vocabulary_tokens, seeded(f"block {identity}"))
    if len(tokens) < wanted:
        tokens += _tokens(wanted - len(tokens), limits.vocabulary_tokens, seeded(f"prompt {number}"))
    return tuple(tokens[:wanted])


def _tokens(count: int, vocabulary: int, draws: TokenDraws) -> list[int]:
    lowest = FIRST_PLAIN_TOKEN if vocabulary > FIRST_PLAIN_TOKEN else 0
    return [draws.randrange(lowest, vocabulary) for _ in range(count)]
