"""Pure: the part of a worker's settings that concerns KV transfers."""

from kvtransfer.contract import TransferConfig
from kvtransfer.nccl.communicator import CommunicatorLimits
from tandem.worker_config import WorkerConfig


def transfer_config(config: WorkerConfig, adopts: bool = False) -> TransferConfig:
    """How a worker with this configuration gives and takes KV; first of all by adoption if it `adopts`."""
    return TransferConfig(
        transports=("adopt", *config.transports) if adopts else config.transports,
        bind_host=config.bind_host,
        advertise_host=config.advertise_host,
        lease_s=config.lease_s,
        park_s=config.park_s,
        checksum=config.checksum,
        tls=config.tls,
        communicators=CommunicatorLimits(
            open_s=config.nccl.open_s,
            abort_s=config.nccl.abort_s,
            max_open=config.nccl.max_communicators,
            slot_bytes=config.nccl.staging_bytes // 2,
        ),
    )
