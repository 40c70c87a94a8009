"""What moving KV takes on a plan's hardware: what its profiles measured, else what the catalogue says."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.plan.file import FleetFile
from planner.plan.workers import PlannedWorkers
from tests.planner.profiles import profile_document

MODEL = {
    "name": "m",
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 64,
    "vocabulary": 100,
}
BLOCK_BYTES = 16 * 2 * 2 * 2 * 32 * 2
TOKENS = 160


def shm(seconds: float) -> list[dict[str, Any]]:
    """A hand-off of TOKENS tokens that takes so long over shm, and three times that over tcp."""
    size = 10 * BLOCK_BYTES
    return [
        {"transport": "tcp", "bytes": size, "seconds": 3 * seconds},
        {"transport": "shm", "bytes": size, "seconds": seconds},
    ]


def workers(
    folder: Path, *transfers: list[dict[str, Any]] | None, hand_over_s: float = 0.0
) -> PlannedWorkers:
    """Hardware with such profiles; None for hardware without one."""
    hardware: list[dict[str, Any]] = []
    for device, moved in zip(("a100-80g", "h100"), transfers, strict=False):
        nodes: dict[str, Any] = {"device": device, "nodes": 1, "devices_per_node": 2}
        if moved is not None:
            (folder / f"{device}.json").write_text(json.dumps(profile_document() | {"transfers": moved}))
            nodes["latency"] = {"kind": "profile", "file": f"{device}.json"}
        hardware.append(nodes)
    plan = {"model": MODEL, "hardware": hardware, "hand_over_s": hand_over_s}
    return PlannedWorkers(FleetFile.model_validate(plan), folder)


def test_measured_hand_offs_stand_for_the_link_inside_a_node(tmp_path: Path) -> None:
    transfer = workers(tmp_path, shm(0.25)).transfer()
    assert transfer.transfer_s(TOKENS, same_node=True) == 0.25
    assert transfer.transfer_s(2 * TOKENS, same_node=True) == pytest.approx(0.5)


def test_between_nodes_the_network_counts(tmp_path: Path) -> None:
    measured, nominal = workers(tmp_path, shm(0.25)), workers(tmp_path, None)
    found = [one.transfer().transfer_s(TOKENS, same_node=False) for one in (measured, nominal)]
    assert found[0] == found[1] < 0.25


@pytest.mark.parametrize("seconds", [(0.25, 0.5), (0.5, 0.25)])
def test_of_several_profiles_the_slowest_counts(tmp_path: Path, seconds: tuple[float, float]) -> None:
    transfer = workers(tmp_path, *map(shm, seconds)).transfer()
    assert transfer.transfer_s(TOKENS, same_node=True) == 0.5


@pytest.mark.parametrize("transfers", [([],), ([{"transport": "tcp", "bytes": 9, "seconds": 9.0}],), (None,)])
def test_without_measured_ones_the_catalogues_link_counts(
    tmp_path: Path, transfers: tuple[list[dict[str, Any]] | None, ...]
) -> None:
    found = workers(tmp_path, *transfers).transfer().transfer_s(TOKENS, same_node=True)
    assert 0 < found < 0.001


def test_hardware_that_measured_nothing_keeps_the_catalogues_link_for_all(tmp_path: Path) -> None:
    found = workers(tmp_path, shm(0.25), None).transfer().transfer_s(TOKENS, same_node=True)
    assert 0 < found < 0.001


def test_the_files_own_hand_over_is_added(tmp_path: Path) -> None:
    transfer = workers(tmp_path, shm(0.25), hand_over_s=0.5).transfer()
    assert transfer.transfer_s(TOKENS, same_node=True) == 0.75
