"""Streamed text is the whole text cut at the first stop string, however it was split into tokens."""

from hypothesis import given
from hypothesis import strategies as st

from router.text_stream import TextStream


class Pieces:
    """A detokeniser whose tokens are indices into a list of pieces."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def finish(self) -> str:
        return self._rest


def reference(text: str, stops: list[str], from_character: int, include: bool) -> tuple[str, str | None]:
    """Cuts where the match ends that ends first (of those the longest), not before `from_character`."""
    ends = [
        (at + len(stop), at, stop)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > from_character
    ]
    if not ends:
        return text, None
    end, start, stop = min(ends)
    return text[: end if include else start], stop


def streamed(stream: TextStream, count: int) -> tuple[list[str], str | None]:
    shown = []
    for token_id in range(count):
        text, match = stream.push(token_id)
        shown.append(text)
        if match:
            return shown, match.stop_string
    text, match = stream.finish()
    return [*shown, text], match.stop_string if match else None


pieces_of_text = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


@given(pieces_of_text, st.text(alphabet="abc", max_size=2), stop_lists, st.booleans(), st.integers(0, 6))
def test_streamed_text_equals_the_whole_text_cut_at_the_first_stop(
    pieces: list[str], rest: str, stops: list[str], include: bool, min_tokens: int
) -> None:
    stream = TextStream(Pieces(pieces, rest), stops, min_tokens, include)
    shown, stop = streamed(stream, len(pieces))
    whole = "".join(pieces)
    if len(pieces) > min_tokens:
        whole += rest
        exempt = len("".join(pieces[:min_tokens]))
        expected = reference(whole, stops, exempt, include)
    else:
        expected = (whole + rest, None)
    assert ("".join(shown), stop) == expected


@given(pieces_of_text, stop_lists)
def test_text_that_was_shown_is_never_part_of_the_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream = TextStream(Pieces(pieces), stops)
    shown = ""
    for token_id in range(len(pieces)):
        text, match = stream.push(token_id)
        shown += text
        assert not any(stop in shown for stop in stops)
        if match:
            break


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Pieces(["hello E", "N", "d", " E", "N", "D"]), ["END"])
    shown = [stream.push(i)[0] for i in range(6)]
    assert shown == ["hello ", "", "ENd", " ", "", ""]


def test_text_of_a_stop_token_is_shown_only_when_asked_for() -> None:
    for include, expected in ((False, ""), (True, "x")):
        stream = TextStream(Pieces(["x"]), [], include_stop=include)
        assert stream.push_stop_token(0)[0] == expected


def test_without_stop_strings_nothing_is_held_back() -> None:
    stream = TextStream(Pieces(["a", "", "b"], "\ufffd"))
    assert [stream.push(i)[0] for i in range(3)] == ["a", "", "b"]
    assert stream.finish() == ("\ufffd", None)
