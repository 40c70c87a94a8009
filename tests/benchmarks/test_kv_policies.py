"""What the benchmark of KV policies hides, asks, counts and scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kv_policies import NeedleFigures, StepFigures, TextFigures, main, needles, perplexity
from benchmarks.kv_policy_reader import CPU, DEFAULT, POLICIES, Model, Policy, Reader, held_bytes, read_bytes
from benchmarks.kv_policy_scores import expectation
from benchmarks.kv_policy_tasks import BLOCK_SIZE, FACTS, PLACES, digest, fixed_text, haystacks, pieces
from engine.cpu.linear import stored_linear
from engine.decoder import Decoder
from engine.kv.kv_cache import KvCache
from engine.kv_policies.bounded_kv import KvBudget
from engine.kv_policies.page_attention import Reading
from engine.models.model_config import read_model_config
from engine.models.model_source import resolve_model
from engine.models.tokenizer import Tokenizer
from engine.models.weights import read_weights
from tandem.errors import InvalidRequest
from tests.engine.kv_policies.page_engine import team_of
from tests.engine.tiny_models import family_configs, random_model, reference_logits
from tests.tandem.test_json_output import documented

QUEST = Policy("quest 2", reading=Reading(2))
MORPH = Policy("morph 64", reading=Reading(budget=KvBudget(64, 16)))


@contextmanager
def _reader(folder: Path, blocks: int) -> Iterator[Reader]:
    config = read_model_config(folder)
    decoder = Decoder(config, read_weights(folder, config, torch.float32, CPU), stored_linear)
    with torch.inference_mode(), KvCache(config, blocks, BLOCK_SIZE, torch.float32, CPU) as cache:
        yield Reader(decoder, config, cache, team_of(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama on disk, and transformers' own object."""
    model = random_model(family_configs()["llama"])
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def test_perplexity_is_that_of_the_model(llama: tuple[Path, Any]) -> None:
    """Of two parts fed side by side after prompts of whole blocks, against transformers in one pass each."""
    folder, model = llama
    lead, losses, likeliest = 3, [], []
    parts = []
    for start in (0, 500):
        sequence = [(11 * place * place + 5 + start) % 101 for place in range(2 * BLOCK_SIZE + 9)]
        parts.append((sequence[: 2 * BLOCK_SIZE], sequence[2 * BLOCK_SIZE :]))
        logits = reference_logits(model, sequence)[2 * BLOCK_SIZE + lead : -1]
        follow = torch.tensor(sequence[2 * BLOCK_SIZE + lead + 1 :])[:, None]
        losses.append(-logits.log_softmax(1).gather(1, follow).flatten())
        likeliest.append(logits.argmax(1))
    with _reader(folder, 9) as reader:
        read = [(reader.read(prompt), rest) for prompt, rest in parts]
        for policy in (POLICIES[0], DEFAULT, MORPH):
            found = expectation(reader, policy, read, lead)
            assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
            assert list(found.likeliest) == torch.stack(likeliest, dim=1).flatten().tolist()
        assert reader.pool.allocated_blocks == 4, "only the prompts stay"


def test_a_sequence_under_morph_holds_its_budget_and_leaves_the_prompt_to_others(
    llama: tuple[Path, Any],
) -> None:
    folder, _ = llama
    prompt = [(7 * place * place + 3) % 101 for place in range(8 * BLOCK_SIZE)]
    with _reader(folder, 24) as reader:
        read = reader.read(prompt)
        before = reader.cache.pool[list(read.table)].clone()
        with reader.sequences(MORPH, [read, read]) as going:
            for place in range(50):
                going.feed([place % 101, (place + 1) % 101])
            assert reader.pool.allocated_blocks == 8 + 2 * 4
        assert torch.equal(reader.cache.pool[list(read.table)], before)


def test_bytes_are_counted_from_the_layout(llama: tuple[Path, Any]) -> None:
    config = read_model_config(llama[0])
    row, page = 8 * 4, 2 * BLOCK_SIZE * 2 * 8 * 4
    assert (config.layers, config.kv_heads, config.head_dim) == (3, 2, 8)
    assert (
        read_bytes(config, POLICIES[0], 5 * BLOCK_SIZE) == held_bytes(config, POLICIES[0], 80) == 3 * 5 * page
    )
    assert read_bytes(config, QUEST, 2 * BLOCK_SIZE) == 3 * 2 * page
    bounds = 4 * 2 * 2 * row
    assert read_bytes(config, QUEST, 5 * BLOCK_SIZE) == 2 * 5 * page + 2 * page + bounds
    assert read_bytes(config, Policy("", torch.int8), BLOCK_SIZE) == 3 * 2 * BLOCK_SIZE * 2 * (8 + 4)
    assert read_bytes(config, MORPH, 500) == 3 * 4 * page
    assert held_bytes(config, MORPH, 500) == 3 * 4 * page + 3 * 2 * 64 * 4


def test_each_haystack_holds_every_fact_once_in_its_order() -> None:
    tokenizer = Tokenizer.load(resolve_model("smollm2"))
    made = haystacks(tokenizer, fixed_text(), 1024, len(PLACES) // len(FACTS))
    numbers = [needle.number for haystack in made for needle in haystack.needles]
    assert len(set(numbers)) == len(numbers) == 32
    for haystack in made:
        assert len(haystack.prompt) % BLOCK_SIZE == 0
        assert abs(len(haystack.prompt) - 1024) < 200
        text = tokenizer.decode(haystack.prompt)
        places = [text.index(needle.fact) for needle in haystack.needles]
        assert places == sorted(places)
        assert all(text.count(needle.number) == 1 for needle in haystack.needles)
        assert places[0] < len(text) / 4
        assert places[-1] > 3 * len(text) / 4
    assert {needle.fact for needle in made[0].needles}.isdisjoint(needle.fact for needle in made[1].needles)


def test_parts_of_the_text_do_not_overlap() -> None:
    tokenizer = Tokenizer.load(resolve_model("smollm2"))
    first, second = pieces(tokenizer, fixed_text(), 64, 2, 10)
    assert (len(first.prompt), len(first.rest)) == (64, 10)
    encoded = tokenizer.encode(fixed_text())
    assert [*first.prompt, *first.rest, *second.prompt, *second.rest] == encoded[:148]


def test_a_text_that_is_too_short_is_refused() -> None:
    tokenizer = Tokenizer.load(resolve_model("smollm2"))
    with pytest.raises(InvalidRequest, match="too short"):
        haystacks(tokenizer, "short", 64, 1)
    with pytest.raises(InvalidRequest, match="fewer than 170"):
        pieces(tokenizer, "short", 64, 2, 21)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--threads", "0"], "--threads must be positive"),
        (["--tokens", "64", "-16"], "--tokens must be positive"),
        (["--text", "{binary}"], "utf-8"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    given = [option.format(binary=binary) for option in options]
    monkeypatch.setattr("benchmarks.kv_policies.configure_logging", lambda level: None)
    monkeypatch.setattr("sys.argv", ["kv_policies", "speed", *given])
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert says in said.err


@pytest.mark.parametrize(
    ("part", "figures"), [("needles", NeedleFigures), ("perplexity", TextFigures), ("speed", StepFigures)]
)
def test_every_figure_is_documented(
    part: str, figures: type[NeedleFigures | TextFigures | StepFigures]
) -> None:
    keys = [field.name for field in fields(figures)]
    assert documented(f"python -m benchmarks.kv_policies {part}") == keys


def test_a_policy_that_is_none_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kv_policies", "speed", "--policies", "quest 33, float32"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2


def test_the_text_is_the_same_in_every_run() -> None:
    assert digest(fixed_text()) == digest(fixed_text()) != digest("another")


def test_the_default_model_finds_needles_with_all_of_its_kv() -> None:
    """And with a budget that holds all; figures of both parts have their counts."""
    model = Model(resolve_model("smollm2"), threads=1)
    roomy = Policy("morph", reading=Reading(budget=KvBudget(1024, 16)))
    with torch.inference_mode():
        full, at_once, later = needles(model, fixed_text(), 384, 8, [POLICIES[0], roomy])
        assert full.needles == 8
        assert full.found >= 6
        assert full.by_depth == at_once.by_depth
        assert (at_once.asked, later.asked) == ("at once", "later")
        for figures in perplexity(model, fixed_text(), 128, (2, 8), [POLICIES[0], roomy]):
            assert figures.scored == 16
            assert figures.of_full == pytest.approx(1.0)
            assert figures.same_greedy == 1.0
