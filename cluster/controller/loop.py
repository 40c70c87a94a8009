"""Edge: the controller beside a cluster: reads the load, asks the pure controller, writes what it wants.

Of several controllers one acts: who holds a lease in the registry, without which nothing can be written. What
the controller remembers is written with every decision, so that the next one goes on where it ended.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
from pydantic import TypeAdapter, ValidationError

from cluster.controller.load_source import LoadSource
from cluster.controller.load_windows import LoadWindows
from cluster.controller.log_file import ControllerLog
from cluster.controller.metrics import ControllerMetrics
from cluster.outage import Outage
from cluster.store import Controlled, Desired, Store, StoreUnavailable
from planner.control.controller import Controller, ControllerRules, ControllerState, Decision, diff
from planner.control.load_window import LoadWindow
from planner.control.role_capacity import CapacityOf
from tandem.errors import TandemError

log = structlog.get_logger(__name__)

RENEWALS_PER_LEASE = 5
MOST_UNSETTLED = 5
"""After so many windows in a row in which the cluster is not what is wanted, what it is counts."""

_STATE = TypeAdapter(ControllerState)


@dataclass(frozen=True, slots=True)
class Brain:
    """What decides: the rules, what workers can do, and how long a window is."""

    rules: ControllerRules
    capacity_of: CapacityOf
    window_s: float

    def controller(self, state: ControllerState | None = None) -> Controller:
        """A controller that goes on from a state. Raises ConfigError for rules without sense."""
        return Controller(self.rules, self.capacity_of, state)


@dataclass(frozen=True, slots=True)
class Senses:
    """Where a controller learns the load, notes its decisions, and is watched; the clock is a wall clock,
    since the times of windows outlive this process.
    """

    load: LoadSource
    log: ControllerLog
    metrics: ControllerMetrics
    clock: Callable[[], float] = time.time


class ControllerLoop:
    """One controller; `turn` is called often, and acts when it leads and a window is over."""

    def __init__(self, brain: Brain, senses: Senses, store: Store, lease_s: float) -> None:
        """Raises ConfigError for rules without sense."""
        brain.rules.check()
        self._brain = brain
        self._senses = senses
        self._store = store
        self._lease_s = lease_s
        self._token = uuid.uuid4().hex
        self._controller: Controller | None = None
        self._windows = LoadWindows()
        self._window_ends_s = 0.0
        self._unsettled = 0
        self._version = 0
        self._outage = Outage("the controller waits: the registry is away")
        self._silence = Outage("the controller waits: no router tells its load", "routers tell their load")

    @property
    def leading(self) -> bool:
        """Whether this controller acts."""
        return self._controller is not None

    async def run(self) -> None:
        """Controls until cancelled, then lets another one lead."""
        try:
            while True:
                await self.turn()
                await asyncio.sleep(min(self._lease_s, self._brain.window_s) / RENEWALS_PER_LEASE)
        finally:
            await self.resign()

    async def turn(self) -> None:
        """Renews the lease, and decides when a window is over. Raises ConfigError for a refused login."""
        try:
            if not await self._store.lead(self._token, self._lease_s):
                self._step_down()
            elif self._controller is None:
                await self._take_over()
            elif not 0 < self._window_ends_s - self._senses.clock() <= self._brain.window_s:
                await self._end_window(self._controller)
        except StoreUnavailable as error:
            self._outage.began(error)
            self._step_down()
        else:
            self._outage.ended()

    async def resign(self) -> None:
        """Lets another controller lead at once."""
        self._step_down()
        try:
            await self._store.resign(self._token)
        except TandemError as error:
            log.warning("the controller's lease must run out by itself", error=str(error))

    def _step_down(self) -> None:
        """What was decided and not written is forgotten; the registry has the rest."""
        self._controller = None
        self._senses.metrics.leads(False)

    async def _take_over(self) -> None:
        self._windows, self._unsettled = LoadWindows(), 0
        memory = await self._store.controller_memory()
        desired = await self._store.desired()
        if await self._read_window() is None and not self._windows.begun:
            return
        self._controller = self._going_on(
            ControllerState() if memory is None else _remembered(memory), desired
        )
        self._senses.metrics.leads(True)
        log.info("this controller leads", desired=None if desired is None else str(desired.placement))

    def _going_on(self, state: ControllerState, desired: Desired | None) -> Controller:
        """A controller that wants what is wanted, whoever said so."""
        self._version = 0 if desired is None else desired.version
        self._senses.log.begin()
        return self._brain.controller(replace(state, desired=None if desired is None else desired.placement))

    async def _end_window(self, controller: Controller) -> None:
        window = await self._read_window()
        if window is None:
            self._senses.metrics.skipped()
            return
        desired = await self._store.desired()
        if desired is None or not self._settled(window, desired):
            self._senses.metrics.skipped()
            return
        if desired.version != self._version:
            controller = self._controller = self._going_on(controller.state, desired)
        before = controller.state
        decision = await asyncio.to_thread(controller.decide, window)
        await self._senses.log.note(window, decision, before)
        await self._write(decision, controller.state, desired)

    async def _read_window(self) -> LoadWindow | None:
        """The window that ends now; None when no router tells its load, and for the first sample."""
        now_s = self._senses.clock()
        self._window_ends_s = now_s + self._brain.window_s
        try:
            samples = await self._senses.load.read()
        except TandemError as error:
            self._silence.began(error)
            return None
        self._silence.ended()
        return self._windows.add(now_s, samples)

    def _settled(self, window: LoadWindow, desired: Desired) -> bool:
        """Whether the workers are those that are wanted, or have not become so for long."""
        if window.placement == desired.placement:
            self._unsettled = 0
            return True
        self._unsettled += 1
        return window.placement.valid and self._unsettled > MOST_UNSETTLED

    async def _write(self, decision: Decision, state: ControllerState, desired: Desired) -> None:
        possible = decision.changed and all(action.possible for action in decision.actions)
        change = Desired(desired.version, decision.desired) if possible else None
        # Reading and deciding may have taken longer than the lease, which nobody else may have taken.
        await self._store.lead(self._token, self._lease_s)
        outcome = await self._store.control(self._token, _STATE.dump_json(state), change)
        if outcome is not Controlled.DONE:
            log.warning("a decision was not written", reason=outcome.name, decision=diff(decision))
            self._step_down()
            return
        self._version += possible
        self._senses.metrics.decided(decision, written=possible)
        if decision.changed:
            log.warning("the controller decided", decision=diff(decision), serves_rps=decision.serves_rps)


async def dry_run(brain: Brain, load: LoadSource, say: Callable[[str], None]) -> None:
    """Says after every window what would be changed, until cancelled; writes nothing anywhere."""
    controller, windows = brain.controller(), LoadWindows()
    while True:
        try:
            window = windows.add(time.time(), await load.read())
        except TandemError as error:
            say(f"no window: {error}")
        else:
            if window is not None and window.placement.valid:
                decision = await asyncio.to_thread(controller.decide, window)
                say(f"{window.placement}, {window.rate_rps:.3g} req/s: {diff(decision)}")
        await asyncio.sleep(brain.window_s)


def _remembered(memory: bytes) -> ControllerState:
    try:
        return _STATE.validate_json(memory)
    except ValidationError as error:
        log.warning("the controller's memory is unreadable and forgotten", faults=error.error_count())
        return ControllerState()
