"""Pure: from cluster.yaml to the controller's rules, and to what the cluster can carry out."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.config_file import parse_cluster_config
from cluster.controller.assembly import read_brain
from cluster.controller.rules import controller_rules, interchangeable
from cluster.plan import ModelFacts, with_replicas, worker_configs
from planner.control.controller import RoleRange
from planner.control.load_window import RolePlacement
from tandem.errors import ConfigError

ROOT = Path(__file__).parents[3]
FACTS = ModelFacts(Path("/model"), "d1", layers=2, kv_heads=1, head_dim=8, context_tokens=256)
ON = "controller: {{enabled: true, plan: plan.yaml{more}}}\n"


def config(more: str = "", pools: str = "") -> ClusterConfig:
    return parse_cluster_config(ON.format(more=more) + pools, "f")


def test_it_is_off_unless_said() -> None:
    assert not ClusterConfig().controller.enabled


def test_without_limits_workers_flip_and_are_neither_added_nor_removed() -> None:
    rules = controller_rules(config(pools="pools: {decode: {replicas: 3}}"), 0.9)
    assert (rules.fewest, rules.most, rules.can_flip, rules.can_scale) == (4, 4, True, False)


def test_limits_let_it_scale() -> None:
    rules = controller_rules(config(", min_workers: 2, max_workers: 6, decode: {min: 1, max: 4}"), 0.99)
    assert (rules.fewest, rules.most, rules.can_scale, rules.attainment) == (2, 6, True, 0.99)
    assert (rules.prefill, rules.decode) == (RoleRange(1, 1024), RoleRange(1, 4))


@pytest.mark.parametrize("differs", ["num_cpus: 2", "num_gpus: 1", "device: cuda"])
def test_workers_on_unlike_resources_cannot_flip(differs: str) -> None:
    unlike = config(pools=f"pools: {{decode: {{{differs}}}}}")
    assert not interchangeable(unlike)
    assert not controller_rules(unlike, 0.9).can_flip
    assert controller_rules(config(), 0.9).can_flip
    assert not controller_rules(config(", flip: false"), 0.9).can_flip


def test_workers_that_keep_to_their_cores_neither_flip_nor_come_and_go() -> None:
    text = "pools: {prefill: {cores: [0]}}\ncontroller: {max_workers: 4}"
    rules = controller_rules(parse_cluster_config(text, "f"), 0.9)
    assert (rules.can_flip, rules.can_scale) == (False, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("controller: {enabled: true}", "plan: an enabled controller needs one"),
        (ON.format(more=", prefill: {min: 3, max: 2}"), "prefill.min: 3 is more than max; allowed: 1 to 2"),
        (ON.format(more=", prefill: {min: 2}"), "pools.prefill.replicas: 1 is outside of controller.prefill"),
        (ON.format(more=", min_workers: 3"), "2 workers start; allowed: min_workers up to 2"),
        (ON.format(more=", gain: 0.5"), "controller.gain"),
        (ON.format(more="") + "pools: {decode: {cores: [0]}}", "pools.decode.cores: shares of cores"),
        (ON.format(more=", windows: 1"), "controller.windows: unknown key"),
    ],
)
def test_a_section_without_sense_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config(text, "f")
    assert expected in str(caught.value)


def test_a_plan_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nonexistent/plan\.yaml: cannot be read"):
        read_brain(parse_cluster_config("controller: {enabled: true, plan: /nonexistent/plan.yaml}", "f"))


def test_a_cluster_without_a_controller_needs_no_library_of_the_planner() -> None:
    code = (
        "import sys\nfor name in ('scipy', 'sklearn', 'matplotlib'): sys.modules[name] = None\n"
        "import cluster.up, cluster.router_host, cluster.worker_actor"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def test_workers_keep_their_names_in_every_placement_that_has_them() -> None:
    named = {
        placement: [
            worker.worker_id for worker in worker_configs(with_replicas(config(), placement), FACTS, cores=2)
        ]
        for placement in (RolePlacement(1, 3), RolePlacement(2, 2))
    }
    assert named == {
        RolePlacement(1, 3): ["prefill-0", "decode-0", "decode-1", "decode-2"],
        RolePlacement(2, 2): ["prefill-0", "prefill-1", "decode-0", "decode-1"],
    }
