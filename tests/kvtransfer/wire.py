"""Edge: a wire between two network namespaces that delays and loses packets by a seeded schedule.

Each end is a tun device in a namespace of its own, and this process carries the packets: what `tc netem`
does, on kernels that lack it, too. Needs root and /dev/net/tun.
"""

import asyncio
import fcntl
import os
import random
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
PACKET_BYTES = 65536
MTU = 1500


class NoWire(Exception):
    """This machine can't have network namespaces with a wire between them; the message says why."""


@dataclass(slots=True)
class Wire:
    """Two ends; `names` are the namespaces and `addresses` the hosts in them."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    delay_s: float
    loss: float
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    carried: int = 0
    lost: int = 0

    def carry(self, source: int, target: int) -> None:
        """Takes a packet off one end; puts it on the other later, or never."""
        try:
            packet = os.read(source, PACKET_BYTES)
        except BlockingIOError:
            return
        if self.chance.random() < self.loss:
            self.lost += 1
            return
        self.carried += 1
        asyncio.get_running_loop().call_later(self.delay_s, self._put, target, packet)

    def _put(self, target: int, packet: bytes) -> None:
        try:
            os.write(target, packet)
        except OSError:
            # The end is down or closed: a packet more that is lost.
            self.lost += 1


@asynccontextmanager
async def wire(delay_s: float, loss: float) -> AsyncIterator[Wire]:
    """Two namespaces and the wire; all is gone at the end. Raises NoWire."""
    number = os.getpid() % 100_000
    names = (f"tandem-{number}-a", f"tandem-{number}-b")
    made = Wire(names, ("10.77.0.1", "10.77.0.2"), delay_s, loss)
    ends: list[int] = []
    loop = asyncio.get_running_loop()
    try:
        for index, name in enumerate(names):
            _run("ip", "netns", "add", name)
            ends.append(_end(f"tk{number}{index}", name, made.addresses[index], made.addresses[1 - index]))
        for source, target in (ends, ends[::-1]):
            loop.add_reader(source, made.carry, source, target)
        yield made
    finally:
        for end in ends:
            loop.remove_reader(end)
            os.close(end)
        _delete(names)


def _end(device: str, namespace: str, address: str, peer: str) -> int:
    """A tun device that was moved into a namespace; it goes when its descriptor is closed."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise NoWire(f"no tun device: {error}") from error
    inside = ("ip", "-n", namespace)
    try:
        _run("ip", "link", "set", device, "netns", namespace)
        _run(*inside, "address", "add", address, "peer", peer, "dev", device)
        _run(*inside, "link", "set", device, "mtu", str(MTU), "up")
        _run(*inside, "link", "set", "lo", "up")
    except NoWire:
        os.close(descriptor)
        raise
    return descriptor


def _delete(namespaces: tuple[str, str]) -> None:
    """Harmless when they were never made."""
    for name in namespaces:
        subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise NoWire(f"{' '.join(command)}: {said.decode().strip()}") from error
