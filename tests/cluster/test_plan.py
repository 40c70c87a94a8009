"""Pure: from cluster.yaml to what router and workers are told."""

from pathlib import Path

import pytest
import torch

from cluster.config import ClusterConfig
from cluster.config_file import parse_cluster_config
from cluster.model_facts import read_model_facts
from cluster.plan import ModelFacts, router_config, worker_configs
from engine.kv.kv_cache import KvCache
from engine.models.model_config import read_model_config
from kvtransfer.settings import transfer_config
from tandem.errors import ConfigError
from tandem.slo import SloClass
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, TlsConfig
from tests.engine.tiny_models import family_configs, random_model

FACTS = ModelFacts(Path("/model"), "d1", layers=2, kv_heads=1, head_dim=8, context_tokens=256)
BLOCK_BYTES = 2 * 2 * 16 * 1 * 8 * 4


def test_block_bytes_are_keys_and_values_of_all_layers() -> None:
    assert FACTS.block_bytes(16, "float32") == BLOCK_BYTES
    assert FACTS.block_bytes(16, "bfloat16") == BLOCK_BYTES // 2


def test_memory_becomes_whole_blocks() -> None:
    config = parse_cluster_config("pools: {prefill: {memory: 1MiB}}", "f")
    prefill, decode = worker_configs(config, FACTS, cores=2)
    assert prefill.pool_blocks == (1 << 20) // BLOCK_BYTES
    assert decode.pool_blocks == (1 << 30) // BLOCK_BYTES


def test_workers_are_named_by_role_and_share_the_cores() -> None:
    config = parse_cluster_config("pools: {prefill: {replicas: 2}, decode: {replicas: 3, threads: 7}}", "f")
    workers = worker_configs(config, FACTS, cores=16)
    assert [worker.worker_id for worker in workers] == [
        "prefill-0",
        "prefill-1",
        "decode-0",
        "decode-1",
        "decode-2",
    ]
    assert [worker.role for worker in workers] == [Role.PREFILL] * 2 + [Role.DECODE] * 3
    assert [worker.threads for worker in workers] == [3, 3, 7, 7, 7]


def test_workers_take_equal_shares_of_their_pools_cores() -> None:
    config = parse_cluster_config(
        "pools: {prefill: {cores: [3]}, decode: {replicas: 2, cores: [0, 5, 4, 1]}}", "f"
    )
    workers = worker_configs(config, FACTS, cores=64)
    assert [worker.cores for worker in workers] == [(3,), (0, 5), (4, 1)]
    assert [worker.threads for worker in workers] == [1, 2, 2]


def test_without_cores_a_worker_keeps_to_none() -> None:
    config = parse_cluster_config("pools: {prefill: {cores: [0, 1], threads: 1}}", "f")
    prefill, decode = worker_configs(config, FACTS, cores=8)
    assert (prefill.cores, prefill.threads) == ((0, 1), 1)
    assert (decode.cores, decode.threads) == ((), 4)


def test_how_weights_are_kept_reaches_every_worker() -> None:
    config = parse_cluster_config("model: {weights_dtype: int8}", "f")
    assert {worker.weights_dtype for worker in worker_configs(config, FACTS, cores=2)} == {"int8"}
    assert {worker.weights_dtype for worker in worker_configs(ClusterConfig(), FACTS, cores=2)} == {None}


def test_a_worker_has_a_thread_even_on_one_core() -> None:
    assert {worker.threads for worker in worker_configs(ClusterConfig(), FACTS, cores=1)} == {1}


def test_settings_reach_the_workers_they_are_for() -> None:
    config = parse_cluster_config(
        "pools: {prefill: {token_budget: 99, metrics_port: 9100}, decode: {max_batch: 20, replicas: 2}}\n"
        "workers: {transports: [tcp], checksum: false}\nleases: {handoff_s: 3, park_s: 4}",
        "f",
    )
    prefill, decode, _ = worker_configs(config, FACTS, cores=2)
    assert (prefill.token_budget, prefill.metrics_port, decode.metrics_port) == (99, 9100, 0)
    assert (decode.max_batch, decode.transports, decode.checksum) == (20, ("tcp",), False)
    assert (decode.lease_s, decode.park_s, decode.context_tokens) == (3.0, 4.0, 256)


def test_bounds_of_nccl_and_files_of_tls_reach_the_transports() -> None:
    text = """
workers:
  tls: {cert: /c.pem, key: /k.pem, ca: /a.pem}
  nccl: {max_communicators: 3, staging: 8MiB, open_s: 5, abort_s: 0.5}
"""
    for worker in worker_configs(parse_cluster_config(text, "my.yaml"), FACTS, cores=2):
        settings = transfer_config(worker)
        assert settings.tls == TlsConfig(Path("/c.pem"), Path("/k.pem"), Path("/a.pem"))
        limits = settings.communicators
        assert (limits.max_open, limits.slot_bytes) == (3, 4 << 20)
        assert (limits.open_s, limits.abort_s) == (5.0, 0.5)


def test_all_pools_lie_in_the_arena_that_is_named() -> None:
    config = parse_cluster_config("workers: {kv_arena: /dev/shm/kv}", "f")
    workers = worker_configs(config, FACTS, cores=2)
    assert {worker.kv_arena for worker in workers} == {Path("/dev/shm/kv")}


def test_router_is_told_the_same_context_digest_and_classes() -> None:
    config = parse_cluster_config("model: {context: 128, name: tiny}\nrouter: {grpc_port: 0}", "f")
    router = router_config(config, FACTS)
    assert (router.model_name, router.digest, router.context_tokens, router.grpc_port) == (
        "tiny",
        "d1",
        128,
        0,
    )
    assert router.slo_classes[0] == SloClass("interactive", 2.0, 0.2, 1.0)
    assert worker_configs(config, FACTS, cores=2)[0].context_tokens == 128


def test_the_request_log_is_off_unless_it_has_a_path() -> None:
    assert router_config(ClusterConfig(), FACTS).request_log is None
    config = parse_cluster_config("router: {request_log: r.jsonl, request_log_bytes: 1MiB}", "f")
    router = router_config(config, FACTS)
    assert (router.request_log, router.request_log_bytes) == (Path("r.jsonl"), 1 << 20)


@pytest.mark.parametrize(
    ("source", "name"),
    [("smollm2", "smollm2"), ("/models/qwen.gguf", "qwen"), ("/models/Llama-3.2-1B", "Llama-3.2-1B")],
)
def test_model_is_named_after_its_source(source: str, name: str) -> None:
    config = parse_cluster_config(f"model: {{source: {source}}}", "f")
    assert router_config(config, FACTS).model_name == name


def test_context_beyond_the_model_is_refused() -> None:
    config = parse_cluster_config("model: {context: 512}", "f")
    with pytest.raises(ConfigError, match=r"model\.context: 512 .* allowed: 16 to 256"):
        router_config(config, FACTS)


@pytest.mark.parametrize(("setting", "key"), [("pool_blocks: 15", "pool_blocks"), ("memory: 1MiB", "memory")])
def test_pool_that_cannot_hold_one_context_is_refused(setting: str, key: str) -> None:
    large = ModelFacts(Path("/model"), "d", layers=32, kv_heads=8, head_dim=128, context_tokens=256)
    config = parse_cluster_config(f"pools: {{decode: {{{setting}}}}}", "f")
    with pytest.raises(ConfigError, match=rf"pools\.decode\.{key}: .* allowed: 16 blocks"):
        worker_configs(config, large, cores=2)


def test_kv_policies_reach_the_workers_and_the_size_of_the_pools() -> None:
    config = parse_cluster_config(
        "model: {kv_dtype: int8}\npools: {decode: {memory: 1MiB, kv_selection: {policy: quest, pages: 9}}}",
        "f",
    )
    prefill, decode = worker_configs(config, FACTS, cores=2)
    assert (prefill.kv_dtype, prefill.kv_selection) == ("int8", None)
    assert (decode.kv_dtype, decode.kv_selection) == ("int8", KvSelectionConfig("quest", pages=9))
    assert decode.pool_blocks == (1 << 20) // (2 * 2 * 16 * 1 * (8 + 4))


def test_the_budget_of_morph_reaches_the_decode_workers() -> None:
    morph = "policy: morph, budget_tokens: 256, window_tokens: 8, fusion: max"
    config = parse_cluster_config(f"pools: {{decode: {{kv_selection: {{{morph}}}}}}}", "f")
    prefill, decode = worker_configs(config, FACTS, cores=2)
    assert prefill.kv_selection is None
    assert decode.kv_selection == KvSelectionConfig("morph", budget_tokens=256, window_tokens=8, fusion="max")


def test_full_selection_in_the_weights_type_is_the_default() -> None:
    workers = worker_configs(ClusterConfig(), FACTS, cores=2)
    assert {(worker.kv_dtype, worker.kv_selection) for worker in workers} == {(None, None)}


@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("int8", torch.int8)])
def test_block_bytes_are_those_of_a_workers_pool(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    facts = read_model_facts(tmp_path, "float32", 16)
    with KvCache(read_model_config(tmp_path), 1, 16, stored, torch.device("cpu")) as cache:
        assert facts.block_bytes(16, dtype) == cache.block_bytes
