"""What Medusa and EAGLE heads guess follows from their weights and from what they have seen."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cpu.attention import CpuAttention
from engine.drafting.draft import DraftRequest
from engine.drafting.eagle import EagleDrafter, EagleHead, eagle_config
from engine.drafting.medusa import MedusaDrafter, MedusaHead, read_medusa
from engine.drafting.runner_drafter import GrownSequence
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import KvCache
from engine.models.model_config import read_model_config
from tandem.sampling import SamplingParams
from tests.engine.drafting.folders import HIDDEN, SIZE, VOCABULARY, save_eagle, save_medusa, save_model

CPU = torch.device("cpu")


def grown(tokens: Sequence[int], drawn: Sequence[int], features: Tensor, key: int = 1) -> GrownSequence:
    """A sequence that asks for six guesses."""
    request = DraftRequest(key, 0, list(tokens), 1, SamplingParams(), 6)
    return GrownSequence(request, tuple(drawn), features)


def test_medusas_first_branch_is_each_heads_favourite() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [MedusaHead((), torch.randn(VOCABULARY, HIDDEN, generator=generator)) for _ in range(3)]
    features = torch.randn(2, HIDDEN, generator=generator)
    (proposal,) = MedusaDrafter(heads).propose([grown([1, 2], [7, 8], features)])
    favourites = [int((head.projection @ features[-1]).argmax()) for head in heads]
    assert proposal.base_tokens == 4
    assert proposal.draft.token_ids[0] == favourites[0]
    assert all(
        token in head_best
        for token, depth in zip(proposal.draft.token_ids, proposal.draft.depths(), strict=True)
        for head_best in [(heads[depth - 1].projection @ features[-1]).topk(8).indices.tolist()]
    )


def test_a_medusa_block_adds_to_what_it_reads(tmp_path: Path) -> None:
    model = read_model_config(save_model(tmp_path / "model"))
    (head, _) = read_medusa(save_medusa(tmp_path / "heads", heads=2), model, torch.float32, CPU)
    features = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4))
    ((weight, bias),) = head.blocks
    expected = (features + torch.nn.functional.silu(features @ weight.T + bias)) @ head.projection.T
    assert torch.allclose(head(features), expected, atol=1e-5)


@pytest.fixture
def eagles(tmp_path: Path) -> list[EagleDrafter]:
    """Two drafters over the same head and embeddings."""
    model = read_model_config(save_model(tmp_path / "model"))
    head = EagleHead(save_eagle(tmp_path / "eagle"), model, torch.float32)
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    shape = eagle_config(model)
    drafters = []
    for _ in range(2):
        cache = KvCache(shape, 16, SIZE, torch.float32, CPU)
        drafters.append(
            EagleDrafter(
                head,
                BlockPool(16, SIZE, prefix_cache=False),
                CpuAttention(cache, shape),
                lambda tokens: embeddings[tokens],
                lambda features: features @ embeddings.T,
                cache.close,
            )
        )
    return drafters


def test_eagle_guesses_the_same_however_the_output_came(eagles: list[EagleDrafter]) -> None:
    """In three steps with guesses in between, or at once: KV of guesses leaves no trace."""
    features = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(6))
    prompt, output = [9, 8, 7], [1, 2, 3, 4, 5, 6]
    for start, end in ((0, 1), (1, 4), (4, 6)):
        (stepwise,) = eagles[0].propose(
            [grown([*prompt, *output[:start]], output[start:end], features[start:end])]
        )
    (whole,) = eagles[1].propose([grown(prompt, output, features)])
    assert stepwise == whole
    assert len(whole.draft) == 6


def test_eagle_starts_anew_after_tokens_that_it_has_not_seen(eagles: list[EagleDrafter]) -> None:
    features = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(7))
    eagles[0].propose([grown([9, 8], [1, 2], features[:2])])
    (after_gap,) = eagles[0].propose([grown([9, 8, 1, 2, 5], [3, 4], features[2:])])
    (fresh,) = eagles[1].propose([grown([9, 8, 1, 2, 5], [3, 4], features[2:])])
    assert after_gap == fresh


def test_eagle_forgets_old_sequences_for_new_ones_and_never_the_batch(eagles: list[EagleDrafter]) -> None:
    features = torch.zeros(1, HIDDEN)
    for key in range(40):
        proposals = eagles[0].propose([grown([9, 8], [1], features, key)])
        assert [proposal.key for proposal in proposals] == [key]
    # 16 blocks hold 8 sequences of a token and six guesses.
    batch = [grown([9, 8], [1], features, key) for key in range(100, 110)]
    assert [proposal.key for proposal in eagles[0].propose(batch)] == list(range(100, 108))
