"""Edge: NCCL through CuPy: the one module that imports cupy, and only when it is asked to.

What the binding does not do is done here or by the callers: its opening call blocks for ever when the peer
is gone (callers bound it), its error table ends at 5 (6 and 7 come as KeyError), and its destructor calls
ncclCommDestroy, which may block (callers abort first, and keep what they could not abort).
"""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Protocol

from tandem.errors import TransferError, TransferFault

UNIQUE_ID_BYTES: Final = 128

ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {"NCCL_MAX_NCHANNELS": "4", "NCCL_MAX_P2P_NCHANNELS": "4"}
)
"""Set before the first call unless the operator did: each channel of a pair costs memory and SMs.

Two processes on one GPU need different NCCL_HOSTID (nccl #103); NCCL then takes them for two hosts and moves
the bytes through sockets, so tests set it and operators do not.
"""

_UINT8: Final = 1
"""ncclUint8 of nccl.h."""

_REMOTE_ERROR: Final = 6
_IN_PROGRESS: Final = 7
_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "unhandled CUDA error",
        2: "system error",
        3: "internal error",
        4: "invalid argument",
        5: "invalid usage",
        _REMOTE_ERROR: "the peer died or its network broke",
        _IN_PROGRESS: "still in progress",
    }
)
_FAULTS: Final[Mapping[int, TransferFault]] = MappingProxyType(
    {
        2: TransferFault.DISCONNECTED,
        4: TransferFault.REFUSED,
        5: TransferFault.REFUSED,
        _REMOTE_ERROR: TransferFault.DISCONNECTED,
        _IN_PROGRESS: TransferFault.TIMEOUT,
    }
)


class NcclCommunicator(Protocol):
    """An open 2-rank communicator; calls but `abort` come from one thread at a time, its device current."""

    def send(self, address: int, size_bytes: int, stream: int) -> None:
        """Enqueues a message to the other rank. Raises TransferError."""
        ...

    def receive(self, address: int, size_bytes: int, stream: int) -> None:
        """Enqueues the taking of the other rank's next message. Raises TransferError."""
        ...

    def check(self) -> None:
        """Raises TransferError when the communicator broke since the last call."""
        ...

    def abort(self) -> None:
        """Ends it and what runs on it; may hang. No call may follow. Raises TransferError."""
        ...


class NcclBinding(Protocol):
    """What is used of NCCL."""

    def unique_id(self) -> bytes:
        """Names a communicator to be; UNIQUE_ID_BYTES long and secret. Raises TransferError."""
        ...

    def open(self, unique_id: bytes, rank: int) -> NcclCommunicator:
        """Joins as rank 0 or 1; blocks until the other one has joined, perhaps for ever.

        Raises TransferError.
        """
        ...


def load_binding() -> NcclBinding:
    """NCCL as CuPy binds it. Raises OSError, in a sentence, where there is none."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise OSError(f"CuPy is not installed or cannot be loaded ({error}).") from error
    if not getattr(nccl, "available", False):
        raise OSError("CuPy is installed here without NCCL.")
    return CupyBinding(nccl)


class CupyBinding:
    """The module cupy.cuda.nccl (or one that behaves like it) behind NcclBinding."""

    def __init__(self, nccl: Any) -> None:
        self._nccl = nccl

    def unique_id(self) -> bytes:
        """CuPy before 14 gives a tuple of signed numbers, later ones bytes."""
        with _mapped("ncclGetUniqueId", self._nccl):
            found = self._nccl.get_unique_id()
        return found if isinstance(found, bytes) else struct.pack(f"{UNIQUE_ID_BYTES}b", *found)

    def open(self, unique_id: bytes, rank: int) -> NcclCommunicator:
        """ncclCommInitRank."""
        if len(unique_id) != UNIQUE_ID_BYTES:
            message = f"A unique id has {UNIQUE_ID_BYTES} bytes; {len(unique_id)} were given."
            raise TransferError(TransferFault.LENGTH, message)
        with _mapped("ncclCommInitRank", self._nccl):
            return CupyCommunicator(self._nccl, self._made(unique_id, rank), peer=1 - rank)

    def _made(self, unique_id: bytes, rank: int) -> Any:
        """CuPy before 14 takes the id as a tuple and says so by a TypeError, before it calls NCCL."""
        try:
            return self._nccl.NcclCommunicator(2, unique_id, rank)
        except TypeError:
            numbers = struct.unpack(f"{UNIQUE_ID_BYTES}b", unique_id)
            return self._nccl.NcclCommunicator(2, numbers, rank)


class CupyCommunicator:
    """cupy.cuda.nccl.NcclCommunicator behind NcclCommunicator."""

    def __init__(self, nccl: Any, inner: Any, peer: int) -> None:
        self._nccl = nccl
        self._inner = inner
        self._peer = peer

    def send(self, address: int, size_bytes: int, stream: int) -> None:
        """ncclSend of bytes."""
        with _mapped("ncclSend", self._nccl):
            self._inner.send(address, size_bytes, _UINT8, self._peer, stream)

    def receive(self, address: int, size_bytes: int, stream: int) -> None:
        """ncclRecv of bytes."""
        with _mapped("ncclRecv", self._nccl):
            self._inner.recv(address, size_bytes, _UINT8, self._peer, stream)

    def check(self) -> None:
        """ncclCommGetAsyncError; work in progress is no error."""
        try:
            with _mapped("ncclCommGetAsyncError", self._nccl):
                self._inner.check_async_error()
        except TransferError as error:
            if error.fault is not TransferFault.TIMEOUT:
                raise

    def abort(self) -> None:
        """ncclCommAbort."""
        with _mapped("ncclCommAbort", self._nccl):
            self._inner.abort()


@contextmanager
def _mapped(call: str, nccl: Any) -> Iterator[None]:
    """Turns what CuPy raises into TransferErrors."""
    try:
        yield
    except (KeyError, nccl.NcclError) as error:
        status = _status(error)
        name = _NAMES.get(status, f"error {status}")
        fault = _FAULTS.get(status, TransferFault.DISCONNECTED)
        raise TransferError(fault, f"{call} failed: {name}.") from error


def _status(error: Exception) -> int:
    """ncclResult_t of an error: CuPy looks its name up in a table without 6 and 7, hence the KeyError."""
    if isinstance(error, KeyError):
        return error.args[0] if error.args and isinstance(error.args[0], int) else -1
    status = getattr(error, "status", -1)
    return status if isinstance(status, int) else -1


BindingLoader = Callable[[], NcclBinding]
"""Gives the binding or raises OSError."""
