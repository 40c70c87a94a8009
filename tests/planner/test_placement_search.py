"""Pure: the search finds what trying everything finds, with far fewer runs."""

from collections.abc import Iterable, Sequence

import pytest

from planner.placements.bound import Bounds
from planner.placements.goodput import Goodput, Probe, find_goodput
from planner.placements.mix import Mix, Option, cheapest_mix, largest_mix
from planner.placements.placement import Candidate, Mode, NodeGroup, Objective, Reached, WorkerKind
from planner.placements.search import Bounded, Searched, bounded, search
from planner.placements.space import Affinity, Space, candidates, worker_kinds
from tests.planner.placement_cases import LENGTHS, SLO, Formula, Opt13bWorkers, space

TOLERANCE = 0.005
TWO_TYPES = Space(
    (NodeGroup("a100-80g", 1, 4, 4.0), NodeGroup("l4", 1, 4, 1.0)), tp=(1, 2), pp=(1,), most_workers=2
)


def _ranked(where: Space) -> tuple[list[Bounded], Formula]:
    workers = Opt13bWorkers()
    bounds = Bounds(workers, LENGTHS, SLO, 256)
    kinds = worker_kinds(where, workers, LENGTHS.longest_tokens)
    return bounded(where, bounds, candidates(where, kinds)), Formula(bounds)


def _searched(where: Space, keep: int = 2) -> tuple[Searched, Formula]:
    ranked, formula = _ranked(where)

    def find_many(probes: Sequence[Probe]) -> Iterable[Goodput]:
        return [find_goodput(formula, probe, SLO.attainment, TOLERANCE) for probe in probes]

    return search(ranked, find_many, keep, 0.0, lambda settled, total: None), formula


def _mix(where: Space, found: Iterable[Goodput]) -> Mix:
    options = [Option(one.candidate, (one.rate_rps,), where.cost(one.candidate)) for one in found]
    mix = largest_mix(options, where.groups, (1.0,))
    assert mix is not None
    return mix


@pytest.mark.parametrize(
    "where", [space(), space(nodes=2, per_node=3), TWO_TYPES], ids=["1x4", "2x3", "2 types"]
)
def test_the_plan_is_within_2_percent_of_trying_every_candidate(where: Space) -> None:
    ranked, formula = _ranked(where)
    exhaustive = [
        find_goodput(formula, Probe(one.candidate, one.bound_rps), 0.9, TOLERANCE) for one in ranked
    ]
    runs = formula.calls
    found, searching = _searched(where)
    best = max(one.rate_rps / where.cost(one.candidate) for one in exhaustive)
    assert found.found[0].rate_rps / where.cost(found.found[0].candidate) >= 0.98 * best
    assert _mix(where, found.found).rate_rps >= 0.98 * _mix(where, exhaustive).rate_rps
    assert searching.calls < 0.75 * runs


def test_goodput_is_where_the_attainment_crosses_the_share_asked_for() -> None:
    ranked, formula = _ranked(space())
    for one in ranked[:10]:
        answer = find_goodput(formula, Probe(one.candidate, one.bound_rps), 0.9, TOLERANCE)
        assert answer.rate_rps == pytest.approx(formula.limit_rps(one.candidate), rel=2 * TOLERANCE)
        assert answer.binding is Objective.TTFT


def test_goodput_above_a_bound_that_was_too_low_is_found() -> None:
    ranked, formula = _ranked(space())
    one = ranked[0]
    answer = find_goodput(formula, Probe(one.candidate, one.bound_rps / 5), 0.9, TOLERANCE)
    assert answer.rate_rps == pytest.approx(formula.limit_rps(one.candidate), rel=2 * TOLERANCE)


def test_a_candidate_that_cannot_beat_the_kept_ones_costs_one_run() -> None:
    ranked, formula = _ranked(space())
    one = ranked[0]
    answer = find_goodput(formula, Probe(one.candidate, one.bound_rps, 10 * one.bound_rps), 0.9, TOLERANCE)
    assert answer.given_up
    assert (answer.runs, answer.rate_rps) == (1, 0.0)


def test_candidates_never_need_more_devices_than_there_are() -> None:
    where = space(nodes=2, per_node=2, most_workers=4)
    for one in _ranked(where)[0]:
        assert one.candidate.devices["a100-80g"] <= 4


@pytest.mark.parametrize("affinity", list(Affinity))
def test_low_affinity_keeps_kv_inside_a_node(affinity: Affinity) -> None:
    where = Space((NodeGroup("a100-80g", 2, 2),), (1, 2), (1, 2), 2, affinity, (Mode.DISAGGREGATED,))
    tried = [one.candidate for one in _ranked(where)[0]]
    assert tried
    local = [one.same_node for one in tried]
    assert {Affinity.LOW: all(local), Affinity.HIGH: not any(local), Affinity.AUTO: any(local)}[affinity]
    for one in tried:
        if one.same_node:
            assert all(size <= 2 for _, size in one.pieces(where.devices_per_node))


def test_stages_of_a_pipeline_share_nodes_pairwise() -> None:
    """DistServe's Algorithm 2: prefill and decode of the same layers are neighbours."""
    kind = WorkerKind("a100-80g", 1, 2)
    pair = Candidate(Mode.DISAGGREGATED, kind, 1, kind, 1)
    assert pair.pieces({"a100-80g": 2}) == {("a100-80g", 2): 2}
    assert pair.pieces({"a100-80g": 4}) == {("a100-80g", 4): 1}


def _option(
    tp: int, rates: tuple[float, ...], cost: float, device: str = "a100-80g", workers: int = 1
) -> Option:
    return Option(Candidate(Mode.COLOCATED, WorkerKind(device, tp), workers), rates, cost)


def test_pieces_are_packed_into_nodes_not_into_a_sum() -> None:
    """Two nodes of 3 hold two workers of 2 devices, although 6 devices would be three."""
    mix = largest_mix([_option(2, (1.0,), 2)], [NodeGroup("a100-80g", 2, 3)], (1.0,))
    assert mix is not None
    assert mix.counts[0][1] == 2


def test_the_cheapest_mix_uses_each_device_where_it_is_worth_its_price() -> None:
    """Melange's case: small requests are cheaper on the small device, which cannot serve the large ones."""
    groups = [NodeGroup("a100-80g", 4, 1, 4.0), NodeGroup("l4", 8, 1, 1.0)]
    large, small = _option(1, (8.0, 4.0), 4.0), _option(1, (4.0, 0.0), 1.0, "l4")
    mix = cheapest_mix([large, small], groups, (8.0, 4.0))
    assert mix is not None
    assert mix.cost == pytest.approx(6.0)
    assert {str(candidate): count for candidate, count in mix.counts} == {
        str(large.candidate): 1,
        str(small.candidate): 2,
    }


def test_a_demand_beyond_the_fleet_has_no_mix() -> None:
    assert cheapest_mix([_option(1, (1.0,), 1)], [NodeGroup("a100-80g", 1, 2)], (3.0,)) is None
    assert largest_mix([_option(4, (1.0,), 4)], [NodeGroup("a100-80g", 2, 2)], (1.0,)) is None


def test_a_candidate_that_ties_with_the_kept_ones_costs_two_runs() -> None:
    ranked, formula = _ranked(space())
    one = ranked[0]
    tied_rps = formula.limit_rps(one.candidate) * (1 - TOLERANCE / 2)
    answer = find_goodput(formula, Probe(one.candidate, 2 * tied_rps, tied_rps), 0.9, TOLERANCE)
    assert answer.runs == 2
    assert answer.rate_rps == pytest.approx(formula.limit_rps(one.candidate), rel=2 * TOLERANCE)


def test_a_bound_that_is_a_little_too_low_is_left_in_small_steps() -> None:
    ranked, formula = _ranked(space())
    one = ranked[0]
    limit_rps = formula.limit_rps(one.candidate)
    tried: list[float] = []

    def watched(candidate: Candidate, rate_rps: float, bucket: int = 0, slo_scale: float = 1.0) -> Reached:
        tried.append(rate_rps)
        return formula(candidate, rate_rps, bucket, slo_scale)

    find_goodput(watched, Probe(one.candidate, 0.98 * limit_rps), 0.9, TOLERANCE)
    assert max(tried) < 1.1 * limit_rps
