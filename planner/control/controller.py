"""Pure: decides online which roles the workers should play, and how many there should be.

A placement is changed only where the present one is short: when the load with its headroom exceeds what the
analytic bound allows it, when prompt workers are hardly ever idle, or when objectives were missed, in
`patience` windows of the last `patience` + 1. The new one must serve
`gain` times as much, so that noise in the measured lengths flips nothing, and after a change the controller
dwells. Role flips come first, since they cost a drain; replicas are added where no flip is enough, and given
back after a long calm. (Dynamo's planner oscillates or never acts: field-notes 11.)
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from planner.control.load_window import LoadWindow, RolePlacement, splits
from planner.control.role_capacity import Capacity, CapacityOf
from tandem.errors import ConfigError


class ActionKind(Enum):
    """What can be done to workers; values are the words of the log."""

    FLIP_TO_PREFILL = "flip decode to prefill"
    FLIP_TO_DECODE = "flip prefill to decode"
    ADD_PREFILL = "add prefill"
    ADD_DECODE = "add decode"
    REMOVE_PREFILL = "remove prefill"
    REMOVE_DECODE = "remove decode"

    @property
    def is_flip(self) -> bool:
        """Whether a worker changes its role."""
        return self in (ActionKind.FLIP_TO_PREFILL, ActionKind.FLIP_TO_DECODE)


class Verdict(Enum):
    """Why a window led to a change, or to none."""

    IDLE = "nothing came"
    ENOUGH = "the placement is enough"
    WAITING = "not yet short or calm for long enough"
    DWELLING = "changed a moment ago"
    NO_BETTER = "no other placement is so much better"
    SHORT = "the placement is short"
    CALM = "fewer workers are enough"


@dataclass(frozen=True, slots=True)
class Action:
    """So many workers to flip, add or remove; `possible`: the cluster can carry it out."""

    kind: ActionKind
    count: int
    possible: bool


@dataclass(frozen=True, slots=True)
class RoleRange:
    """How many workers a role may have."""

    fewest: int = 1
    most: int = 1024

    def __contains__(self, count: int) -> bool:
        return self.fewest <= count <= self.most


@dataclass(frozen=True, slots=True)
class ControllerRules:
    """The controller's limits. `headroom` multiplies the measured rate, `spare` too before workers are given
    back; `fewest` and `most` bound the workers of both roles together, `prefill` and `decode` those of each.
    Prompt workers busier than `prefill_busy` are short; decode workers are always busy, with small batches
    too.
    """

    fewest: int
    most: int
    headroom: float = 1.1
    attainment: float = 0.9
    prefill_busy: float = 0.9
    gain: float = 1.25
    patience: int = 2
    dwell_s: float = 180.0
    spare: float = 1.5
    calm_windows: int = 10
    can_flip: bool = True
    can_scale: bool = True
    prefill: RoleRange = RoleRange()
    decode: RoleRange = RoleRange()

    def allows(self, placement: RolePlacement) -> bool:
        """Whether each role has as many workers as it may."""
        return placement.valid and placement.prefill in self.prefill and placement.decode in self.decode

    def check(self) -> None:
        """Raises ConfigError for rules without sense."""
        wrong = {
            "fewest: at least 2, one worker for each role": self.fewest >= 2,
            "most: at least fewest": self.most >= self.fewest,
            "prefill: at least 1, most at least fewest": 1 <= self.prefill.fewest <= self.prefill.most,
            "decode: at least 1, most at least fewest": 1 <= self.decode.fewest <= self.decode.most,
            "headroom, gain, spare: at least 1": min(self.headroom, self.gain, self.spare) >= 1,
            "attainment: between 0 and 1": 0 < self.attainment < 1,
            "prefill_busy: above 0, up to 1": 0 < self.prefill_busy <= 1,
            "patience, calm_windows: at least 1": min(self.patience, self.calm_windows) >= 1,
            "dwell_s: not negative": self.dwell_s >= 0,
        }
        for needed, holds in wrong.items():
            if not holds:
                raise ConfigError(f"controller: {needed}")


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted after a window. `actions` lead from the present placement to `desired`; none without a
    change. `serves_rps` is the bound of the present placement, `needs_rps` the rate with its headroom.
    """

    at_s: float
    verdict: Verdict
    desired: RolePlacement
    actions: tuple[Action, ...]
    serves_rps: float
    needs_rps: float

    @property
    def changed(self) -> bool:
        """Whether something is to be done."""
        return bool(self.actions)


@dataclass(frozen=True, slots=True)
class ControllerState:
    """All that a controller remembers: what it wants and since when, which of the last windows were short,
    and for how many it was calm. A controller that begins with it goes on where the other one ended.
    """

    desired: RolePlacement | None = None
    changed_s: float | None = None
    recent: tuple[bool, ...] = ()
    calm: int = 0


class Controller:
    """Owns what is desired; told one window after the other, in order of time."""

    def __init__(
        self, rules: ControllerRules, capacity_of: CapacityOf, state: ControllerState | None = None
    ) -> None:
        """Without a state it remembers nothing. Raises ConfigError for rules without sense."""
        rules.check()
        begun = state or ControllerState()
        self._rules = rules
        self._capacity_of = capacity_of
        self._desired = begun.desired
        self._changed_s = begun.changed_s
        self._recent = deque(begun.recent, maxlen=rules.patience + 1)
        self._calm = begun.calm

    @property
    def state(self) -> ControllerState:
        """What it remembers after the last window."""
        return ControllerState(self._desired, self._changed_s, tuple(self._recent), self._calm)

    def decide(self, window: LoadWindow) -> Decision:
        """What is wanted from now on; the same windows in the same order give the same decisions."""
        present = window.placement
        desired = self._desired or present
        if not window.lengths or window.arrived == 0:
            self._forget()
            return Decision(window.ended_s, Verdict.IDLE, desired, (), 0.0, 0.0)
        capacity = self._capacity_of(window.lengths)
        serves, needs = capacity(present), window.rate_rps * self._rules.headroom
        missed = window.prefill_busy > self._rules.prefill_busy or (
            window.attainment is not None and window.attainment < self._rules.attainment
        )
        verdict, target = self._judged(window, capacity, serves, needs, missed)
        actions: tuple[Action, ...] = ()
        if target != desired and verdict in (Verdict.SHORT, Verdict.CALM):
            actions = difference(present, target, self._rules)
            self._desired, self._changed_s = target, window.ended_s
            self._forget()
        return Decision(window.ended_s, verdict, self._desired or present, actions, serves, needs)

    def _judged(
        self, window: LoadWindow, capacity: Capacity, serves: float, needs: float, missed: bool
    ) -> tuple[Verdict, RolePlacement]:
        """The verdict, and the placement that it asks for."""
        rules, present = self._rules, window.placement
        short = missed or serves < needs
        fewer = None if short else self._fewer(present, capacity, window.rate_rps * rules.spare)
        self._recent.append(short)
        self._calm = self._calm + 1 if fewer is not None else 0
        if not short and fewer is None:
            return Verdict.ENOUGH, present
        if self._changed_s is not None and window.ended_s - self._changed_s < rules.dwell_s:
            return Verdict.DWELLING, present
        if sum(self._recent) < rules.patience and self._calm < rules.calm_windows:
            return Verdict.WAITING, present
        if fewer is not None:
            return Verdict.CALM, fewer
        better = self._better(present, capacity, max(needs, serves * rules.gain if missed else 0.0))
        if better is None or capacity(better) < serves * rules.gain:
            return Verdict.NO_BETTER, present
        return Verdict.SHORT, better

    def _forget(self) -> None:
        self._recent.clear()
        self._calm = 0

    def _better(self, present: RolePlacement, capacity: Capacity, needs: float) -> RolePlacement | None:
        """The best placement of the fewest workers that are enough; else the best one there is."""
        found: list[RolePlacement] = []
        for total in self._totals(present):
            found = [one for one in splits(total) if self._possible(present, one)] or found
            enough = [one for one in found if capacity(one) >= needs]
            if enough:
                return max(enough, key=lambda one: (capacity(one), -_distance(present, one)))
        best = max(found, key=lambda one: (capacity(one), -_distance(present, one)), default=None)
        if best is not None and capacity(best) >= capacity(present) * self._rules.gain:
            return best
        # Nothing that the cluster can do helps: what would help is wanted all the same, and shown.
        wished = filter(self._rules.allows, splits(present.total))
        return max(wished, key=lambda one: (capacity(one), -_distance(present, one)), default=None)

    def _totals(self, present: RolePlacement) -> Iterable[int]:
        most = max(self._rules.most, present.total) if self._rules.can_scale else present.total
        return range(present.total, most + 1)

    def _possible(self, present: RolePlacement, target: RolePlacement) -> bool:
        flips = target.prefill < present.prefill or target.decode < present.decode
        return self._rules.allows(target) and (self._rules.can_flip or not flips)

    def _fewer(self, present: RolePlacement, capacity: Capacity, needs: float) -> RolePlacement | None:
        """One worker fewer, where that is enough by far."""
        if not self._rules.can_scale or present.total <= self._rules.fewest:
            return None
        less = (
            RolePlacement(present.prefill - 1, present.decode),
            RolePlacement(present.prefill, present.decode - 1),
        )
        enough = [one for one in less if self._rules.allows(one) and capacity(one) >= needs]
        return max(enough, key=capacity, default=None)


def difference(present: RolePlacement, target: RolePlacement, rules: ControllerRules) -> tuple[Action, ...]:
    """The actions that lead from one placement to another: as many flips as possible, then replicas."""
    more_prefill, more_decode = target.prefill - present.prefill, target.decode - present.decode
    to_prefill = max(0, min(more_prefill, -more_decode))
    to_decode = max(0, min(more_decode, -more_prefill))
    more_prefill += to_decode - to_prefill
    more_decode += to_prefill - to_decode
    counts = {
        ActionKind.FLIP_TO_PREFILL: to_prefill,
        ActionKind.FLIP_TO_DECODE: to_decode,
        ActionKind.ADD_PREFILL: max(0, more_prefill),
        ActionKind.ADD_DECODE: max(0, more_decode),
        ActionKind.REMOVE_PREFILL: max(0, -more_prefill),
        ActionKind.REMOVE_DECODE: max(0, -more_decode),
    }
    return tuple(
        Action(kind, count, rules.can_flip if kind.is_flip else rules.can_scale)
        for kind, count in counts.items()
        if count
    )


def diff(decision: Decision) -> str:
    """What a decision changes, in one line; the controller's dry run prints it."""
    if not decision.changed:
        return f"nothing, {decision.verdict.value}"
    done = [f"{action.kind.value} x {action.count}" for action in decision.actions if action.possible]
    undone = [
        f"{action.kind.value} x {action.count} (the cluster can't)"
        for action in decision.actions
        if not action.possible
    ]
    return f"{', '.join([*done, *undone])}; wanted: {decision.desired}, {decision.verdict.value}"


def _distance(one: RolePlacement, other: RolePlacement) -> int:
    """Workers that would change their role, come or go."""
    return max(abs(one.prefill - other.prefill), abs(one.decode - other.decode))
