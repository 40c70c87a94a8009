"""Edge: the transports by name. A new one is a new module and a line in each table."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeVar

from kvtransfer.contract import BlockMemory, FrameArena, SinkTransport, SourceTransport, TransferConfig
from kvtransfer.cuda.driver import open_sharing
from kvtransfer.cuda.ipc import CudaIpcSink, CudaIpcSource, IpcKit
from kvtransfer.device import Device
from kvtransfer.nccl.binding import load_binding
from kvtransfer.nccl.sink import NcclSink
from kvtransfer.nccl.source import NcclSource
from kvtransfer.nccl.threaded_communicator import NcclKit
from kvtransfer.shm.adopt import AdoptSink, AdoptSource
from kvtransfer.shm.arena import arena_of
from kvtransfer.shm.transport import ShmSink, ShmSource
from kvtransfer.tcp.sink import TcpSink
from kvtransfer.tcp.source import TcpSource
from tandem.errors import ConfigError


def _open_device(index: int) -> Device:
    """Loads torch and triton only where a pool is on a GPU."""
    from kvtransfer.cuda.device import open_device

    return open_device(index)


def _nccl(config: TransferConfig) -> NcclKit:
    return NcclKit(load_binding, _open_device, config.communicators)


def _arena(memory: BlockMemory) -> FrameArena:
    """Raises ConfigError for a pool that lies in none."""
    arena = arena_of(memory)
    if arena is None:
        raise ConfigError("The transport adopt needs a KV pool in an arena.")
    return arena


IPC: Final = IpcKit(_open_device, open_sharing)

SOURCES: Final[Mapping[str, Callable[[BlockMemory, TransferConfig], SourceTransport]]] = MappingProxyType(
    {
        "nccl": lambda memory, config: NcclSource(memory, config, _nccl(config)),
        "cuda_ipc": lambda memory, config: CudaIpcSource(memory, config, IPC),
        "adopt": lambda memory, config: AdoptSource(_arena(memory), config),
        "shm": ShmSource,
        "tcp": lambda memory, config: TcpSource(memory, config, _open_device),
    }
)
SINKS: Final[Mapping[str, Callable[[BlockMemory, TransferConfig, Callable[[], float]], SinkTransport]]] = (
    MappingProxyType(
        {
            "nccl": lambda memory, config, clock: NcclSink(memory, config, clock, _nccl(config)),
            "cuda_ipc": lambda memory, config, clock: CudaIpcSink(memory, config, clock, IPC),
            "adopt": lambda memory, config, _clock: AdoptSink(_arena(memory), config),
            "shm": ShmSink,
            "tcp": lambda memory, config, clock: TcpSink(memory, config, clock, _open_device),
        }
    )
)

MakerT = TypeVar("MakerT")


def source_transports(memory: BlockMemory, config: TransferConfig) -> tuple[SourceTransport, ...]:
    """The giving sides that are configured, best first. Raises ConfigError for an unknown name."""
    return tuple(make(memory, config) for make in _named(SOURCES, config.transports))


def sink_transports(
    memory: BlockMemory, config: TransferConfig, clock: Callable[[], float]
) -> tuple[SinkTransport, ...]:
    """The taking sides that are configured, best first. Raises ConfigError for an unknown name."""
    return tuple(make(memory, config, clock) for make in _named(SINKS, config.transports))


def _named(table: Mapping[str, MakerT], names: Sequence[str]) -> list[MakerT]:
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        message = f"transports: {', '.join(unknown) or 'none'} given; allowed are {', '.join(sorted(table))}."
        raise ConfigError(message)
    return [table[name] for name in names]
