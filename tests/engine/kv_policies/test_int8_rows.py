"""What an eight-bit pool keeps of a number: its row's scale bounds the error, zero stays zero."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from engine.kv.kv_cache import KvCache
from engine.kv_policies.paged_rows import PagedRows, Places
from engine.kv_policies.quantised_rows import quantised_row
from engine.models.model_config import ModelConfig, RopeConfig
from tandem.errors import ModelError
from tandem.ids import BlockId
from tests.engine.kv_policies.page_engine import team_of

CONFIG = ModelConfig(
    "LlamaForCausalLM", 10, 8, 8, 2, 2, 2, 8, 1e-5, RopeConfig(1e4), 64, True, *(False,) * 4, (None,) * 2, ()
)
NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda number: number == 0 or abs(number) > 1e-20)
ROWS = arrays.arrays(np.float32, (3, 2, 8), elements=NUMBERS)


@settings(max_examples=60, deadline=None)
@given(keys=ROWS, values=ROWS)
def test_a_number_is_off_by_half_a_step_of_its_row_at_most(
    keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    with KvCache(CONFIG, 4, 4, torch.int8, torch.device("cpu")) as cache:
        rows = PagedRows(cache, CONFIG, team_of(1))
        places = Places(np.array([2, 2, 0]), np.array([0, 3, 1]))
        rows.write(1, places, torch.from_numpy(keys), torch.from_numpy(values))
        found = rows.read(1, [BlockId(2), BlockId(0)])
        for exact, read in zip((keys, values), found, strict=True):
            stored = read[torch.tensor([0, 3, 5])].numpy()
            step = np.abs(exact).max(axis=2, keepdims=True) / 127
            assert (np.abs(stored - exact) <= step * 0.501).all()
            assert (stored[exact == 0] == 0).all()
        assert not rows.read(0, [BlockId(2)])[0].any(), "another layer was written"
        del rows


def test_heads_that_leave_a_scale_unaligned_are_refused() -> None:
    assert quantised_row(64) == 68
    with pytest.raises(ModelError, match="a multiple of 4 numbers, not 6"):
        quantised_row(6)
