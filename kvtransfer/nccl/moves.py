"""Edge: one transfer over an open communicator, in the thread that calls: pack, send; receive, unpack.

Only staging is ever handed to NCCL. So a message that hangs touches no block, whoever owns it by then: the
sender packs a slot when the slot's last message is gone, the receiver unpacks a slot when its message is all
there, and both look between the messages at whether they should stop. Two slots keep the wire busy meanwhile
and cap the bytes in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvtransfer.device import Device, DevicePool, Lane, Mark, PieceCopy, Pieces, Staging
from kvtransfer.nccl.binding import NcclCommunicator
from kvtransfer.nccl.pack_plan import Chunk, chunks
from kvtransfer.watch import Watch, outwait, wait_for

QUIET_S: Final = 0.5
"""Bound of a copy of staged bytes within the device; it waits for no peer."""


@dataclass(frozen=True, slots=True)
class Wire:
    """An open communicator with its streams and staging; `bytes` of device memory that all of it took."""

    communicator: NcclCommunicator
    device: Device
    copying: Lane
    sending: Lane
    slots: tuple[Staging, Staging]
    slot_bytes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """What is moved: a byte range, the same within each of these blocks of a pool."""

    pool: DevicePool
    blocks: Sequence[int]
    offset_bytes: int
    size_bytes: int


def send_part(wire: Wire, watch: Watch, part: Part) -> None:
    """Packs and sends; when it returns or raises TransferError, nothing reads the blocks any more."""
    with wire.device.current():
        taken: list[Mark | None] = [None, None]
        try:
            for number, chunk in enumerate(chunks(len(part.blocks), part.size_bytes, wire.slot_bytes)):
                slot = number % 2
                _wait(wire, taken[slot], watch)
                wire.copying.copy(_packing(wire, part, chunk, slot))
                wire.sending.wait(wire.copying.mark())
                wire.communicator.send(wire.slots[slot].address, chunk.size_bytes, wire.sending.stream)
                taken[slot] = wire.sending.mark()
            for mark in taken:
                _wait(wire, mark, watch)
        finally:
            outwait(wire.copying.mark(), QUIET_S)


def receive_part(wire: Wire, watch: Watch, part: Part) -> None:
    """Receives and unpacks; when it returns or raises TransferError, nothing writes the blocks any more."""
    with wire.device.current():
        plan = chunks(len(part.blocks), part.size_bytes, wire.slot_bytes)
        arrived: list[Mark | None] = [None, None]
        try:
            for number in range(len(plan) + 1):
                if number < len(plan):
                    arrived[number % 2] = _post(wire, plan[number], number % 2)
                if number > 0:
                    slot = (number - 1) % 2
                    _wait(wire, arrived[slot], watch)
                    wire.copying.copy(_unpacking(wire, part, plan[number - 1], slot))
        finally:
            outwait(wire.copying.mark(), QUIET_S)


def _post(wire: Wire, chunk: Chunk, slot: int) -> Mark:
    """Asks for a message into a slot, once what was in it is unpacked."""
    wire.sending.wait(wire.copying.mark())
    wire.communicator.receive(wire.slots[slot].address, chunk.size_bytes, wire.sending.stream)
    return wire.sending.mark()


def _packing(wire: Wire, part: Part, chunk: Chunk, slot: int) -> PieceCopy:
    return PieceCopy(
        source=part.pool.pieces(part.offset_bytes),
        source_indices=part.blocks[chunk.first : chunk.first + chunk.count],
        target=Pieces(wire.slots[slot].address, part.size_bytes),
        target_indices=range(chunk.count),
        piece_bytes=part.size_bytes,
    )


def _unpacking(wire: Wire, part: Part, chunk: Chunk, slot: int) -> PieceCopy:
    return PieceCopy(
        source=Pieces(wire.slots[slot].address, part.size_bytes),
        source_indices=range(chunk.count),
        target=part.pool.pieces(part.offset_bytes),
        target_indices=part.blocks[chunk.first : chunk.first + chunk.count],
        piece_bytes=part.size_bytes,
    )


def _wait(wire: Wire, mark: Mark | None, watch: Watch) -> None:
    """Until a mark is done. Raises TransferError when the transfer should end or NCCL broke meanwhile."""

    def check() -> None:
        watch.check()
        wire.communicator.check()

    if mark is not None:
        wait_for(mark, check)
