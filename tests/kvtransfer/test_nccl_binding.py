"""CuPy's errors become TransferErrors, whatever way they come; NCCL is absent with a sentence."""

import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from kvtransfer.nccl.binding import ENVIRONMENT, UNIQUE_ID_BYTES, CupyBinding
from tandem.errors import TransferError, TransferFault
from tests.kvtransfer.fake_nccl import FakeNccl, Mischief, NcclError

ROOT = Path(__file__).resolve().parents[2]


class Raising:
    """A communicator whose every call fails with a status."""

    def __init__(self, status: int) -> None:
        self._status = status

    def __call__(self, *_arguments: object) -> "Raising":
        return self

    def send(self, *_arguments: object) -> None:
        """Fails."""
        raise NcclError(self._status)

    recv = check_async_error = abort = send


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (1, TransferFault.DISCONNECTED),
        (3, TransferFault.DISCONNECTED),
        (5, TransferFault.REFUSED),
        (6, TransferFault.DISCONNECTED),
        (7, TransferFault.TIMEOUT),
        (99, TransferFault.DISCONNECTED),
    ],
)
def test_every_call_maps_every_status(status: int, fault: TransferFault) -> None:
    nccl = FakeNccl()
    nccl.NcclCommunicator = Raising(status)  # type: ignore[method-assign, assignment]
    communicator = CupyBinding(nccl).open(bytes(UNIQUE_ID_BYTES), 0)
    calls = (partial(communicator.send, 0, 1, 0), partial(communicator.receive, 0, 1, 0), communicator.abort)
    for call in calls:
        with pytest.raises(TransferError) as caught:
            call()
        assert caught.value.fault is fault
    if status == 7:
        communicator.check()
    else:
        with pytest.raises(TransferError):
            communicator.check()


def test_statuses_beyond_cupys_table_come_as_key_errors() -> None:
    with pytest.raises(KeyError):
        raise NcclError(6)
    with pytest.raises(TransferError, match="the peer died"):
        CupyBinding(FakeNccl(Mischief(open_status=6))).open(bytes(UNIQUE_ID_BYTES), 1)


def test_id_of_older_cupy_becomes_the_same_bytes() -> None:
    nccl = FakeNccl(old=True)
    numbers = nccl.get_unique_id()
    nccl.get_unique_id = lambda: numbers  # type: ignore[method-assign]
    assert isinstance(numbers, tuple)
    assert CupyBinding(nccl).unique_id() == struct.pack("128b", *numbers)


def test_id_of_another_length_never_reaches_nccl() -> None:
    with pytest.raises(TransferError) as caught:
        CupyBinding(FakeNccl()).open(b"short", 1)
    assert caught.value.fault is TransferFault.LENGTH


@pytest.mark.parametrize("given", ["", "16"])
def test_few_channels_unless_the_operator_says_otherwise(given: str) -> None:
    """In a process of its own, because NCCL reads its environment once."""
    code = (
        "import os, sys, types; fake = types.ModuleType('cupy.cuda'); fake.nccl = types.SimpleNamespace("
        "available=True); sys.modules['cupy'] = types.ModuleType('cupy'); sys.modules['cupy.cuda'] = fake\n"
        "from kvtransfer.nccl.binding import load_binding\nload_binding()\n"
        "print(os.environ['NCCL_MAX_NCHANNELS'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    if given:
        environment["NCCL_MAX_NCHANNELS"] = given
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == (given or ENVIRONMENT["NCCL_MAX_NCHANNELS"])


def test_absence_of_cupy_is_a_sentence() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "from kvtransfer.nccl.binding import load_binding\n"
        "try:\n    load_binding()\nexcept OSError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("CuPy is not installed or cannot be loaded")
