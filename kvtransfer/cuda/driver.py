"""Edge: handles of device memory for other processes, through the CUDA driver (libcuda, by ctypes).

torch shares tensors by handles of its own making, whose reference counts lie in files that a killed process
leaves behind; the driver's 64 bytes are all that another process needs.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tandem.errors import TransferError, TransferFault

HANDLE_BYTES: Final = 64
_LAZY_PEER_ACCESS: Final = 1
_DeviceAddress = ctypes.c_uint64


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """An allocation that another process may map: its handle, and where in it something begins."""

    handle: bytes
    offset_bytes: int


class MemorySharing(Protocol):
    """What is used of the driver; calls may come from any thread."""

    def share(self, address: int) -> SharedMemory:
        """Names the allocation in which an address lies. Raises OSError when it cannot be shared."""
        ...

    def map(self, handle: bytes) -> int:
        """Address here of another process's allocation, through a peer's link if it is on another device.

        Raises TransferError (UNSUPPORTED).
        """
        ...

    def unmap(self, address: int) -> None:
        """Ends a mapping; when the other process is gone there may be nothing to end."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def open_sharing(device_index: int) -> MemorySharing:
    """Raises OSError where there is no driver or no such device."""
    return CudaDriver(ctypes.CDLL("libcuda.so.1"), device_index)


class CudaDriver:
    """libcuda within a device's primary context, the one that torch uses."""

    def __init__(self, library: Any, device_index: int) -> None:
        """Raises OSError when the device cannot be had."""
        self._cuda = library
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        for status in (
            library.cuInit(0),
            library.cuDeviceGet(ctypes.byref(device), device_index),
            library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device),
        ):
            if status:
                raise OSError(f"The CUDA driver cannot use device {device_index}: {self._reason(status)}.")

    def share(self, address: int) -> SharedMemory:
        """cuIpcGetMemHandle; memory of torch's expandable segments has none."""
        base, size, handle = _DeviceAddress(), ctypes.c_size_t(), _Handle()
        self._enter()
        status = self._cuda.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), _DeviceAddress(address)
        ) or self._cuda.cuIpcGetMemHandle(ctypes.byref(handle), base)
        if status:
            raise OSError(f"The KV pool cannot be shared with other processes: {self._reason(status)}.")
        return SharedMemory(bytes(handle), address - base.value)

    def map(self, handle: bytes) -> int:
        """cuIpcOpenMemHandle."""
        if len(handle) != HANDLE_BYTES:
            raise TransferError(TransferFault.LENGTH, f"A handle of {len(handle)} bytes was given.")
        address = _DeviceAddress()
        self._enter()
        status = self._cuda.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
        )
        if status:
            message = f"The source's memory cannot be mapped: {self._reason(status)}."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        return address.value

    def unmap(self, address: int) -> None:
        """cuIpcCloseMemHandle; its status does not matter, since nobody uses the mapping any more."""
        self._enter()
        self._cuda.cuIpcCloseMemHandle(_DeviceAddress(address))

    def _enter(self) -> None:
        """Makes the context the calling thread's: a new thread has none."""
        self._cuda.cuCtxSetCurrent(self._context)

    def _reason(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self._cuda.cuGetErrorString(status, ctypes.byref(text)) or text.value is None:
            return f"error {status}"
        return text.value.decode(errors="replace")
