"""Sentences: what a list's value becomes in the call, and groups and lists that are wrong."""

from itertools import combinations
from random import Random

import pytest

from fc_lightning.calls import parse_call
from fc_lightning.functions import RegistryError, registry_from_source
from fc_lightning.sentences import compile_carriers, compile_groups
from fc_lightning.synthesis import synthesize

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
COLOR = {"type": "string", "enum": ["red", "blue"]}
COUNT = {"type": "integer"}


def registry_of(schema, template="{x}", *, group=None, **source):
    """A domain of one function, `f(x)`, with one template in four wordings."""
    group = {"orders": [f"{template} {word}" for word in "abcd"]} | (group or {})
    parameters = {"properties": {"x": schema}}
    function = {"name": "f", "parameters": parameters, "sentences": [group]}
    return registry_from_source({"functions": [function], **source}, "test.yaml")


def drawn(registry, num_examples):
    """Command in lower case, without its last word -> x."""
    rows = synthesize(registry, num_examples=num_examples).train
    calls = {row.command: parse_call(row.assistant) for row in rows}
    return {
        command.lower().rpartition(" ")[0]: call.arguments["x"] for command, call in calls.items()
    }


def test_invented_names_fill_the_argument_that_the_slot_names():
    lists = {"inv": {"invented_names": {"from": 1, "to": 2}}}
    commands = drawn(registry_of(TEXT, "{inv:x}", lists=lists), 30)
    assert len(commands) > 20
    assert all(command == name for command, name in commands.items())


def test_invented_names_are_elements_of_an_array():
    lists = {"inv": {"invented_names": {"from": 1, "to": 1}}}
    commands = drawn(registry_of(TEXTS, "{inv:x} and {inv:x}", lists=lists), 30)
    assert len(commands) > 20
    assert all(set(command.split(" and ")) == set(x) for command, x in commands.items())


def test_a_value_without_out_is_what_was_said_beside_values_with_one():
    lists = {"x": {"values": [{"in": "mum", "out": "mother"}, "[my] Dad"]}}
    commands = drawn(registry_of(TEXT, lists=lists), 8)
    said = {"mum": "mother", "dad": "dad", "my dad": "my dad"}
    assert commands.keys() == said.keys()
    assert all(said[command] == value for command, value in commands.items())


def test_an_element_without_out_is_what_was_said_and_is_not_repeated():
    lists = {"x": {"values": ["[my] Mom", "(my|) Mom", {"in": "pa", "out": ["Dad"]}]}}
    (group,) = compile_groups(registry_of(TEXTS, "{x} and {x}", lists=lists))
    seen = set()
    for seed in range(60):
        draft = group.new_draft()
        group.templates[0].say(draft, Random(seed))
        seen.add(frozenset(draft.arguments["x"]))
    assert seen == {frozenset(pair) for pair in combinations(("mom", "my mom", "Dad"), 2)}


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ({"orders": "stopand"}, "orders of a group must be a list"),
        ({"phrases": "stop"}, "phrases of a group must be a list"),
        ({"arguments": ["x"]}, "arguments of a group must be a dict"),
        ({"incomplete": "no"}, "incomplete of a group must be a bool"),
        ({"weight": "a lot"}, "weight 'a lot' must be a number above 0"),
        ({"weight": 0}, "weight 0 must be a number above 0"),
    ],
)
def test_a_wrong_group_is_reported_with_file_and_function(group, problem):
    registry = registry_of(TEXT, group=group, lists={"x": {"values": ["a"]}})
    with pytest.raises(RegistryError, match=f"^test.yaml: function 'f': {problem}"):
        compile_groups(registry)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"lists": ["x"]}, "lists must be a dict"),
        ({"expansion_rules": ["x"]}, "expansion_rules must be a dict"),
        ({"carriers": "please {request}"}, "carriers must be a list"),
    ],
)
def test_a_wrong_part_of_the_file_is_reported(source, problem):
    with pytest.raises(RegistryError, match=f"^test.yaml: {problem}"):
        registry_of(TEXT, **source)


@pytest.mark.parametrize(
    ("group", "fix"),
    [
        ({}, "or mark the group incomplete"),
        ({"arguments": {"x": 1}, "incomplete": True}, "or take 'incomplete' from the group"),
    ],
)
def test_what_to_do_about_a_call_that_is_not_valid_fits_the_group(group, fix):
    schema = {"properties": {"x": COUNT}, "required": ["x"]}
    function = {"name": "f", "parameters": schema, "sentences": [{"orders": [*"abcd"]} | group]}
    registry = registry_from_source({"functions": [function]}, "test.yaml")
    with pytest.raises(RegistryError, match=fix):
        synthesize(registry, num_examples=4, incomplete_share=float("incomplete" in group))


@pytest.mark.parametrize(
    ("schema", "entry", "problem"),
    [
        (TEXT, {"values": "abc"}, "list {x}: values must be a list, not 'abc'"),
        (TEXT, {"values": [{"in": "a", "weight": 0}]}, "list {x}: weight 0 must be a number"),
        (COLOR, {"invented_names": {"from": 1, "to": 2}}, "list {x}: x takes no invented names"),
        (COUNT, {"range": {"from": 1, "to": 2, "step": 0}}, "list {x}: needs whole numbers"),
        (COUNT, {"range": {"from": 1, "to": 2}}, "language 'xx' is unknown; use one such as en"),
    ],
)
def test_a_wrong_list_is_reported_with_file_and_list(schema, entry, problem):
    with pytest.raises(RegistryError) as caught:
        compile_groups(registry_of(schema, lists={"x": entry}, language="xx"))
    assert str(caught.value).startswith("test.yaml: ")
    assert problem in str(caught.value)


def test_a_wrong_weight_of_a_carrier_is_reported():
    registry = registry_of(TEXT, carriers=[{"says": "{request}", "weight": -1}])
    with pytest.raises(RegistryError, match=r"test\.yaml: carriers: weight -1 must be a number"):
        compile_carriers(registry)
