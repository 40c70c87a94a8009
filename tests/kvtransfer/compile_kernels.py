"""Edge: compiles the kernels for two generations of GPUs, which needs no GPU; prints what was compiled."""

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kvtransfer.cuda import block_kernels

COPY = {"source": "i64", "source_stride": "i32", "source_indices": "*i64", "target": "i64"} | {
    "target_stride": "i32",
    "target_indices": "*i64",
    "words": "i32",
    "WORD": "constexpr",
    "COUNT": "constexpr",
}
SUM = {"source": "i64", "stride": "i32", "indices": "*i64", "words": "i32"} | {
    "partial_sums": "*i64",
    "COUNT": "constexpr",
}


def main() -> None:
    """One line a kernel and generation."""
    kernels = (
        (block_kernels.copy_pieces, COPY, {"WORD": tl.int64, "COUNT": block_kernels.COPY_WORDS}),
        (block_kernels.sum_pieces, SUM, {"COUNT": block_kernels.SUM_WORDS}),
    )
    for capability in (80, 90):
        for kernel, signature, constants in kernels:
            made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
            print(kernel.__name__, capability, len(made.asm["cubin"]) > 0)


if __name__ == "__main__":
    main()
