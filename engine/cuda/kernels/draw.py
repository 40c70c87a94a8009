"""Edge: the next token of every row of logits: the best one, or a draw by temperature with a given uniform.

Two passes: every chunk of the vocabulary gives its maximum and its sum of weights, then one program a row
finds the chunk and the token. The draw is the inverse CDF in token-id order, as
engine.sampling.token_weights does it on the CPU, so that a token depends on (seed, sample, output index)
alone wherever it is drawn; at a chunk's border the two may round differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024


@triton.jit
def _chunk_sums(logits, temperatures, maxima, places, sums, vocabulary, chunks, chunk: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * chunk + tl.arange(0, chunk)
    inside = at < vocabulary
    values = tl.load(logits + row * vocabulary + at, mask=inside, other=float("-inf")).to(tl.float32)
    # A maximum passes over what is no number; it must not go unseen.
    broken = tl.max((values != values).to(tl.int32), axis=0)
    best = tl.where(broken > 0, float("inf"), tl.max(values, axis=0))
    temperature = tl.load(temperatures + row)
    shifted = tl.where(
        values == float("-inf"), float("-inf"), (values - best) / tl.maximum(temperature, 1e-6)
    )
    tl.store(maxima + row * chunks + part, best)
    tl.store(places + row * chunks + part, tl.min(tl.where(values == best, at, vocabulary), axis=0))
    tl.store(sums + row * chunks + part, tl.sum(tl.exp(shifted), axis=0).to(tl.float64))


@triton.jit
def _pick(
    logits, temperatures, uniforms, maxima, places, sums, tokens, vocabulary, chunks,
    chunk: tl.constexpr, chunks_width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, chunks_width)
    has = parts < chunks
    best_of = tl.load(maxima + row * chunks + parts, mask=has, other=float("-inf"))
    best = tl.max(best_of, axis=0)
    temperature = tl.load(temperatures + row)
    finite = (best != float("inf")) & (best != float("-inf"))
    if finite and temperature == 0.0:
        place = tl.load(places + row * chunks + parts, mask=has, other=vocabulary)
        tl.store(tokens + row, tl.min(tl.where(best_of == best, place, vocabulary), axis=0).to(tl.int64))
    elif finite:
        cooled = tl.maximum(temperature, 1e-6)
        weight = tl.load(sums + row * chunks + parts, mask=has, other=0.0)
        weight = tl.where(
            best_of == float("-inf"), 0.0, weight * tl.exp((best_of - best) / cooled).to(tl.float64)
        )
        ends = tl.cumsum(weight, axis=0)
        target = tl.load(uniforms + row) * tl.sum(weight, axis=0)
        # Rounding may leave no end above the target: then it is the last chunk that weighs anything.
        last = tl.max(tl.where(weight > 0.0, parts, 0), axis=0)
        part = tl.minimum(tl.min(tl.where((ends > target) & (weight > 0.0), parts, last), axis=0), last)
        before = tl.sum(tl.where(parts < part, weight, 0.0), axis=0)
        inner = tl.arange(0, chunk)
        at = part * chunk + inner
        values = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=float("-inf")).to(
            tl.float32
        )
        mass = tl.where(values == float("-inf"), 0.0, tl.exp((values - best) / cooled)).to(tl.float64)
        inner_ends = before + tl.cumsum(mass, axis=0)
        last_inner = tl.max(tl.where(mass > 0.0, inner, 0), axis=0)
        chosen = tl.min(tl.where((inner_ends > target) & (mass > 0.0), inner, last_inner), axis=0)
        tl.store(tokens + row, (part * chunk + chosen).to(tl.int64))
    else:
        tl.store(tokens + row, tl.full((), -1, tl.int64))


def draw_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor, tokens: Tensor) -> None:
    """Fills int64 tokens [rows]; -1 where the best logit is not finite.

    logits [rows, vocabulary], contiguous; temperatures float32 [rows], 0 for the best token (the lowest id
    among equals); uniforms float64 [rows] in [0, 1).
    """
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    places = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    sums = torch.empty((rows, chunks), dtype=torch.float64, device=logits.device)
    _chunk_sums[(rows, chunks)](logits, temperatures, maxima, places, sums, vocabulary, chunks, chunk=CHUNK)
    _pick[(rows,)](
        logits, temperatures, uniforms, maxima, places, sums, tokens, vocabulary, chunks,
        chunk=CHUNK, chunks_width=triton.next_power_of_2(chunks),
    )  # fmt: skip
