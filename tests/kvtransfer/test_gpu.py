"""On a real device: copies, sums, and whole hand-offs between two processes over cuda_ipc and NCCL."""

import os
import secrets

import pytest
import torch

from benchmarks import gpu_peer, gpu_transfers
from benchmarks.gpu_pool import GpuPool
from kvtransfer import weighted_sum
from kvtransfer.cuda.device import device_checksums, open_device
from kvtransfer.device import DevicePool, PieceCopy
from kvtransfer.watch import outwait

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret of both processes."""
    monkeypatch.setitem(os.environ, gpu_peer.TOKEN_ENV, secrets.token_hex(16))
    monkeypatch.setenv("NCCL_HOSTID", "tandem-gpu-test")


@pytest.mark.parametrize("block_bytes", [737_280, 24 * 1024, 1021])
def test_lane_copies_pieces_and_nothing_else(block_bytes: int) -> None:
    source, target = GpuPool(16, block_bytes, seed=1), GpuPool(16, block_bytes, seed=2)
    expected = target.tensor.clone()
    expected[[9, 0, 15]] = source.tensor[[3, 4, 1]]
    device = open_device(0)
    with device.current():
        lane = device.lane()
        lane.copy(
            PieceCopy(
                DevicePool.of(source).pieces(0),
                (3, 4, 1),
                DevicePool.of(target).pieces(0),
                (9, 0, 15),
                block_bytes,
            )
        )
        outwait(lane.mark(), 5.0)
    assert torch.equal(target.tensor, expected)


def test_device_sums_are_those_of_the_host() -> None:
    pool = GpuPool(6, 737_280, seed=1)
    found = device_checksums(DevicePool.of(pool), (5, 0), 4096, 24_576)
    parts = [pool.tensor[block, 4096 : 4096 + 24_576].cpu().numpy().tobytes() for block in (5, 0)]
    assert found == tuple(weighted_sum.weighted_sum(memoryview(part)) for part in parts)


async def test_cuda_ipc_brings_the_right_bytes() -> None:
    reports, equal = await gpu_transfers.pulls(("cuda_ipc", 64, 737_280), rounds=2)
    assert equal
    assert {report.transport for report in reports} == {"cuda_ipc"}


async def test_real_nccl_brings_the_right_bytes_between_two_processes_on_one_device() -> None:
    pytest.importorskip("cupy")
    reports, equal = await gpu_transfers.pulls(("nccl", 64, 737_280), rounds=2)
    assert equal
    assert {report.transport for report in reports} == {"nccl"}


async def test_tcp_brings_the_right_bytes_through_pinned_memory() -> None:
    reports, equal = await gpu_transfers.pulls(("tcp", 64, 737_280), rounds=2)
    assert equal
    assert {report.transport for report in reports} == {"tcp"}


async def test_killed_peers_free_the_other_side() -> None:
    pytest.importorskip("cupy")
    for figure in await gpu_transfers.sigkill():
        assert figure.holds, figure
