"""Edge: a step runner whose attention hears what else than its tokens changes the pool."""

import time
from dataclasses import replace

from engine.contract import LayerListener, StepRunner
from engine.kv_policies.page_attention import PageAttention
from engine.step import StepPlan, StepResult


class PageRunner:
    """StepRunner that prepares a PageAttention for each step of another runner."""

    def __init__(self, runner: StepRunner, attention: PageAttention) -> None:
        """`runner` attends with `attention`."""
        self._runner = runner
        self._attention = attention

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """See StepRunner; the time includes the preparation."""
        began_s = time.perf_counter()
        self._attention.begin_step(plan)
        result = self._runner.run(plan, on_layers)
        return replace(result, compute_s=time.perf_counter() - began_s)
