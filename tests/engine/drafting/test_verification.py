"""Verified guesses change no token: the engine writes with them what it writes without, greedy or drawn."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.decode_alone import Decoded, decode_alone
from decode_worker.speculation import Speculation
from engine.drafting.contract import Drafter
from engine.drafting.draft import ROOT, Draft, Proposal
from engine.drafting.ngram import NgramDrafter
from engine.kv.blocks import BlockPool
from engine.leg import LegToken
from engine.loading import LoadedEngine, load_engine
from engine.step import SampleRequest, SequenceSlice
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig
from tests.engine.drafting.always import Always
from tests.engine.tiny_models import (
    GREEDY,
    Engine,
    family_configs,
    open_engine,
    random_model,
    reference_logits,
    slice_of,
)

BLOCKS, SIZE, CONTEXT = 64, 4, 128
PROMPTS = ([5, 6, 7, 8, 5, 6], [9, 9, 9], [40, 41, 42, 43, 44, 45, 46], [3])
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "drawn": SamplingParams(seed=11, max_tokens=40, ignore_eos=True),
    "cut": SamplingParams(seed=12, top_p=0.8, top_k=20, temperature=0.7, max_tokens=40, logprobs=2),
    "penalised": SamplingParams(
        seed=3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, max_tokens=40
    ),
    "ends": SamplingParams(seed=4, temperature=3.0, min_tokens=12, stop_token_ids=tuple(range(2, 40))),
}


class Oracle:
    """A drafter that knows the output and guesses it, with wrong guesses in between; in trees if asked to."""

    asks_runner = False

    def __init__(self, outputs: Sequence[Sequence[int]], branching: bool) -> None:
        self._texts = [(*prompt, *output) for prompt, output in zip(PROMPTS, outputs, strict=True)]
        self._branching = branching

    def propose(self, key: int, tokens: Sequence[int], limit: int) -> Draft:
        """See Drafter."""
        text = next(text for text in self._texts if list(text[: len(tokens)]) == list(tokens))
        coming = [*text[len(tokens) : len(tokens) + limit], *([1] * limit)][:limit]
        if not self._branching:
            wrong_at = len(tokens) % 5
            return Draft(tuple((t + 1) % 101 if at == wrong_at else t for at, t in enumerate(coming)))
        half = limit // 2
        wrong = [(token + 1) % 101 for token in coming[:half]]
        right = coming[: limit - half]
        parents = [*range(ROOT, half - 1), ROOT, *range(half, limit - 1)]
        return Draft((*wrong, *right), tuple(parents[:limit]))

    def learn(self, proposals: Iterable[Proposal]) -> None:
        """See Drafter."""

    def forget(self, key: int) -> None:
        """See Drafter."""


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadedEngine]:
    folder = tmp_path_factory.mktemp("model")
    random_model(family_configs()[request.param]).save_pretrained(folder)
    config = WorkerConfig(
        WorkerId("w"), Incarnation(1), Role.DECODE, folder, "tiny", pool_blocks=BLOCKS * 2, block_size=SIZE
    )
    with load_engine(config) as loaded:
        yield loaded


def decode(engine: LoadedEngine, params: SamplingParams, drafter: Drafter | None = None) -> Decoded:
    """All prompts in one batch."""
    pool = BlockPool(BLOCKS * 2, SIZE)
    speculation = None if drafter is None else Speculation(drafter, Always(), max_tokens=6)
    decoded = decode_alone(
        engine.runner,
        pool,
        PROMPTS,
        params,
        context_tokens=CONTEXT,
        eos_ids=engine.eos_ids,
        speculation=speculation,
    )
    assert pool.allocated_blocks == 0
    return decoded


def described(decoded: Decoded) -> list[list[tuple[object, ...]]]:
    """All that is told of each sample's tokens, but for the last digits of log-probabilities."""
    return [
        [_described(token) for token in decoded.tokens if token.leg_id == str(leg)]
        for leg in range(len(PROMPTS))
    ]


def _described(token: LegToken) -> tuple[object, ...]:
    logprob = None if token.logprob is None else round(token.logprob.logprob, 3)
    return token.output_index, token.token_id, token.finish, token.stop_token_id, logprob


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("drafting", ["ngram", "chain", "tree"])
def test_output_is_the_same_with_guesses(engine: LoadedEngine, sampling: str, drafting: str) -> None:
    params = SAMPLING[sampling]
    plain = decode(engine, params)
    drafters: dict[str, Drafter] = {
        "ngram": NgramDrafter(1, 3),
        "chain": Oracle(plain.outputs, branching=False),
        "tree": Oracle(plain.outputs, branching=True),
    }
    guessed = decode(engine, params, drafters[drafting])
    assert described(guessed) == described(plain)
    assert guessed.guesses > 0
    if drafting != "ngram":
        assert guessed.steps < plain.steps
        assert guessed.accepted > 0


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_each_branch_of_a_tree_sees_itself_alone(family: str, tmp_path: Path) -> None:
    """Logits after every guess are those of the sequence that ends with its branch."""
    model = random_model(family_configs()[family])
    model.save_pretrained(tmp_path)
    prompt = [5, 6, 7, 8, 9, 10, 11]
    tree = Draft((20, 21, 22, 30, 31, 23), (ROOT, 0, 1, ROOT, 3, 1))
    with open_engine(tmp_path, block_size=SIZE) as engine:
        found = _tree_logits(engine, prompt, tree)
    for row in range(len(tree) + 1):
        path = tree.path(row - 1) if row else ()
        expected = reference_logits(model, [*prompt, *path])[-1]
        assert (found[row] - expected).abs().max().item() < 1e-4


def _tree_logits(engine: Engine, prompt: list[int], tree: Draft) -> torch.Tensor:
    table = [BlockId(place) for place in (9, 3, 5, 7)]
    engine.step(slice_of(prompt[:-2], 0, table, samples=0))
    requests = tuple(SampleRequest(0, 0, 0, GREEDY, row=row - 1 - len(tree)) for row in range(len(tree) + 1))
    part = SequenceSlice((*prompt[-2:], *tree.token_ids), len(prompt) - 2, table, requests, tree)
    return engine.step(part)
