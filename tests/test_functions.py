"""The registry: its files, and what its schemas allow."""

import json
import re

import pytest
import yaml

from fc_lightning.calls import (
    FunctionCall,
    parse_call,
    render_call,
)
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.functions import RegistryError, load_registry, registry_from_source

VEHICLE = load_registry()


def registry_of(**properties):
    """A registry with one function `f`, all its arguments required."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return registry_from_source({"functions": [{"name": "f", "parameters": schema}]}, "test.yaml")


# ---------------------------------------------------------------- the schema


def test_the_vehicle_has_eighteen_functions_of_which_fourteen_can_be_incomplete():
    assert len(VEHICLE.functions) == 18
    assert len(VEHICLE.call_names) == 18 + 14
    assert "possibly_incomplete_start_engine" not in VEHICLE.call_names
    assert VEHICLE.spec("possibly_incomplete_lock_doors") is VEHICLE.by_name["lock_doors"]
    assert VEHICLE.by_name["set_temperature"].by_name["area"].enum == (
        "driver", "front-passenger", "rear-right", "rear-left"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("fly", {}, "unknown function 'fly'"),
        ("possibly_incomplete_start_engine", {}, "unknown function"),
        ("lock_doors", {}, "lock_doors needs 'lock_state'"),
        ("lock_doors", {"lock_state": "ajar"}, "'ajar' is not one of lock, unlock"),
        ("lock_doors", {"lock_state": "lock", "door": 1}, "lock_doors has no argument 'door'"),
        ("set_temperature", {"temperature": "21"}, "temperature must be a number, not '21'"),
        ("set_temperature", {"temperature": True}, "temperature must be a number, not True"),
        ("set_temperature", {"temperature": 0}, "0 is below 1"),
        ("set_temperature", {"temperature": 80.5}, "80.5 is above 80"),
        ("set_cruise_control", {"speed": 99.5}, "speed must be an integer, not 99.5"),
        ("adjust_fan_speed", {"speed": "increase", "area": "driver"}, "area must be an array"),
        ("adjust_fan_speed", {"speed": "increase", "area": ["roof"]}, "'roof' is not one of"),
        ("adjust_fan_speed", {"speed": "increase", "area": [1]}, "1 is no string"),
        ("adjust_fan_speed", {"speed": "increase", "area": ["driver"] * 2}, "is repeated"),
        ("check_battery_health", {"include_history": 1}, "must be a boolean, not 1"),
        ("possibly_incomplete_lock_doors", {"lock_state": "lock"}, "leaves no required"),
        ("possibly_incomplete_lock_doors", {}, "lock_doors needs 'lock_state'"),
    ],
)
def test_a_violation_of_the_schema_is_named(name, arguments, problem):
    violations = VEHICLE.violations(FunctionCall(name, arguments))
    assert any(problem in violation for violation in violations), violations


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("set_cruise_control", {"speed": 100.0}),
        ("set_temperature", {"temperature": 68, "area": ["rear-left", "driver"]}),
        ("start_engine", {}),
        ("possibly_incomplete_set_fan_speed", {"speed": "", "area": ["driver"]}),
    ],
)
def test_a_valid_call_has_no_violation(name, arguments):
    assert VEHICLE.violations(FunctionCall(name, arguments)) == []


def test_canonical_orders_keys_by_schema_and_arrays_by_enum_and_shortens_numbers():
    call = FunctionCall(
        "set_temperature",
        {"unit": "celsius", "odd": 1, "area": ["rear-left", "driver"], "temperature": 21.0},
    )
    canonical = VEHICLE.canonical(call)
    assert list(canonical.arguments.items()) == [
        ("temperature", 21),
        ("area", ["driver", "rear-left"]),
        ("unit", "celsius"),
        ("odd", 1),
    ]
    assert isinstance(canonical.arguments["temperature"], int)


# ---------------------------------------------------------------- registry files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("functions: [", "not valid YAML"),
        ("[" * 3_000, "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("- a", "must be a mapping with 'functions', not a list"),
        ("", "must be a mapping with 'functions', not a NoneType"),
        ("functions: []", "at least one function"),
        ("functions: [3]", "needs a 'name' such as set_temperature, not None"),
        ("functions: [{name: two words}]", "not 'two words'"),
        ("functions: [{name: possibly_incomplete_x}]", "must not start with"),
        ("functions: [{name: f}, {name: f}]", "function 'f' is defined twice"),
        ("functions: [{name: f, parameters: [a]}]", "'f': 'parameters' must be a JSON Schema"),
        ("functions: [{name: f, parameters: {required: [a]}}]", "'a' is not among its properties"),
        ("functions: [{name: f, parameters: {properties: {ab: {type: string}}, required: ab}}]",
         "'f': required must be a list, not 'ab'"),
        ("functions: [{name: f, parameters: {properties: {a: {type: object}}}}]",
         "'f': argument 'a' has type 'object'; use string, integer, number, boolean, array"),
        ("functions: [{name: f, parameters: {properties: {a: {enum: [on, off]}}}}]",
         "enum value True is no string .put quotes around on, off, yes and no"),
        ("functions: [{name: f, parameters: {properties: {on: {type: string}}}}]",
         "key functions.0.parameters.properties.True must be a string .put quotes around it"),
        ("{functions: [{name: f}], lists: {on: {values: [a]}}}", "key lists.True must be a string"),
        ("functions: [{name: f, parameters: {properties: {a: {enum: low}}}}]",
         "argument 'a': enum must be a list, not 'low'"),
        ("functions: [{name: f, parameters: {properties: {a: {type: integer, minimum: low}}}}]",
         "argument 'a': minimum 'low' is no number"),
        ("functions: [{name: f, parameters: {properties: {a: {type: array, items: "
         "{type: array}}}}}]", "items of type 'array' are not supported"),
        ("functions: [{name: f, parameters: {properties: {a: {enum: [b], x-verbatim: true}}}}]",
         "argument 'a': x-verbatim: true is for strings without enum only"),
        ("functions: [{name: f, parameters: {properties: {a's: {type: string, x-verbatim: yes}}}}]",
         "x-verbatim: true needs a name without quotes and backslashes"),
        ("{tools: gone.json, functions: []}", "gone.json can't be read"),
    ],
)  # fmt: skip
def test_a_wrong_registry_file_says_what_and_where(tmp_path, content, message):
    path = tmp_path / "domain.yaml"
    path.write_text(content)
    with pytest.raises(RegistryError, match=message) as caught:
        load_registry(path)
    assert "domain.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


INTEGERS = {"type": "integer", "minimum": 1, "maximum": 9}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": ["string", "null"]}, "has type ['string', 'null']; use string, integer, "),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum 5 is above maximum 1"),
        ({"type": "number", "maximum": float("inf")}, "maximum inf is no number"),
        ({"type": "integer", "minimum": float("nan")}, "minimum nan is no number"),
        ({"type": "string", "minimum": 1}, "minimum is for numbers, not for a string"),
        ({"type": "boolean", "maximum": 1}, "maximum is for numbers, not for a boolean"),
        ({"type": "array", "items": {"maximum": 1}}, "maximum is for numbers, not for a string"),
        ({"type": "array", "enum": ["a"]}, "enum of an array must stand in its items"),
        ({"type": "array", "items": INTEGERS, "maximum": 9}, "maximum of an array must stand in"),
        ({"type": "array", "items": {"enum": ["a", "A"]}}, "enum value 'a' equals another"),
        ({"enum": ["low  beam", "Low beam"]}, "enum value 'low  beam' equals another"),
        ({"type": "number", "enum": [1, 1.0]}, "enum value 1 equals another"),
        ({"type": "number", "enum": [float("nan")]}, "enum value nan is no number"),
        ({"enum": ["a", ""]}, "enum value '' would mean that nothing was said"),
        (INTEGERS | {"enum": [1, 20]}, "enum value 20 is outside minimum and maximum"),
        ({"type": "array", "items": INTEGERS | {"enum": [0]}}, "enum value 0 is outside minimum"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(schema, problem):
    with pytest.raises(RegistryError) as caught:
        registry_of(a=schema)
    assert str(caught.value).startswith("test.yaml: function 'f': argument 'a'")
    assert problem in str(caught.value)


def test_the_name_of_an_argument_must_be_a_string():
    function = {"name": "f", "parameters": {"properties": {1: {"type": "string"}}}}
    with pytest.raises(RegistryError, match="'f': argument 1 must be a string"):
        registry_from_source({"functions": [function]}, "test.yaml")


def test_a_file_may_hold_a_date_and_its_examples_have_a_folder(tmp_path):
    path, folders = tmp_path / "domain.yaml", set()
    for date in ("2024-05-01", "2024-05-02"):
        path.write_text(f"{{functions: [{{name: f}}], updated: {date}}}")
        folders.add(FunctionCallDataModule(functions=str(path)).folder)
    assert len(folders) == 2


def test_a_registry_file_that_is_not_there_or_is_no_text_is_refused(tmp_path):
    with pytest.raises(RegistryError, match=r"gone\.yaml: can't be read \(No such file"):
        load_registry(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RegistryError, match=r"binary\.yaml: not valid YAML"):
        load_registry(tmp_path / "binary.yaml")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "order",
            "description": "Order a dish.",
            "parameters": {"properties": {"dish": {"type": "string"}}, "required": ["dish"]},
        },
    },
    {"name": "cancel"},
]


def test_an_openai_tools_list_supplies_what_the_domain_file_leaves_out(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    domain = {"tools": "tools.json", "functions": [{"name": "order", "sentences": ["a {dish}"]}]}
    (tmp_path / "domain.yaml").write_text(yaml.safe_dump(domain))
    registry = load_registry(tmp_path / "domain.yaml")
    order = registry.by_name["order"]
    assert list(registry.by_name) == ["order", "cancel"]
    assert (order.description, order.required) == ("Order a dish.", ("dish",))
    assert order.sentences == ["a {dish}"]
    # What travels in a checkpoint stands alone, without the tools file.
    assert registry_from_source(registry.source, "checkpoint") == registry


@pytest.mark.parametrize(
    ("tools", "functions", "message"),
    [
        ("{", [], "tools.json: not an OpenAI tools list"),
        ("[" * 100_000, [], "tools.json: not an OpenAI tools list"),
        ('[{"name": ["order"]}]', [], "tools.json: not an OpenAI tools list"),
        (json.dumps(TOOLS), [{"name": "ordr"}], "function 'ordr' is not in .*tools.json"),
        (json.dumps(TOOLS), [{"sentences": []}], "each entry of 'functions' needs a 'name'"),
        (json.dumps(TOOLS), 5, "each entry of 'functions' needs a 'name'"),
    ],
)  # fmt: skip
def test_a_wrong_tools_list_says_what_and_where(tmp_path, tools, functions, message):
    (tmp_path / "tools.json").write_text(tools)
    domain = {"tools": "tools.json", "functions": functions}
    (tmp_path / "domain.yaml").write_text(yaml.safe_dump(domain))
    with pytest.raises(RegistryError, match=message):
        load_registry(tmp_path / "domain.yaml")


def test_a_number_argument_reads_integers_and_its_bounds_are_inclusive():
    registry = registry_of(t={"type": "number", "minimum": 1, "maximum": 80})
    for value in (1, 80, 1.0, 42.5):
        read = parse_call(render_call(FunctionCall("f", {"t": value})))
        assert registry.violations(read) == []
        assert re.search(rf"'t': {value!r}", read.raw)
