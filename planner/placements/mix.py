"""Pure: how many of which candidate: the cheapest mix for a rate, or the most goodput of a fleet.

An integer program after Melange (Griggs et al. 2024), solved by HiGHS: requests of each bucket of lengths are
shared among candidates, a candidate that spends all its time on bucket b serves rate[b] a second, and the
pieces of all candidates must fit into the nodes one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from planner.placements.placement import Candidate, NodeGroup

_TIME_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate that may be used: requests a second by bucket when it does nothing else, and its price."""

    candidate: Candidate
    rates_rps: tuple[float, ...]
    cost: float


@dataclass(frozen=True, slots=True)
class Mix:
    """How many of each option, the requests a second they serve together, and their price an hour."""

    counts: tuple[tuple[Candidate, int], ...]
    rate_rps: float
    cost: float


def cheapest_mix(
    options: Sequence[Option], groups: Sequence[NodeGroup], demand: Sequence[float]
) -> Mix | None:
    """The mix of the lowest price that serves `demand` (requests a second by bucket); None when none does."""
    program = _Program(options, groups, len(demand))
    program.serve(demand)
    costs = np.zeros(program.width)
    costs[: len(options)] = [option.cost for option in options]
    return program.solve(costs, sum(demand))


def largest_mix(
    options: Sequence[Option], groups: Sequence[NodeGroup], shares: Sequence[float]
) -> Mix | None:
    """The mix that serves most requests whose buckets have these shares; None when not even one option
    fits."""
    program = _Program(options, groups, len(shares))
    program.serve_in_proportion(shares)
    costs = np.zeros(program.width)
    costs[-1] = -1.0
    return program.solve(costs, None)


class _Program:
    """Variables: options used (integers), share of each bucket at each option, pieces in nodes, total
    rate."""

    def __init__(self, options: Sequence[Option], groups: Sequence[NodeGroup], buckets: int) -> None:
        self._options, self._groups, self._buckets = options, groups, buckets
        per_node = {group.device: group.devices_per_node for group in groups}
        self._pieces = [option.candidate.pieces(per_node) for option in options]
        self._sizes = sorted({size for pieces in self._pieces for size in pieces})
        self._nodes = [(group, node) for group in groups for node in range(group.nodes)]
        self._flow_at = len(options)
        self._piece_at = self._flow_at + len(options) * buckets
        self.width = self._piece_at + len(self._sizes) * len(self._nodes) + 1
        self._rows: list[npt.NDArray[np.float64]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        self._pack()
        self._share_time()

    def serve(self, demand: Sequence[float]) -> None:
        """Every bucket's requests are served."""
        for bucket, rate_rps in enumerate(demand):
            row = self._bucket_row(bucket)
            self._add(row, rate_rps, rate_rps)

    def serve_in_proportion(self, shares: Sequence[float]) -> None:
        """Every bucket gets its share of the total rate, which is the last variable."""
        for bucket, share in enumerate(shares):
            row = self._bucket_row(bucket)
            row[-1] = -share
            self._add(row, 0.0, 0.0)

    def solve(self, costs: npt.NDArray[np.float64], rate_rps: float | None) -> Mix | None:
        """The best mix, or None when there is none."""
        whole = np.ones(self.width, dtype=np.int64)
        whole[self._flow_at : self._piece_at] = 0
        whole[-1] = 0
        solved = milp(
            costs,
            integrality=whole,
            bounds=Bounds(0, np.inf),
            constraints=LinearConstraint(np.array(self._rows), np.array(self._low), np.array(self._high)),
            options={"time_limit": _TIME_LIMIT_S, "mip_rel_gap": 1e-4},
        )
        if solved.x is None:
            return None
        counts = [(option, round(solved.x[index])) for index, option in enumerate(self._options)]
        used = tuple((option.candidate, count) for option, count in counts if count)
        cost = sum(option.cost * count for option, count in counts)
        served = float(solved.x[-1]) if rate_rps is None else rate_rps
        return Mix(used, served, cost) if used and served > 0 else None

    def _pack(self) -> None:
        """Pieces of a size are dealt to nodes; a node holds no more than its devices."""
        for number, (device, size) in enumerate(self._sizes):
            row = np.zeros(self.width)
            for index, pieces in enumerate(self._pieces):
                row[index] = -pieces.get((device, size), 0)
            for node, (group, _) in enumerate(self._nodes):
                if group.device == device:
                    row[self._piece(number, node)] = 1
            self._add(row, 0.0, 0.0)
        for node, (group, _) in enumerate(self._nodes):
            row = np.zeros(self.width)
            for number, (device, size) in enumerate(self._sizes):
                if device == group.device:
                    row[self._piece(number, node)] = size
            self._add(row, 0.0, group.devices_per_node)

    def _share_time(self) -> None:
        """An option's buckets together take no more than all of its time."""
        for index, option in enumerate(self._options):
            row = np.zeros(self.width)
            row[index] = -1
            for bucket, rate_rps in enumerate(option.rates_rps):
                if rate_rps > 0:
                    row[self._flow(index, bucket)] = 1 / rate_rps
                else:
                    closed = np.zeros(self.width)
                    closed[self._flow(index, bucket)] = 1
                    self._add(closed, 0.0, 0.0)
            self._add(row, -np.inf, 0.0)

    def _bucket_row(self, bucket: int) -> npt.NDArray[np.float64]:
        row = np.zeros(self.width)
        for index in range(len(self._options)):
            row[self._flow(index, bucket)] = 1
        return row

    def _flow(self, option: int, bucket: int) -> int:
        return self._flow_at + option * self._buckets + bucket

    def _piece(self, size: int, node: int) -> int:
        return self._piece_at + size * len(self._nodes) + node

    def _add(self, row: npt.NDArray[np.float64], low: float, high: float) -> None:
        self._rows.append(row)
        self._low.append(low)
        self._high.append(high)
