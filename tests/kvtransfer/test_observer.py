"""What metrics hear of transfers: what landed or failed, each change of road, each refusal by name."""

from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from engine.worker_process.transfer_metrics import TransferMetrics
from kvtransfer.contract import BlockMemory, BlockRange, PeerId, SinkTransport, TransferObserver
from kvtransfer.faults import Fault, FaultSchedule, FaultySink
from tandem.errors import TransferError, TransferFault
from tandem.ids import Incarnation, WorkerId
from tests.kvtransfer.pair import blocks, config, connected_pair, key


@dataclass(slots=True)
class Heard:
    """Remembers what it was told."""

    landed: list[str] = field(default_factory=list)
    failures: list[tuple[str, TransferFault]] = field(default_factory=list)
    roads: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[TransferFault] = field(default_factory=list)
    link_refusals: list[tuple[str, TransferFault]] = field(default_factory=list)

    def transferred(self, transport: str) -> None:
        self.landed.append(transport)

    def failed(self, transport: str, fault: TransferFault) -> None:
        self.failures.append((transport, fault))

    def road_taken(self, source: PeerId, before: str, now: str) -> None:
        self.roads.append((before, now))

    def refused(self, fault: TransferFault) -> None:
        self.refusals.append(fault)

    def link_refused(self, transport: str, fault: TransferFault) -> None:
        self.link_refusals.append((transport, fault))


async def test_fallback_and_return_are_heard() -> None:
    heard = Heard()
    schedule = FaultSchedule(1, {Fault.DISCONNECT: 1.0})

    def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
        return FaultySink(inner, pool, schedule) if inner.name == "shm" else inner

    settings = config("shm", "tcp", backoff_s=0.0)
    async with connected_pair(settings, wrap_sink=wrap, observer=heard) as pair:
        for leg in ("a", "b"):
            pair.source.offer(key(leg), blocks(5))
            await pair.pull(key(leg), BlockRange(0, 1), blocks(1))
            schedule.weights = {Fault.NONE: 1.0}
        source = PeerId.of(pair.source_record)
        await pair.sink.peer_lost(source.worker_id, source.incarnation)
    assert heard.failures == [("shm", TransferFault.DISCONNECTED)]
    assert heard.landed == ["tcp", "shm"]
    assert heard.roads == [("", "tcp"), ("tcp", "shm"), ("shm", "")]


@pytest.mark.parametrize(
    ("sink_digest", "epoch", "wanted", "fault"),
    [
        ("another model", 2, BlockRange(0, 1), TransferFault.DIGEST),
        ("d", 1, BlockRange(0, 1), TransferFault.STALE_EPOCH),
        ("d", 2, BlockRange(1, 1), TransferFault.LENGTH),
    ],
)
async def test_bad_request_is_refused_by_name_and_nothing_is_written(
    sink_digest: str, epoch: int, wanted: BlockRange, fault: TransferFault
) -> None:
    heard = Heard()
    async with connected_pair(config("shm"), sink_digest=sink_digest, observer=heard) as pair:
        pair.source.offer(key("a", 1), blocks(4))
        pair.source.offer(key("a", 2), blocks(5))
        before = pair.sink_pool.read(blocks(*range(32)))
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("a", epoch), wanted, blocks(1))
        assert caught.value.fault is fault
        assert heard.refusals == [fault]
        assert pair.sink_pool.read(blocks(*range(32))) == before


async def test_grant_of_other_lengths_is_refused_before_anything_is_written() -> None:
    heard = Heard()
    async with connected_pair(config("shm"), observer=heard) as pair:
        pair.source.offer(key("a"), blocks(4, 5))
        pair.source._layer_bytes //= 2
        before = pair.sink_pool.read(blocks(*range(32)))
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
        assert caught.value.fault is TransferFault.LENGTH
        assert TransferFault.LENGTH in heard.refusals
        assert pair.sink_pool.read(blocks(*range(32))) == before
        await pair.wait_released(1, within_s=10.0)


def test_prometheus_shows_one_road_for_each_source() -> None:
    registry = CollectorRegistry()
    metrics: TransferObserver = TransferMetrics(registry)
    source = PeerId(WorkerId("prefill-0"), Incarnation(1))
    metrics.road_taken(source, "", "shm")
    metrics.road_taken(source, "shm", "tcp")
    roads = {
        sample.labels["transport"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "tandem_worker_transport"
    }
    assert roads == {"tcp": 1.0}
    changes = {"before": "shm", "now": "tcp"}
    assert registry.get_sample_value("tandem_worker_transport_changes_total", changes) == 1.0


async def test_refused_handoff_is_no_failure_of_its_transport() -> None:
    heard = Heard()
    async with connected_pair(config("shm", "tcp"), observer=heard) as pair:
        with pytest.raises(TransferError):
            await pair.pull(key("unknown"), BlockRange(0, 1), blocks(1))
        pair.source.offer(key("a"), blocks(4))
        assert (await pair.pull(key("a"), BlockRange(0, 1), blocks(1))).transport == "shm"
    assert heard.failures == []
    assert heard.refusals == [TransferFault.REFUSED]
