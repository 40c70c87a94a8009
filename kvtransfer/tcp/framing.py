"""Pure: the bytes on a data connection before and between the KV: greetings and transfer headers.

All numbers are big-endian. A header carries everything that names a transfer, so that bytes of another
request, epoch, attempt or range are never taken for the ones asked for (field-notes, pain 1). A refusal says
why, by the place of its fault in TransferFault.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from kvtransfer.contract import BlockRange, HandoffKey, Transfer
from kvtransfer.handoffs.tickets import TICKET_BYTES
from tandem.errors import TransferError, TransferFault
from tandem.ids import LegId

VERSION = 3
MAX_LEG_BYTES = 512
"""Longest leg id in UTF-8; a longer one is refused."""

_GREETING = struct.Struct(f"!4sHH{TICKET_BYTES}s")
_WELCOME = struct.Struct("!4sHH")
_HEADER = struct.Struct("!4sHHQIIIIIQQHH")
_GREETING_MAGIC = b"TKVg"
_WELCOME_MAGIC = b"TKVw"
_HEADER_MAGIC = b"TKVt"
_ACCEPTED = len(TransferFault)
_FAULTS = tuple(TransferFault)

GREETING_BYTES = _GREETING.size
WELCOME_BYTES = _WELCOME.size
HEADER_BYTES = _HEADER.size
"""Bytes of a header before its leg id."""


class HeaderKind(IntEnum):
    """What a header announces."""

    ASK = 1
    """The sink wants a transfer that it was granted."""
    BYTES = 2
    """`length_bytes` of KV follow."""
    REFUSED = 3
    """The source gives nothing."""


@dataclass(frozen=True, slots=True)
class Header:
    """Names a share of a transfer on the wire; `length_bytes` of KV follow a BYTES header.

    The share begins `offset_bytes` into the transfer, whose parts of blocks are counted one after the other.
    `fault` is why a REFUSED one is.
    """

    kind: HeaderKind
    transfer: Transfer
    length_bytes: int
    offset_bytes: int = 0
    fault: TransferFault = TransferFault.REFUSED


def encode_greeting(ticket: bytes) -> bytes:
    """What a sink says first; GREETING_BYTES long."""
    return _GREETING.pack(_GREETING_MAGIC, VERSION, 0, ticket)


def decode_greeting(data: bytes) -> bytes:
    """The ticket of a greeting. Raises TransferError (UNSUPPORTED)."""
    magic, version, _, ticket = _GREETING.unpack(data)
    _check(magic, _GREETING_MAGIC, version)
    return bytes(ticket)


def encode_welcome(accepted: bool, fault: TransferFault = TransferFault.REFUSED) -> bytes:
    """What a source answers, and why it refuses if it does; WELCOME_BYTES long."""
    return _WELCOME.pack(_WELCOME_MAGIC, VERSION, _ACCEPTED if accepted else _FAULTS.index(fault))


def check_welcome(data: bytes) -> None:
    """Raises TransferError: what the source named (REFUSED a wrong ticket), UNSUPPORTED for a stranger."""
    magic, version, answer = _WELCOME.unpack(data)
    _check(magic, _WELCOME_MAGIC, version)
    if answer != _ACCEPTED:
        fault = _named(answer)
        raise TransferError(fault, f"The source refused the data connection ({fault.value}).")


def encode_header(header: Header) -> bytes:
    """HEADER_BYTES and the leg id. Raises TransferError (UNSUPPORTED) when the leg id is too long."""
    leg = header.transfer.key.leg_id.encode()
    if len(leg) > MAX_LEG_BYTES:
        message = f"The leg id has {len(leg)} bytes; at most {MAX_LEG_BYTES} can be sent."
        raise TransferError(TransferFault.UNSUPPORTED, message)
    part = header.transfer.block_range
    fixed = _HEADER.pack(
        *(_HEADER_MAGIC, VERSION, header.kind, header.transfer.number, header.transfer.key.epoch),
        *(part.first_block, part.num_blocks, part.first_layer, part.num_layers),
        *(header.length_bytes, header.offset_bytes, _FAULTS.index(header.fault), len(leg)),
    )
    return fixed + leg


def leg_bytes(fixed: bytes) -> int:
    """How many bytes of leg id follow the first HEADER_BYTES. Raises TransferError (UNSUPPORTED)."""
    magic, version, *_, length = _HEADER.unpack(fixed)
    _check(magic, _HEADER_MAGIC, version)
    if length > MAX_LEG_BYTES:
        raise TransferError(TransferFault.UNSUPPORTED, f"A leg id of {length} bytes was announced.")
    return int(length)


def decode_header(fixed: bytes, leg: bytes) -> Header:
    """Raises TransferError (UNSUPPORTED) for what no peer of ours would send."""
    _, _, kind, number, epoch, *numbers, length, offset, fault, _ = _HEADER.unpack(fixed)
    try:
        leg_id = LegId(leg.decode())
        known_kind = HeaderKind(kind)
    except ValueError as error:
        raise TransferError(TransferFault.UNSUPPORTED, "A transfer header makes no sense.") from error
    transfer = Transfer(HandoffKey(leg_id, epoch), number, BlockRange(*numbers))
    return Header(known_kind, transfer, length, offset, _named(fault))


def check_header(header: Header, expected: Transfer, length_bytes: int, offset_bytes: int = 0) -> None:
    """Raises TransferError unless exactly the expected bytes follow."""
    if header.kind is HeaderKind.REFUSED:
        message = f"The source refused the transfer on the data connection ({header.fault.value})."
        raise TransferError(header.fault, message)
    if header.kind is not HeaderKind.BYTES or header.transfer.key.leg_id != expected.key.leg_id:
        raise TransferError(TransferFault.REFUSED, "The bytes on the connection belong to another request.")
    if header.transfer.key.epoch != expected.key.epoch:
        message = f"Bytes of epoch {header.transfer.key.epoch} came; {expected.key.epoch} was granted."
        raise TransferError(TransferFault.STALE_EPOCH, message)
    if header.transfer != expected:
        raise TransferError(TransferFault.REFUSED, "The bytes on the connection belong to another transfer.")
    if header.length_bytes != length_bytes:
        message = f"{header.length_bytes} bytes were announced; {length_bytes} were granted."
        raise TransferError(TransferFault.LENGTH, message)
    if header.offset_bytes != offset_bytes:
        message = f"Bytes from {header.offset_bytes} on were announced; {offset_bytes} was asked for."
        raise TransferError(TransferFault.LENGTH, message)


def fault_of_ask(asked: Header, granted: Transfer | None, fits: bool) -> TransferFault:
    """Why a source refuses a request.

    `granted` is the transfer of its number, None when there is none; `fits` whether the bytes that are asked
    for are such as it has.
    """
    if granted is None or asked.transfer.key.leg_id != granted.key.leg_id:
        return TransferFault.REFUSED
    if asked.transfer.key.epoch < granted.key.epoch:
        return TransferFault.STALE_EPOCH
    if asked.transfer.key != granted.key:
        return TransferFault.REFUSED
    same = asked.transfer.block_range == granted.block_range
    # What fits and is not given after all is over, or given already.
    return TransferFault.REFUSED if same and fits else TransferFault.LENGTH


def _named(code: int) -> TransferFault:
    """Raises TransferError (UNSUPPORTED) for a code that no source of ours would send."""
    if code >= len(_FAULTS):
        raise TransferError(TransferFault.UNSUPPORTED, f"A refusal of unknown kind {code} was sent.")
    return _FAULTS[code]


def _check(magic: bytes, expected: bytes, version: int) -> None:
    if magic != expected:
        raise TransferError(TransferFault.UNSUPPORTED, "The peer on the data connection is not one of ours.")
    if version != VERSION:
        message = f"The peer speaks version {version} of the data protocol; this is {VERSION}."
        raise TransferError(TransferFault.UNSUPPORTED, message)
