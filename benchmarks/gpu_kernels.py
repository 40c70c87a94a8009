"""Edge: each of the engine's kernels on a GPU beside the time that its bytes or products take at least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from triton.testing import do_bench

from benchmarks.gpu_report import GpuFigure
from engine.cuda.kernels.activation import swiglu
from engine.cuda.kernels.draw import draw_tokens
from engine.cuda.kernels.norm import rms_norm
from engine.cuda.kernels.paged_decode import DecodeScratch, paged_decode
from engine.cuda.kernels.paged_prefill import QueryRun, paged_prefill, tiles_of
from engine.cuda.kernels.rope_write import rope_write
from engine.models.model_config import ModelConfig, RopeConfig, RopeKind

SHARE = 0.9
ROWS, BATCH, CONTEXT, BLOCK_SIZE = 8192, 64, 1024, 16
_COPIED_BYTES = 2 * 1024**3
_KIND = torch.bfloat16

LLAMA_3_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocabulary_tokens=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeConfig(500_000.0, RopeKind.DEFAULT),
    context_tokens=8192,
    tied_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,) * 32,
    eos_ids=(128_001,),
)


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Measured in the same run: bytes a second and operations a second."""

    bytes_s: float
    flop_s: float


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One launch, the bytes that it must move and the operations of its matrix products."""

    name: str
    launch: Callable[[], object]
    bytes_moved: float
    flops: float = 0.0


async def kernels() -> list[GpuFigure]:
    """The shapes are Llama-3-8B's in bfloat16."""
    limits = device_limits()
    return [_figure(kernel, limits) for kernel in (*_row_kernels(), *_attention_kernels())]


def device_limits() -> DeviceLimits:
    """A copy within the device, read and written, and a product as large as the model's."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source))
    shape = LLAMA_3_8B
    rows, weight = _numbers(ROWS, shape.hidden_size), _numbers(shape.intermediate_size, shape.hidden_size)
    product_s = _seconds(lambda: torch.nn.functional.linear(rows, weight))
    flops = 2 * ROWS * shape.hidden_size * shape.intermediate_size
    return DeviceLimits(2 * _COPIED_BYTES / copy_s, flops / product_s)


def _figure(kernel: _Kernel, limits: DeviceLimits) -> GpuFigure:
    seconds = _seconds(kernel.launch)
    floor_s = max(kernel.bytes_moved / limits.bytes_s, kernel.flops / limits.flop_s)
    text = f"{seconds * 1e6:.0f} us, {floor_s / seconds:.2f} of its floor ({floor_s * 1e6:.0f} us)"
    return GpuFigure(f"kernel {kernel.name}", text, f">= {SHARE}", floor_s >= SHARE * seconds)


def _row_kernels() -> Iterator[_Kernel]:
    shape = LLAMA_3_8B
    hidden, delta, weight = (
        _numbers(ROWS, shape.hidden_size),
        _numbers(ROWS, shape.hidden_size),
        _numbers(4096),
    )
    normed = torch.empty_like(hidden)
    yield _Kernel(
        "rms_norm with a residual",
        lambda: rms_norm(hidden, delta, weight, shape.norm_eps, normed),
        4 * hidden.nbytes,
    )
    gate_up = _numbers(ROWS, 2 * shape.intermediate_size)
    inner = _numbers(ROWS, shape.intermediate_size)
    yield _Kernel("swiglu", lambda: swiglu(gate_up, inner), gate_up.nbytes + inner.nbytes)
    projected = _numbers(ROWS, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    queries, pool = _numbers(ROWS, shape.heads, shape.head_dim), _pool(ROWS)
    positions = torch.arange(ROWS, device="cuda")
    slots = positions // BLOCK_SIZE * 2 * BLOCK_SIZE + positions % BLOCK_SIZE
    frequencies = torch.rand(shape.head_dim // 2, device="cuda")
    yield _Kernel(
        "rope_write",
        lambda: rope_write(projected, positions, frequencies, slots, None, queries, pool, 0),
        2 * projected.nbytes,
    )
    logits = _numbers(BATCH, shape.vocabulary_tokens)
    temperatures = torch.full((BATCH,), 0.8, device="cuda")
    uniforms = torch.rand(BATCH, dtype=torch.float64, device="cuda")
    tokens = torch.empty(BATCH, dtype=torch.int64, device="cuda")
    yield _Kernel("draw", lambda: draw_tokens(logits, temperatures, uniforms, tokens), logits.nbytes)


def _attention_kernels() -> Iterator[_Kernel]:
    shape = LLAMA_3_8B
    pool = _pool(BATCH * CONTEXT)
    tables = torch.randperm(pool.shape[0], device="cuda", dtype=torch.int32).view(BATCH, -1)
    lengths = torch.full((BATCH,), CONTEXT, dtype=torch.int32, device="cuda")
    queries = _numbers(BATCH, shape.heads, shape.head_dim)
    out = torch.empty_like(queries)
    scratch = DecodeScratch.allocate(BATCH, 8, shape.heads, shape.head_dim, pool.device)
    yield _Kernel(
        "paged_decode",
        lambda: paged_decode(queries, pool, 0, tables, lengths, None, scratch, out),
        pool.nbytes,
    )
    chunk = _numbers(ROWS, shape.heads, shape.head_dim)
    attended = torch.empty_like(chunk)
    table = tables.view(1, -1)[:, : ROWS // BLOCK_SIZE].contiguous()
    tiles = tiles_of([QueryRun(0, 0, 0, ROWS)], pool.device)
    yield _Kernel(
        "paged_prefill",
        lambda: paged_prefill(chunk, pool, 0, tiles, table, None, attended),
        2 * chunk.nbytes,
        4 * shape.heads * shape.head_dim * ROWS * (ROWS + 1) / 2,
    )


def _pool(tokens: int) -> torch.Tensor:
    """One layer's K and V."""
    return _numbers(tokens // BLOCK_SIZE, 1, 2, BLOCK_SIZE, LLAMA_3_8B.kv_heads, LLAMA_3_8B.head_dim)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=_KIND, device="cuda")


def _seconds(work: Callable[[], object]) -> float:
    """The median of runs with cold caches."""
    return float(do_bench(work, return_mode="median")) / 1e3
