"""What a router tells of its load: totals, lengths, and workers wanted beside workers there."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.stub_script import StubSettings
from router.load_totals import KEPT_LENGTHS, MOST_TOLD, LoadTotals
from router.role_counts import RoleCount, role_counts
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad, WorkerLoad
from tandem.client import AsyncTandemClient
from tandem.errors import TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.v1 import cluster_pb2 as cpb
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role
from tests.router.harness import Cluster, cluster, until


def ended(count: int) -> LoadTotals:
    totals = LoadTotals()
    for number in range(1, count + 1):
        totals.came()
        totals.left(number, 10 * number, good=number % 2 == 0)
    return totals


def test_lengths_are_told_once() -> None:
    totals = ended(3)
    assert totals.lengths_after(0) == ((1, 10), (2, 20), (3, 30))
    assert totals.lengths_after(2) == ((3, 30),)
    assert totals.lengths_after(totals.ended) == ()


def test_a_number_from_another_life_tells_nothing_wrong() -> None:
    assert ended(3).lengths_after(99) == ()


def test_a_refused_request_is_settled_and_has_no_lengths() -> None:
    totals = LoadTotals()
    totals.came()
    totals.left(5, 0, good=False)
    assert (totals.offered, totals.settled, totals.good, totals.ended) == (1, 1, 0, 0)
    assert totals.lengths_after(0) == ()


@pytest.mark.parametrize("count", [MOST_TOLD, MOST_TOLD + 1, 3 * MOST_TOLD, 3 * KEPT_LENGTHS])
def test_many_lengths_are_taken_evenly_and_bounded(count: int) -> None:
    lengths = [prompt for prompt, _ in ended(count).lengths_after(0)]
    assert MOST_TOLD // 2 <= len(lengths) <= MOST_TOLD
    assert len({after - before for before, after in pairwise(lengths)}) == 1
    assert lengths[0] == max(1, count - KEPT_LENGTHS + 1)


def test_a_draining_worker_is_not_counted() -> None:
    workers = [WorkerLoad(WorkerKey(WorkerId(f"d{n}"), Incarnation(1)), Role.DECODE, 8) for n in range(3)]
    workers[0].heard(ReportedLoad(draining=True), 0.0)
    assert role_counts({Role.DECODE: 3}, workers) == (
        RoleCount(Role.PREFILL, None, 0),
        RoleCount(Role.DECODE, 3, 2),
    )


async def _load(running: Cluster, after: int = 0) -> cpb.LoadResponse:
    async with AsyncTandemClient(running.grpc) as client:
        return await client.load(after)


async def test_requests_are_counted_and_canaries_are_not(folder: Path) -> None:
    async with cluster(folder, StubSettings(), canary_interval_s=0.1) as running:
        for name, slo_class in (("a", "chat"), ("b", "strict")):
            await running.ask(_question(name, slo_class=slo_class))
        with pytest.raises(Exception, match="context"):
            await running.ask(_question("c", max_tokens=10_000))

        async def told() -> bool:
            return (await _load(running)).settled == 2

        await until(told)
        load = await _load(running)
    assert (load.offered, load.good, load.ended) == (2, 1, 2)
    assert [(one.prompt_tokens, one.output_tokens) for one in load.lengths] == [(3, 4), (3, 4)]
    assert {one.worker.worker_id for one in load.workers} == {"p0", "d0"}


def _question(name: str, max_tokens: int = 4, slo_class: str = "chat") -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    tokens = pb.TokenIds(ids=[10, 20, 30])
    return pb.GenerateRequest(request_id=name, token_ids=tokens, sampling=params, slo_class=slo_class)


async def test_status_shows_what_is_wanted_beside_what_is_there(folder: Path) -> None:
    async with cluster(folder) as running:
        running.membership.wanted = {Role.PREFILL: 1, Role.DECODE: 2}
        async with AsyncTandemClient(running.grpc) as client:
            status = await client.status()
        metrics = await running.metrics()
    assert [(count.role, count.desired, count.actual) for count in status.roles] == [
        (wpb.ROLE_PREFILL, 1, 1),
        (wpb.ROLE_DECODE, 2, 1),
    ]
    assert 'tandem_workers{role="decode",state="desired"} 2.0' in metrics


async def test_a_router_that_is_away_is_an_error_of_ours() -> None:
    async with AsyncTandemClient("127.0.0.1:1") as client:
        with pytest.raises(TandemError):
            await client.load()
