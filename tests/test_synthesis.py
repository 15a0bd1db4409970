"""Synthesis: exact tiny domains for what a template says, the vehicle for hygiene."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from fc_lightning.calls import parse_call
from fc_lightning.chat import Example
from fc_lightning.coverage import coverage
from fc_lightning.functions import (
    VEHICLE,
    Registry,
    RegistryError,
    load_registry,
    registry_from_source,
)
from fc_lightning.sentences import compile_groups
from fc_lightning.synthesis import command_key, synthesize, write_data_folder

COLORS = ["red", "green", "blue", "white"]


def lamp(sentences, *, required=("color",), **source) -> Registry:
    """A domain of one function, `paint(color, rooms, level, name)`."""
    properties = {
        "color": {"type": "string", "enum": COLORS},
        "rooms": {"type": "array", "items": {"type": "string", "enum": ["a", "b", "c"]}},
        "level": {"type": "integer", "minimum": 1, "maximum": 30},
        "name": {"type": "string"},
    }
    parameters = {"properties": properties, "required": list(required)}
    function = {"name": "paint", "parameters": parameters, "sentences": sentences}
    lists = {
        "color": {"values": COLORS},
        "room": {"values": [{"in": f"room {r}", "out": r} for r in "abc"]},
        "pair": {"values": [{"in": "both", "out": ["a", "b"]}, {"in": "last", "out": "c"}]},
        "level": {"range": {"from": 1, "to": 30}},
        "name": {"wildcard": True, "values": ["Zoë's {thing} (big|small)"]},
        "thing": {"values": ["Lamp", "Light, Too"]},
    }
    source["lists"] = lists | source.pop("lists", {})
    return registry_from_source({"functions": [function], **source}, "lamp.yaml")


def four(template: str) -> list[str]:
    """A template in four wordings, the fewest of which one can be kept for test."""
    return [f"{template} {word}" for word in ("here", "there", "now", "then")]


def drawn(registry: Registry, num_examples: int, **options) -> dict[str, dict]:
    """What was drawn for train: command -> arguments."""
    rows = synthesize(registry, num_examples=num_examples, **options).train
    return {row.command: dict(parse_call(row.assistant).arguments) for row in rows}


def letters(command: str) -> str:
    return "".join(c for c in command.casefold() if c.isalnum())


# ---------------------------------------------------------------- what a template says


def test_a_slot_fills_the_argument_of_its_name_or_the_one_it_names():
    commands = drawn(lamp([{"orders": four("{color} in {room:rooms}")}]), 30)
    for command, arguments in commands.items():
        said = re.match(r"(\w+) in room (\w)", command.lower())
        assert said and arguments == {"color": said[1], "rooms": [said[2]]}


def test_repeated_slots_of_an_array_add_up_and_never_repeat_an_element():
    template = "red: {room:rooms}, {room:rooms} and {room:rooms}"
    group = {"arguments": {"color": "red"}, "orders": four(template)}
    for arguments in drawn(lamp([group]), 15).values():
        assert arguments["rooms"] == ["a", "b", "c"]


def test_a_value_may_stand_for_several_elements_without_overlap():
    group = {"arguments": {"color": "red"}, "orders": four("{room:rooms} and {pair:rooms}")}
    for command, arguments in drawn(lamp([group]), 9).items():
        expected = {"a", "b", "c"} if "both" in command else {command.lower()[5], "c"}
        assert set(arguments["rooms"]) == expected


def test_free_text_is_what_stands_on_paper_in_lower_case():
    group = {"orders": four("call it {name} or {color} {level}")}
    commands = drawn(lamp([group]), 300)
    for command, arguments in commands.items():
        said = re.search(r"call it (.*) or ", command, re.IGNORECASE)
        assert said and arguments["name"] == said[1].lower().replace("’", "'")
    names = {arguments["name"] for arguments in commands.values()}
    assert "zoë's light, too big" in names
    assert "zoë's light too big" in names  # as a speech recognizer writes it


def test_free_text_has_straight_quotes_whatever_the_list_has():
    lists = {"name": {"values": ["Don’t Stop", "The “Mill”"]}}
    commands = drawn(lamp([{"orders": four("call it {name} or {color} {level}")}], lists=lists), 90)
    names = {arguments["name"] for arguments in commands.values()}
    assert names >= {"don't stop", 'the "mill"'}
    assert not re.search("[‘’“”]", "".join(names))


def test_free_text_of_punctuation_is_kept_and_not_taken_for_what_was_not_said():
    lists = {"name": {"values": ["!!!", "???"]}}
    groups = [{"orders": four("{color} {level} for {name}")}]
    commands = drawn(lamp(groups, lists=lists, required=("name",)), 300)
    assert {arguments["name"] for arguments in commands.values()} == {"!!!", "???"}
    assert all(arguments["name"] in command for command, arguments in commands.items())


def test_a_mark_at_the_beginning_of_a_word_is_not_moved_to_the_word_before():
    lists = {"name": {"values": [".hack", "!wow"]}}
    commands = drawn(lamp([{"orders": four("call {name} , {color} {level}")}], lists=lists), 200)
    assert all(re.match(r"call ([.]?hack|!?wow),? ", c, re.IGNORECASE) for c in commands)


def test_marks_between_digits_are_always_written():
    lists = {"size": {"values": ["2.5 k", "7,5 k", ".5 k", "5 k."]}}
    registry = lamp([{"orders": four("at {level}:30, {size}, {color},")}], lists=lists)
    commands = [c.lower() for c in drawn(registry, 400) if re.match(r"at \d", c, re.IGNORECASE)]
    assert any("," not in command for command in commands)  # as a speech recognizer writes it
    for command in commands:
        assert re.match(r"at \d+:30,? (2\.5|7,5|\.5|5) k", command), command


def test_commands_that_differ_in_a_sign_are_both_drawn():
    lists = {"far": {"range": {"from": -5, "to": 5}}}
    group = {"arguments": {"color": "red"}, "orders": four("red at {far}")}
    commands = {c.lower().removesuffix(".") for c in drawn(lamp([group], lists=lists), 50)}
    assert [c for c in commands if re.search(r"-\d", c) and c.replace("-", "") in commands]


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("Lamp, on!", "LAMP-ON"),
        ("It's “5 – 3”.", "its 5 3"),
        ("set it to −5", "set it to -5"),
        ("zone 2, 30 minutes", "zone 2 30 minutes"),
        ("make it 52°.", "make it 52"),
        ("turn the A/C on", "turn the AC on"),
    ],
)
def test_case_spaces_and_sentence_punctuation_make_no_other_command(command, other):
    assert command_key(command) == command_key(other)


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("set it to 5", "set it to -5"),
        ("set it to 5", "set it to .5"),
        ("at 2.5", "at 25"),
        ("at 2 5", "at 25"),
        ("open C#", "open C++"),
        ("play की", "play का"),
        ("add 👍", "add 👎"),
        ("???", "!!!"),
    ],
)
def test_signs_symbols_and_marks_make_another_command(command, other):
    assert command_key(command) != command_key(other)


def test_numbers_are_said_in_digits_and_words_and_none_is_left_out():
    group = {"arguments": {"color": "red"}, "orders": four("level {level}")}
    commands = drawn(lamp([group]), 90)
    assert {arguments["level"] for arguments in commands.values()} == set(range(1, 31))
    in_words = {a["level"] for c, a in commands.items() if not re.search(r"\d", c)}
    assert 0 < len(in_words) < 30


def test_optionals_alternatives_permutations_and_rules_are_sampled():
    group = {"orders": four("[please] (a|b) (<hue>;today)")}
    registry = lamp([group], expansion_rules={"hue": ["{color}", "so {color}"]})
    text = " ".join(drawn(registry, 200)).lower()
    for words in ("please a", "b so red", "b today so red", "a red today"):
        assert words in text, words


def test_a_huge_list_does_not_drown_its_neighbours():
    lists = {"color": {"values": COLORS + [{"in": f"teal {i}", "out": "blue"} for i in range(999)]}}
    registry = lamp([{"orders": four("(red {level}|{color})")}], lists=lists, required=[])
    is_red = ["level" in arguments for arguments in drawn(registry, 100).values()]
    assert 30 < sum(is_red) < 70


def test_weights_of_groups_and_values_are_kept():
    lists = {"color": {"values": [{"in": "red", "weight": 9}, "blue"]}}
    rare = {"orders": four("{color} {level}")}
    often = {"weight": 4, "arguments": {"color": "white"}, "orders": four("white at {level}")}
    commands = drawn(lamp([rare, often], lists=lists), 200)
    counts = Counter(arguments["color"] for arguments in commands.values())
    assert counts["white"] == pytest.approx(144, abs=25)
    assert counts["red"] > 3 * counts["blue"]


def test_carriers_stand_around_orders_and_not_around_phrases():
    group = {"orders": four("paint {color} {level}"), "phrases": four("some {color} {level}")}
    registry = lamp([group], carriers=["could you {request}, dear?"])
    for command in drawn(registry, 100):
        assert command.lower().startswith("could you ") == ("paint" in command.lower())
        assert " dear" in command or "some" in command.lower()


def test_an_incomplete_group_leaves_the_required_argument_empty():
    groups = [
        {"orders": four("paint it {color} {level}")},
        {"incomplete": True, "orders": four("paint it at {level}")},
    ]
    calls = [
        parse_call(row.assistant)
        for row in synthesize(lamp(groups), num_examples=200, incomplete_share=0.25).train
    ]
    incomplete = [call for call in calls if not call.is_complete]
    assert len(incomplete) == 45
    assert all(list(call.arguments) == ["color", "level"] for call in incomplete)
    assert all(call.arguments["color"] == "" for call in incomplete)


# ---------------------------------------------------------------- templates that can't be used


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"orders": ["paint {colour:color}"]}, "there is no list {colour}"),
        ({"orders": ["paint {color:hue}"]}, "'hue' is no argument of the function"),
        ({"orders": ["paint <hue>"]}, "there is no rule <hue>"),
        ({"orders": ["paint <loop>"]}, "rule <loop> contains itself"),
        ({"orders": ["paint (red"]}, "can't be parsed"),
        ({"orders": [True]}, "put quotes around it"),
        ({"orders": ["{thing:color}"]}, "'Lamp' is not one of red"),
        ({"orders": ["{far:level}"]}, "31 is above 30"),
        ({"orders": ["{color}", "{color}"]}, "stands there twice"),
        ({"arguments": {"color": "pink"}, "orders": ["x"]}, "'pink' is not one of red"),
        ({"arguments": {"hue": 1}, "orders": ["x"]}, "it has no argument 'hue'"),
        ({"order": ["x"]}, "a group of sentences has arguments"),
        ({"weight": 1}, "needs orders or phrases"),
    ],
)
def test_a_wrong_template_is_reported_with_file_function_and_template(group, message):
    lists = {"far": {"range": {"from": 1, "to": 31}}}
    registry = lamp([group], lists=lists, expansion_rules={"loop": "on and <loop>"})
    with pytest.raises(RegistryError) as error:
        compile_groups(registry)
    assert str(error.value).startswith("lamp.yaml: function 'paint'")
    assert message in str(error.value)


def test_a_template_that_leaves_a_required_argument_out_is_reported():
    with pytest.raises(RegistryError, match=r"template 'no colour \w+': paint needs 'color'"):
        synthesize(lamp([{"orders": four("no colour")}]), num_examples=4)


def test_a_function_without_sentences_is_reported():
    with pytest.raises(RegistryError, match="'paint' has no sentences"):
        synthesize(lamp(None), num_examples=4)


def test_asking_for_more_commands_than_there_are_is_an_error():
    registry = lamp([{"arguments": {"color": "red"}, "orders": four("red")}])
    with pytest.raises(ValueError, match=r"only about \d different commands, not 90;"):
        synthesize(registry, num_examples=100)


def test_a_small_domain_has_fewer_test_rows_than_asked_for():
    registry = lamp([{"arguments": {"color": "red"}, "orders": four("red {level}")}])
    examples = synthesize(registry, num_examples=90)
    assert len(examples.train) == 81
    assert 0 < len(examples.test) <= 9


# ---------------------------------------------------------------- hygiene, on what ships


@pytest.fixture(scope="module")
def vehicle() -> Registry:
    return load_registry()


@pytest.fixture(scope="module")
def rows(vehicle) -> tuple[list[Example], list[Example]]:
    data = synthesize(vehicle, num_examples=25_000, seed=3)
    return data.train, data.test


def test_a_tenth_is_test_and_an_eighth_is_incomplete(rows):
    train, test = rows
    assert (len(train), len(test)) == (22_500, 2_500)
    for part in rows:
        num_incomplete = sum("possibly_incomplete_" in row.assistant for row in part)
        assert num_incomplete == pytest.approx(len(part) / 8, abs=1)


def test_no_command_is_there_twice(rows):
    commands = [letters(row.command) for part in rows for row in part]
    assert len(set(commands)) == len(commands)


def test_every_call_is_valid_and_canonical(vehicle, rows):
    for part in rows:
        for row in part:
            call = parse_call(row.assistant)
            assert vehicle.violations(call) == [], row.command
            canonical = vehicle.canonical(call)
            assert list(call.arguments.items()) == list(canonical.arguments.items())


def test_no_function_argument_or_value_is_missing_from_train(vehicle, rows):
    counts = coverage(vehicle, (parse_call(row.assistant) for row in rows[0]))
    assert [row for row, count in counts.items() if count == 0] == []


def test_test_holds_every_kind_of_call(vehicle, rows):
    names = {parse_call(row.assistant).name for row in rows[1]}
    assert names == set(vehicle.call_names)


def test_no_template_is_in_train_and_test(monkeypatch, vehicle):
    sides: list[set[str]] = []

    def record(self, groups, num_examples, incomplete_share, **_):
        sides.append({f"{g.spec.name}: {t.text}" for g in groups for t in g.templates})
        return []

    monkeypatch.setattr("fc_lightning.synthesis._Drawer.draw", record)
    synthesize(vehicle)
    test, train = sides
    assert not test & train
    assert 0.08 < len(test) / len(test | train) < 0.12


def test_the_variety_is_there(rows):
    commands = [row.command for part in rows for row in part]
    for pattern in (
        r"^[A-Z].*\.$",
        r"\?$",
        r"^[a-z' ]+$",
        r"’",
        r"&",
        r"\(",
        r"[éöñã]",
        r"twenty-\w+ degrees",
        r"\bI'm\b",
        r"everyone (but|except) ",
        r"the kids in the (back|rear)",
        r"\w+, \w+[^,]*, and ",
        r"\d+ \w+ (Street|Avenue)",
    ):
        assert sum(bool(re.search(pattern, command)) for command in commands) >= 10, pattern


def test_typing_errors_leave_numbers_and_free_text_alone():
    group = {"orders": four("picture {name} at {level} in {color}")}
    commands = drawn(lamp([group]), 900)
    slips = [c for c in commands if not re.match(r"picture ", c, re.IGNORECASE)]
    assert 0 < len(slips) < 90
    for command, arguments in commands.items():
        assert arguments["name"] in command.lower().replace("’", "'")
        assert re.search(r" at (\d+|[a-z]+(-[a-z]+)?) in ", command), command


def test_the_same_seed_gives_the_same_rows_in_another_process(vehicle):
    script = (
        "import sys; from fc_lightning.functions import load_registry;"
        "from fc_lightning.synthesis import synthesize;"
        "sys.stdout.buffer.write(repr(synthesize(load_registry(), num_examples=300, seed=5))"
        ".encode())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert run.stdout.decode() == repr(synthesize(vehicle, num_examples=300, seed=5))
    assert run.stdout.decode() != repr(synthesize(vehicle, num_examples=300, seed=6))


# ---------------------------------------------------------------- files and counts


def test_a_data_folder_holds_train_and_test_in_the_reference_format(tmp_path, vehicle):
    write_data_folder(tmp_path / "new" / "data", vehicle, num_examples=50, seed=1)
    written = sorted((tmp_path / "new" / "data").iterdir())
    assert [path.name for path in written] == ["fc_test.json", "fc_train.json"]
    rows = json.loads(written[1].read_text(encoding="utf-8"))
    expected = synthesize(vehicle, num_examples=50, seed=1).train
    assert [Example(**row) for row in rows] == expected
    assert set(rows[0]) == {"system", "user", "assistant"}


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, vehicle, monkeypatch):
    (tmp_path / "fc_test.json").write_text("old")

    def fail(rows, **_):
        raise OSError("disk full")

    monkeypatch.setattr("fc_lightning.synthesis.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_data_folder(tmp_path, vehicle, num_examples=20)
    assert [path.name for path in tmp_path.iterdir()] == ["fc_test.json"]
    assert (tmp_path / "fc_test.json").read_text() == "old"


def test_invented_names_are_new_and_are_the_value():
    name = {"invented_names": {"from": 1, "to": 2}}
    rows = drawn(lamp([{"orders": four("call it {name}")}], required=(), lists={"name": name}), 200)
    names = [arguments["name"] for arguments in rows.values()]
    assert all(name in row.lower() for row, name in zip(rows, names, strict=True))
    assert {len(name.split()) for name in names} == {1, 2}
    assert len(set(names)) > 150


def test_the_smart_home_is_said_whole_and_validly():
    home = load_registry(VEHICLE.with_name("smart_home.yaml"))
    examples = synthesize(home, num_examples=5_000)
    calls = [parse_call(row.assistant) for row in examples.train + examples.test]
    assert [call for call in calls if home.violations(call)] == []
    assert [row for row, count in coverage(home, calls).items() if not count] == []
    commands = [{letters(row.command) for row in rows} for rows in (examples.train, examples.test)]
    assert not commands[0] & commands[1]
