"""Runs of decode steps: when they may begin, where they end, what they leave."""

import pytest

from decode_worker.decode_leg import DecodeLeg, SampleStart
from decode_worker.grown_tokens import TOKEN, GrownTokens
from decode_worker.run_ahead import RunAheadScheduler
from engine.kv.blocks import BlockPool
from tandem.errors import ProtocolError
from tandem.ids import LegId
from tandem.sampling import SamplingParams


def scheduler(blocks: int = 20) -> tuple[RunAheadScheduler, BlockPool]:
    pool = BlockPool(blocks, 4, prefix_cache=False)
    return RunAheadScheduler(pool, max_batch=8, max_waiting=8, context_tokens=100), pool


def join(runs: RunAheadScheduler, leg_id: str, prompt: int, output: int, samples: int = 1) -> None:
    """A leg comes, is pulled and lands."""
    starts = tuple(SampleStart(index, (TOKEN,)) for index in range(samples))
    params = SamplingParams(max_tokens=output, n=samples)
    runs.add(DecodeLeg(LegId(leg_id), range(prompt), prompt, starts, params, 0, 100.0), 0.0)
    runs.reserve(0.0)
    runs.landed(LegId(leg_id), 0.0)


def test_a_run_ends_with_the_first_sample_that_ends() -> None:
    runs, pool = scheduler()
    join(runs, "a", 5, 4)
    join(runs, "b", 6, 9)
    run = runs.begin_run()
    assert run is not None
    assert (run.steps, run.batch, run.context_tokens) == (3, 2, 13)
    (token,) = runs.complete_run(3).tokens
    assert (token.leg_id, token.output_index) == ("a", 3)
    assert runs.drawn(LegId("b")) == {0: 4}
    pool.check_integrity(runs.held_blocks())


def test_all_blocks_come_back_when_the_last_sample_ended() -> None:
    runs, pool = scheduler()
    join(runs, "a", 5, 30)
    run = runs.begin_run()
    assert run is not None
    runs.advance(20)
    assert pool.allocated_blocks == 7
    runs.complete_run(29)
    assert (pool.allocated_blocks, pool.promised_blocks) == (0, 0)


def test_a_run_is_no_longer_than_the_blocks_suffice_for() -> None:
    runs, _ = scheduler(blocks=4)
    join(runs, "a", 5, 30)
    run = runs.begin_run()
    assert run is not None
    assert run.steps == 4 * 4 - 5


def test_a_leg_that_lands_during_a_run_joins_after_it() -> None:
    runs, _ = scheduler()
    join(runs, "a", 5, 30)
    runs.begin_run()
    runs.advance(2)
    join(runs, "b", 5, 30)
    runs.complete_run(3)
    assert (runs.drawn(LegId("a")), runs.drawn(LegId("b"))) == ({0: 4}, {0: 1})
    run = runs.begin_run()
    assert run is not None
    assert run.batch == 2


def test_a_leg_cancelled_during_a_run_leaves_when_it_ends() -> None:
    runs, pool = scheduler()
    join(runs, "a", 5, 30)
    join(runs, "b", 5, 30)
    runs.begin_run()
    runs.cancel(LegId("a"))
    held = pool.allocated_blocks
    runs.complete_run(1)
    assert pool.allocated_blocks < held
    assert set(runs.legs()) == {"b"}


def test_samples_that_share_a_block_step_singly_until_they_have_their_own() -> None:
    runs, _ = scheduler()
    join(runs, "a", 5, 30, samples=2)
    assert runs.begin_run() is None
    assert runs.schedule(0.0) is not None


def test_a_run_in_flight_keeps_others_out() -> None:
    runs, _ = scheduler()
    join(runs, "a", 5, 30)
    runs.begin_run()
    with pytest.raises(ProtocolError):
        runs.begin_run()
    with pytest.raises(ProtocolError):
        runs.schedule(0.0)
    with pytest.raises(ProtocolError):
        runs.complete_run(30)


def test_grown_tokens_read_like_the_list_they_stand_for() -> None:
    grown, plain = GrownTokens(range(5, 9), 1), [5, 6, 7, 8, TOKEN]
    grown.grow(2)
    plain += [TOKEN, TOKEN]
    assert list(grown) == plain
    assert len(grown) == 7
    for start in range(8):
        for stop in range(8):
            assert list(grown[start:stop]) == plain[start:stop]
    assert (grown[-1], grown[0]) == (TOKEN, 5)
