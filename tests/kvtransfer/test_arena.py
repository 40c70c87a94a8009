"""Blocks change owners between real processes; whoever dies when, no frame has two living owners."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.shm import frame_words
from kvtransfer.shm.arena import MOST_POOLS, Arena
from kvtransfer.shm.frame_words import NOBODY, leaving, offered, owned, owner_of, swap
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId
from tests.kvtransfer.arena_process import mark
from tests.kvtransfer.pair import blocks

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS = 6
BLOCK_BYTES = 5000
OURS, THEIRS = 0xAA, 0xBB


@pytest.fixture
def path() -> Iterator[Path]:
    """Where an arena may be made."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "arena"


@dataclass(slots=True)
class Member:
    """Another process."""

    process: asyncio.subprocess.Process
    member: int
    blocks: tuple[BlockId, ...]

    def say(self, *words: object) -> None:
        """A line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{' '.join(map(str, words))}\n".encode())

    async def heard(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 50)).decode().strip()

    async def kill(self) -> None:
        """Ends it as a crash would."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def other_member(path: Path) -> AsyncIterator[Member]:
    """A process that has joined and marked its blocks."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kvtransfer.arena_process"),
        *(str(path), str(NUM_BLOCKS), str(BLOCK_BYTES), str(THEIRS)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    other = Member(process, 0, ())
    try:
        first, *rest = (int(number) for number in (await other.heard()).split())
        other.member, other.blocks = first, blocks(*rest)
        yield other
    finally:
        await other.kill()


def joined(path: Path) -> Arena:
    """A member in this process, its blocks marked as ours."""
    arena = Arena(path, NUM_BLOCKS, BLOCK_BYTES)
    mark(arena, BLOCK_BYTES, OURS)
    return arena


def held(arena: Arena, given: tuple[BlockId, ...]) -> list[int]:
    """The marks of blocks, the same at both ends."""
    ends = [(arena.bytes[b * BLOCK_BYTES], arena.bytes[(b + 1) * BLOCK_BYTES - 1]) for b in given]
    assert all(first == last for first, last in ends)
    return [first for first, _ in ends]


async def test_blocks_change_owners_between_two_processes(path: Path) -> None:
    with joined(path) as arena:
        async with other_member(path) as giver:
            given, taken = giver.blocks[1:4], arena.blocks[2:5]
            arena.offer(giver.member, taken)
            giver.say("give", arena.member, *given, *taken)
            assert await giver.heard() == "3"
            assert arena.settle(giver.member, given, taken) == tuple(zip(taken, given, strict=True))
            assert held(arena, given) == [THEIRS] * 3
            assert set(arena.owned()) == {*arena.blocks[:2], *arena.blocks[5:], *given}
            giver.say("owned")
            theirs = {int(number) for number in (await giver.heard()).split()}
            assert theirs == {*giver.blocks[:1], *giver.blocks[4:], *taken}
            assert held(arena, taken) == [OURS] * 3


async def test_giver_that_dies_before_it_gives_leaves_us_our_frames(path: Path) -> None:
    with joined(path) as arena:
        async with other_member(path) as giver:
            arena.offer(giver.member, arena.blocks)
            await giver.kill()
            assert not arena._file.lives(giver.member)
            assert arena.settle(giver.member, giver.blocks, arena.blocks) == ()
            assert arena.owned() == arena.blocks


async def test_giver_that_dies_after_it_gave_leaves_us_what_it_gave(path: Path) -> None:
    with joined(path) as arena:
        async with other_member(path) as giver:
            arena.offer(giver.member, arena.blocks)
            giver.say("give", arena.member, *giver.blocks, *arena.blocks)
            assert await giver.heard() == str(NUM_BLOCKS)
            await giver.kill()
            assert len(arena.settle(giver.member, giver.blocks, arena.blocks)) == NUM_BLOCKS
            assert arena.owned() == giver.blocks
            assert held(arena, giver.blocks) == [THEIRS] * NUM_BLOCKS


async def test_giver_that_dies_between_taking_and_giving_owes_us_its_frames(path: Path) -> None:
    """Also when somebody joins before we have looked."""
    with joined(path) as arena:
        async with other_member(path) as giver:
            given, taken = giver.blocks[:2], arena.blocks[:2]
            arena.offer(giver.member, taken)
            giver.say("half", arena.member, *given, *taken)
            assert await giver.process.wait() == -9
        async with other_member(path) as third:
            assert not {*given} & {*third.blocks}
            assert arena.settle(giver.member, given, taken) == tuple(zip(taken, given, strict=True))
            assert set(arena.owned()) == {*arena.blocks[2:], *given}


async def test_taker_that_dies_leaves_the_giver_a_whole_pool(path: Path) -> None:
    with joined(path) as arena:
        async with other_member(path) as taker:
            taker.say("offer", arena.member, *taker.blocks)
            assert await taker.heard() == "offered"
            assert len(arena.give(taker.member, arena.blocks[:3], taker.blocks[:3])) == 3
            await taker.kill()
            # What it had on offer can be taken still: nobody else has it, and nobody misses ours.
            assert len(arena.give(taker.member, arena.blocks[3:4], taker.blocks[3:4])) == 1
        assert set(arena.owned()) == {*taker.blocks[:4], *arena.blocks[4:]}


async def test_who_joins_takes_what_the_dead_have_left_and_no_more(path: Path) -> None:
    with joined(path) as arena:
        async with other_member(path) as taker:
            taker.say("offer", arena.member, *taker.blocks)
            await taker.heard()
            arena.give(taker.member, arena.blocks[:3], taker.blocks[:3])
            await taker.kill()
        used = os.stat(path).st_blocks
        async with other_member(path) as next_life:
            assert {*next_life.blocks} == {*arena.blocks[:3], *taker.blocks[3:]}
            assert not {*arena.owned()} & {*next_life.blocks}
            assert os.stat(path).st_blocks <= used


async def test_arena_of_which_all_were_killed_is_begun_anew(path: Path) -> None:
    async with other_member(path) as dead:
        await dead.kill()
    assert path in path.parent.iterdir()
    with Arena(path, 2, 2 * BLOCK_BYTES) as arena:
        assert arena.num_blocks == 2 * MOST_POOLS
    assert path not in path.parent.iterdir()


def test_last_member_to_leave_takes_the_file_along(path: Path) -> None:
    with joined(path), joined(path):
        pass
    assert not path.exists()


def test_memory_of_who_leaves_is_free(path: Path) -> None:
    with joined(path):
        before = os.stat(path).st_blocks
        with Arena(path, 50 * 1, BLOCK_BYTES):
            assert os.stat(path).st_blocks > before
        assert os.stat(path).st_blocks <= before + 8


def test_taker_that_takes_its_offer_back_keeps_its_frames(path: Path) -> None:
    with joined(path) as arena, joined(path) as giver:
        arena.offer(giver.member, arena.blocks[:2])
        assert arena.settle(giver.member, giver.blocks[:2], arena.blocks[:2]) == ()
        assert giver.give(arena.member, giver.blocks[:2], arena.blocks[:2]) == ()
        assert (arena.owned(), giver.owned()) == (arena.blocks, giver.blocks)


def test_what_is_not_ours_cannot_be_offered_nor_given(path: Path) -> None:
    with joined(path) as arena, joined(path) as other:
        with pytest.raises(TransferError) as caught:
            arena.offer(other.member, (arena.blocks[0], other.blocks[0]))
        assert caught.value.fault is TransferFault.REFUSED
        assert arena.give(other.member, other.blocks[:1], other.blocks[1:2]) == ()
        with pytest.raises(TransferError) as caught:
            arena.give(other.member, arena.blocks[:1], blocks(arena.num_blocks))
        assert caught.value.fault is TransferFault.LENGTH
        assert (arena.owned(), other.owned()) == (arena.blocks, other.blocks)


def test_what_is_no_arena_is_refused_in_one_sentence(path: Path, tmp_path: Path) -> None:
    with joined(path) as arena:
        for count, size in ((NUM_BLOCKS, BLOCK_BYTES + 1), (arena.num_blocks, BLOCK_BYTES), (0, 1)):
            with pytest.raises(TransferError) as caught:
                Arena(path, count, size)
            assert caught.value.fault is TransferFault.UNSUPPORTED
        assert arena.owned() == arena.blocks
    with pytest.raises(TransferError):
        Arena(path.parent / "missing" / "arena", 1, 1)
    path.touch(mode=0o644)
    with pytest.raises(TransferError):
        joined(path)
    if os.statvfs(tmp_path).f_fsid != os.statvfs("/dev/shm").f_fsid:
        with pytest.raises(TransferError, match="tmpfs"):
            joined(tmp_path / "arena")


def test_arena_that_cannot_be_made_leaves_nothing_behind(path: Path) -> None:
    with pytest.raises(TransferError) as caught:
        Arena(path, 1 << 40, 1 << 20)
    assert caught.value.fault is TransferFault.UNSUPPORTED
    assert not list(path.parent.iterdir())


def test_file_that_is_no_arena_is_left_as_it_is(path: Path) -> None:
    path.touch(mode=0o600)
    path.write_bytes(b"somebody's" * 1000)
    with pytest.raises(TransferError, match="no arena"):
        joined(path)
    assert path.read_bytes() == b"somebody's" * 1000


def test_who_was_refused_holds_nobody_up_while_its_error_is_kept(path: Path) -> None:
    with joined(path):
        with pytest.raises(TransferError, match="blocks of") as kept:
            Arena(path, NUM_BLOCKS, BLOCK_BYTES + 1)
        with joined(path) as next_one:
            assert next_one.member
        assert kept.value.fault is TransferFault.UNSUPPORTED


def test_frame_that_is_taken_from_who_leaves_keeps_its_content(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The giver takes it after the leaving member has looked at what it owns."""
    size = 1 << 16
    with Arena(path, 2, size) as giver:
        taker = Arena(path, 2, size)
        mark(taker, size, THEIRS)
        taken = taker.blocks[:1]
        taker.offer(giver.member, taken)
        member, sort = taker.member, np.unique

        def looked(words: frame_words.Words) -> frame_words.Words:
            seen: frame_words.Words = sort(words)
            giver.give(member, giver.blocks[:1], taken)
            return seen

        monkeypatch.setattr(np, "unique", looked)
        taker.close()
        monkeypatch.undo()
        assert set(giver.owned()) == {*giver.blocks[1:], *taken}
        assert giver.bytes[taken[0] * size] == THEIRS


FRAMES = 5


def indices(frames: Sequence[int]) -> frame_words.Words:
    """As an array."""
    return np.array(frames, dtype=np.int64)


class Members(RuleBasedStateMachine):
    """Three members that exchange frames, are stopped anywhere in it, die and live anew."""

    def __init__(self) -> None:
        super().__init__()
        self.words = np.zeros(MOST_POOLS * FRAMES, dtype=np.int64)
        self.names = 0
        self.lives: dict[int, list[int]] = {}
        self.stopped: list[tuple[int, int, int, int]] = []
        for _ in range(3):
            self.join()

    def join(self) -> None:
        """As Arena does: what the dead own is free, but for what they owe to the living."""
        for frame, word in enumerate(self.words.tolist()):
            owes = word in {leaving(owner_of(word), taker) for taker in self.lives}
            if word != NOBODY and owner_of(word) not in self.lives and not owes:
                self.words[frame] = NOBODY
        self.names += 1
        free = np.flatnonzero(self.words == NOBODY)[:FRAMES]
        self.words[free] = owned(self.names)
        self.lives[self.names] = free.tolist()

    @rule(
        taker=st.integers(0, 2),
        step=st.integers(1, 2),
        order=st.permutations(range(FRAMES)),
        count=st.integers(1, FRAMES),
        swaps=st.integers(0, 3),
        end=st.sampled_from(["taker settles", "giver dies", "taker dies", "giver goes on"]),
    )
    def exchange(self, taker: int, step: int, order: list[int], count: int, swaps: int, end: str) -> None:
        """The giver does the last pair up to its swap number `swaps`, and may go on much later."""
        names = sorted(self.lives)
        taking, giving = names[taker], names[(taker + step) % 3]
        taken = [self.lives[taking][index] for index in order[:count]]
        given = self.lives[giving][:count]
        swap(self.words, indices(taken), owned(taking), offered(taking, giving))
        whole = count - 1
        frame_words.give(self.words, giving, taking, indices(given[:whole]), indices(taken[:whole]))
        self.gives(giving, taking, given[-1], taken[-1], swaps)
        if end == "giver goes on":
            self.gives(giving, taking, given[-1], taken[-1], 3, swaps)
        if end == "giver dies":
            del self.lives[giving]
        if end == "taker dies":
            del self.lives[taking]
        else:
            done = frame_words.settle(self.words, giving, taking, indices(given), indices(taken))
            kept = [theirs if has else ours for ours, theirs, has in zip(taken, given, done, strict=True)]
            self.lives[taking] = kept + [f for f in self.lives[taking] if f not in taken]
        if giving in self.lives:
            # It was stopped, and goes on only now.
            got = self.gives(giving, taking, given[-1], taken[-1], 3, swaps if end != "giver goes on" else 3)
            pairs = list(zip(given, taken, strict=True))[: count if got else whole]
            names_of = dict(pairs)
            self.lives[giving] = [names_of.get(frame, frame) for frame in self.lives[giving]]
        while len(self.lives) < 3:
            self.join()

    def gives(self, giving: int, taking: int, given: int, taken: int, until: int, begin: int = 0) -> bool:
        """Swaps begin..until of one pair; whether the giver has the taker's frame."""
        ours, theirs = indices([given]), indices([taken])
        if begin <= 0 < until:
            swap(self.words, ours, owned(giving), leaving(giving, taking))
        if begin <= 1 < until:
            swap(self.words, theirs, offered(taking, giving), owned(giving))
        has = bool(self.words[taken] == owned(giving))
        if begin <= 2 < until:
            swap(self.words, ours, leaving(giving, taking), owned(taking) if has else owned(giving))
        return has

    @invariant()
    def no_frame_has_two_owners(self) -> None:
        """Nor does a pool lose or gain any."""
        frames = [frame for pool in self.lives.values() for frame in pool]
        assert len(set(frames)) == len(frames) == 3 * FRAMES
        for name, pool in self.lives.items():
            assert self.words[pool].tolist() == [owned(name)] * FRAMES


TestMembers = Members.TestCase
