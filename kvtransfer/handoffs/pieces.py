"""Pure: in which pieces a leg's KV moves, so that a hand-off can begin while its prefill still runs.

A sink asks for all it still wants; the source grants the first piece of that which is ready. What is left is
asked for next. A piece is a range of blocks in all their layers, or a range of layers in all the blocks that
are left (the last prompt chunk, layer group by layer group). See field-notes, pain 16.
"""

from typing import Final

from kvtransfer.contract import BlockRange, KvReady
from tandem.errors import ProtocolError, TransferError, TransferFault

MIN_PIECE_BYTES: Final = 1 << 20
"""What is ready early moves early only if it is so much: a piece costs a round trip of about a millisecond.
"""

MAX_PIECE_BYTES: Final = 64 << 20
"""A larger piece might not move within one lease over a slow link; 13 MB/s suffice for this."""


def complete(ready: KvReady, num_blocks: int, layers: int) -> bool:
    """Whether all of an offer of `num_blocks` blocks may be pulled."""
    return ready.blocks >= num_blocks or ready.layers >= layers


def grown(before: KvReady, after: KvReady) -> KvReady:
    """The later of two states. Raises ProtocolError when the offer would shrink."""
    if after.blocks < before.blocks or after.layers < before.layers:
        raise ProtocolError(f"An offer cannot shrink from {before} to {after}.")
    return after


def layer_span(part: BlockRange, layers: int) -> tuple[int, int]:
    """(first, end): a range holds layers [first, end); num_layers 0 means all from the first on."""
    return part.first_layer, part.first_layer + part.num_layers if part.num_layers else layers


def next_piece(wanted: BlockRange, ready: KvReady, layers: int, layer_bytes: int) -> BlockRange | None:
    """The first piece of `wanted` that should move now; None when it is better to wait.

    Always begins where `wanted` begins. When all that is wanted is ready, only MAX_PIECE_BYTES divides it.
    A range without blocks is granted once the whole offer is complete, which `ready.layers` then says.
    """
    first, end = layer_span(wanted, layers)
    everything = ready.layers >= layers
    blocks = (
        wanted.num_blocks if everything else _within(ready.blocks - wanted.first_block, wanted.num_blocks)
    )
    if everything or (wanted.num_blocks and blocks == wanted.num_blocks):
        return _bounded(wanted, end - first, layer_bytes)
    whole = first == 0 and end == layers
    if whole and blocks * layers * layer_bytes >= MIN_PIECE_BYTES:
        return _bounded(BlockRange(wanted.first_block, blocks), layers, layer_bytes)
    finished = _within(ready.layers, end) - first
    if wanted.num_blocks * finished * layer_bytes >= MIN_PIECE_BYTES or finished == end - first:
        part = BlockRange(wanted.first_block, wanted.num_blocks, first, finished)
        return _bounded(part, finished, layer_bytes)
    return None


def remainder(wanted: BlockRange, granted: BlockRange, layers: int) -> BlockRange | None:
    """What of `wanted` is left after a grant; None when nothing is.

    Raises TransferError (LENGTH) when the grant is not a first piece of it.
    """
    first, end = layer_span(wanted, layers)
    granted_first, granted_end = layer_span(granted, layers)
    begins = (granted.first_block, granted_first) == (wanted.first_block, first)
    if begins and granted.num_blocks == wanted.num_blocks and granted_end <= end:
        left = end - granted_end
        return BlockRange(wanted.first_block, wanted.num_blocks, granted_end, left) if left else None
    if begins and 0 < granted.num_blocks < wanted.num_blocks and granted_end == end:
        blocks = granted.num_blocks
        return BlockRange(wanted.first_block + blocks, wanted.num_blocks - blocks, first, wanted.num_layers)
    raise TransferError(TransferFault.LENGTH, f"{granted} was granted where {wanted} was asked for.")


def _bounded(part: BlockRange, num_layers: int, layer_bytes: int) -> BlockRange:
    """At most MAX_PIECE_BYTES of it (but at least one layer, or one block), in the direction it is cut in."""
    if part.num_blocks * num_layers * layer_bytes <= MAX_PIECE_BYTES:
        return part
    if part.first_layer or part.num_layers:
        fitting = max(1, MAX_PIECE_BYTES // (part.num_blocks * layer_bytes))
        return BlockRange(part.first_block, part.num_blocks, part.first_layer, min(fitting, num_layers))
    return BlockRange(part.first_block, max(1, MAX_PIECE_BYTES // (num_layers * layer_bytes)))


def _within(number: int, limit: int) -> int:
    return max(0, min(number, limit))
