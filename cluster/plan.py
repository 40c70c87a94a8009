"""Pure: from cluster.yaml and the model's facts to what each router and worker is told."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from cluster.config import ClusterConfig
from cluster.config_pools import DecodePool, PoolSection, PrefillPool
from cluster.core_shares import cores_of
from planner.control.load_window import RolePlacement
from router.config import RouterConfig
from tandem.errors import ConfigError
from tandem.ids import Incarnation, WorkerId
from tandem.slo import SloClass
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, NcclConfig, SpeculativeConfig, TlsConfig, WorkerConfig

UNBORN = Incarnation(0)
"""Incarnation in a plan; each start of the worker takes a real one from the registry."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

SCALE_BYTES = {"int8": 4}
"""Beside each head's K or V of a token."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs of a model folder."""

    folder: Path
    digest: str
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one KV block: K and V of all layers for block_size tokens, stored as `dtype`."""
        row_bytes = self.head_dim * DTYPE_BYTES[dtype] + SCALE_BYTES.get(dtype, 0)
        return self.layers * 2 * block_size * self.kv_heads * row_bytes


def served_name(config: ClusterConfig) -> str:
    """Name of the model that clients use."""
    source = config.model.source
    path = PurePath(source)
    return config.model.name or (path.stem if path.suffix == ".gguf" else path.name) or source


def context_tokens(config: ClusterConfig, model: ModelFacts) -> int:
    """Most tokens of prompt and output together. Raises ConfigError when the model cannot do it."""
    wanted = config.model.context
    if wanted is None:
        return model.context_tokens
    if wanted > model.context_tokens:
        raise ConfigError(
            f"model.context: {wanted} is more than the model's {model.context_tokens} tokens; "
            f"allowed: 16 to {model.context_tokens}"
        )
    return wanted


def thresholds_path(config: ClusterConfig) -> Path | None:
    """Where the wire codec's thresholds are, on every worker's host."""
    named = config.workers.codec_thresholds
    return None if named is None else Path(named)


def kv_dtype(config: ClusterConfig) -> str | None:
    """How KV is stored; None for as the weights are."""
    return None if config.model.kv_dtype == "auto" else config.model.kv_dtype


def weights_dtype(config: ClusterConfig) -> str | None:
    """How the weights of matrix products are kept; None for as `model.dtype` says."""
    return None if config.model.weights_dtype == "auto" else config.model.weights_dtype


def router_config(config: ClusterConfig, model: ModelFacts) -> RouterConfig:
    """What the router is told."""
    router = config.router
    return RouterConfig(
        model_folder=model.folder,
        model_name=served_name(config),
        digest=model.digest,
        slo_classes=tuple(
            SloClass(name, slo.ttft_s, slo.tpot_s, slo.longest_gap_s)
            for name, slo in config.slo_classes.items()
        ),
        default_slo_class=config.default_slo_class,
        context_tokens=context_tokens(config, model),
        block_size=config.block_size,
        dispatch=config.policies.dispatch,
        max_queued=router.max_queued,
        max_active=router.max_active,
        max_replacements=router.max_replacements,
        request_timeout_s=router.request_timeout_s,
        park_requests_s=router.park_requests_s,
        canary_interval_s=router.canary_interval_s,
        bind_host=router.bind_host,
        grpc_port=router.grpc_port,
        http_port=router.http_port,
        drain_timeout_s=config.ray.drain_timeout_s,
        request_log=None if router.request_log is None else Path(router.request_log).expanduser(),
        request_log_bytes=int(router.request_log_bytes),
    )


def with_replicas(config: ClusterConfig, placement: RolePlacement) -> ClusterConfig:
    """The same cluster with so many workers of each role."""
    prefill = config.pools.prefill.model_copy(update={"replicas": placement.prefill})
    decode = config.pools.decode.model_copy(update={"replicas": placement.decode})
    pools = config.pools.model_copy(update={"prefill": prefill, "decode": decode})
    return config.model_copy(update={"pools": pools})


def worker_configs(config: ClusterConfig, model: ModelFacts, cores: int) -> tuple[WorkerConfig, ...]:
    """What each worker is told, prefill first; `cores` are those of the machine that holds them all."""
    pools: tuple[tuple[Role, PoolSection], ...] = (
        (Role.PREFILL, config.pools.prefill),
        (Role.DECODE, config.pools.decode),
    )
    workers = sum(pool.replicas for _, pool in pools)
    auto_threads = max(1, cores // workers)
    return tuple(
        _worker(config, model, role, pool, index, auto_threads)
        for role, pool in pools
        for index in range(pool.replicas)
    )


def _worker(
    config: ClusterConfig, model: ModelFacts, role: Role, pool: PoolSection, index: int, auto_threads: int
) -> WorkerConfig:
    bind, cores = config.workers.bind_host, cores_of(pool.cores, pool.replicas, index)
    worker = WorkerConfig(
        worker_id=WorkerId(f"{role.value}-{index}"),
        incarnation=UNBORN,
        role=role,
        model_folder=model.folder,
        model_name=served_name(config),
        pool_blocks=_pool_blocks(config, model, role, pool),
        block_size=config.block_size,
        dtype=config.model.dtype,
        device=pool.device,
        attention=pool.attention,
        weights_dtype=weights_dtype(config),
        threads=(len(cores) or auto_threads) if pool.threads == "auto" else pool.threads,
        cores=cores,
        context_tokens=context_tokens(config, model),
        max_waiting=pool.max_waiting,
        prefix_cache=pool.prefix_cache,
        bind_host=bind,
        advertise_host=bind if config.workers.advertise_host == "auto" else config.workers.advertise_host,
        metrics_port=None if pool.metrics_port is None else _port_of(pool.metrics_port, index),
        transports=config.workers.transports,
        lease_s=config.leases.handoff_s,
        park_s=config.leases.park_s,
        checksum=config.workers.checksum,
        codec=config.workers.codec,
        codec_thresholds=thresholds_path(config),
        tls=_tls(config),
        nccl=_nccl(config),
        kv_dtype=kv_dtype(config),
        kv_arena=None if config.workers.kv_arena is None else Path(config.workers.kv_arena),
    )
    if isinstance(pool, PrefillPool):
        return replace(worker, token_budget=pool.token_budget, overlap_min_tokens=pool.overlap_min_tokens)
    if isinstance(pool, DecodePool):
        return _decoding(worker, config, pool)
    return worker


def _tls(config: ClusterConfig) -> TlsConfig | None:
    files = config.workers.tls
    return None if files is None else TlsConfig(Path(files.cert), Path(files.key), Path(files.ca))


def _nccl(config: ClusterConfig) -> NcclConfig:
    section = config.workers.nccl
    return NcclConfig(section.max_communicators, int(section.staging), section.open_s, section.abort_s)


def _decoding(worker: WorkerConfig, config: ClusterConfig, pool: DecodePool) -> WorkerConfig:
    speculative, selection = _speculative(config), _kv_selection(pool)
    return replace(worker, max_batch=pool.max_batch, speculative=speculative, kv_selection=selection)


def _kv_selection(pool: DecodePool) -> KvSelectionConfig | None:
    section = pool.kv_selection
    if section.policy == "full":
        return None
    return KvSelectionConfig(
        section.policy, section.pages, section.budget_tokens, section.window_tokens, section.fusion
    )


def _speculative(config: ClusterConfig) -> SpeculativeConfig | None:
    section = config.speculative
    if section.method == "none":
        return None
    return SpeculativeConfig(
        method=section.method,
        tokens=section.tokens,
        source=section.source,
        min_ngram=section.min_ngram,
        max_ngram=section.max_ngram,
        acceptance=section.acceptance,
        pool_blocks=section.pool_blocks,
    )


def _port_of(first: int, index: int) -> int:
    return first + index if first else 0


def _pool_blocks(config: ClusterConfig, model: ModelFacts, role: Role, pool: PoolSection) -> int:
    """Blocks of a pool, 0 for what fits a GPU; raises ConfigError when it cannot hold one context."""
    if pool.pool_blocks == 0 and pool.device != "cpu":
        return 0
    block_bytes = model.block_bytes(config.block_size, kv_dtype(config) or config.model.dtype)
    blocks = pool.pool_blocks if pool.pool_blocks is not None else int(pool.memory) // block_bytes
    context = context_tokens(config, model)
    needed = -(-context // config.block_size)
    if blocks < needed:
        key = "memory" if pool.pool_blocks is None else "pool_blocks"
        raise ConfigError(
            f"pools.{role.value}.{key}: {blocks} blocks cannot hold one context of {context} tokens; "
            f"allowed: {needed} blocks ({needed * block_bytes} bytes) or more, or a smaller model.context"
        )
    return blocks
