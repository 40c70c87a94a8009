"""Each fact about NCCL in docs/decisions/005-gpu-roads.md names tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/decisions/005-gpu-roads.md").read_text()
ROWS = re.findall(r"^\| (?!fact|-)([^|]+) \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
DEFINED = {
    name
    for file in (ROOT / "tests/kvtransfer").glob("test_*.py")
    for name in re.findall(r"def (test_\w+)", file.read_text())
}


def test_the_page_has_the_nine_facts_of_the_field_notes() -> None:
    assert len(ROWS) == 9


@pytest.mark.parametrize(("fact", "tests"), ROWS, ids=[fact[:40] for fact, _ in ROWS])
def test_tests_that_a_fact_names_are_there(fact: str, tests: str) -> None:
    named = re.findall(r"`(\w+)`", tests)
    assert named
    assert set(named) <= DEFINED
