"""Edge: what real routers tell of their load."""

from functools import partial
from pathlib import Path

import pytest

from benchmarks.stub_script import StubSettings
from cluster.controller.load_source import RouterLoads
from tandem.errors import NotReady
from tandem.v1 import inference_pb2 as pb
from tandem.worker import Role
from tests.router.harness import Cluster, cluster, until, write_model_folder


async def ask(running: Cluster, name: str) -> None:
    params = pb.SamplingParams(max_tokens=4, ignore_eos=True)
    await running.ask(
        pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=[10, 20, 30]), sampling=params)
    )


async def test_totals_grow_and_lengths_come_once(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    async with cluster(folder, StubSettings()) as running, RouterLoads([running.grpc]) as loads:
        lengths: list[tuple[int, int]] = []

        async def told(settled: int) -> bool:
            (sample,) = await loads.read()
            lengths.extend(sample.lengths)
            return (sample.offered, sample.settled) == (settled, settled)

        for number in (1, 2):
            await ask(running, str(number))
            await until(partial(told, number))
        assert lengths == [(3, 4), (3, 4)]
        (sample,) = await loads.read()
        assert {(one.worker_id, one.role, one.serving) for one in sample.workers} == {
            ("p0", Role.PREFILL, True),
            ("d0", Role.DECODE, True),
        }


async def test_a_router_that_is_away_is_left_out_while_another_one_answers(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    async with cluster(folder) as running, RouterLoads(["127.0.0.1:1", running.grpc]) as loads:
        assert len(await loads.read()) == 1


async def test_without_any_router_there_is_no_load() -> None:
    async with RouterLoads(["127.0.0.1:1"]) as loads:
        with pytest.raises(NotReady, match=r"127\.0\.0\.1:1"):
            await loads.read()
