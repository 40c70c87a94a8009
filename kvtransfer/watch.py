"""Edge: whether a transfer that runs in a thread should go on, and waiting for a device meanwhile."""

import math
import threading
import time
from collections.abc import Callable
from typing import Final

from kvtransfer.device import Mark
from tandem.errors import TransferError, TransferFault

SPIN_S: Final = 0.001
"""How long a wait asks again and again: a copy within a device takes less than a timer's slack."""

POLL_S: Final = 0.0001
"""Pause between two looks after that: a device tells nobody when work is done."""


class Watch:
    """Says while a transfer runs whether it should go on; stopped from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, until_s: float = math.inf) -> None:
        """`until_s` is the end of the lease on `clock`."""
        self._stopped = threading.Event()
        self._clock = clock
        self._until_s = until_s

    def stop(self) -> None:
        """Makes the transfer end soon."""
        self._stopped.set()

    def check(self) -> None:
        """Raises TransferError when it was stopped (DISCONNECTED) or its lease ended (LEASE)."""
        if self._stopped.is_set():
            raise TransferError(TransferFault.DISCONNECTED, "The transfer was stopped.")
        if self._clock() >= self._until_s:
            raise TransferError(TransferFault.LEASE, "The lease ended before all blocks had come.")


def wait_for(mark: Mark, check: Callable[[], None]) -> None:
    """Until a mark is done; raises what `check`, which is called at every look and at the end, raises."""
    began_s = time.monotonic()
    while not mark.done():
        check()
        time.sleep(0.0 if time.monotonic() - began_s < SPIN_S else POLL_S)
    check()


def outwait(mark: Mark, bound_s: float) -> None:
    """Until a mark that waits for no peer is done. Raises TransferError when the device does not answer."""
    until_s = time.monotonic() + bound_s

    def check() -> None:
        if time.monotonic() >= until_s and not mark.done():
            raise TransferError(TransferFault.TIMEOUT, "The device did not finish a copy of its own.")

    wait_for(mark, check)
