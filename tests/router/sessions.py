"""Pure: how the tests of this room make sessions."""

from collections.abc import Callable

from router.request import GenerationRequest, ResumePoint
from router.session import Session, SessionRules
from router.text_stream import TextStream
from router.worker_key import WorkerKey
from tandem.ids import Incarnation, LegId, RequestId, WorkerId
from tandem.sampling import SamplingParams
from tandem.slo import SloClass

SLO = SloClass("chat", ttft_s=1.0, tpot_s=0.1, longest_gap_s=0.5)
PROMPT = (11, 12, 13)


def worker(name: str, incarnation: int = 1) -> WorkerKey:
    """A worker's key."""
    return WorkerKey(WorkerId(name), Incarnation(incarnation))


class Letters:
    """A detokeniser for tests: token 0 is 'a', 1 is 'b' and so on."""

    def push(self, token_id: int) -> str:
        """One letter."""
        return chr(ord("a") + token_id % 26)

    def finish(self) -> str:
        """Nothing is held back."""
        return ""


def leg_ids() -> Callable[[], LegId]:
    """Numbered leg ids."""
    count = 0

    def new() -> LegId:
        nonlocal count
        count += 1
        return LegId(f"leg-{count}")

    return new


def make_session(
    params: SamplingParams | None = None,
    *,
    resume: tuple[ResumePoint, ...] = (),
    max_replacements: int = 3,
    end_ids: frozenset[int] = frozenset(),
) -> Session:
    """A session whose request arrived at 0 with the deadline 100."""
    params = params or SamplingParams(max_tokens=4)
    request = GenerationRequest(RequestId("r"), PROMPT, params, SLO.name, arrived_s=0.0, resume=resume)
    rules = SessionRules(
        slo=SLO,
        deadline_s=100.0,
        max_replacements=max_replacements,
        end_ids=end_ids,
        new_leg_id=leg_ids(),
        new_text=lambda: TextStream(Letters(), params.stop, params.min_tokens, params.include_stop),
        note_gap=lambda _gap_s: None,
    )
    return Session(request, rules)
