"""Pure: small placement problems, and a formula in the place of the simulator."""

from math import exp

from planner.latency import LatencyModel, TransferModel
from planner.placements.bound import Bounds, Lengths
from planner.placements.placement import Candidate, NodeGroup, Objective, Reached, Slo, WorkerKind
from planner.placements.space import Space
from planner.step_times.distserve_fit import DistServeFit
from planner.step_times.transfer_links import LinkTransfer, link_of_rate
from tests.planner.distserve_figures import opt_13b

LENGTHS = Lengths(tuple((100 + 37 * number % 1500, 20 + 61 * number % 400) for number in range(200)))
SLO = Slo(0.25, 0.1, 60.0, 0.9)
OFFERED = 1000


class Opt13bWorkers:
    """OPT-13B on A100-80GB (tp 1 and 2) and on a device that is `slower` times as slow."""

    def __init__(self, slower: float = 2.0) -> None:
        self._slower = slower

    def latency(self, kind: WorkerKind) -> LatencyModel | None:
        """See Workers."""
        if kind.tp > 2:
            return None
        model = opt_13b(kind.tp, kind.pp)
        return model if kind.device == "a100-80g" else Slower(model, self._slower)

    def kv_tokens(self, kind: WorkerKind) -> int:
        """See Workers."""
        return 66_144 + 96_864 * (kind.devices - 1)

    def transfer(self) -> TransferModel:
        """See Workers."""
        link = link_of_rate(300e9, 0.0)
        return LinkTransfer(819_200, 16, link, link)


class Slower:
    """Another latency model's times, multiplied."""

    def __init__(self, model: DistServeFit, factor: float) -> None:
        self._model, self._factor = model, factor
        self.step_s = lambda shape: factor * model.step_s(shape)
        self.stage_s = lambda shape: factor * model.stage_s(shape)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """See LatencyModel."""
        return self._factor * self._model.decode_run_s(batch, context_tokens, steps)

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """See LatencyModel."""
        return self._model.decode_steps_within(batch, context_tokens, within_s / self._factor)


def space(nodes: int = 1, per_node: int = 4, most_workers: int = 2) -> Space:
    """A100 nodes alone."""
    return Space((NodeGroup("a100-80g", nodes, per_node),), (1, 2), (1, 2), most_workers)


class Formula:
    """Evaluate without a simulator: attainment falls smoothly as the load nears and passes a candidate's
    own limit.

    The limit lies below the bound by a share that differs from candidate to candidate, so that the order of
    bounds is not the order of goodputs.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.calls = 0

    def limit_rps(self, candidate: Candidate) -> float:
        """The rate at which attainment is 90 %."""
        spread = (sum(map(ord, str(candidate))) % 23) / 100
        return self._bounds.rate_rps(candidate) * (0.75 + spread)

    def __call__(
        self, candidate: Candidate, rate_rps: float, bucket: int = 0, slo_scale: float = 1.0
    ) -> Reached:
        self.calls += 1
        limit = self.limit_rps(candidate)
        share = 1 / (1 + exp(8 * (rate_rps / limit - 1)) / 9) if limit else 0.0
        good = round(OFFERED * share)
        return Reached(OFFERED, good, {Objective.TTFT: good, Objective.TPOT: OFFERED, Objective.GAP: OFFERED})
