"""Pure: what one prefill and one decode worker of a live profile would do with a load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.forecast.live_profile import LiveProfile
from planner.forecast.shared_machine import MachineSteps, MachineTransfer, SharedMachine, Side
from planner.simulation.records import Records
from planner.simulation.setup import Drive, RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import Simulation
from planner.step_times.profile_model import ProfileModel
from planner.workloads.workload import SimRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass

_PREFILL, _DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


@dataclass(frozen=True, slots=True)
class PairLimits:
    """The pair's limits, as in cluster.yaml."""

    pool_blocks: int = 1024
    token_budget: int = 512
    max_batch: int = 64


@dataclass(frozen=True, slots=True)
class Forecast:
    """The times that clients would see, by the number of the request; the share that met its objectives; and
    the busy share of each worker. A request of one token has no time per token.
    """

    ttft_s: Mapping[int, float]
    tpot_s: Mapping[int, float]
    attainment: float
    prefill_busy: float
    decode_busy: float


def forecast(
    profile: LiveProfile, requests: Sequence[SimRequest], slo: SloClass, limits: PairLimits
) -> Forecast:
    """Simulates the pair, step by step, under requests of the one class. Raises what a simulation raises."""
    machine = SharedMachine(profile)
    simulation = Simulation(_setup(profile, slo, limits, machine), requests)
    machine.now_s = lambda: simulation.now_s
    result = simulation.run()
    span_s = max(result.records.times["ended_s"]) - requests[0].at_s
    prefill_busy, decode_busy = (result.used[worker].busy_s / span_s for worker in (_PREFILL, _DECODE))
    return _seen(result.records, profile, slo, prefill_busy, decode_busy)


def _setup(profile: LiveProfile, slo: SloClass, limits: PairLimits, machine: SharedMachine) -> Setup:
    alone = ProfileModel(profile)

    def worker(worker_id: WorkerId, role: SimRole, side: Side) -> WorkerSpec:
        steps = MachineSteps(machine, side, alone)
        return WorkerSpec(
            worker_id,
            role,
            steps,
            limits.pool_blocks,
            block_size=profile.block_size,
            token_budget=limits.token_budget,
            max_batch=limits.max_batch,
            left_s=steps.left_s,
        )

    workers = (
        worker(_PREFILL, SimRole.PREFILL, Side.PREFILL),
        worker(_DECODE, SimRole.DECODE, Side.DECODE),
    )
    return Setup(workers, RouterRules((slo,)), MachineTransfer(machine), drive=Drive.STEPS)


def _seen(
    records: Records, profile: LiveProfile, slo: SloClass, prefill_busy: float, decode_busy: float
) -> Forecast:
    """Adds the front door, which is slower the more the decode worker is at work."""
    beside_s = profile.company[0].front_door_s
    door_s = profile.front_door_s + decode_busy * (beside_s - profile.front_door_s)
    times = records.times
    rows = zip(times["ttft_s"], times["tpot_s"], times["longest_gap_s"], strict=True)
    met = [
        ttft_s + door_s <= slo.ttft_s and tpot_s <= slo.tpot_s and gap_s <= slo.longest_gap_s
        for ttft_s, tpot_s, gap_s in rows
    ]
    written = zip(records.numbers, times["tpot_s"], records.counts["output_tokens"], strict=True)
    return Forecast(
        {number: ttft_s + door_s for number, ttft_s in zip(records.numbers, times["ttft_s"], strict=True)},
        {number: tpot_s for number, tpot_s, tokens in written if tokens > 1},
        sum(met) / len(met),
        prefill_busy,
        decode_busy,
    )
