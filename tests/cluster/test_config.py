"""Edge: cluster.yaml: what is accepted, and that all that is wrong with a file is said at once."""

from pathlib import Path

import pytest

from cluster.config import ClusterConfig, RaySection, RedisSection
from cluster.config_docs import render
from cluster.config_file import MAX_FILE_BYTES, load_cluster_config, parse_cluster_config
from tandem.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent


def test_no_file_is_the_demo() -> None:
    config = load_cluster_config(None)
    assert config == ClusterConfig()
    assert (config.model.source, config.pools.prefill.replicas, config.pools.decode.replicas) == (
        "smollm2",
        1,
        1,
    )
    assert (config.redis.url, config.ray.address) == ("embedded", "local")
    assert (config.router.grpc_port, config.router.http_port) == (50051, 8000)
    assert config.router.bind_host == config.workers.bind_host == "127.0.0.1"


def test_empty_file_is_the_demo_too() -> None:
    assert parse_cluster_config("# nothing\n", "cluster.yaml") == ClusterConfig()


def test_example_in_the_repository_is_accepted() -> None:
    config = load_cluster_config(ROOT / "deploy" / "examples" / "cluster.yaml")
    assert config.model.context == 4096


def test_page_about_cluster_yaml_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cluster-yaml.md").read_text() == render(), (
        "run: python -m cluster.config_docs > docs/cluster-yaml.md"
    )


def test_sizes_are_read_with_units() -> None:
    config = parse_cluster_config("pools: {decode: {memory: 512MiB}}", "f")
    assert config.pools.decode.memory == 512 * 1024 * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: {}", ["models: unknown key; allowed keys: model, block_size, pools"]),
        ("pools: {prefill: {max_batch: 3}}", ["pools.prefill.max_batch: unknown key", "token_budget"]),
        ("pools: {prefill: {replicas: 0}}", ["pools.prefill.replicas", "greater than or equal to 1 (got 0)"]),
        ("pools: {decode: {threads: many}}", ["pools.decode.threads", "'auto'", "valid integer"]),
        ("pools: {decode: {memory: lots}}", ["pools.decode.memory", "lots"]),
        ("pools: {decode: 5}", ["pools.decode", "got 5"]),
        ("block_size: 12", ["block_size", "8, 16, 32, 64 or 128 (got 12)"]),
        ("policies: {dispatch: best}", ["'round_robin', 'least_loaded' or 'prefix_aware' (got 'best')"]),
        (
            "workers: {transports: [rdma]}",
            ["workers.transports.0", "'nccl', 'cuda_ipc', 'shm' or 'tcp' (got 'rdma')"],
        ),
        ("slo_classes: {a: {ttft_s: 1, tpot_s: .inf, longest_gap_s: 1}}", ["slo_classes.a.tpot_s", "finite"]),
        ("slo_classes: {a: {ttft_s: 1}}", ["slo_classes.a.tpot_s: Field required"]),
        (
            "slo_classes: {a: {ttft_s: 1, tpot_s: 1, longest_gap_s: 1, p: 1}}",
            ["slo_classes.a.p: unknown key"],
        ),
        ("default_slo_class: fast", ["default_slo_class: 'fast' is no class; allowed: batch, interactive"]),
        ("router: {grpc_port: 70000}", ["router.grpc_port", "65535"]),
        ("redis: {url: 'http://x'}", ["redis.url", "embedded, redis://host:port/db"]),
        ("workers: {tls: {cert: c.pem, key: k.pem}}", ["workers.tls.ca: Field required"]),
        (
            "workers: {transports: [shm], tls: {cert: c.pem, key: k.pem, ca: a.pem}}",
            ["workers: tls: belongs to the transport tcp"],
        ),
        ("workers: {nccl: {max_communicators: 0}}", ["workers.nccl.max_communicators"]),
        ("workers: {nccl: {staging: 1KiB}}", ["workers.nccl.staging"]),
        ("redis: {tls_ca: ca.pem}", ["redis.tls_ca: needs a redis.url that starts with rediss://"]),
        ("ray: {address: cloud}", ["ray.address", "local, auto, ray://host:port (got 'cloud')"]),
        ("ray: {address: auto}", ["redis.url", "embedded", "rediss://host:port/db"]),
        ("model: {dtype: int8}", ["model.dtype", "'float32' or 'bfloat16' (got 'int8')"]),
        ("pools: {decode: {cores: [1, 1]}}", ["pools.decode", "cores: names a core twice"]),
        ("pools: {decode: {cores: [0, 1, 2], replicas: 2}}", ["pools.decode", "allowed: a multiple of 2"]),
        (
            "pools: {decode: {cores: [0, 1], replicas: 2, threads: 2}}",
            ["pools.decode", "threads: 2 on 1 of the cores; allowed: auto, 1 to 1"],
        ),
        (
            "pools: {prefill: {cores: [0, 1]}, decode: {cores: [1]}}",
            ["pools", "decode.cores: core 1 is one of prefill.cores; allowed: others"],
        ),
        ("pools: {decode: {cores: [-1]}}", ["pools.decode.cores.0", "greater than or equal to 0"]),
        ("pools: {decode: {cores: []}}", ["pools.decode.cores", "at least 1 item"]),
        (
            "model: {weights_dtype: int8}\npools: {decode: {device: cuda}}",
            ["model.weights_dtype: int8 is for the CPU, and pools.decode.device is cuda; allowed: auto"],
        ),
        (
            "model: {context: 1024}\npools: {decode: {pool_blocks: 63}}",
            [
                "pools.decode.pool_blocks: 63 blocks cannot hold one context of 1024 tokens",
                "allowed: 64 or more",
            ],
        ),
        ("- a\n- b", ["must be a mapping with the keys model"]),
        ("a: [", ["not YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not YAML"]),
    ],
)
def test_fault_is_named_with_file_path_and_allowed_values(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml")
    for part in expected:
        assert part in message


def test_all_faults_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config("block_size: 1\nrouter: {http_port: -1, x: 1}\nfoo: 1", "my.yaml")
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().split(":")[0] for line in lines] == [
        "block_size",
        "router.http_port",
        "router.x",
        "foo",
    ]


def test_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config("redis: {url: 'redis://:hunter2@host:6379/0'}", "my.yaml")
    assert "TANDEM_REDIS_PASSWORD" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_cluster_config(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        load_cluster_config(tmp_path / "bytes.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_cluster_config(tmp_path / "large.yaml")


def test_external_registry_and_ray_are_accepted_together() -> None:
    config = ClusterConfig(
        redis=RedisSection(url="rediss://redis.example:6380/1", tls_ca="/etc/ca.pem"),
        ray=RaySection(address="ray://head:10001"),
    )
    assert config.redis.namespace == "tandem"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {kv_dtype: int8}\nworkers: {codec: fp8}",
            r"pools\.prefill: kv_dtype int8 does not go through codec fp8; allowed: identity",
        ),
        (
            "model: {kv_dtype: int8}\npools: {decode: {device: cuda}}",
            r"pools\.decode: kv_dtype int8 runs on the CPU only, not on device cuda",
        ),
        (
            "pools: {decode: {kv_selection: {policy: quest}}}\nspeculative: {method: ngram}",
            r"pools\.decode: kv_selection quest does not go with speculative decoding",
        ),
        (
            "model: {dtype: bfloat16}\npools: {decode: {kv_selection: {policy: quest}}}",
            r"pools\.decode: kv_selection quest does not read KV of bfloat16; allowed: float32, int8",
        ),
        (
            "pools: {decode: {kv_selection: {policy: morph}}}\nspeculative: {method: ngram}",
            r"pools\.decode: kv_selection morph does not go with speculative decoding: KV is dropped by",
        ),
        (
            "pools: {decode: {kv_selection: {policy: morph, budget_tokens: 30, window_tokens: 16}}}",
            r"budget_tokens: 30 is less than two windows; allowed: 32 or more",
        ),
        ("pools: {prefill: {kv_selection: {policy: quest}}}", r"pools\.prefill\.kv_selection: unknown key"),
    ],
)
def test_kv_policies_that_do_not_go_together_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cluster_config(text, "f")
