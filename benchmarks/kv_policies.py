"""Edge: what KV policies cost in accuracy (needles found, perplexity), and what they give in bytes and time.

Prompts are read in full, as prefill does, once for all policies that store KV alike; every token after them,
those of the question too, is fed in a step of its own, so that the policy under test attends for it.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.bench_arguments import check_positive
from benchmarks.kv_policy_reader import (
    DEFAULT,
    POLICIES,
    WINDOW,
    Model,
    Policy,
    Prompt,
    Reader,
    held_bytes,
    read_bytes,
)
from benchmarks.kv_policy_scores import ANSWER_TOKENS, expectation, found_by_depth
from benchmarks.kv_policy_tasks import (
    BLOCK_SIZE,
    FACTS,
    PLACES,
    Haystack,
    digest,
    fixed_text,
    haystacks,
    pieces,
)
from benchmarks.machine_limits import machine_name
from engine.models.model_source import resolve_model
from planner.statistics import wilson_interval
from tandem.errors import TandemError
from tandem.ids import BlockId
from tandem.logs import configure_logging

SPEED_STEPS = 32
DEPTHS = len(FACTS)
LEAD = WINDOW
"""Tokens after a prompt that are not scored: morph keeps all of it for a window."""


@dataclass(frozen=True, slots=True)
class NeedleFigures:
    """One policy at one length of prompt.

    `asked` is at once: morph first drops when it has seen the question, before it sees any of the answer; or
    `later`: it has dropped once before the question. `by_depth` counts what was found of each place in the
    prompt; `low` to `high` is the 95 % Wilson interval of `found` / `needles`.
    """

    policy: str
    prompt_tokens: int
    asked: str
    needles: int
    found: int
    low: float
    high: float
    by_depth: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextFigures:
    """One policy at one length of context; ratios and `same_greedy` against full float32 in the same run.

    `perplexity` is of `scored` tokens, `same_greedy` the part of them before which the likeliest token is the
    same. Bytes are counted from the layout: what a sequence of so many tokens holds, and what one more reads.
    """

    policy: str
    context_tokens: int
    scored: int
    loss: float
    perplexity: float
    of_full: float
    same_greedy: float
    held_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Median step of one sequence at a context; `of_default` is against the default back-end in this run.

    `longest_ms` is the slowest of the steps, with morph one that drops.
    """

    policy: str
    context_tokens: int
    step_ms: float
    longest_ms: float
    of_default: float
    read_bytes: int


def needles(
    model: Model, text: str, tokens: int, count: int, policies: Sequence[Policy]
) -> Iterator[NeedleFigures]:
    """Numbers that each policy finds, of `count` in all."""
    hay = haystacks(model.tokenizer, text, tokens, count // DEPTHS)
    plain = model.tokenizer.encode(text)[-2 * WINDOW :]
    going_on = -(-(2 * WINDOW + ANSWER_TOKENS) // BLOCK_SIZE)
    blocks = sum(len(one.prompt) for one in hay) // BLOCK_SIZE + count * (going_on + _kept_blocks(policies))
    for reader, chosen in _readers(model, blocks, policies):
        asked = [(reader.read(one.prompt), one) for one in hay]
        for policy in chosen:
            yield _found(model, reader, policy, asked, plain[1 - WINDOW :])
            if policy.reading.budget is not None:
                yield _found(model, reader, policy, asked, plain[1 - 2 * WINDOW :])


def _found(
    model: Model,
    reader: Reader,
    policy: Policy,
    asked: Sequence[tuple[Prompt, Haystack]],
    plain: Sequence[int],
) -> NeedleFigures:
    by_depth = found_by_depth(reader, model.tokenizer, policy, asked, plain, len(plain))
    found, total = sum(by_depth), sum(len(haystack.needles) for _, haystack in asked)
    low, high = wilson_interval(found, total)
    return NeedleFigures(
        policy=policy.name,
        prompt_tokens=max(prompt.tokens for prompt, _ in asked),
        asked="later" if len(plain) > WINDOW else "at once",
        needles=total,
        found=found,
        low=low,
        high=high,
        by_depth=tuple(by_depth),
    )


def perplexity(
    model: Model, text: str, tokens: int, shape: tuple[int, int], policies: Sequence[Policy]
) -> Iterator[TextFigures]:
    """Full float32 before all others; `shape` is how many parts of the text, and scored tokens of each."""
    count, scored = shape
    parts = pieces(model.tokenizer, text, tokens, count, LEAD + scored + 1)
    going_on = -(-(LEAD + scored + 1) // BLOCK_SIZE)
    blocks = count * (tokens // BLOCK_SIZE + going_on + _kept_blocks(policies))
    full = None
    for reader, chosen in _readers(model, blocks, policies):
        read = [(reader.read(part.prompt), part.rest) for part in parts]
        for policy in chosen:
            found = expectation(reader, policy, read, LEAD)
            full = full or found
            same = sum(map(int.__eq__, found.likeliest, full.likeliest)) / len(full.likeliest)
            yield TextFigures(
                policy=policy.name,
                context_tokens=tokens,
                scored=len(found.likeliest),
                loss=found.loss,
                perplexity=found.perplexity,
                of_full=found.perplexity / full.perplexity,
                same_greedy=same,
                held_bytes=held_bytes(model.config, policy, tokens),
                read_bytes=read_bytes(model.config, policy, tokens),
            )


def _readers(
    model: Model, blocks: int, policies: Sequence[Policy]
) -> Iterator[tuple[Reader, Sequence[Policy]]]:
    """A reader for each way to store KV, with its policies."""
    for stored in (torch.float32, torch.int8):
        chosen = [policy for policy in policies if policy.stored == stored]
        if chosen:
            with model.reader(blocks, stored) as reader:
                yield reader, chosen


def _kept_blocks(policies: Sequence[Policy]) -> int:
    """Blocks that a sequence takes for what it keeps of its prompt, at most."""
    budgets = [policy.reading.budget.tokens for policy in policies if policy.reading.budget is not None]
    return max(budgets, default=0) // BLOCK_SIZE + 2


def speed(model: Model, contexts: Sequence[int], policies: Sequence[Policy]) -> Iterator[StepFigures]:
    """Steps of one sequence over KV of random numbers; the default back-end first at each context."""
    for context in contexts:
        default_ms = 0.0
        for policy in (DEFAULT, *policies):
            blocks = context // BLOCK_SIZE + _kept_blocks([policy]) + SPEED_STEPS
            with model.reader(blocks, policy.stored) as reader:
                _fill(reader)
                times_ms = _step_times_ms(reader, policy, context)
            step_ms = statistics.median(times_ms)
            default_ms = default_ms or step_ms
            read = read_bytes(model.config, policy, context)
            yield StepFigures(policy.name, context, step_ms, max(times_ms), step_ms / default_ms, read)


def _fill(reader: Reader) -> None:
    """Random K and V, in an eight-bit pool with scales of one."""
    pool = reader.cache.pool
    if pool.dtype == torch.int8:
        pool.random_(-127, 128)
        pool.view(-1, pool.shape[-1])[:, -4:].copy_(torch.ones(1).view(torch.int8))
    else:
        pool.normal_()


def _step_times_ms(reader: Reader, policy: Policy, context: int) -> list[float]:
    """Of steps after enough others for morph's first drop."""
    budget = policy.reading.budget
    warm = 2 if budget is None else budget.window + 2
    table = tuple(BlockId(block) for block in reader.pool.allocate(context // BLOCK_SIZE))
    times_ms: list[float] = []
    with reader.sequences(policy, [Prompt(table, len(table) * BLOCK_SIZE)]) as going:
        for _ in range(warm + SPEED_STEPS):
            began_s = time.perf_counter()
            going.feed([1])
            times_ms.append((time.perf_counter() - began_s) * 1e3)
    return times_ms[warm:]


def main() -> int:
    """Prints a line of JSON for the machine and for each policy, as soon as it is measured."""
    parser = argparse.ArgumentParser(description="Accuracy, bytes and step time of KV policies on the CPU.")
    parser.add_argument("part", choices=("needles", "perplexity", "speed"))
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of the context")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="files to read and score instead of Python's language reference"
    )
    parser.add_argument("--needles", type=int, default=len(PLACES), help=f"to find, a multiple of {DEPTHS}")
    parser.add_argument("--parts", type=int, default=4, help="parts of the text whose perplexity is taken")
    parser.add_argument("--scored", type=int, default=176, help="tokens of each part that are scored")
    names = [policy.name for policy in POLICIES]
    parser.add_argument("--policies", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.needles % DEPTHS or not 0 < chosen.needles <= len(PLACES):
        parser.error(f"--needles: a multiple of {DEPTHS} up to {len(PLACES)}")
    configure_logging(logging.WARNING)
    try:
        counts = {f"--{name}": getattr(chosen, name) for name in ("threads", "parts", "scored")}
        check_positive({**counts, "--tokens": min(chosen.tokens)})
        torch.set_num_threads(chosen.threads)
        with torch.inference_mode():
            for figures in _measure(chosen):
                print(json.dumps(figures), flush=True)
    except (TandemError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(chosen: argparse.Namespace) -> Iterator[dict[str, object]]:
    text = "\n\n".join(path.read_text() for path in chosen.text) if chosen.text else fixed_text()
    yield {
        "machine": machine_name(),
        "threads": chosen.threads,
        "python": platform.python_version(),
        "text_sha256": digest(text),
    }
    model = Model(resolve_model(chosen.model), chosen.threads)
    always = POLICIES[:1] if chosen.part == "perplexity" else ()
    policies = [policy for policy in POLICIES if policy in always or policy.name in chosen.policies]
    for tokens in chosen.tokens:
        if chosen.part == "needles":
            found: Iterator[NeedleFigures | TextFigures] = needles(
                model, text, tokens, chosen.needles, policies
            )
        elif chosen.part == "perplexity":
            found = perplexity(model, text, tokens, (chosen.parts, chosen.scored), policies)
        else:
            found = iter(())
        yield from map(asdict, found)
    if chosen.part == "speed":
        yield from map(asdict, speed(model, chosen.tokens, policies))


if __name__ == "__main__":
    sys.exit(main())
