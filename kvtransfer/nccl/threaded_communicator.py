"""Edge: carries out the life of one communicator: opens, uses and aborts it in threads, each within a bound.

The state is a CommunicatorState of communicator.py; all methods are called on the event loop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from kvtransfer.device import Device
from kvtransfer.nccl.binding import BindingLoader, NcclBinding
from kvtransfer.nccl.communicator import (
    CommunicatorAction,
    CommunicatorCounts,
    CommunicatorInput,
    CommunicatorLimits,
    CommunicatorState,
    transition,
)
from kvtransfer.nccl.moves import Wire
from kvtransfer.threads import in_daemon_thread, outlast
from kvtransfer.watch import Watch
from tandem.errors import TransferError, TransferFault

_KEPT: list[Wire] = []
"""Communicators whose abort hangs: their destructor would hang, too, so nobody may collect them."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class NcclKit:
    """What a worker needs for NCCL: how to load the binding, how to use a device, and bounds."""

    load_binding: BindingLoader
    open_device: Callable[[int], Device]
    limits: CommunicatorLimits = field(default_factory=CommunicatorLimits)


@dataclass(frozen=True, slots=True)
class Rank:
    """This process's place in a communicator."""

    unique_id: bytes
    number: int


class PairCommunicator:
    """One communicator of one pair and epoch; carries one transfer at a time.

    `on_over`, to be set by its owner, is called once when it will carry no other one.
    """

    def __init__(
        self,
        rank: Rank,
        binding: NcclBinding,
        device: Device,
        limits: CommunicatorLimits,
        slot_bytes: int,
    ) -> None:
        self.state = CommunicatorState.FRESH
        self.on_over: Callable[[], None] = _nothing
        self._rank = rank
        self._binding = binding
        self._device = device
        self._limits = limits
        self._slot_bytes = slot_bytes
        self._wire: Wire | None = None
        self._decided = asyncio.Event()
        self._working: asyncio.Future[None] | None = None
        self._watch: Watch | None = None
        self._ending: asyncio.Task[None] | None = None
        self._overdue: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a transfer runs on it."""
        return self._watch is not None

    def counts(self) -> CommunicatorCounts:
        """For metrics and for the watchdog."""
        wedged = "An NCCL abort hangs." if self.state is CommunicatorState.STUCK else None
        held = 0 if self._wire is None else self._wire.bytes
        return CommunicatorCounts(
            self._wire is not None, held, self.state is CommunicatorState.ABANDONED, wedged
        )

    def open(self) -> None:
        """Begins to open it unless that was done."""
        if self.state is CommunicatorState.FRESH:
            self._apply(CommunicatorInput.OPEN)

    async def ready(self, within_s: float) -> None:
        """Waits until it is open. Raises TransferError: TIMEOUT when it still opens, else DISCONNECTED."""
        self.open()
        try:
            async with asyncio.timeout(within_s):
                await self._decided.wait()
        except TimeoutError as error:
            raise TransferError(TransferFault.TIMEOUT, "The communicator still opens.") from error
        if self.state is not CommunicatorState.READY:
            raise TransferError(TransferFault.DISCONNECTED, "The communicator did not open or is over.")

    async def run(self, work: Callable[[Wire, Watch], None], watch: Watch) -> None:
        """Runs one transfer; whatever ends it early ends the communicator, because its order is lost.

        One that is cancelled may end by itself within stop_s: often the other side was only quicker to see
        that all is there. Raises what the work raised. When it returns, raises or was cancelled, the work has
        ended, unless the state is STUCK; then only staging is still in use.
        """
        wire = self._wire
        if wire is None or self.state is not CommunicatorState.READY or self.busy:
            raise TransferError(TransferFault.DISCONNECTED, "The communicator is not free.")
        self._watch = watch
        self._working = in_daemon_thread(lambda: work(wire, watch), "kv-nccl-move")
        succeeded = False
        try:
            await asyncio.shield(self._working)
            succeeded = True
        except asyncio.CancelledError:
            succeeded = await self._ends_by_itself(self._working)
            raise
        finally:
            if not succeeded:
                self.end()
                await self.ended()
            if self._working.done():
                self._working.exception()
            self._watch = self._working = None

    async def _ends_by_itself(self, working: asyncio.Future[None]) -> bool:
        """Whether the transfer succeeds within stop_s."""
        grace = asyncio.create_task(asyncio.wait((working,), timeout=self._limits.stop_s))
        await outlast(grace)
        return working.done() and working.exception() is None

    def end(self) -> None:
        """Begins to end it, whatever it does; idempotent."""
        if self._watch is not None:
            self._watch.stop()
        self._apply(CommunicatorInput.END)

    async def ended(self) -> None:
        """Waits, within stop_s and twice abort_s, until it is over or stuck."""
        if self._ending is not None:
            await outlast(self._ending)

    def _apply(self, given: CommunicatorInput) -> None:
        was_over = self.state.over
        action, self.state = transition(self.state, given)
        if action is CommunicatorAction.OPEN:
            self._begin_opening()
        elif action is CommunicatorAction.ABORT:
            self._ending = asyncio.create_task(self._abort())
        elif action is CommunicatorAction.FORGET:
            self._wire = None
        elif action is CommunicatorAction.RESTART and self._wire is not None:
            _KEPT.append(self._wire)
            _log.critical("an abort of NCCL hangs; the worker must be restarted")
        elif action is CommunicatorAction.ABANDON:
            _log.warning("a communicator did not open in time", limit_s=self._limits.open_s)
        if self.state is not CommunicatorState.OPENING:
            self._decided.set()
        if self.state.over and not was_over:
            self.on_over()

    def _begin_opening(self) -> None:
        self._overdue = asyncio.get_running_loop().call_later(self._limits.open_s, self._open_overdue)
        opening = in_daemon_thread(self._open, "kv-nccl-open")
        opening.add_done_callback(self._opened)

    def _open(self) -> Wire:
        """Blocks, perhaps for ever, until the peer opens its side."""
        with self._device.current():
            before = self._device.free_bytes()
            slots = (self._device.staging(self._slot_bytes), self._device.staging(self._slot_bytes))
            copying, sending = self._device.lane(), self._device.lane()
            communicator = self._binding.open(self._rank.unique_id, self._rank.number)
            taken = max(0, before - self._device.free_bytes())
        return Wire(communicator, self._device, copying, sending, slots, self._slot_bytes, taken)

    def _opened(self, opening: asyncio.Future[Wire]) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
        if opening.cancelled():
            return
        error = opening.exception()
        if error is not None:
            _log.warning("a communicator could not be opened", error=str(error))
            self._apply(CommunicatorInput.OPEN_FAILED)
            return
        self._wire = opening.result()
        self._apply(CommunicatorInput.OPENED)

    def _open_overdue(self) -> None:
        if self.state is CommunicatorState.OPENING:
            self._apply(CommunicatorInput.OPEN_OVERDUE)

    async def _abort(self) -> None:
        """Lets the transfer leave its call, aborts, and then waits for a transfer that the abort freed."""
        wire, working = self._wire, self._working
        if wire is None:
            return
        if working is not None:
            # An abort frees what a call uses, so it waits a little for the call that may yet return.
            await asyncio.wait((working,), timeout=self._limits.stop_s)
        aborting = in_daemon_thread(wire.communicator.abort, "kv-nccl-abort")
        awaited = (aborting,) if working is None else (aborting, working)
        _, late = await asyncio.wait(awaited, timeout=self._limits.abort_s)
        if late:
            self._apply(CommunicatorInput.ABORT_OVERDUE)
            return
        if (error := aborting.exception()) is not None:
            _log.warning("an abort of NCCL failed", error=str(error))
        self._apply(CommunicatorInput.ABORTED)


def _nothing() -> None:
    """What happens when nobody asked to be told."""
