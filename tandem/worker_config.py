"""Pure: what a worker process is told at its start, by cluster.yaml or by hand."""

from dataclasses import dataclass
from pathlib import Path

from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How a decode worker guesses tokens.

    `method` is ngram, draft_model, medusa or eagle; at most `tokens` guesses of a sequence are verified in a
    step. `source` is the draft model, named as a model is, or the folder of the heads (not for ngram).
    `acceptance` is exact (the output is the one without guesses) or rejection (draft_model only: drawn output
    has the same distribution, and more guesses hold). `pool_blocks` is the size of a draft model's or EAGLE
    head's own KV pool.
    """

    method: str
    tokens: int = 8
    source: str | None = None
    min_ngram: int = 2
    max_ngram: int = 4
    acceptance: str = "exact"
    pool_blocks: int = 1024


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files of a worker: its certificate, the key of it, and the authority that signed everyone's."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class NcclConfig:
    """Bounds on NCCL: open communicators of a worker, staging bytes of each, and opening and aborting one."""

    max_communicators: int = 8
    staging_bytes: int = 32 << 20
    open_s: float = 15.0
    abort_s: float = 1.0


@dataclass(frozen=True, slots=True)
class KvSelectionConfig:
    """Which of its KV a decode worker reads or keeps: `policy` full, quest or morph.

    quest reads `pages` blocks a KV head. morph keeps KV of at most `budget_tokens` tokens a sequence, those
    that the last `window_tokens` attend to most; `fusion` sum or max makes one score of their attention.
    """

    policy: str
    pages: int = 64
    budget_tokens: int = 1024
    window_tokens: int = 16
    fusion: str = "sum"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker's settings.

    `model_folder` is a Hugging Face folder (a GGUF file is converted into one first).
    `pool_blocks` is the size of the KV pool, 0 on a GPU for what fits beside the model; `attention` names a
    GPU's back-end, `auto` the best one. `weights_dtype` is how the weights of matrix products are kept: None
    as `dtype` says, int8 in eight bits. The worker's threads keep to `cores` (empty: any).
    `token_budget` bounds the tokens of one prefill step, `max_batch` the sequences of one decode step,
    `max_waiting` the legs queued at the worker. KV of prompts of at least `overlap_min_tokens` can be pulled
    while they are read (None: of none).
    `port` 0 lets the system choose; `metrics_port` None serves no metrics. The cluster token comes from the
    environment variable TANDEM_CLUSTER_TOKEN, never from here. `codec` is how KV is written on its way;
    `codec_thresholds` is the file that oaken needs. `tls` encrypts what moves over tcp. `kv_dtype` is how KV
    is stored: None as `dtype` says, int8 in eight bits with scales; `kv_selection` None reads all of it.
    `kv_arena` is a file in a tmpfs or hugetlbfs in which all workers of the host have their pools (CPU only).
    """

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    model_folder: Path
    model_name: str
    pool_blocks: int
    block_size: int = 16
    dtype: str = "float32"
    weights_dtype: str | None = None
    device: str = "cpu"
    attention: str = "auto"
    threads: int = 1
    cores: tuple[int, ...] = ()
    context_tokens: int | None = None
    token_budget: int = 512
    overlap_min_tokens: int | None = 256
    max_batch: int = 64
    max_waiting: int = 256
    prefix_cache: bool = True
    bind_host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int | None = None
    transports: tuple[str, ...] = ("shm", "tcp")
    lease_s: float = 5.0
    park_s: float = 30.0
    checksum: bool = True
    codec: str = "identity"
    codec_thresholds: Path | None = None
    tls: TlsConfig | None = None
    nccl: NcclConfig = NcclConfig()
    speculative: SpeculativeConfig | None = None
    kv_dtype: str | None = None
    kv_selection: KvSelectionConfig | None = None
    kv_arena: Path | None = None
