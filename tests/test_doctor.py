"""Folders with one thing wrong: that it is found, where, and that nothing else is."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fc_lightning.calls import FunctionCall
from fc_lightning.chat import make_example
from fc_lightning.dataset import DataError, FunctionCallDataset, Row
from fc_lightning.doctor import FIXES, Problem, diagnose
from fc_lightning.functions import Registry, registry_from_source

REGISTRY = registry_from_source(
    {
        "functions": [
            {
                "name": "set_lamp",
                "parameters": {
                    "properties": {
                        "state": {"type": "string", "enum": ["on", "off"]},
                        "rooms": {"type": "array", "items": {"enum": ["attic", "den"]}},
                    },
                    "required": ["state"],
                },
            }
        ]
    },
    "lamp.yaml",
)
ON, OFF = (FunctionCall("set_lamp", {"state": state}) for state in ("on", "off"))
BOTH = FunctionCall("set_lamp", {"state": "on", "rooms": ["attic", "den"]})
HALF = FunctionCall("possibly_incomplete_set_lamp", {"state": ""})
# Together they leave no call, argument or value out.
TRAIN = [
    ("lamp on", ON),
    ("lamp off", OFF),
    ("both lamps on", BOTH),
    ("attic lamp on", FunctionCall("set_lamp", {"state": "on", "rooms": ["attic"]})),
    ("set the lamp", HALF),
    ("attic lamp", FunctionCall("possibly_incomplete_set_lamp", {"state": "", "rooms": ["attic"]})),
    (
        "the lamps",
        FunctionCall("possibly_incomplete_set_lamp", {"state": "", "rooms": ["den", "attic"]}),
    ),
]
TEST = [("light, please", ON)]


def entry(command, call):
    return vars(make_example(command, call))


@pytest.fixture
def found_in(tmp_path):
    """What is found in a folder of sound examples with more behind them."""

    def diagnose_with(train=(), test=(), **options):
        for name, sound, more in (("a_train", TRAIN, train), ("a_test", TEST, test)):
            entries = [entry(*pair) for pair in sound]
            entries += [e if isinstance(e, dict) else entry(*e) for e in more]
            (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        return diagnose(tmp_path, REGISTRY, **options).problems

    return diagnose_with


def test_nothing_is_wrong_with_sound_examples(found_in):
    assert found_in() == []


def test_a_repeated_command_is_found_whatever_its_case_and_punctuation(found_in):
    problems = found_in(train=[("Lamp, on!", ON), ("LAMP-ON", ON)])
    assert problems == [
        Problem("repeated", "a_train.json: row 7", "'Lamp, on!', as in row 0"),
        Problem("repeated", "a_train.json: row 8", "'LAMP-ON', as in row 0"),
    ]


def test_marks_between_digits_make_commands_different(found_in):
    assert found_in(train=[("lamp 2.5", ON), ("lamp 25", OFF)]) == []


def test_signs_symbols_and_vowel_signs_make_commands_different(found_in):
    pairs = [("lamp 5", "lamp -5"), ("lamp C#", "lamp C++"), ("lamp की", "lamp का"), ("👍", "👎")]
    assert found_in(train=[row for one, other in pairs for row in ((one, ON), (other, OFF))]) == []


def test_one_command_with_two_calls_is_a_contradiction(found_in):
    [problem] = found_in(train=[("Lamp on.", OFF)])
    what = "'Lamp on.': set_lamp(state='off'), but row 0: set_lamp(state='on')"
    assert problem == Problem("contradiction", "a_train.json: row 7", what)


def test_a_call_with_its_arguments_in_another_order_is_the_same(found_in):
    turned = FunctionCall("set_lamp", {"rooms": ["den", "attic"], "state": "on"})
    assert [p.kind for p in found_in(train=[("both lamps on", turned)])] == ["repeated"]


def test_a_test_command_that_is_trained_on_is_found(found_in):
    [problem] = found_in(test=[("lamp on", ON)])
    what = "'lamp on', as in a_train.json: row 0"
    assert problem == Problem("test seen in training", "a_test.json: row 1", what)


@pytest.mark.parametrize(
    ("response", "kind", "what"),
    [
        ("I can't do that", "unreadable call", "no call in ''"),
        ('<functioncall> {"name": "fly", "arguments": "{}"}', "unknown function", "'fly'"),
        (
            '<functioncall> {"name": "set_lamp", "arguments": "{\'state\': \'dim\'}"}',
            "call against its schema",
            "state: 'dim' is not one of on, off",
        ),
    ],
)
def test_calls_that_cant_be_taught_are_found(found_in, response, kind, what):
    example = entry("dim it", ON) | {"assistant": response}
    assert found_in(train=[example]) == [Problem(kind, "a_train.json: row 7", what)]


def test_rows_that_are_no_examples_are_found_and_the_rest_is_read(found_in):
    empty, wrong = entry("dim it", ON) | {"assistant": ""}, {"user": "dim it"}
    problems = found_in(train=[empty, wrong, ("LAMP on", ON)])
    assert [(p.kind, p.where) for p in problems] == [
        ("not an example", "a_train.json: row 7"),
        ("not an example", "a_train.json: row 8"),
        ("repeated", "a_train.json: row 9"),
    ]
    assert "the response is empty" in problems[0].what
    assert "found user" in problems[1].what


def test_commands_that_nobody_could_say_are_found(found_in):
    bare = entry("x", ON) | {"user": "dim it"}
    other_system = entry("dim that", ON) | {"system": "You are a lamp."}
    problems = found_in(train=[(" ", ON), bare, other_system, ("two\nlines", ON)])
    assert [(p.kind, p.where) for p in problems] == [
        ("not an example", "a_train.json: row 7"),
        *(("unusual prompt", f"a_train.json: row {n}") for n in (8, 9, 10)),
    ]
    assert [p.what for p in problems[1:3]] == ["'dim it'", "'You are a lamp.'"]


def test_a_row_is_too_long_where_training_would_leave_it_out(found_in):
    rows = [Row(make_example(*pair), Path(), n) for n, pair in enumerate(TRAIN)]
    longest = max(length for _, length in FunctionCallDataset(rows, block_size=1).too_long)
    assert FunctionCallDataset(rows, block_size=longest).too_long == []
    assert found_in(block_size=longest) == []
    [problem, *_] = found_in(block_size=longest - 1)
    assert (problem.kind, problem.what) == ("too long", f"{longest} tokens, {longest - 1} fit")
    assert len(found_in(block_size=40)) == len(TRAIN) + len(TEST)


def test_calls_and_values_that_never_occur_are_named(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([entry("lamp on", ON)]))
    (tmp_path / "test.json").write_text(json.dumps([entry("hello", FunctionCall("fly", {}))]))
    problems = diagnose(tmp_path, REGISTRY).problems
    assert problems[1:] == [
        Problem("never in training", "possibly_incomplete_set_lamp", "no row with this call"),
        Problem("never in training", "set_lamp: state", "off"),
        Problem("never in training", "set_lamp: rooms", "attic, den, 1 of 2, 2 of 2"),
        Problem("never in test", "set_lamp", "no row with this function"),
    ]


def one_argument(schema) -> Registry:
    function = {"name": "tune", "parameters": {"properties": {"x": schema}, "required": ["x"]}}
    return registry_from_source({"functions": [function]}, "tune.yaml")


def diagnose_calls(folder, schema, values):
    """What is found where each of the values is trained and tested, by commands of its own."""
    for split in ("train", "test"):
        calls = [FunctionCall("tune", {"x": value}) for value in values]
        calls.append(FunctionCall("possibly_incomplete_tune", {"x": ""}))
        rows = [entry(f"{split} {chr(97 + n)}", call) for n, call in enumerate(calls)]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return diagnose(folder, one_argument(schema)).problems


def test_of_many_values_that_never_occur_a_few_are_named(tmp_path):
    schema = {"type": "integer", "minimum": 1, "maximum": 1000}
    [problem] = diagnose_calls(tmp_path, schema, [1, 3])
    assert problem.what == "2, 4, 5, 6, 7 and 993 more"


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number"}, 52.51, 52.5163),
        ({"type": "integer"}, 491511111, 4915111111111),
        ({"type": "string"}, "it's " * 16, "x" * 81),
        ({"type": "array", "items": {"type": "string"}}, ["b", "a"], []),
    ],
)
def test_a_call_that_the_grammar_does_not_allow_is_found(tmp_path, schema, good, bad):
    problems = diagnose_calls(tmp_path, schema, [good, bad])
    assert problems == [
        Problem("can't be written", f"{split}.json: row 1", str(FunctionCall("tune", {"x": bad})))
        for split in ("test", "train")
    ]


def test_a_schema_that_the_grammar_can_not_satisfy_is_found(tmp_path):
    schema = {"type": "number", "minimum": 0.001, "maximum": 0.004}
    [problem] = diagnose_calls(tmp_path, schema, [0.002])
    assert (problem.kind, problem.where) == ("can't be written", "tune.yaml")
    assert "no number lies between 0.001 and 0.004" in problem.what


def test_a_function_is_tested_by_its_incomplete_form_too(tmp_path):
    for name, pairs in (("train", TRAIN), ("test", [("do set it", HALF)])):
        (tmp_path / f"{name}.json").write_text(json.dumps([entry(*pair) for pair in pairs]))
    assert diagnose(tmp_path, REGISTRY).problems == []


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{}", b"[]", b"[" * 10_000, b'[{"user": 1', b"null"]
)
def test_a_file_that_is_no_list_of_rows_is_one_problem(tmp_path, content):
    (tmp_path / "train.json").write_bytes(content)
    (tmp_path / "test.json").write_text(json.dumps([entry("lamp on", ON)]))
    [problem] = diagnose(tmp_path, REGISTRY).problems
    assert (problem.kind, problem.where) == ("unusable file", "train.json")


def test_a_folder_without_a_split_is_incomplete(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([entry("lamp on", ON)]))
    (tmp_path / "notes.json").write_text("not read")
    assert [(p.kind, p.where) for p in diagnose(tmp_path, REGISTRY).problems] == [
        ("missing split", "train")
    ]


def test_a_missing_folder_is_an_error():
    with pytest.raises(DataError, match="no such folder"):
        diagnose(Path("nowhere"), REGISTRY)


def test_the_table_counts_all_and_shows_the_first_places(tmp_path):
    rows = [entry("[bold]lamp[/] on", ON)] * 6
    (tmp_path / "train.json").write_text(json.dumps(rows))
    diagnosis = diagnose(tmp_path, REGISTRY)
    console = Console(file=io.StringIO(), width=200)
    console.print(diagnosis)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == f"6 rows in 1 file of {tmp_path}"
    assert any(line.split()[:2] == ["repeated", "5"] for line in lines)
    assert "and 2 more" in lines
    assert "'[bold]lamp[/] on', as in row 0" in lines
    assert "train.json: row 4" not in lines
    assert {p.kind for p in diagnosis.problems} <= FIXES.keys()


def test_half_a_surrogate_pair_is_read(found_in):
    assert found_in(train=[("lamp \ud83d", ON)]) == []


def test_real_commands_have_contradictions_leaks_and_gaps():
    folder = Path(__file__).parents[2] / "shared" / "model_data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/model_data")
    from fc_lightning.functions import load_registry

    diagnosis = diagnose(folder, load_registry())
    counts = {k: sum(p.kind == k for p in diagnosis.problems) for k in FIXES}
    # Counted independently, with ast and plain dictionaries.
    assert {kind: count for kind, count in counts.items() if count} == {
        "contradiction": 77,
        "test seen in training": 5,
        "repeated": 1108,
        "never in training": 11,
    }
