"""The roads between device memories, over fakes that move real bytes in host memory."""

import ctypes
import time
from collections.abc import Callable, Sequence

from kvtransfer import weighted_sum
from kvtransfer.contract import BlockMemory, SinkTransport, SourceTransport, TransferConfig
from kvtransfer.cuda.ipc import CudaIpcSink, CudaIpcSource, IpcKit
from kvtransfer.device import DevicePool
from kvtransfer.nccl.communicator import CommunicatorLimits
from kvtransfer.nccl.sink import NcclSink
from kvtransfer.nccl.source import NcclSource
from tests.kvtransfer.fake_nccl import PATIENT, DevicePoolInHost, FakeNccl, HostDevice, host_kit
from tests.kvtransfer.pair import HOST_ROADS, Roads
from tests.kvtransfer.test_cuda_ipc import HostSharing

Makers = tuple[
    Callable[[BlockMemory, TransferConfig], SourceTransport],
    Callable[[BlockMemory, TransferConfig], SinkTransport],
]


def checksums_in_host(
    pool: DevicePool, some: Sequence[int], offset_bytes: int, size_bytes: int
) -> tuple[int, ...]:
    """What the kernel computes, of a device that lies in host memory."""
    pieces = pool.pieces(offset_bytes)
    parts = [ctypes.string_at(pieces.address + block * pieces.stride_bytes, size_bytes) for block in some]
    return tuple(weighted_sum.weighted_sum(memoryview(part)) for part in parts)


def nccl_makers(source: FakeNccl, sink: FakeNccl, limits: CommunicatorLimits = PATIENT) -> Makers:
    """Both sides over fakes."""
    return (
        lambda pool, settings: NcclSource(pool, settings, host_kit(source, limits)),
        lambda pool, settings: NcclSink(pool, settings, time.monotonic, host_kit(sink, limits)),
    )


def ipc_makers() -> Makers:
    """Both sides over fakes."""
    kit = IpcKit(lambda _index: HostDevice(), lambda _index: HostSharing())
    return (
        lambda pool, settings: CudaIpcSource(pool, settings, kit),
        lambda pool, settings: CudaIpcSink(pool, settings, time.monotonic, kit),
    )


def roads_of(name: str) -> Roads:
    """What a transport runs between: device memory for the device's, shared memory for the others."""
    if name not in ("nccl", "cuda_ipc"):
        return HOST_ROADS
    give, take = nccl_makers(FakeNccl(), FakeNccl()) if name == "nccl" else ipc_makers()
    return Roads(
        DevicePoolInHost,
        lambda pool, settings: (give(pool, settings),),
        lambda pool, settings: (take(pool, settings),),
    )
