"""Pure: what a sink must know to join a communicator; it travels in the answer to Connect only."""

from dataclasses import dataclass, field
from typing import Final

from kvtransfer.nccl.binding import UNIQUE_ID_BYTES
from tandem.errors import TransferError, TransferFault

MAX_SLOT_BYTES: Final = 1 << 30
"""A source that wants more staging than this is not one of ours."""


@dataclass(frozen=True, slots=True)
class NcclAddress:
    """Where the source's link listens, and the communicator of this epoch; its unique id is a secret."""

    host: str
    port: int
    epoch: int
    slot_bytes: int
    unique_id: bytes = field(repr=False)

    def encode(self) -> str:
        """The inverse of parse."""
        return f"{self.host} {self.port} {self.epoch} {self.slot_bytes} {self.unique_id.hex()}"

    @classmethod
    def parse(cls, text: str) -> "NcclAddress":
        """Raises TransferError (UNSUPPORTED) for what no source of ours would send."""
        try:
            host, port, epoch, slot_bytes, unique_id = text.split(" ")
            made = cls(host, int(port), int(epoch), int(slot_bytes), bytes.fromhex(unique_id))
        except ValueError as error:
            raise TransferError(
                TransferFault.UNSUPPORTED, "The source's nccl address makes no sense."
            ) from error
        fits = 0 < made.slot_bytes <= MAX_SLOT_BYTES and 0 < made.port < 65536 and 0 <= made.epoch < 1 << 63
        if not fits or len(made.unique_id) != UNIQUE_ID_BYTES:
            raise TransferError(TransferFault.UNSUPPORTED, "The source's nccl address is out of bounds.")
        return made
