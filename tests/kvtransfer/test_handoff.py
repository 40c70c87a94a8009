"""The hand-off protocol under random interleavings, loss, repetition, reordering, and either side's death."""

from enum import Enum

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.handoffs.source_protocol import SourceInput
from kvtransfer.handoffs.words import HandoffState
from tests.kvtransfer.handoff_world import (
    DEADLINE_S,
    MAX_PULLS,
    SOURCE_TIMES,
    Kind,
    Message,
    World,
    end_by_source,
)

S = HandoffState


class Trouble(Enum):
    """What may go wrong in a run; a run has a few kinds of it, or it would end before it began."""

    LOSS = "loss"
    REPEAT = "repeat"
    CANCEL = "cancel"
    GIVE_UP = "give up"
    SUSPECT = "suspect"
    LINK = "link"
    SOURCE_DIES = "source dies"
    SINK_DIES = "sink dies"
    FAILED_IO = "failed I/O"
    DELAY = "delay"


class HandoffMachine(RuleBasedStateMachine):
    """Every rule is something that a process, a network or a clock may do."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.troubles: frozenset[Trouble] = frozenset()

    @initialize(
        troubles=st.frozensets(st.sampled_from(Trouble), max_size=3), pieces=st.integers(1, 3), data=st.data()
    )
    def choose_troubles(self, troubles: frozenset[Trouble], pieces: int, data: st.DataObject) -> None:
        self.troubles = troubles
        self.world.pieces = pieces
        self.world.ready = data.draw(st.integers(0, pieces))

    @property
    def well_under_way(self) -> bool:
        """Whether what ends a run may come now; earlier, most runs would end before anything moved."""
        return self.world.source.state is not S.OFFERED or self.world.number > 1

    @rule(steps=st.integers(1, 6), direct=st.booleans())
    def things_go_on(self, steps: int, direct: bool) -> None:
        for _ in range(steps):
            self.world.take_next_step(direct)

    @precondition(lambda self: self.world.sink_alive and self.world.sink.state is S.OFFERED)
    @rule(direct=st.booleans())
    def sink_pulls(self, direct: bool) -> None:
        if self.world.number < MAX_PULLS:
            self.world.ask(direct)

    @precondition(lambda self: self.world.sink_alive and self.world.number > 0)
    @precondition(lambda self: self.world.sink.state is S.OFFERED)
    @precondition(lambda self: Trouble.REPEAT in self.troubles)
    @rule()
    def sink_repeats_its_pull(self) -> None:
        self.world.ask_again()

    @precondition(lambda self: self.world.network)
    @rule(data=st.data())
    def message_arrives(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.world.network) - 1))
        self.world.deliver(self.world.network.pop(index))

    @precondition(lambda self: self.world.network)
    @precondition(lambda self: Trouble.REPEAT in self.troubles)
    @rule(data=st.data())
    def message_arrives_and_stays(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.world.network) - 1))
        self.world.deliver(self.world.network[index])

    @precondition(lambda self: self.world.network)
    @precondition(lambda self: Trouble.LOSS in self.troubles)
    @rule(data=st.data())
    def message_is_lost(self, data: st.DataObject) -> None:
        self.world.network.pop(data.draw(st.integers(0, len(self.world.network) - 1)))

    @precondition(lambda self: self.world.sink_alive and self.world.sink.state is S.ACCEPTED)
    @rule()
    def sink_starts_reading(self) -> None:
        self.world.start_reading()

    @precondition(lambda self: self.world.sink_reading is not None)
    @rule(whole=st.booleans())
    def sink_ends_reading(self, whole: bool) -> None:
        self.world.end_reading(whole or Trouble.FAILED_IO not in self.troubles)

    @precondition(lambda self: self.world.awaiting_check)
    @rule()
    def sink_checks(self) -> None:
        self.world.check()

    @precondition(lambda self: self.world.sink_alive and self.world.sink.state is S.LANDED)
    @rule(kind=st.sampled_from((Kind.COMMIT, Kind.QUERY)))
    def sink_asks_for_the_end(self, kind: Kind) -> None:
        if kind is Kind.COMMIT:
            self.world.send_commit()
        else:
            self.world.send(Message(kind))

    @precondition(lambda self: self.world.source_alive and self.world.ready < self.world.pieces)
    @rule()
    def prefill_goes_on(self) -> None:
        self.world.grow()

    @precondition(lambda self: self.world.sink_alive and self.world.sink_reading is None)
    @precondition(lambda self: not self.world.awaiting_check)
    @precondition(lambda self: Trouble.CANCEL in self.troubles and self.well_under_way)
    @rule()
    def sink_cancels(self) -> None:
        self.world.sink.cancel()
        self.world.settle()

    @precondition(lambda self: self.world.source_alive and self.world.source.state is S.ACCEPTED)
    @precondition(lambda self: not self.world.sends)
    @rule()
    def source_starts_sending(self) -> None:
        self.world.start_send()

    @precondition(lambda self: self.world.sends)
    @rule(succeeded=st.booleans())
    def source_ends_sending(self, succeeded: bool) -> None:
        self.world.end_send(succeeded or Trouble.FAILED_IO not in self.troubles)

    @precondition(lambda self: self.world.source_alive)
    @precondition(lambda self: Trouble.GIVE_UP in self.troubles and self.well_under_way)
    @rule(given=st.sampled_from((SourceInput.WITHDRAW, SourceInput.SUPERSEDE, SourceInput.CLOSE)))
    def source_gives_up(self, given: SourceInput) -> None:
        end_by_source(self.world, given)

    @precondition(lambda self: self.world.source_alive and self.world.source.holder is not None)
    @precondition(lambda self: Trouble.SUSPECT in self.troubles)
    @rule()
    def source_suspects_the_sink(self) -> None:
        self.world.source.peer_suspected(self.world.now_s)
        self.world.settle()

    @precondition(lambda self: self.world.source_alive and self.world.source.holder is not None)
    @precondition(lambda self: self.world.sink_reading is None and not self.world.awaiting_check)
    @precondition(lambda self: not self.world.sink_alive or self.world.sink.state in (S.OFFERED, S.ABORTED))
    @precondition(lambda self: Trouble.LINK in self.troubles)
    @rule()
    def link_breaks(self) -> None:
        self.world.source.link_lost(self.world.now_s)
        self.world.settle()

    @precondition(lambda self: self.world.source_alive)
    @precondition(lambda self: Trouble.SOURCE_DIES in self.troubles and self.well_under_way)
    @rule()
    def source_dies(self) -> None:
        self.world.kill_source()

    @precondition(lambda self: not self.world.source_alive and self.world.sink_alive)
    @precondition(lambda self: self.world.sink_reading is None and not self.world.awaiting_check)
    @rule()
    def sink_hears_that_the_source_died(self) -> None:
        self.world.sink.source_lost()
        self.world.settle()

    @precondition(lambda self: self.world.sink_alive)
    @precondition(lambda self: Trouble.SINK_DIES in self.troubles and self.well_under_way)
    @rule()
    def sink_dies(self) -> None:
        self.world.kill_sink()

    @rule(seconds=st.sampled_from((0.01, 0.1, 0.3)))
    def a_little_time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @precondition(lambda self: Trouble.DELAY in self.troubles)
    @rule(seconds=st.sampled_from((1.0, 2.5, 4.5, 5.1, 30.0)))
    def much_time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @invariant()
    def blocks_come_back_at_most_once(self) -> None:
        assert self.world.released <= 1
        assert self.world.released == 0 or self.world.source.state.terminal

    @invariant()
    def every_wait_has_an_end(self) -> None:
        world = self.world
        if world.source_alive and not world.released:
            assert world.source.next_deadline_s <= world.now_s + SOURCE_TIMES.park_s
        if world.sink_alive and not world.sink.state.terminal:
            assert world.sink.next_deadline_s is not None
            assert world.sink.next_deadline_s <= DEADLINE_S

    def teardown(self) -> None:
        """All messages are lost from here on; what threads do ends; only time passes."""
        world = self.world
        world.network.clear()
        if world.awaiting_check:
            world.check()
        world.advance(DEADLINE_S + SOURCE_TIMES.park_s + SOURCE_TIMES.lease_s)
        if world.source_alive:
            while world.sends:
                world.end_send(succeeded=False)
            assert world.released == 1, f"leaked by a source that is {world.source.state}"
        if world.sink_alive:
            assert world.sink.state.terminal, f"the sink waits for ever as {world.sink.state}"
            assert world.sink.may_free, "the sink's blocks are leaked"


HandoffMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
TestHandoffUnderFaults = HandoffMachine.TestCase
