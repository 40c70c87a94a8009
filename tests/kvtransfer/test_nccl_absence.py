"""Where NCCL cannot be had, a sentence says why and the pair takes another road."""

import time

import pytest

from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.sink import NcclSink
from kvtransfer.nccl.source import NcclSource
from tandem.errors import TransferError, TransferFault
from tests.kvtransfer.fake_nccl import DevicePoolInHost, FakeNccl, host_kit
from tests.kvtransfer.nccl_pair import BLOCK_BYTES, SINK, SOURCE, TICKET, nccl_pair
from tests.kvtransfer.pair import Pool, config


async def test_pool_in_host_memory_is_refused() -> None:
    pool = Pool(4, BLOCK_BYTES)
    source = NcclSource(pool, config("nccl"), host_kit(FakeNccl()))
    with pytest.raises(OSError, match="The KV pool is not on a GPU"):
        await source.start(lambda _peer: None, lambda _fault: None)
    assert source.endpoint(SINK, TICKET) is None
    pool.close()


async def test_sink_without_nccl_says_so() -> None:
    def no_binding() -> None:
        raise OSError("CuPy is not installed.")

    async with nccl_pair() as pair:
        kit = host_kit(pair.sink_nccl)
        pool = DevicePoolInHost(4, BLOCK_BYTES)
        missing = type(kit)(no_binding, kit.open_device, kit.limits)  # type: ignore[arg-type]
        sink = NcclSink(pool, config("nccl"), time.monotonic, missing)
        address = pair.source.endpoint(SINK, TICKET)
        assert address is not None
        with pytest.raises(TransferError, match="CuPy is not installed") as caught:
            await sink.connect(SOURCE, address, TICKET, BLOCK_BYTES)
        assert caught.value.fault is TransferFault.UNSUPPORTED
        await sink.close()
        pool.close()


@pytest.mark.parametrize(
    "address",
    ["", "h 1 2", "h x 1 1 00", "h 1 1 1 00", f"h 1 1 0 {'00' * 128}", f"h 99999 1 1 {'0' * 256}"],
)
def test_address_that_makes_no_sense_is_refused(address: str) -> None:
    with pytest.raises(TransferError) as caught:
        NcclAddress.parse(address)
    assert caught.value.fault is TransferFault.UNSUPPORTED


def test_unique_id_is_not_in_a_printed_address() -> None:
    address = NcclAddress("h", 1, 1, 1, b"s" * 128)
    assert NcclAddress.parse(address.encode()) == address
    assert "73" * 4 not in repr(address)
