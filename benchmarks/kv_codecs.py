"""Edge: what a wire codec costs: bytes, seconds, error, and what a model makes of KV that went through it.

The first half of each window of a text is read, its KV goes through the codec as in a hand-off, and the
second half is scored on top of it. Thresholds are calibrated on another text.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.attention import Span
from engine.cpu.attention import CpuAttention
from engine.cpu.linear import MakeProduct, packed_linear
from engine.decoder import Decoder
from engine.kv.kv_cache import KvCache
from engine.models.model_config import read_model_config
from engine.models.model_source import resolve_model
from engine.models.tokenizer import Tokenizer
from engine.models.weights import read_weights
from kvtransfer.codecs.contract import BlockShape, Codec, report_on
from kvtransfer.codecs.registry import CODECS, codec_named
from kvtransfer.codecs.thresholds import calibrate
from tandem.errors import InvalidRequest, TandemError
from tandem.ids import BlockId

BLOCK_SIZE = 16
HALF_BLOCKS = 16
WINDOW_TOKENS = 2 * HALF_BLOCKS * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """One codec; `bytes_ratio` and `perplexity_ratio` are against identity in the same run.

    Errors are parts of the largest magnitude of the number's block, layer and head. `same_greedy` is the part
    of the scored tokens after which the likeliest next one is identity's. Rates are of the pool's bytes.
    """

    codec: str
    block_bytes: int
    bytes_ratio: float
    max_error: float
    mean_error: float
    perplexity: float
    perplexity_ratio: float
    same_greedy: float
    scored_tokens: int
    encode_gbps: float
    decode_gbps: float


@dataclass(frozen=True, slots=True)
class _Run:
    """A codec's blocks before it, and for each scored token its logarithmic probability and the likeliest."""

    blocks: Tensor
    log_probabilities: Tensor
    likeliest: Tensor
    encode_s: float
    decode_s: float


class Reader:
    """A model with a KV pool of one window, on the CPU."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, product: MakeProduct = packed_linear
    ) -> None:
        """Weights and KV are of `dtype`; `product` says how weights are kept."""
        config = read_model_config(folder)
        device = torch.device("cpu")
        self.cache = KvCache(config, 2 * HALF_BLOCKS, BLOCK_SIZE, dtype, device)
        self.shape = BlockShape.of_pool(self.cache.pool)
        self._attention = CpuAttention(self.cache, config)
        self._decoder = Decoder(config, read_weights(folder, config, dtype, device, None), product)
        self._table = [BlockId(block) for block in range(2 * HALF_BLOCKS)]

    def feed(self, tokens: Tensor, start: int) -> Tensor:
        """Logits [tokens, vocabulary] of tokens at positions `start` and on."""
        positions = torch.arange(start, start + len(tokens))
        attention = self._attention.prepare([Span(0, len(tokens), start, self._table)])
        return self._decoder.forward(tokens, positions, attention, torch.arange(len(tokens)))

    def score(self, window: Tensor, codec: Codec) -> _Run:
        """Reads one half of [WINDOW_TOKENS], and scores the other on what the codec left of its KV."""
        half = HALF_BLOCKS * BLOCK_SIZE
        self.feed(window[:half], 0)
        blocks = self.cache.pool[:HALF_BLOCKS].clone()
        encoded = torch.empty((HALF_BLOCKS, codec.encoded_bytes), dtype=torch.uint8)
        began_s = time.perf_counter()
        codec.encode(blocks, encoded)
        encoded_s = time.perf_counter()
        codec.decode(encoded, self.cache.pool[:HALF_BLOCKS])
        decoded_s = time.perf_counter()
        logits = self.feed(window[half:], half)
        chosen = logits.log_softmax(1)[:-1].gather(1, window[half + 1 :, None])[:, 0]
        return _Run(blocks, chosen, logits.argmax(1), encoded_s - began_s, decoded_s - encoded_s)


def windows_of(path: Path, tokens: Sequence[int], most: int) -> list[Tensor]:
    """Whole windows from a text's start. Raises InvalidRequest when there is none."""
    count = min(most, len(tokens) // WINDOW_TOKENS)
    if not count:
        raise InvalidRequest(f"{path}: fewer than {WINDOW_TOKENS} tokens.", "text")
    return list(torch.tensor(tokens[: count * WINDOW_TOKENS]).view(count, WINDOW_TOKENS))


def calibrated(reader: Reader, windows: Sequence[Tensor], file: Path) -> None:
    """Writes the thresholds of a text's KV."""
    blocks = []
    for window in windows:
        reader.feed(window, 0)
        blocks.append(reader.cache.pool.clone())
    calibrate(torch.cat(blocks), reader.shape).save(file)


def figures(reader: Reader, windows: Sequence[Tensor], thresholds: Path) -> list[CodecFigures]:
    """Every codec over the same windows, identity first."""
    found: list[CodecFigures] = []
    for name in CODECS:
        codec = codec_named(name, reader.shape, thresholds)
        runs = [reader.score(window, codec) for window in windows]
        likeliest = torch.cat([run.likeliest for run in runs])
        if not found:
            expected = likeliest
        report = report_on(codec, torch.cat([run.blocks for run in runs]), reader.shape)
        perplexity = float(torch.cat([run.log_probabilities for run in runs]).mean().neg().exp().item())
        pool_gigabytes = len(runs) * HALF_BLOCKS * report.block_bytes / 1e9
        found.append(
            CodecFigures(
                codec=name,
                block_bytes=report.encoded_bytes,
                bytes_ratio=report.encoded_bytes / report.block_bytes,
                max_error=report.max_error,
                mean_error=report.mean_error,
                perplexity=perplexity,
                perplexity_ratio=perplexity / (found[0].perplexity if found else perplexity),
                same_greedy=float((likeliest == expected).float().mean().item()),
                scored_tokens=len(likeliest),
                encode_gbps=pool_gigabytes / sum(run.encode_s for run in runs),
                decode_gbps=pool_gigabytes / sum(run.decode_s for run in runs),
            )
        )
    return found


def main() -> int:
    """Calibrates on one text, measures on another, prints JSON."""
    parser = argparse.ArgumentParser(description="Accuracy and cost of the wire codecs of KV.")
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="what is scored; default: only calibrate")
    parser.add_argument("--thresholds", type=Path, required=True, help="file to write, for codec oaken")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW_TOKENS} tokens, at most")
    chosen = parser.parse_args()
    try:
        with torch.inference_mode():
            print(json.dumps(_measure(chosen), indent=2))
    except (TandemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(chosen: argparse.Namespace) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    folder = resolve_model(chosen.model)
    tokenizer, reader = Tokenizer.load(folder), Reader(folder)

    def windows(path: Path) -> list[Tensor]:
        return windows_of(path, tokenizer.encode(path.read_text()), chosen.windows)

    with reader.cache:
        calibrated(reader, windows(chosen.calibration_text), chosen.thresholds)
        if chosen.text is None:
            return []
        return [asdict(found) for found in figures(reader, windows(chosen.text), chosen.thresholds)]


if __name__ == "__main__":
    sys.exit(main())
