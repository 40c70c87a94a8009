"""Edge: prints where a request's time went, as a small table with bars."""

from rich.console import Console
from rich.table import Table

from tandem.generation import Timeline, Update, Usage

BAR_CHARACTERS = 30


def print_timeline(update: Update, console: Console | None = None) -> None:
    """Prints the stages of a finished request; nothing when the update carries no timeline."""
    if update.timeline is None or update.usage is None:
        return
    console = console or Console(highlight=False)
    console.print(_stages(update.timeline))
    console.print(_summary(update.timeline, update.usage), soft_wrap=True)


def _stages(line: Timeline) -> Table:
    stages = (
        ("queue", line.queue_s, ""),
        ("prefill", line.prefill_s, line.prefill_worker),
        ("hand-off", line.handoff_s, _handoff_note(line)),
        ("decode", line.decode_s, line.decode_worker),
    )
    whole_s = sum(seconds for _, seconds, _ in stages) or 1.0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("stage", "ms", "", "where"):
        table.add_column(title, justify="right" if title == "ms" else "left")
    before_s = 0.0
    for name, seconds, where in stages:
        table.add_row(name, f"{seconds * 1e3:.1f}", _bar(before_s, seconds, whole_s), where)
        before_s += seconds
    return table


def _handoff_note(line: Timeline) -> str:
    return f"{line.handoff_bytes / 1e6:.1f} MB over {line.transport}" if line.transport else "none needed"


def _bar(before_s: float, seconds: float, whole_s: float) -> str:
    """A bar that starts where the stages before it ended."""
    start = round(before_s / whole_s * BAR_CHARACTERS)
    length = max(1, round(seconds / whole_s * BAR_CHARACTERS)) if seconds > 0 else 0
    return " " * min(start, BAR_CHARACTERS - length) + "█" * length


def _summary(line: Timeline, usage: Usage) -> str:
    after_first = max(0, usage.completion_tokens - 1)
    spent_s = line.handoff_s + line.decode_s
    speed = f"{after_first / spent_s:.1f}" if spent_s > 0 and after_first else "-"
    return (
        f"TTFT {line.ttft_s * 1e3:.0f} ms   TPOT {line.tpot_s * 1e3:.1f} ms   {speed} tokens/s   "
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached)   "
        f"answer {usage.completion_tokens} tokens"
    )
