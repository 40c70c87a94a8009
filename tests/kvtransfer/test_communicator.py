"""A communicator's life over every order of events; which one is closed for room; how blocks are packed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.nccl.communicator import (
    TRANSITIONS,
    CommunicatorAction,
    CommunicatorCounts,
    CommunicatorInput,
    CommunicatorState,
    LruOrder,
    transition,
)
from kvtransfer.nccl.pack_plan import chunks
from tandem.errors import ProtocolError, TransferError, TransferFault


class CommunicatorLife(RuleBasedStateMachine):
    """The edge around the table: an opening call, an abort call, their bounds, and ends at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.state = CommunicatorState.FRESH
        self.opening = self.exists = self.aborting = self.restart = False
        self.aborts = 0

    def give(self, event: CommunicatorInput) -> None:
        """Carries out the action as the edge does."""
        action, self.state = transition(self.state, event)
        if action is CommunicatorAction.OPEN:
            self.opening = True
        if action is CommunicatorAction.ABORT:
            self.aborting, self.aborts = True, self.aborts + 1
        if action is CommunicatorAction.RESTART:
            self.restart = True

    @precondition(lambda self: self.state is CommunicatorState.FRESH)
    @rule()
    def open(self) -> None:
        """Somebody wants it."""
        self.give(CommunicatorInput.OPEN)

    @precondition(lambda self: self.opening)
    @rule(succeeded=st.booleans())
    def opening_returns(self, succeeded: bool) -> None:
        """Perhaps long after its bound."""
        self.opening, self.exists = False, succeeded
        self.give(CommunicatorInput.OPENED if succeeded else CommunicatorInput.OPEN_FAILED)

    @precondition(lambda self: self.opening and self.state is CommunicatorState.OPENING)
    @rule()
    def opening_overdue(self) -> None:
        """The clock."""
        self.give(CommunicatorInput.OPEN_OVERDUE)

    @rule()
    def end(self) -> None:
        """At any time, any number of times."""
        self.give(CommunicatorInput.END)

    @precondition(lambda self: self.aborting)
    @rule()
    def abort_returns(self) -> None:
        """It is gone."""
        self.aborting = self.exists = False
        self.give(CommunicatorInput.ABORTED)

    @precondition(lambda self: self.aborting and self.state is CommunicatorState.ABORTING)
    @rule()
    def abort_overdue(self) -> None:
        """The clock."""
        self.give(CommunicatorInput.ABORT_OVERDUE)

    @invariant()
    def what_exists_is_aborted_once_and_before_it_is_forgotten(self) -> None:
        """A destructor never meets a living communicator."""
        assert self.aborts <= 1
        if self.exists:
            assert self.state in (
                *(CommunicatorState.READY, CommunicatorState.ABORTING, CommunicatorState.STUCK),
            )
        if self.state is CommunicatorState.CLOSED:
            assert (self.exists, self.opening, self.aborting) == (False, False, False)

    @invariant()
    def only_a_stuck_one_asks_for_a_restart(self) -> None:
        """And it does."""
        assert self.restart is (self.state is CommunicatorState.STUCK)


TestCommunicatorLife = CommunicatorLife.TestCase


def test_input_without_a_row_is_refused() -> None:
    missing = [
        (state, event)
        for state in CommunicatorState
        for event in CommunicatorInput
        if (state, event) not in TRANSITIONS
    ]
    assert (CommunicatorState.READY, CommunicatorInput.OPEN) in missing
    for state, event in missing:
        with pytest.raises(ProtocolError):
            transition(state, event)


def test_every_state_can_be_ended() -> None:
    assert all((state, CommunicatorInput.END) in TRANSITIONS for state in CommunicatorState)


class TestLruOrder:
    """Who makes room."""

    @given(st.lists(st.integers(0, 9)), st.integers(1, 6), st.sets(st.integers(0, 9)))
    def test_victims_make_room_oldest_first_and_are_never_busy(
        self, uses: list[int], limit: int, busy: set[int]
    ) -> None:
        order: LruOrder[int] = LruOrder()
        for key in uses:
            order.used(key)
        oldest_first = [key for place, key in enumerate(uses) if key not in uses[place + 1 :]]
        victims = order.victims(limit, busy)
        idle = [key for key in oldest_first if key not in busy]
        needed = max(0, len(oldest_first) + 1 - limit)
        assert victims == (tuple(idle[:needed]) if len(idle) >= needed else None)

    def test_forgotten_key_takes_no_room(self) -> None:
        order: LruOrder[str] = LruOrder()
        order.used("a")
        order.forget("a")
        order.forget("a")
        assert order.victims(1, ()) == ()


def test_counts_add_up_and_keep_a_reason_to_restart() -> None:
    both = CommunicatorCounts(1, 5, 0).plus(CommunicatorCounts(1, 7, 1, "hangs"))
    assert both == CommunicatorCounts(2, 12, 1, "hangs")


class TestPackPlan:
    """Which blocks go in which message."""

    @given(st.integers(0, 300), st.integers(1, 5000), st.integers(1, 20000))
    def test_messages_cover_all_pieces_in_order_and_fit_the_slot(
        self, num_pieces: int, piece_bytes: int, slot_bytes: int
    ) -> None:
        if piece_bytes > slot_bytes:
            with pytest.raises(TransferError) as caught:
                chunks(num_pieces, piece_bytes, slot_bytes)
            assert caught.value.fault is TransferFault.LENGTH
            return
        plan = chunks(num_pieces, piece_bytes, slot_bytes)
        covered = [piece for chunk in plan for piece in range(chunk.first, chunk.first + chunk.count)]
        assert covered == list(range(num_pieces))
        assert all(0 < chunk.size_bytes == chunk.count * piece_bytes <= slot_bytes for chunk in plan)
        assert all(chunk.size_bytes + piece_bytes > slot_bytes for chunk in plan[:-1])
