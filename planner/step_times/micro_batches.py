"""Pure: a pipeline that decodes: its batch goes through the stages in as many micro-batches as there are
stages.

While one stage works on one micro-batch the others work on theirs, so that every sequence gets a token in
the time that one micro-batch takes through all stages (DistServe, simdistserve: a pipeline's workers pass
batches on in a ring). The schedulers see one batch whose steps take that long.
"""

from planner.latency import LatencyModel, StepShape
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, straight

_FAR_TOKENS = 1_000_000


class MicroBatches:
    """LatencyModel of a worker of `pp` stages around a model of whole steps, linear in context.

    Steps with prompts are the model's own: they follow each other by `stage_s`.
    """

    def __init__(self, model: LatencyModel, pp: int) -> None:
        self._model, self._pp = model, pp
        self._curves = DecodeCurves(self._curve)
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        return self._model.step_s(shape) if shape.prompts else self._curves.step_s(shape)

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel; the micro-batches of a decode step keep every stage busy until the next one."""
        return self._model.stage_s(shape) if shape.prompts else self._curves.step_s(shape)

    def _curve(self, batch: int) -> DecodeCurve:
        each = -(-batch // self._pp)
        base_s = self._model.step_s(StepShape((), each, 0))
        far_s = self._model.step_s(StepShape((), each, _FAR_TOKENS))
        return straight(base_s, (far_s - base_s) / _FAR_TOKENS / self._pp)
