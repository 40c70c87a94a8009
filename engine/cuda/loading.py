"""Edge: puts a model on a GPU: weights, attention, the pool that fits beside them, graphs."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec

import structlog
import torch
from torch import Tensor

from engine.computing import Computing
from engine.cuda.accelerator import Accelerator
from engine.cuda.attention import GatherAttention, PagedAttention, TritonAttention
from engine.cuda.attention_choice import AttentionChoice, choose_attention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.flashinfer_attention import FlashInferAttention
from engine.cuda.graphs import DecodeGraphs
from engine.cuda.memory_plan import DeviceMemory, graph_buckets, kv_blocks
from engine.cuda.runner import CudaStepRunner, current_device
from engine.drafting.loading import Drafting, LoadSmall, Target, load_drafting
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig
from engine.sampling.sampler import Sampler
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.ids import BlockId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

MEMORY_SHARE = 0.9
"""Of a device's memory that a worker may use when it sizes its own pool."""

CAPTURE_S = 60.0
"""Bound on capturing graphs; buckets beyond it run without one."""

_PACKAGES = ("flashinfer", "triton")
_DRY_RUN = SamplingParams(temperature=1.0, top_k=2, seed=0)

_log = structlog.get_logger("tandem.engine")


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A model whose weights are on the device, and all that its steps need beside a pool."""

    worker: WorkerConfig
    config: ModelConfig
    decoder: CudaDecoder
    dtype: torch.dtype
    accelerator: Accelerator
    choice: AttentionChoice
    drafting: Drafting
    context_tokens: int

    @property
    def table_width(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.context_tokens // self.worker.block_size)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes with a graph: none where nothing is decoded."""
        graphs = self.choice.capability.graphs and self.worker.role is not Role.PREFILL
        return graph_buckets(self.worker.max_batch) if graphs else ()


def load_on_device(
    worker: WorkerConfig,
    config: ModelConfig,
    weights: MutableMapping[str, Tensor],
    dtype: torch.dtype,
    accelerator: Accelerator,
    load_small: LoadSmall,
    sampler: Sampler | None,
) -> Computing:
    """Everything but reading the files; `weights` are on the device, and are taken out.

    Raises ConfigError when attention, drafting or memory do not allow it, ModelError for files of drafting.
    """
    with torch.inference_mode(), current_device(accelerator.device):
        decoder = CudaDecoder(config, weights)
        installed = [package for package in _PACKAGES if find_spec(package) is not None]
        choice = choose_attention(worker.attention, config, worker.dtype, accelerator.capability, installed)
        _log.info("attention chosen", attention=choice.capability.name, reason=choice.reason)
        target = Target(worker, config, decoder, dtype, accelerator.device)
        drafting = load_drafting(target, load_small)
        if sampler is not None:
            drafting = Drafting(sampler, drafting.drafter)
        context = min(config.context_tokens, worker.context_tokens or config.context_tokens)
        model = DeviceModel(worker, config, decoder, dtype, accelerator, choice, drafting, context)
        return _computing(model, worker.pool_blocks or fitting_blocks(model))


def fitting_blocks(model: DeviceModel) -> int:
    """How many blocks the device has room for beside the model and its largest step.

    Raises ConfigError when they do not hold one sequence of the whole context.
    """
    worker, accelerator = model.worker, model.accelerator
    free, total = accelerator.memory()
    plan, blocks = dry_run_plan(worker.token_budget, worker.max_batch, worker.block_size)
    block_bytes = _block_bytes(model)

    def largest_step() -> None:
        with KvCache(model.config, blocks, worker.block_size, model.dtype, accelerator.device) as cache:
            _runner(model, cache, graphs=None).run(plan)

    peak = accelerator.peak_of(largest_step) - blocks * block_bytes
    memory = DeviceMemory(total, free, max(0, peak))
    found = kv_blocks(memory, block_bytes, MEMORY_SHARE, model.table_width)
    _log.info("pool sized", blocks=found, block_bytes=block_bytes, free_bytes=free, step_bytes=peak)
    return found


def dry_run_plan(token_budget: int, max_batch: int, block_size: int) -> tuple[StepPlan, int]:
    """The largest step that a worker may run, and how many blocks it needs.

    As many tokens as the budget, in as many sequences as may be, all of which want a token. They write to the
    same blocks: what they compute is of no use.
    """
    tokens = max(token_budget, max_batch)
    each, more = divmod(tokens, max_batch)
    table = [BlockId(block) for block in range(-(-(each + more) // block_size))]
    slices = tuple(
        SequenceSlice([0] * count, 0, table, (SampleRequest(key, 0, 0, _DRY_RUN),))
        for key, count in enumerate([each + more, *[each] * (max_batch - 1)])
    )
    return StepPlan(0, slices), len(table)


def _computing(model: DeviceModel, blocks: int) -> Computing:
    worker, device = model.worker, model.accelerator.device
    cache = KvCache(model.config, blocks + 1, worker.block_size, model.dtype, device)
    attention = _attention(model, cache.pool)
    graphs = None
    if model.buckets:
        slot = blocks * model.config.layers * 2 * worker.block_size
        graphs = DecodeGraphs(
            model.decoder,
            attention,
            model.accelerator.capture(),
            model.buckets,
            model.table_width,
            blocks,
            slot,
            device,
        )
        graphs.capture_all(CAPTURE_S)
    runner = _runner(model, cache, graphs, attention)
    return Computing(runner, cache, blocks, model.drafting.drafter)


def _runner(
    model: DeviceModel, cache: KvCache, graphs: DecodeGraphs | None, attention: PagedAttention | None = None
) -> CudaStepRunner:
    return CudaStepRunner(
        model.decoder,
        cache,
        model.config.layers,
        attention or _attention(model, cache.pool),
        GatherAttention(cache.pool, model.config),
        model.drafting.sampler,
        graphs,
        model.drafting.drafter,
    )


def _attention(model: DeviceModel, pool: Tensor) -> PagedAttention:
    name, config = model.choice.capability.name, model.config
    if name == FlashInferAttention.name:
        return FlashInferAttention(pool, config, model.buckets, model.table_width)
    if name == TritonAttention.name:
        return TritonAttention(pool, config, model.worker.max_batch)
    return GatherAttention(pool, config)


def _block_bytes(model: DeviceModel) -> int:
    config = model.config
    numbers = config.layers * 2 * model.worker.block_size * config.kv_heads * config.head_dim
    return numbers * model.dtype.itemsize
