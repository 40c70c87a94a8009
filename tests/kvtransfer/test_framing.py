"""What is on the wire is what both sides agreed on, or it is refused by name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.contract import BlockRange, HandoffKey, Transfer
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from tandem.errors import TransferError, TransferFault
from tandem.ids import LegId

NUMBER = st.integers(0, 2**32 - 1)
RANGES = st.builds(BlockRange, NUMBER, NUMBER, NUMBER, NUMBER)
KEYS = st.builds(HandoffKey, st.text(max_size=100).map(LegId), NUMBER)
TRANSFERS = st.builds(Transfer, KEYS, st.integers(0, 2**64 - 1), RANGES)
HEADERS = st.builds(Header, st.sampled_from(HeaderKind), TRANSFERS, st.integers(0, 2**64 - 1))
EXPECTED = Transfer(HandoffKey(LegId("leg"), 3), 7, BlockRange(2, 4))


def decoded(data: bytes) -> Header:
    """As a receiver reads it."""
    fixed, leg = data[: framing.HEADER_BYTES], data[framing.HEADER_BYTES :]
    assert framing.leg_bytes(fixed) == len(leg)
    return framing.decode_header(fixed, leg)


@given(HEADERS)
def test_header_survives_the_wire(header: Header) -> None:
    assert decoded(framing.encode_header(header)) == header


@given(st.binary(min_size=framing.HEADER_BYTES, max_size=framing.HEADER_BYTES))
def test_garbage_is_a_named_fault(data: bytes) -> None:
    with pytest.raises(TransferError) as caught:
        framing.leg_bytes(data)
    assert caught.value.fault is TransferFault.UNSUPPORTED


def test_long_leg_id_is_neither_sent_nor_read() -> None:
    header = Header(HeaderKind.ASK, replace(EXPECTED, key=HandoffKey(LegId("x" * 513), 1)), 0)
    with pytest.raises(TransferError, match="513 bytes"):
        framing.encode_header(header)
    allowed = framing.encode_header(replace(header, transfer=EXPECTED))
    tampered = allowed[: framing.HEADER_BYTES - 2] + (513).to_bytes(2, "big")
    with pytest.raises(TransferError, match="513 bytes"):
        framing.leg_bytes(tampered)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (Transfer(HandoffKey(LegId("another"), 3), 7, BlockRange(2, 4)), TransferFault.REFUSED),
        (Transfer(HandoffKey(LegId("leg"), 2), 7, BlockRange(2, 4)), TransferFault.STALE_EPOCH),
        (Transfer(HandoffKey(LegId("leg"), 3), 8, BlockRange(2, 4)), TransferFault.REFUSED),
        (Transfer(HandoffKey(LegId("leg"), 3), 7, BlockRange(1, 4)), TransferFault.REFUSED),
        (Transfer(HandoffKey(LegId("leg"), 3), 7, BlockRange(2, 4, 1, 1)), TransferFault.REFUSED),
    ],
)
def test_bytes_of_another_transfer_are_not_taken(changed: Transfer, fault: TransferFault) -> None:
    with pytest.raises(TransferError) as caught:
        framing.check_header(Header(HeaderKind.BYTES, changed, 64), EXPECTED, 64)
    assert caught.value.fault is fault


def test_another_length_is_not_taken() -> None:
    with pytest.raises(TransferError) as caught:
        framing.check_header(Header(HeaderKind.BYTES, EXPECTED, 63), EXPECTED, 64)
    assert caught.value.fault is TransferFault.LENGTH


def test_another_share_is_not_taken() -> None:
    with pytest.raises(TransferError) as caught:
        framing.check_header(Header(HeaderKind.BYTES, EXPECTED, 64, 128), EXPECTED, 64, 64)
    assert caught.value.fault is TransferFault.LENGTH


def test_greeting_of_another_version_is_refused() -> None:
    greeting = bytearray(framing.encode_greeting(b"t" * 32))
    assert framing.decode_greeting(bytes(greeting)) == b"t" * 32
    greeting[5] += 1
    with pytest.raises(TransferError, match=f"version {framing.VERSION + 1}"):
        framing.decode_greeting(bytes(greeting))
