"""Pure: step times composed from per-operator tables (microsoft/vidur's form), with analytical attention.

A table has the median time of every linear and element-wise op of one layer by tokens and tensor-parallel
degree. The tables have no attention: its time is the roofline's, from the same hardware description.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from math import inf
from statistics import median

from planner.latency import StepShape, total_tokens
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, straight
from planner.step_times.model_shape import ModelShape
from planner.step_times.roofline import Attention, Layout, linear_s
from planner.step_times.transfer_links import LinkTable
from tandem.errors import ConfigError

LAYER_OPS = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)
"""Ops of one layer; `add` runs twice, `emb` once a step and not a layer."""

_NO_ROW = (KeyError, ValueError, TypeError)
"""What reading a row raises that lacks a column, a number, or its end."""


def _seconds(milliseconds: str) -> float:
    """Raises ValueError for what is no time."""
    found = float(milliseconds) / 1e3
    if not 0 <= found < inf:
        raise ValueError(f"{milliseconds} ms is no time")
    return found


def degrees(rows: Iterable[Mapping[str, str]]) -> set[int]:
    """Tensor-parallel degrees that a table has rows for. Raises ConfigError for rows of something else."""
    try:
        return {int(row["num_tensor_parallel_workers"]) for row in rows}
    except _NO_ROW as error:
        raise ConfigError(f"not a table of operators: {error!r}") from error


class OperatorTable:
    """Seconds of each op by number of tokens, for one tensor-parallel degree."""

    def __init__(self, rows: Iterable[Mapping[str, str]], tp: int) -> None:
        """`rows` as csv.DictReader gives them, times in ms. Raises ConfigError without rows for `tp`."""
        seen: dict[str, dict[int, list[float]]] = {op: {} for op in ("emb", *LAYER_OPS)}
        try:
            for row in rows:
                if int(row["num_tensor_parallel_workers"]) == tp:
                    for op, times in seen.items():
                        times.setdefault(int(row["num_tokens"]), []).append(
                            _seconds(row[f"time_stats.{op}.median"])
                        )
        except _NO_ROW as error:
            raise ConfigError(f"not a table of operators: {error!r}") from error
        if not seen["emb"]:
            raise ConfigError(f"the table of operators has no rows for tp {tp}")
        self._tokens = sorted(seen["emb"])
        self._times = {op: [median(times[count]) for count in self._tokens] for op, times in seen.items()}

    def op_s(self, op: str, tokens: int) -> float:
        """Time of one op: linear between rows, beyond the last in proportion to the tokens."""
        times = self._times[op]
        right = bisect_left(self._tokens, tokens)
        if right == 0:
            return times[0]
        if right == len(self._tokens):
            return times[-1] * tokens / self._tokens[-1]
        low, high = self._tokens[right - 1], self._tokens[right]
        return times[right - 1] + (tokens - low) / (high - low) * (times[right] - times[right - 1])

    def layer_s(self, tokens: int) -> float:
        """One layer without attention and without communication."""
        return sum(self.op_s(op, tokens) for op in LAYER_OPS) + self.op_s("add", tokens)


def collective_link(
    rows: Iterable[Mapping[str, str]], collective: str, workers: int, devices_per_node: int
) -> LinkTable:
    """Measured times of a collective by its bytes (columns as in vidur's tables, ms). Raises ConfigError
    without."""
    try:
        points = [
            (float(row["size"]), _seconds(row[f"time_stats.{collective}.median"]))
            for row in rows
            if int(row["num_workers"]) == workers and int(row["devices_per_node"]) == devices_per_node
        ]
    except _NO_ROW as error:
        raise ConfigError(f"not a table of {collective}: {error!r}") from error
    if not points:
        raise ConfigError(f"no row of {collective} for {workers} workers, {devices_per_node} in a node")
    return LinkTable(points)


class ComposedModel:
    """LatencyModel from operator tables, links and analytical attention."""

    def __init__(
        self,
        model: ModelShape,
        layout: Layout,
        operators: OperatorTable,
        all_reduce: LinkTable | None = None,
        send_recv: LinkTable | None = None,
    ) -> None:
        """Raises ConfigError when tp or pp need a link that is not given."""
        if layout.tp > 1 and all_reduce is None:
            raise ConfigError(f"tp {layout.tp} needs measured all-reduces")
        if layout.pp > 1 and send_recv is None:
            raise ConfigError(f"pp {layout.pp} needs measured sends between stages")
        self._model, self._layout, self._operators = model, layout, operators
        self._all_reduce = all_reduce if layout.tp > 1 else None
        self._send_recv = send_recv if layout.pp > 1 else None
        self._attention = Attention(model, layout)
        self._curves = DecodeCurves(self._curve)
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        if not shape.prompts:
            return self._curves.step_s(shape)
        tokens = total_tokens(shape.prompts) + shape.decode_batch
        attention = self._attention
        reading_s = sum([attention.seconds(part.tokens, part.context_tokens) for part in shape.prompts])
        reading_s += attention.token_s * shape.decode_context_tokens
        outputs = len(shape.prompts) + shape.decode_batch
        return self._without_attention_s(tokens, outputs) + self._model.layers * reading_s

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        slowest = -(-self._model.layers // self._layout.pp)
        return self.step_s(shape) * slowest / self._model.layers

    def _curve(self, batch: int) -> DecodeCurve:
        by_token_s = self._model.layers * self._attention.token_s
        return straight(self._without_attention_s(batch, batch), by_token_s)

    def _without_attention_s(self, tokens: int, outputs: int) -> float:
        model, layout = self._model, self._layout
        data_bytes = tokens * model.hidden * model.value_bytes
        layer_s = self._operators.layer_s(tokens)
        if self._all_reduce is not None:
            layer_s += 2 * self._all_reduce.seconds(data_bytes)
        total_s = model.layers * layer_s + self._operators.op_s("emb", tokens)
        total_s += linear_s(model, layout, model.head_weights, outputs)
        if self._send_recv is not None:
            total_s += (layout.pp - 1) * self._send_recv.seconds(data_bytes)
        return total_s
