"""Edge: compiles the engine's kernels for GPUs without having one; says for each whether there is code.

Run without TRITON_INTERPRET: `python -m tests.engine.cuda.compile_kernels`.
"""

from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.cuda.kernels import activation, draw, norm, paged_decode, paged_prefill, rope_write

CAPABILITIES = (80, 90)
TYPES = ("bf16", "fp32")

Signature = dict[str, str]
Constants = dict[str, int | bool]


def kernels(kind: str) -> Iterator[tuple[Any, Signature, Constants]]:
    """Each kernel with its arguments' types and constants, as launched for Llama-3-8B in the type `kind`."""
    held, wide = f"*{kind}", kind == "fp32"
    tokens = dict.fromkeys(("positions", "slots"), "*i64")
    yield (
        norm._rms_norm,
        {**dict.fromkeys(("hidden", "delta", "weight", "out"), held), "columns": "i32", "epsilon": "fp32"},
        {"adds": True, "width": 4096},
    )
    yield activation._swiglu, {"gate_up": held, "out": held, "columns": "i32"}, {"width": 1024}
    yield (
        rope_write._rope_write,
        {
            **dict.fromkeys(("projected", "query_norm", "key_norm", "queries", "pool"), held),
            **tokens,
            "frequencies": "*fp32",
            **dict.fromkeys(("heads", "kv_heads", "layer_row"), "i32"),
            "epsilon": "fp32",
        },
        {"head_dim": 128, "block_size": 16, "norms": True, "half_width": 64},
    )
    sums = {"maxima": "*fp32", "places": "*i32", "sums": "*fp64", "vocabulary": "i32", "chunks": "i32"}
    yield draw._chunk_sums, {"logits": held, "temperatures": "*fp32", **sums}, {"chunk": 1024}
    yield (
        draw._pick,
        {"logits": held, "temperatures": "*fp32", "uniforms": "*fp64", "tokens": "*i64", **sums},
        {"chunk": 1024, "chunks_width": 128},
    )
    paged = {
        **dict.fromkeys(("queries", "pool"), held),
        "tables": "*i32",
        **dict.fromkeys(("heads", "kv_heads", "table_width", "layer_row", "block_rows", "window"), "i32"),
        "scale": "fp32",
    }
    shape = {"head_dim": 128, "block_size": 16, "dim_width": 128, "wide": wide}
    split = dict.fromkeys(("sums", "maxima", "weights"), "*fp32")
    yield (
        paged_decode._attend_split,
        {**paged, **split, "lengths": "*i32"},
        {**shape, "group": 4, "group_width": 16, "splits": 8, "tile": 32},
    )
    yield (
        paged_decode._join_splits,
        {**split, "out": held, "heads": "i32"},
        {"head_dim": 128, "dim_width": 128, "splits": 8},
    )
    yield (
        paged_prefill._attend_tile,
        {**paged, "tiles": "*i32", "out": held},
        {**shape, "rows": paged_prefill.ROWS, "keys": 32},
    )


def main() -> None:
    """One line for each kernel, type and compute capability."""
    for kind in TYPES:
        for kernel, types, constants in kernels(kind):
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constexprs=constants)
            for capability in CAPABILITIES:
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                print(f"{kernel.__name__} {kind} {capability} {bool(compiled.asm['cubin'])}", flush=True)


if __name__ == "__main__":
    main()
