"""Edge: what KV policies cost in accuracy (needles found, perplexity), and what they give in bytes and time.

Prompts are read in full, as prefill does; every token after them, those of the question too, is fed in a step
of its own, so that the policy under test attends for it. Sequences share the blocks of their prompt.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kv_policy_reader import (
    BLOCK_SIZE,
    CPU,
    DEFAULT,
    NEEDLES,
    POLICIES,
    Needle,
    Policy,
    Reader,
    continued,
    found_needles,
    haystack,
    held_bytes,
    read_bytes,
)
from benchmarks.machine_limits import machine_name
from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.layout_choice import choose_linears
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from engine.weights import linear_shapes, read_weights
from tandem.errors import InvalidRequest, TandemError
from tandem.ids import BlockId
from tandem.logs import configure_logging

SPEED_STEPS = 12


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """One policy at one length of prompt.

    `perplexity` is of the `scored` tokens after the prompt, `same_greedy` the part of them whose likeliest
    successor is that of full float32. Bytes are counted from the layout: held for each token with its bounds,
    and read of KV and bounds for each new token.
    """

    policy: str
    prompt_tokens: int
    needles: int
    found: int
    perplexity: float
    same_greedy: float
    scored: int
    held_bytes: float
    read_bytes: int


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Median step of one sequence at a context; `of_default` is against the default back-end in this run."""

    policy: str
    context_tokens: int
    step_ms: float
    of_default: float
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked at one length: a haystack with needles, and a plain text to go on with."""

    needles: tuple[Needle, ...]
    prompt: tuple[int, ...]
    plain: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks that hold either prompt and what is fed after it."""
        return max(len(self.prompt), len(self.plain)) // BLOCK_SIZE + max(
            3 * len(self.needles), len(self.rest)
        )


class Model:
    """The default model or another, float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.config: ModelConfig = read_model_config(folder)
        self.tokenizer = Tokenizer.load(folder)
        weights = read_weights(folder, self.config, torch.float32, CPU, None)
        product = choose_linears(linear_shapes(self.config), torch.float32)
        self._decoder = Decoder(self.config, weights, product)

    @contextmanager
    def reader(self, blocks: int, stored: torch.dtype) -> Iterator[Reader]:
        """A reader with a pool of its own."""
        with KvCache(self.config, blocks, BLOCK_SIZE, stored, CPU) as cache:
            yield Reader(self._decoder, self.config, cache)


def task_of(tokenizer: Tokenizer, text: str, tokens: int, scored: int) -> Task:
    """Raises InvalidRequest when the text is too short."""
    encoded = tokenizer.encode(text)
    read = tokens // BLOCK_SIZE * BLOCK_SIZE
    if len(encoded) < read + scored + 1:
        raise InvalidRequest(f"The text has fewer than {read + scored + 1} tokens.", "text")
    prompt = tuple(haystack(tokenizer, text, tokens, NEEDLES))
    return Task(NEEDLES, prompt, tuple(encoded[:read]), tuple(encoded[read : read + scored + 1]))


def accuracy(model: Model, task: Task, policies: Sequence[Policy]) -> Iterator[PolicyFigures]:
    """The policies over the same task, full float32 before all others."""
    expected: list[int] = []
    for stored in (torch.float32, torch.int8):
        chosen = [policy for policy in (POLICIES[0], *policies) if policy.stored == stored]
        if not chosen:
            continue
        with model.reader(task.blocks, stored) as reader:
            reader.read(task.plain)
            scores = {policy: continued(reader, policy, len(task.plain), task.rest) for policy in chosen}
            reader.read(task.prompt)
            for policy, (perplexity, likeliest) in scores.items():
                expected = expected or likeliest
                found = found_needles(reader, model.tokenizer, policy, len(task.prompt), task.needles)
                yield _figures(reader, policy, task, found, perplexity, likeliest, expected)


def _figures(
    reader: Reader,
    policy: Policy,
    task: Task,
    found: int,
    perplexity: float,
    likeliest: Sequence[int],
    expected: Sequence[int],
) -> PolicyFigures:
    return PolicyFigures(
        policy=policy.name,
        prompt_tokens=len(task.prompt),
        needles=len(task.needles),
        found=found,
        perplexity=perplexity,
        same_greedy=sum(map(int.__eq__, likeliest, expected)) / len(expected),
        scored=len(task.rest) - 1,
        held_bytes=held_bytes(reader, policy),
        read_bytes=read_bytes(reader.config, policy, len(task.prompt)),
    )


def speed(model: Model, contexts: Sequence[int]) -> Iterator[StepFigures]:
    """Steps of one sequence over KV of random numbers; the default back-end first at each context."""
    for context in contexts:
        table = [[BlockId(block) for block in range(-(-context // BLOCK_SIZE))]]
        default_ms = 0.0
        for policy in (DEFAULT, *POLICIES):
            with model.reader(len(table[0]), policy.stored) as reader:
                _fill(reader)
                step_ms = _step_ms(reader, policy, context, table)
            default_ms = default_ms or step_ms
            read = read_bytes(model.config, policy, context)
            yield StepFigures(policy.name, context, step_ms, step_ms / default_ms, read)


def _fill(reader: Reader) -> None:
    """Random K and V, in an eight-bit pool with scales of one."""
    pool = reader.cache.pool
    if pool.dtype == torch.int8:
        pool.random_(-127, 128)
        pool.view(-1, pool.shape[-1])[:, -4:].copy_(torch.ones(1).view(torch.int8))
    else:
        pool.normal_()


def _step_ms(reader: Reader, policy: Policy, context: int, table: Sequence[Sequence[BlockId]]) -> float:
    attention = reader.attention(policy, len(table[0]))
    times: list[float] = []
    for _ in range(SPEED_STEPS + 2):
        began_s = time.perf_counter()
        reader.step(attention, [1], context - 1, table)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:]) * 1e3


def main() -> int:
    """Prints a line of JSON for the machine and for each policy, as soon as it is measured."""
    parser = argparse.ArgumentParser(description="Accuracy, bytes and step time of KV policies on the CPU.")
    parser.add_argument("part", choices=("accuracy", "speed"))
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of the context")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="files that are read and scored, one after another"
    )
    parser.add_argument("--scored", type=int, default=128, help="tokens whose perplexity is taken")
    parser.add_argument("--policies", nargs="+", default=[policy.name for policy in POLICIES])
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    configure_logging(logging.WARNING)
    try:
        torch.set_num_threads(chosen.threads)
        print(json.dumps({"machine": machine_name(), "threads": chosen.threads}), flush=True)
        with torch.inference_mode():
            for figures in _measure(chosen):
                print(json.dumps(asdict(figures)), flush=True)
    except (TandemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(chosen: argparse.Namespace) -> Iterator[PolicyFigures | StepFigures]:
    model = Model(resolve_model(chosen.model))
    if chosen.part == "speed":
        yield from speed(model, chosen.tokens)
        return
    policies = [policy for policy in POLICIES[1:] if policy.name in chosen.policies]
    text = "\n\n".join(path.read_text() for path in chosen.text or ())
    for tokens in chosen.tokens:
        yield from accuracy(model, task_of(model.tokenizer, text, tokens, chosen.scored), policies)


if __name__ == "__main__":
    sys.exit(main())
