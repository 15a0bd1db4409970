"""Coverage: what could be said is named as what is said is counted."""

import pytest

from fc_lightning.calls import FunctionCall
from fc_lightning.coverage import ANY_NUMBER, ANY_TEXT, NOT_SAID, coverage, never_said
from fc_lightning.functions import Registry, registry_from_source


def one_function(name, properties, *, required) -> Registry:
    parameters = {"properties": properties, "required": required}
    function = {"name": name, "parameters": parameters}
    return registry_from_source({"functions": [function]}, f"{name}.yaml")


def test_coverage_counts_values_elements_sizes_and_what_was_not_said():
    properties = {
        "color": {"type": "string", "enum": ["red", "green"]},
        "rooms": {"type": "array", "items": {"type": "string", "enum": ["a", "b", "c"]}},
        "level": {"type": "integer", "minimum": 1, "maximum": 30},
        "name": {"type": "string"},
    }
    registry = one_function("paint", properties, required=["color"])
    calls = [
        FunctionCall("paint", {"color": "red", "rooms": ["a", "c"], "level": 2}),
        FunctionCall("possibly_incomplete_paint", {"color": "", "name": "x"}),
    ]
    counts = coverage(registry, calls)
    said = {row: count for row, count in counts.items() if count}
    assert said == {
        ("paint", "color", "red"): 1,
        ("paint", "rooms", "a"): 1,
        ("paint", "rooms", "c"): 1,
        ("paint", "rooms", "2 of 3"): 1,
        ("paint", "level", "2"): 1,
        ("paint", "name", NOT_SAID): 1,
        ("possibly_incomplete_paint", "color", "''"): 1,
        ("possibly_incomplete_paint", "rooms", NOT_SAID): 1,
        ("possibly_incomplete_paint", "level", NOT_SAID): 1,
        ("possibly_incomplete_paint", "name", ANY_TEXT): 1,
    }
    assert counts["paint", "level", "30"] == 0
    assert counts["paint", "rooms", "3 of 3"] == 0
    assert ("possibly_incomplete_paint", "color", "red") not in counts


TEXTS = {"type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "values", "unsaid"),
    [
        (TEXTS, [["my text"]], []),
        (TEXTS, [], [ANY_TEXT]),
        ({"type": "number"}, [5.25], []),
        ({"type": "integer", "minimum": 1}, [], [ANY_NUMBER]),
        ({"type": "integer", "minimum": 0, "maximum": 5_000_000}, [7], []),
        ({"type": "number", "enum": [21.0, 22.5]}, [21, 22.5], []),
        ({"type": "number", "minimum": 0.5, "maximum": 2.5}, [1], ["2"]),
        ({"type": "number", "minimum": 0.1, "maximum": 0.3}, [0.2], []),
        ({"type": "boolean", "enum": [True]}, [True], []),
        ({"type": "array", "items": {"type": "boolean"}}, [[True]], ["False"]),
    ],
)
def test_what_could_be_said_is_named_as_it_is_counted(schema, values, unsaid):
    registry = one_function("tune", {"x": schema}, required=["x"])
    calls = [FunctionCall("tune", {"x": value}) for value in values]
    assert never_said(registry, calls).get(("tune", "x"), []) == unsaid
