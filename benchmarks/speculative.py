"""Edge: what guessing tokens by n-grams gains on a task that repeats itself."""

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.decode_alone import Decoded, decode_alone
from decode_worker.speculation import Speculation, speculation_of
from engine.kv.blocks import BlockPool
from engine.loading import LoadedEngine
from engine.models.tokenizer import Tokenizer
from tandem.sampling import SamplingParams
from tandem.worker_config import SpeculativeConfig, WorkerConfig

LIMIT = 1.5
"""Speed-up that issue 4 asks for."""

_LINE = "10:00:{0:02d} INFO worker decode-0: step {0} done, batch 8, tokens 8, free blocks 812\n"
_NGRAM = SpeculativeConfig("ngram", tokens=8)


@dataclass(frozen=True, slots=True)
class SpeculativeFigures:
    """One batch-1 greedy output, with and without guesses; medians over `runs` alternating runs.

    `identical` says whether all runs gave the same tokens; `accepted` of `guesses` held in the last run.
    """

    prompt_tokens: int
    output_tokens: int
    runs: int
    plain_tokens_per_s: float
    tokens_per_s: float
    speedup: float
    limit: float
    identical: bool
    steps: int
    guesses: int
    accepted: int

    def as_json(self) -> dict[str, Any]:
        """For the JSON of `tandem bench engine`."""
        return asdict(self)


def repetitive_prompt(tokenizer: Tokenizer) -> list[int]:
    """The beginning of a log whose lines differ in two numbers."""
    return tokenizer.encode("".join(_LINE.format(number) for number in range(8)))


def measure_speculative(
    engine: LoadedEngine, config: WorkerConfig, tokenizer: Tokenizer, output_tokens: int = 128, runs: int = 3
) -> SpeculativeFigures:
    """Continues a log; `engine` was loaded with `config`, without a drafter of its own."""
    prompt = repetitive_prompt(tokenizer)
    plain: list[Decoded] = []
    guessed: list[Decoded] = []
    # The first pair only warms up: each new shape is slow once.
    for _ in range(runs + 1):
        plain.append(_decode(engine, config, prompt, output_tokens, None))
        guessed.append(_decode(engine, config, prompt, output_tokens, speculation_of_ngrams(config)))
    plain_tokens_per_s = statistics.median(run.tokens_per_s for run in plain[1:])
    tokens_per_s = statistics.median(run.tokens_per_s for run in guessed[1:])
    return SpeculativeFigures(
        prompt_tokens=len(prompt),
        output_tokens=output_tokens,
        runs=runs,
        plain_tokens_per_s=plain_tokens_per_s,
        tokens_per_s=tokens_per_s,
        speedup=tokens_per_s / plain_tokens_per_s,
        limit=LIMIT,
        identical=len({run.outputs for run in (*plain, *guessed)}) == 1,
        steps=guessed[-1].steps,
        guesses=guessed[-1].guesses,
        accepted=guessed[-1].accepted,
    )


def speculation_of_ngrams(config: WorkerConfig) -> Speculation | None:
    """As a decode worker of these settings has it with `speculative.method: ngram`."""
    return speculation_of(replace(config, speculative=_NGRAM))


def _decode(
    engine: LoadedEngine,
    config: WorkerConfig,
    prompt: list[int],
    output_tokens: int,
    speculation: Speculation | None,
) -> Decoded:
    return decode_alone(
        engine.runner,
        BlockPool(config.pool_blocks, config.block_size, prefix_cache=False),
        [prompt],
        SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True),
        context_tokens=engine.context_tokens,
        speculation=speculation,
    )
