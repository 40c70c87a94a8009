"""Edge: runs sim.yaml: reads its trace, seeds its draws, and gives the records."""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from planner.placements.placement import WorkerKind
from planner.plan.file import LengthSection
from planner.plan.workers import PlannedWorkers
from planner.simulate.file import PoolSection, SimFile, SimWorkloadSection
from planner.simulation.setup import Drive, Fault, FaultKind, RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import SimulationResult, simulate
from planner.workloads.arrivals import ArrivalProcess, arrival_times_s
from planner.workloads.trace_file import read_trace_file
from planner.workloads.traces import TraceRow
from planner.workloads.workload import (
    Lognormal,
    SimRequest,
    empirical_lengths,
    fixed_lengths,
    lognormal_lengths,
    rate_scaled,
    requests,
)
from tandem.errors import ConfigError
from tandem.ids import WorkerId
from tandem.slo import SloClass


def run_file(file: SimFile, folder: Path, keep_timeline: bool = False) -> SimulationResult:
    """Paths in the file are relative to `folder`. Raises ConfigError, InvalidRequest."""
    return simulate(setup_of(file, folder, keep_timeline), workload_of(file, folder))


def setup_of(file: SimFile, folder: Path, keep_timeline: bool = False) -> Setup:
    """The cluster of a file. Raises ConfigError for hardware, files and names without sense."""
    workers = PlannedWorkers(file, folder)
    limits = file.router
    rules = RouterRules(
        tuple(SloClass(c.name, c.ttft_s, c.tpot_s, c.longest_gap_s) for c in file.classes),
        **limits.model_dump(),
    )
    faults = tuple(Fault(f.at_s, FaultKind(f.kind), WorkerId(f.worker)) for f in file.faults)
    numbers = {role: count() for role in SimRole}
    specs = tuple(
        _spec(file, workers, pool, next(numbers[SimRole(pool.role)]))
        for pool in file.workers
        for _ in range(pool.count)
    )
    return Setup(
        specs,
        rules,
        workers.transfer(),
        faults,
        drive=Drive(file.drive),
        keep_timeline=keep_timeline,
        early=workers.early(),
        hops=workers.hops(),
    )


def workload_of(file: SimFile, folder: Path) -> Iterator[SimRequest]:
    """The requests of a file, drawn as they are asked for. Raises ConfigError, InvalidRequest."""
    asked = file.workload
    rows: Sequence[TraceRow] | Iterator[TraceRow]
    if asked.trace is None:
        rows = _drawn_lengths(asked, random.Random(f"{file.seed} lengths"))
    else:
        read = read_trace_file(folder / asked.trace, asked.requests if asked.lengths == "in_order" else None)
        rows = read
        if asked.lengths == "empirical":
            rows = empirical_lengths(read, random.Random(f"{file.seed} lengths"))
        if asked.arrivals == "trace":
            return _with_classes(file, rows, rate_scaled(read, asked.rate_rps))
    if asked.rate_rps is None:
        raise ConfigError("workload: rate_rps is needed")
    draws = random.Random(f"{file.seed} arrivals")
    times_s = arrival_times_s(ArrivalProcess(asked.arrivals), asked.rate_rps, draws, asked.variation)
    return _with_classes(file, rows, times_s)


def _with_classes(
    file: SimFile, rows: Sequence[TraceRow] | Iterator[TraceRow], times_s: Sequence[float] | Iterator[float]
) -> Iterator[SimRequest]:
    shares = {c.name: c.share for c in file.classes}
    made = requests(rows, times_s, shares, random.Random(f"{file.seed} classes"))
    return islice(made, file.workload.requests)


def _spec(file: SimFile, workers: PlannedWorkers, pool: PoolSection, number: int) -> WorkerSpec:
    file.nodes(pool.device)
    kind = WorkerKind(pool.device, pool.tp, pool.pp)
    latency = workers.latency(kind)
    if latency is None:
        raise ConfigError(f"workers: there are no step times for {kind}")
    blocks = pool.pool_blocks or workers.kv_tokens(kind) // file.block_size
    if blocks < 1:
        raise ConfigError(f"workers: the model does not fit into {kind}; it needs more or larger devices")
    return WorkerSpec(
        WorkerId(f"{pool.role}-{number}"),
        SimRole(pool.role),
        latency,
        blocks,
        pool.node,
        file.block_size,
        pool.token_budget,
        pool.max_batch,
        prefix_cache=pool.prefix_cache,
        policy=pool.policy,
        whole_prompts=pool.whole_prompts,
    )


def _drawn_lengths(asked: SimWorkloadSection, draws: random.Random) -> Iterator[TraceRow]:
    prompt, output = asked.prompt_tokens, asked.output_tokens
    if isinstance(prompt, int) and isinstance(output, int):
        return fixed_lengths(prompt, output)
    return lognormal_lengths(_lognormal(prompt), _lognormal(output), draws)


def _lognormal(section: LengthSection | int | None) -> Lognormal:
    if isinstance(section, LengthSection):
        return Lognormal(section.mean, section.variation, section.most)
    raise ConfigError("workload: prompt_tokens and output_tokens must both be numbers, or both distributions")
