"""HandoffService as a stranger, a second sink or a repeating client meets it."""

import pytest

from kvtransfer.checksums import XXH3, block_checksum, piece_checksum
from kvtransfer.contract import BlockRange, HeadRange, Transfer
from kvtransfer.handoffs.client import HandoffClient, PullTerms
from kvtransfer.handoffs.words import HandoffState, ReleaseReason
from kvtransfer.host import host_id
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.worker import Role
from tests.kvtransfer.pair import TOKEN, Pair, blocks, config, connected_pair, eventually, key, record


def client_of(pair: Pair, name: str = "decode-9", token: str = TOKEN) -> HandoffClient:
    """A client of its own, as another decode worker."""
    return HandoffClient(record(name, Role.DECODE), pair.source_record, token)


def terms(leg: str, number: int, num_blocks: int = 0) -> PullTerms:
    """A pull of no blocks, which needs no transport, unless told otherwise."""
    return PullTerms(Transfer(key(leg), number, BlockRange(0, num_blocks)), "tcp", 0, 5.0)


async def test_call_without_the_token_is_refused() -> None:
    async with connected_pair(config("tcp")) as pair:
        client = client_of(pair, token="wrong")
        with pytest.raises(TransferError, match="UNAUTHENTICATED"):
            await client.query(key("a"), 2.0)
        await client.close()


async def test_sink_must_connect_to_this_incarnation_first() -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1))
        client = client_of(pair)
        with pytest.raises(TransferError) as caught:
            await client.pull(terms("a", 1), 0.0, 2.0)
        assert caught.value.fault is TransferFault.DISCONNECTED
        await client.close()


async def test_another_incarnation_at_the_address_is_noticed() -> None:
    async with connected_pair(config("tcp")) as pair:
        expected = record("prefill-0", Role.PREFILL, pair.source_record.address, incarnation=2)
        client = HandoffClient(record("decode-9", Role.DECODE), expected, TOKEN)
        with pytest.raises(TransferError, match="now lives prefill-0 in life 1"):
            await client.connect(("tcp",), host_id(), 2.0, (XXH3,))
        await client.close()


async def test_repeated_calls_change_nothing() -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1, 2))
        client = client_of(pair)
        first = await client.connect(("tcp",), host_id(), 2.0, (XXH3,))
        assert (await client.connect(("tcp",), host_id(), 2.0, (XXH3,))).endpoints == first.endpoints
        granted = await client.pull(terms("a", 1, 2), 0.0, 2.0)
        again = await client.pull(terms("a", 1, 2), 0.0, 2.0)
        assert granted is not None
        assert again is not None
        assert (granted.transfer, granted.source_blocks) == (again.transfer, again.source_blocks)
        assert again.lease_until_s <= granted.lease_until_s
        right = {1: piece_checksum([block_checksum(pair.source_pool.view(block)) for block in blocks(1, 2)])}
        for _ in range(2):
            assert (await client.commit(key("a"), 1, right, 2.0)).state is HandoffState.COMMITTED
        assert await client.abort(key("a"), 2.0) is HandoffState.COMMITTED
        assert await client.query(key("a"), 2.0) is HandoffState.COMMITTED
        # The bytes were never fetched, so the source first waits a moment for its send to end by itself.
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]
        await client.close()


async def test_second_sink_can_neither_take_nor_end_a_handoff() -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1))
        holder, other = client_of(pair), client_of(pair, "decode-10")
        for client in (holder, other):
            await client.connect(("tcp",), host_id(), 2.0, (XXH3,))
        await holder.pull(terms("a", 1), 0.0, 2.0)
        for refused in (other.pull(terms("a", 1), 0.0, 2.0), other.commit(key("a"), 1, {}, 2.0)):
            with pytest.raises(TransferError) as caught:
                await refused
            assert caught.value.fault is TransferFault.REFUSED
        with pytest.raises(TransferError, match="Only the sink that pulled"):
            await other.abort(key("a"), 2.0)
        assert (await holder.commit(key("a"), 1, {}, 2.0)).state is HandoffState.COMMITTED
        for client in (holder, other):
            await client.close()


async def test_ended_handoff_is_forgotten_after_a_while() -> None:
    async with connected_pair(config("tcp", forget_s=0.1)) as pair:
        pair.source.offer(key("a"), blocks(1))
        await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
        await eventually(lambda: pair.source.query(key("a")) is None, within_s=10.0)
        pair.source.offer(key("a"), blocks(1))
        assert pair.source.query(key("a")) is HandoffState.OFFERED


async def test_epoch_must_grow() -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a", 2), blocks(1))
        for epoch in (1, 2):
            with pytest.raises(ProtocolError, match=f"Epoch {epoch}"):
                pair.source.offer(key("a", epoch), blocks(1))


async def test_lost_peer_ends_what_it_holds() -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1))
        client = client_of(pair)
        await client.connect(("tcp",), host_id(), 2.0, (XXH3,))
        await client.pull(terms("a", 1, 1), 0.0, 2.0)
        assert pair.source.counts().in_flight == 1
        lost = record("decode-9", Role.DECODE)
        pair.source.peer_lost(lost.worker_id, lost.incarnation)
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.PEER_LOST)]
        await client.close()


@pytest.mark.parametrize("landed", [{}, {1: 7}, {2: 7}])
async def test_commit_without_the_right_checksum_frees_nothing(landed: dict[int, int]) -> None:
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1, 2))
        client = client_of(pair)
        await client.connect(("tcp",), host_id(), 2.0, (XXH3,))
        await client.pull(terms("a", 1, 2), 0.0, 2.0)
        status = await client.commit(key("a"), 1, landed, 2.0)
        assert status.state is HandoffState.ACCEPTED
        assert status.mismatched
        assert pair.released == []
        assert pair.source.counts().refused[TransferFault.CHECKSUM] == 1
        await client.close()


@pytest.mark.parametrize("sink_has", [(), ("crc0",)])
async def test_sink_without_the_checksum_is_refused(sink_has: tuple[str, ...]) -> None:
    async with connected_pair(config("tcp")) as pair:
        client = client_of(pair)
        with pytest.raises(TransferError, match="this source xxh3_64") as caught:
            await client.connect(("tcp",), host_id(), 2.0, sink_has)
        assert caught.value.fault is TransferFault.UNSUPPORTED
        await client.close()


async def test_sink_with_other_heads_is_refused() -> None:
    async with connected_pair(config("tcp")) as pair:
        client = client_of(pair)
        with pytest.raises(TransferError, match="KV heads HeadRange") as caught:
            await client.connect(("tcp",), host_id(), 2.0, (XXH3,), HeadRange(0, 2, 4))
        assert caught.value.fault is TransferFault.UNSUPPORTED
        await client.close()
