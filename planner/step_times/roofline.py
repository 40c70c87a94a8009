"""Pure: step times from hardware and model alone: max(FLOPs / reached FLOP/s, bytes / reached bytes/s) and
links.

Per layer: the linear layers do 2 FLOPs a weight and token and read every weight once; attention does
4 * head_dim * heads FLOPs for each pair of a token and one before it, and reads the KV of its context. Tensor
parallelism divides both by tp and adds two all-reduces a layer (ring: 2 (tp - 1) / tp of the data over the
link); a pipeline adds a send of the activations between stages.
"""

from dataclasses import dataclass

from planner.latency import StepShape, total_tokens
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, straight
from planner.step_times.hardware import Device
from planner.step_times.model_shape import ModelShape
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """How a worker spreads over devices: tp times pp of them; stages talk over `stage_link_bytes_s`."""

    device: Device
    tp: int = 1
    pp: int = 1
    stage_link_bytes_s: float | None = None

    @property
    def devices(self) -> int:
        """Devices of one worker."""
        return self.tp * self.pp

    @property
    def reached_flops_s(self) -> float:
        """FLOP/s that the tp devices of a stage reach together."""
        return self.device.flops_s * self.device.compute_share * self.tp

    @property
    def reached_bytes_s(self) -> float:
        """Bytes/s of memory that the tp devices of a stage reach together."""
        return self.device.memory_bytes_s * self.device.memory_share * self.tp


class Roofline:
    """LatencyModel without any measurement but the shares in the catalogue."""

    def __init__(self, model: ModelShape, layout: Layout) -> None:
        """Raises ConfigError when the model cannot be cut that way."""
        _check(model, layout)
        self._model = model
        self._layout = layout
        self._attention = Attention(model, layout)
        self._curves = DecodeCurves(self._curve)
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        if not shape.prompts:
            return self._curves.step_s(shape)
        model, layers = self._model, self._model.layers
        tokens = total_tokens(shape.prompts) + shape.decode_batch
        reading_s = sum([self._attention.seconds(part.tokens, part.context_tokens) for part in shape.prompts])
        reading_s += self._attention.token_s * shape.decode_context_tokens
        head_s = linear_s(model, self._layout, model.head_weights, len(shape.prompts) + shape.decode_batch)
        return layers * (self._layer_s(tokens) + reading_s) + head_s + self._between_stages_s(tokens)

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel: layers are dealt evenly, a stage takes the whole over pp, rounded up to a
        layer."""
        slowest = -(-self._model.layers // self._layout.pp)
        return self.step_s(shape) * slowest / self._model.layers

    def _curve(self, batch: int) -> DecodeCurve:
        model, layers = self._model, self._model.layers
        base_s = layers * self._layer_s(batch) + linear_s(model, self._layout, model.head_weights, batch)
        by_token_s = layers * self._attention.token_s
        return straight(base_s + self._between_stages_s(batch), by_token_s)

    def _layer_s(self, tokens: int) -> float:
        """One layer without attention, for `tokens` tokens."""
        reduced_bytes = tokens * self._model.hidden * self._model.value_bytes
        matrices_s = linear_s(self._model, self._layout, self._model.layer_weights, tokens)
        return matrices_s + self._layout.device.layer_overhead_s + 2 * self._all_reduce_s(reduced_bytes)

    def _all_reduce_s(self, data_bytes: float) -> float:
        tp, device = self._layout.tp, self._layout.device
        if tp == 1:
            return 0.0
        return device.link_latency_s + 2 * (tp - 1) / tp * data_bytes / device.link_bytes_s

    def _between_stages_s(self, tokens: int) -> float:
        layout = self._layout
        link_bytes_s = layout.stage_link_bytes_s or layout.device.link_bytes_s
        one_s = (
            layout.device.link_latency_s
            + tokens * self._model.hidden * self._model.value_bytes / link_bytes_s
        )
        return (layout.pp - 1) * one_s


def linear_s(model: ModelShape, layout: Layout, weights: int, tokens: int) -> float:
    """Time of matrices of `weights` parameters for `tokens` tokens: compute-bound or bound by reading them
    once."""
    return max(
        2 * weights * tokens / layout.reached_flops_s, weights * model.value_bytes / layout.reached_bytes_s
    )


class Attention:
    """One layer's attention: what decides its time is looked up once."""

    __slots__ = ("_pair_s", "token_s")

    def __init__(self, model: ModelShape, layout: Layout) -> None:
        self._pair_s = 4 * model.heads * model.head_dim / layout.reached_flops_s
        read_bytes = 2 * model.kv_heads * model.head_dim * model.value_bytes
        self.token_s = max(self._pair_s, read_bytes / layout.reached_bytes_s)
        """Time for each token of context that a decoding sequence attends to."""

    def seconds(self, tokens: int, context_tokens: int) -> float:
        """Time of a prompt part: causal, so half of its own square and all of the context's."""
        compute_s = tokens * (context_tokens + tokens / 2) * self._pair_s
        return max(compute_s, self.token_s * (context_tokens + tokens))


def _check(model: ModelShape, layout: Layout) -> None:
    if layout.tp < 1 or layout.pp < 1:
        raise ConfigError(f"tp and pp must be 1 or more, not {layout.tp} and {layout.pp}")
    if model.heads % layout.tp:
        raise ConfigError(f"{model.name} has {model.heads} heads, which tp {layout.tp} does not divide")
    if layout.pp > model.layers:
        raise ConfigError(f"{model.name} has {model.layers} layers, fewer than pp {layout.pp}")
