"""Edge: FlashInfer's two wrappers as its documentation describes them, computed plainly in float64.

They attend over exactly what a plan describes, so that a wrong plan gives wrong numbers. Their signatures are
those of flashinfer 0.7 (docs.flashinfer.ai): calls that it would refuse are refused here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Plan:
    query_starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last_page: Tensor
    shape: tuple[int, int, int, int]
    """Query heads, K/V heads, head_dim, page size."""
    window_left: int


class _Wrapper:
    def __init__(self, workspace: Tensor, layout: str) -> None:
        if layout != "NHD" or workspace.dtype is not torch.uint8:
            raise ValueError("pages must be NHD, the workspace bytes")
        self._plan: _Plan | None = None

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        plan = self._plan
        if plan is None:
            raise RuntimeError("run before plan")
        keys, values = paged_kv_cache
        heads, kv_heads, head_dim, page_size = plan.shape
        if keys.stride() != values.stride() or keys.shape[1:] != (page_size, kv_heads, head_dim):
            raise ValueError("K and V must have equal strides and the planned shape")
        if q.shape[1:] != (heads, head_dim) or q.shape[0] != plan.query_starts[-1]:
            raise ValueError("queries are not those that were planned")
        for row in range(len(plan.last_page)):
            rows = slice(int(plan.query_starts[row]), int(plan.query_starts[row + 1]))
            out[rows] = _attend(q[rows], keys, values, plan, row).to(out.dtype)
        return out


def _attend(queries: Tensor, keys: Tensor, values: Tensor, plan: _Plan, row: int) -> Tensor:
    pages = plan.pages[int(plan.page_starts[row]) : int(plan.page_starts[row + 1])].long()
    heads, kv_heads, head_dim, page_size = plan.shape
    length = (len(pages) - 1) * page_size + int(plan.last_page[row])
    key, value = (
        part[pages].reshape(-1, kv_heads, head_dim)[:length].double().repeat_interleave(heads // kv_heads, 1)
        for part in (keys, values)
    )
    at = torch.arange(length - len(queries), length)[:, None]
    seen = torch.arange(length) <= at
    if plan.window_left >= 0:
        seen &= torch.arange(length) >= at - plan.window_left
    scores = torch.einsum("qhd,khd->hqk", queries.double(), key) / head_dim**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=2)
    return torch.einsum("hqk,khd->qhd", weights, value)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Several query tokens a sequence."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """Takes a batch."""
        if not causal or q_data_type is not kv_data_type:
            raise ValueError("only causal attention of one type is stood in for")
        self._plan = _Plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            (num_qo_heads, num_kv_heads, head_dim_qk, page_size),
            window_left,
        )


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query token a sequence; with graphs, a batch size that is fixed by the buffers."""

    def __init__(
        self,
        workspace: Tensor,
        layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        super().__init__(workspace, layout)
        if not use_cuda_graph:
            raise ValueError("only fixed batches are stood in for")
        self._buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **terms: Any,
    ) -> None:
        """Takes a batch of the fixed size."""
        starts, pages, last = self._buffers
        if len(indptr) != len(starts) or len(indices) > len(pages) or len(last_page_len) != len(last):
            raise ValueError("the batch has not the fixed size")
        if int(last_page_len.min()) < 1 or int(last_page_len.max()) > page_size:
            raise ValueError("a last page holds 1 to page_size tokens")
        self._plan = _Plan(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            (num_qo_heads, num_kv_heads, head_dim, page_size),
            terms["window_left"],
        )
