"""Edge: what a worker's process makes of its orders before it serves."""

import asyncio
from pathlib import Path

import psutil
import pytest

from cluster.worker_host import EXIT_STALLED, WorkerSpec, _end_if_stalled, advertised_host
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role, WorkerRecord
from tandem.worker_config import WorkerConfig

SPEC = WorkerSpec(
    config=WorkerConfig(
        WorkerId("decode-3"),
        Incarnation(0),
        Role.DECODE,
        Path("/model"),
        "tiny",
        pool_blocks=8,
        transports=("tcp",),
    ),
    model_source="smollm2",
    store_url="redis://127.0.0.1:1/0",
    store_namespace="tandem",
    store_tls_ca=None,
    registry_lease_s=2.0,
    drain_timeout_s=1.0,
)


def test_orders_survive_the_way_to_another_process() -> None:
    assert WorkerSpec.from_json(SPEC.to_json()) == SPEC


def test_orders_hold_no_secret_and_the_environment_does() -> None:
    address = SPEC.store_address({"TANDEM_REDIS_PASSWORD": "hunter2"})
    assert address.password == "hunter2"
    assert "password" not in SPEC.to_json()
    assert SPEC.store_address({}).password is None


@pytest.mark.parametrize("host", ["127.0.0.1", "worker-3.workers.svc", "::1"])
def test_a_definite_host_is_advertised_as_it_is(host: str) -> None:
    assert advertised_host(host) == host


def test_all_interfaces_are_advertised_as_an_address_of_this_node() -> None:
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    assert advertised_host("0.0.0.0") in own


class WedgedWorker:
    """A worker whose transfers hang for ever."""

    record = WorkerRecord(WorkerId("decode-3"), Incarnation(1), Role.DECODE, "", "d")

    async def drain(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    def stalled_s(self) -> float:
        """No step hangs."""
        return 0.0

    def wedged(self) -> str | None:
        """From the start."""
        return "An NCCL abort hangs."

    async def failed(self) -> None:
        """Never."""
        await asyncio.Event().wait()


def test_process_ends_when_its_transfers_are_wedged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def ended(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("cluster.worker_host.os._exit", ended)
    monkeypatch.setattr("cluster.worker_host.STALL_CHECK_S", 0.0)
    with pytest.raises(Ended, match=str(EXIT_STALLED)):
        asyncio.run(asyncio.wait_for(_end_if_stalled(WedgedWorker()), 5))
