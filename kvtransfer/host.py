"""Edge: which processes can share memory."""

import socket
from pathlib import Path


def host_id() -> str:
    """Equal for two processes iff abstract unix sockets reach from one to the other.

    Boot and host name tell machines (and restored snapshots of one) apart; the network namespace tells pods
    of one machine apart, because abstract sockets do not cross it.
    """
    boot = _read("/proc/sys/kernel/random/boot_id")
    try:
        namespace = str(Path("/proc/self/ns/net").stat().st_ino)
    except OSError:
        namespace = "unknown"
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"
