"""Pure: how scattered blocks are packed into few large messages.

Both ends compute the plan from numbers that they agreed on, so message boundaries need no words.
"""

from dataclasses import dataclass

from tandem.errors import TransferError, TransferFault


@dataclass(frozen=True, slots=True)
class Chunk:
    """The pieces `first` to `first + count - 1` of a transfer, sent as one message of `size_bytes`."""

    first: int
    count: int
    size_bytes: int


def chunks(num_pieces: int, piece_bytes: int, slot_bytes: int) -> tuple[Chunk, ...]:
    """Messages of whole pieces, each as large as a staging slot allows, in order.

    Raises TransferError (LENGTH) when not even one piece fits into a slot.
    """
    if not 0 < piece_bytes <= slot_bytes:
        message = f"Pieces of {piece_bytes} bytes do not fit into staging of {slot_bytes}."
        raise TransferError(TransferFault.LENGTH, message)
    most = slot_bytes // piece_bytes
    return tuple(
        Chunk(first, min(most, num_pieces - first), min(most, num_pieces - first) * piece_bytes)
        for first in range(0, num_pieces, most)
    )
