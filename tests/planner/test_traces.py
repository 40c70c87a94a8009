"""Pure: the four trace formats, each with its first rows.

Excerpts: Azure LLM inference trace 2023, conversation, as processed in microsoft/vidur (MIT; original
Azure/AzurePublicDataset, CC-BY); arXiv summarisation lengths from microsoft/vidur (MIT); Mooncake's
conversation trace, kvcache-ai/Mooncake FAST'25 release (Apache-2.0).
"""

import pytest

from planner.workloads.traces import TraceRow, read_trace
from tandem.errors import InvalidRequest

AZURE = """arrived_at,num_prefill_tokens,num_decode_tokens
0.0,374,44
4.314579,396,109
""".splitlines(keepends=True)

ARXIV = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.85185185185185
2015,156,2171,12.916666666666666
""".splitlines(keepends=True)

AZURE_DATES = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
""".splitlines(keepends=True)

MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]}
{"timestamp": 3000, "input_length": 2290, "output_length": 316, "hash_ids": [0, 42, 43, 44, 45]}
""".splitlines(keepends=True)  # noqa: E501


def test_azure_rows_have_their_own_times() -> None:
    assert read_trace(AZURE) == (TraceRow(0.0, 374, 44), TraceRow(4.314579, 396, 109))


def test_azure_rows_as_published_count_from_the_first_date() -> None:
    first, second = read_trace(AZURE_DATES)
    assert first == TraceRow(0.0, 374, 44)
    assert second.arrived_s == pytest.approx(4.314579)
    with_zone = ["TIMESTAMP,ContextTokens,GeneratedTokens\n", "2024-05-10 00:00:00.009930+00:00,2162,5\n"]
    assert read_trace(with_zone) == (TraceRow(0.0, 2162, 5),)


def test_arxiv_rows_have_none() -> None:
    assert read_trace(ARXIV) == (TraceRow(None, 3772, 54), TraceRow(None, 2015, 156))


def test_mooncake_times_are_milliseconds_and_prefixes_are_kept() -> None:
    first, second = read_trace(MOONCAKE)
    assert first == TraceRow(0.0, 6758, 500, tuple(range(14)))
    assert second == TraceRow(3.0, 2290, 316, (0, 42, 43, 44, 45))


def test_limit_cuts_without_reading_on() -> None:
    assert len(read_trace([*AZURE[:2], "broken,line,here"], limit=1)) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b,c\n", "1,2,3\n"], "has not the columns of a known form: arrived_at, num_prefill_tokens"),
        ([], "The trace is empty"),
        (["\n"], "The trace is empty"),
        ([AZURE[0], "nan,1,3\n"], "Line 2 of the trace has no valid time: nan"),
        ([AZURE_DATES[0], "yesterday,1,3\n"], "Line 2 of the trace has no valid time"),
        ([AZURE_DATES[0], "2023-11-16 18:15:46,1\n"], "Line 2 of the trace has no valid numbers"),
        ([f'{{"timestamp": {10**400}, "input_length": 1, "output_length": 1}}'], "Line 1 of the trace"),
        (['{"timestamp": Infinity, "input_length": 1, "output_length": 1}\n'], "Line 1 of the trace"),
        ([AZURE[0], "0.0,many,3\n"], "Line 2 of the trace has no valid numbers"),
        ([AZURE[0], "0.0,1\n"], "Line 2 of the trace has no valid numbers"),
        ([AZURE[0], "0.0,-1,3\n"], "Line 2 of the trace has negative lengths"),
        ([MOONCAKE[0], "{broken\n"], "Line 2 of the trace is no Mooncake row"),
        (['{"timestamp": 0}\n'], "Line 1 of the trace is no Mooncake row"),
    ],
)
def test_broken_line_is_named(lines: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_trace(lines)
