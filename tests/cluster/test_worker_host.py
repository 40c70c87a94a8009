"""Edge: what a worker's process makes of its orders before it serves."""

from pathlib import Path

import psutil
import pytest

from cluster.worker_host import WorkerSpec, advertised_host
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role
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
