"""Edge: the lengths of a plan's requests: drawn from the file's distributions, or read from its trace."""

import random
from itertools import islice
from pathlib import Path

from planner.placements.bound import Lengths
from planner.plan.file import LengthSection, WorkloadSection
from planner.workloads.trace_file import read_trace_file
from planner.workloads.workload import Lognormal, lognormal_lengths
from tandem.errors import ConfigError

_SEED = 7


def read_lengths(workload: WorkloadSection, folder: Path) -> Lengths:
    """As many requests as a run has. Raises ConfigError, InvalidRequest for a trace that is none or empty."""
    if workload.trace is not None:
        return _of_trace(folder / workload.trace, workload.requests)
    if workload.prompt_tokens is None or workload.output_tokens is None:
        raise ConfigError("workload: give either trace, or prompt_tokens and output_tokens")
    rows = lognormal_lengths(
        _lognormal(workload.prompt_tokens), _lognormal(workload.output_tokens), random.Random(_SEED)
    )
    return Lengths(tuple((row.prompt_tokens, row.output_tokens) for row in islice(rows, workload.requests)))


def buckets_of(lengths: Lengths, count: int) -> tuple[Lengths, ...]:
    """Requests in `count` buckets of about equal size by the length of their prompt, each in the old
    order."""
    if count == 1:
        return (lengths,)
    ordered = sorted(prompt for prompt, _ in lengths.pairs)
    edges = [ordered[len(ordered) * number // count] for number in range(1, count)]
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for pair in lengths.pairs:
        buckets[sum(pair[0] >= edge for edge in edges)].append(pair)
    return tuple(Lengths(tuple(bucket)) for bucket in buckets if bucket)


def _of_trace(path: Path, limit: int) -> Lengths:
    rows = read_trace_file(path, limit)
    return Lengths(tuple([(max(1, row.prompt_tokens), max(1, row.output_tokens)) for row in rows]))


def _lognormal(section: LengthSection) -> Lognormal:
    return Lognormal(section.mean, section.variation, section.most)
