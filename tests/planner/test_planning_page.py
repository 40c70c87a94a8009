"""Edge: docs/planning.md names exactly the keys of plan.yaml, and its example is one that is read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from planner.plan.file import ModelSection, PlanFile
from planner.step_times.hardware import DEVICES

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation is not ModelSection:
            yield annotation
        return
    for inner in get_args(annotation):
        yield from _sections(inner)


def _keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = list(_sections(info.annotation))
        listed = "[]" if inner and "tuple" in str(info.annotation) else ""
        if not inner:
            yield path + name
        for each in inner:
            yield from _keys(each, f"{path}{name}{listed}.")


def test_every_key_is_documented_and_no_other() -> None:
    text = PAGE.split("## plan.yaml")[1]
    documented = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert sorted(documented) == sorted(_keys(PlanFile))


def test_the_example_is_read() -> None:
    example = PAGE.split("```yaml\n")[1].split("```")[0]
    assert PlanFile.model_validate(yaml.safe_load(example)).rate_rps == 60


def test_the_devices_named_are_those_of_the_catalogue() -> None:
    assert all(name in PAGE for name in DEVICES)
