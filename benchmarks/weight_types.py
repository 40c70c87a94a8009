"""Edge: `python -m benchmarks.weight_types --text FILE`: what narrower weights gain, and what they change.

Every way to keep weights runs in turn in one process; a text's windows are scored by each.
"""

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.engine_drive import EngineDrive
from benchmarks.kv_codecs import Reader, windows_of
from benchmarks.machine_limits import machine_name
from engine.cpu.int8_linear import int8_linear
from engine.cpu.linear import MakeProduct, packed_linear
from engine.loading import DTYPES, load_engine
from engine.models.model_source import resolve_model
from engine.models.tokenizer import Tokenizer
from tandem.errors import TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.logs import configure_logging
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

PROMPT_TOKENS, PREFILL_TOKENS = 32, 512
POOL_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to keep weights, as cluster.yaml says it."""

    dtype: str
    weights_dtype: str

    @property
    def name(self) -> str:
        """As in the output."""
        return self.dtype if self.weights_dtype == "auto" else self.weights_dtype


KINDS: Final = (Kind("float32", "auto"), Kind("float32", "int8"), Kind("bfloat16", "auto"))
"""The first is what the others are compared with."""


def rates(
    config: WorkerConfig, batches: Sequence[int], output_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median tokens a second by kind: `decode_N` of output tokens, `prefill` of prompt tokens."""
    found: dict[str, dict[str, list[float]]] = {kind.name: {} for kind in KINDS}
    with ExitStack() as stack:
        drives = {}
        for kind in KINDS:
            weights_dtype = None if kind.weights_dtype == "auto" else kind.weights_dtype
            own = replace(config, dtype=kind.dtype, weights_dtype=weights_dtype)
            drives[kind.name] = EngineDrive(stack.enter_context(load_engine(own)), own)
        for _ in range(rounds):
            for name, drive in drives.items():
                for figure, rate in _round(drive, batches, output_tokens):
                    found[name].setdefault(figure, []).append(rate)
    return {
        name: {key: statistics.median(taken) for key, taken in own.items()} for name, own in found.items()
    }


def _round(drive: EngineDrive, batches: Sequence[int], output_tokens: int) -> list[tuple[str, float]]:
    taken = []
    for batch in batches:
        read = drive.read([drive.prompt(PROMPT_TOKENS) for _ in range(batch)], output_tokens)
        taken.append((f"decode_{batch}", batch / statistics.median(drive.write(read).wall_s)))
    read = drive.read([drive.prompt(PREFILL_TOKENS)])
    drive.forget(read)
    taken.append(("prefill", PREFILL_TOKENS / sum(read.times.wall_s)))
    return taken


def accuracy(folder: Path, windows: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """By kind: perplexity of the windows, and the share of tokens after which the likeliest is float32's."""
    found: dict[str, dict[str, float]] = {}
    expected: Tensor | None = None
    for kind in KINDS:
        product: MakeProduct = int8_linear if kind.weights_dtype == "int8" else packed_linear
        with torch.inference_mode():
            reader = Reader(folder, DTYPES[kind.dtype], product)
            with reader.cache:
                scored = [_scored(reader, window) for window in windows]
        likeliest = torch.cat([one[1] for one in scored])
        expected = likeliest if expected is None else expected
        found[kind.name] = {
            "perplexity": float(torch.cat([one[0] for one in scored]).mean().neg().exp().item()),
            "same_greedy": float((likeliest == expected).float().mean().item()),
        }
    return found


def _scored(reader: Reader, window: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithmic probability of each token but the first, and the likeliest after each."""
    logits = reader.feed(window, 0)
    return logits.log_softmax(1)[:-1].gather(1, window[1:, None])[:, 0], logits.argmax(1)


def result_json(
    chosen: argparse.Namespace,
    speed: Mapping[str, Mapping[str, float]],
    score: Mapping[str, Mapping[str, float]],
    scored_tokens: int,
) -> dict[str, Any]:
    """The output; its keys are in docs/json-output.md."""
    first = KINDS[0].name
    return {
        "benchmark": "weight_types",
        "machine": machine_name(),
        "model": chosen.model,
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "scored_tokens": scored_tokens,
        "kinds": [
            {
                "name": kind.name,
                "rates": [
                    {"figure": figure, "tokens_per_s": rate, "ratio": rate / speed[first][figure]}
                    for figure, rate in speed[kind.name].items()
                ],
                "perplexity": score[kind.name]["perplexity"],
                "perplexity_ratio": score[kind.name]["perplexity"] / score[first]["perplexity"],
                "same_greedy": score[kind.name]["same_greedy"],
            }
            for kind in KINDS
        ],
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Raises TandemError, OSError."""
    folder = resolve_model(chosen.model)
    config = WorkerConfig(
        *(WorkerId("bench"), Incarnation(1), Role.MIXED, folder, chosen.model),
        pool_blocks=POOL_BLOCKS,
        threads=chosen.threads,
    )
    windows = windows_of(chosen.text, Tokenizer.load(folder).encode(chosen.text.read_text()), chosen.windows)
    speed = rates(config, chosen.batches, chosen.output_tokens, chosen.rounds)
    torch.set_num_threads(chosen.threads)
    return result_json(chosen, speed, accuracy(folder, windows), sum(len(window) for window in windows))


def main() -> int:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description="Speed and accuracy of each way to keep weights.")
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="what is scored")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, at most (4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="the median is reported (3)")
    parser.add_argument("--output-tokens", type=int, default=24, help="of each sequence (24)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="(1 8 32)")
    chosen = parser.parse_args()
    configure_logging(logging.WARNING)
    try:
        print(json.dumps(measure(chosen), indent=2))
    except (TandemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
