"""How many guesses are verified follows from what was measured: acceptance and step times."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from engine.drafting.controller import Offer, SpeculationController
from engine.drafting.draft import ROOT, Draft

CHAIN = Draft(tuple(range(8)))


def serve(
    controller: SpeculationController,
    sequences: int,
    step_s: Callable[[int], float],
    hold: float,
    steps: int = 400,
) -> tuple[list[int], float]:
    """Runs steps in which each guess holds or not by a fixed pattern; guesses of each step, speed-up."""
    offers = [Offer(key, CHAIN) for key in range(sequences)]
    guesses, tokens, seconds, trial = [], 0, 0.0, 0
    for _ in range(steps):
        lengths = controller.lengths(sequences, offers)
        for offer, length in zip(offers, lengths, strict=True):
            accepted = 0
            while accepted < length:
                trial += 1
                if (trial * 0.6180339887) % 1.0 >= hold:
                    break
                accepted += 1
            tokens += 1 + accepted
            if length:
                controller.observe_draft(offer.key, length, accepted)
        guesses.append(sum(lengths))
        seconds += step_s(guesses[-1])
        controller.observe_step(sequences, guesses[-1], step_s(guesses[-1]))
    return guesses, tokens / seconds * step_s(0) / sequences


def memory_bound(guesses: int) -> float:
    """Guesses cost next to nothing: weights and KV are read once anyway."""
    return 0.020 + 0.0002 * guesses


def test_right_guesses_are_verified_whole_when_verification_is_nearly_free() -> None:
    guesses, speedup = serve(SpeculationController(), 1, memory_bound, hold=0.9)
    assert guesses[50:].count(8) > 300
    assert speedup > 3.5


def test_a_compute_bound_batch_is_left_alone_but_for_rare_probes() -> None:
    def compute_bound(guesses: int) -> float:
        return 0.020 * (64 + guesses) / 64

    guesses, speedup = serve(SpeculationController(), 64, compute_bound, hold=0.5)
    assert sum(guesses[50:]) < 100
    assert speedup > 0.97


def test_wrong_guesses_are_given_up_even_if_they_cost_little() -> None:
    guesses, speedup = serve(SpeculationController(), 1, lambda count: 0.020 + 0.002 * count, hold=0.02)
    assert sum(guesses[50:]) < 50
    assert speedup > 0.97


def test_drafting_resumes_when_guesses_become_right() -> None:
    controller = SpeculationController()
    serve(controller, 1, memory_bound, hold=0.0)
    _, speedup = serve(controller, 1, memory_bound, hold=0.95)
    assert speedup > 3.0


def test_drafting_stops_when_the_batch_grows_and_goes_on_when_it_shrinks() -> None:
    def step_s(batch: int) -> Callable[[int], float]:
        return lambda guesses: 0.020 * max(16, batch + guesses) / 16

    controller = SpeculationController()
    assert serve(controller, 1, step_s(1), hold=0.8)[1] > 2.0
    guesses, _ = serve(controller, 64, step_s(64), hold=0.5)
    assert sum(guesses[50:]) < 100
    assert serve(controller, 1, step_s(1), hold=0.8)[1] > 2.0


def test_the_sequences_whose_guesses_hold_are_served_first() -> None:
    controller = SpeculationController()
    for _ in range(40):
        controller.observe_draft(0, 8, 8)
        controller.observe_draft(1, 8, 0)
    for guesses, seconds in ((0, 0.02), (8, 0.021), (16, 0.1)):
        controller.observe_step(2, guesses, seconds)
    good, bad = controller.lengths(2, [Offer(0, CHAIN), Offer(1, CHAIN)])
    assert good == 8
    assert bad == 0


def test_expected_speedup_is_magicdecs_ratio() -> None:
    controller = SpeculationController()
    assert controller.expected_speedup(1, [Offer(0, CHAIN)]) == 1.0
    controller.observe_step(1, 0, 0.020)
    controller.observe_step(1, 8, 0.025)
    for _ in range(100):
        controller.observe_draft(0, 8, 8)
    assert abs(controller.expected_speedup(1, [Offer(0, CHAIN)]) - 9 * 0.020 / 0.025) < 1e-6


def test_a_forgotten_sequence_is_judged_by_all_others_again() -> None:
    controller = SpeculationController()
    for _ in range(50):
        controller.observe_draft(1, 1, 1)
    assert controller.acceptance(1) > 0.99
    controller.forget(1)
    assert 0.5 < controller.acceptance(1) < 0.99


@given(
    st.integers(1, 70),
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.tuples(st.integers(0, 200), st.floats(0, 10)), max_size=30),
)
def test_no_more_than_offered_is_ever_verified(
    sequences: int, sizes: list[int], history: list[tuple[int, float]]
) -> None:
    controller = SpeculationController()
    for guesses, seconds in history:
        controller.observe_step(sequences, guesses, seconds)
    offers = [
        Offer(key, Draft(tuple(range(size)), (ROOT,) * size if key % 2 else ()))
        for key, size in enumerate(sizes)
    ]
    lengths = controller.lengths(sequences, offers)
    assert all(0 <= length <= size for length, size in zip(lengths, sizes, strict=True))
