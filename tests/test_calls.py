"""How a call is written, read and compared."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fc_lightning.calls import (
    INCOMPLETE_PREFIX,
    FunctionCall,
    UnreadableCall,
    calls_equal,
    parse_call,
    render_call,
    value_key,
    values_equal,
)
from fc_lightning.functions import registry_from_source


def clean(literal: str) -> str:
    """A call of `f` whose outer JSON is right, around any literal."""
    return f"<functioncall> {json.dumps({'name': 'f', 'arguments': literal})} "


def loose(literal: str) -> str:
    """A call of `f` as other people's files hold it: the literal's double quotes not escaped."""
    return f'<functioncall> {{"name": "f", "arguments": "{literal}"}} <|im_end|><|endoftext|>'


# ---------------------------------------------------------------- round trip


def scalars(kind: str):
    return {
        "string": st.text(),
        "integer": st.integers(-(10**30), 10**30),
        "number": st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        "boolean": st.booleans(),
    }[kind]


@st.composite
def properties(draw):
    """One argument's JSON Schema: a scalar or an array, an enum or free."""
    kind = draw(st.sampled_from(["string", "integer", "number", "boolean"]))
    item: dict = {"type": kind}
    if draw(st.booleans()):
        choices = scalars(kind).filter(lambda v: v != "")  # '' means not said
        item["enum"] = draw(st.lists(choices, min_size=1, max_size=5, unique_by=value_key))
    return {"type": "array", "items": item} if draw(st.booleans()) else item


@st.composite
def registries_and_calls(draw):
    """Any registry of one function, and a call that satisfies its schema."""
    schemas = draw(st.dictionaries(st.text(), properties(), max_size=4))
    required = [name for name in schemas if draw(st.booleans())]
    arguments = {}
    for name, schema in schemas.items():
        if name not in required and draw(st.booleans()):
            continue
        item = schema.get("items", schema)
        one = st.sampled_from(item["enum"]) if "enum" in item else scalars(item["type"])
        many = st.lists(one, max_size=5, unique_by=value_key)
        arguments[name] = draw(many if schema["type"] == "array" else one)
    function = {"name": "f", "parameters": {"properties": schemas, "required": required}}
    keys = draw(st.permutations(list(arguments)))
    call = FunctionCall("f", {key: arguments[key] for key in keys})
    return registry_from_source({"functions": [function]}, "drawn"), call


@given(registries_and_calls())
def test_any_valid_call_of_any_schema_is_read_back_as_it_was_written(drawn):
    registry, call = drawn
    assert registry.violations(call) == []
    text = render_call(registry.canonical(call))
    read = parse_call(text)
    assert calls_equal(read, call)
    assert registry.violations(read) == []
    assert render_call(registry.canonical(read)) == text


@given(st.text(), st.text())
def test_any_string_is_read_back_exactly(name, value):
    call = FunctionCall("f", {name: value, "list": [value, value]})
    assert parse_call(render_call(call)).arguments == call.arguments
    as_openai = json.dumps({"name": "f", "arguments": json.dumps(call.arguments)})
    as_object = json.dumps({"name": "f", "arguments": call.arguments})
    if name != "list":
        assert parse_call(as_openai).arguments == call.arguments
        assert parse_call(as_object).arguments == call.arguments


@given(st.text(st.characters(exclude_characters='"\\', exclude_categories=["Cc", "Cs"])))
def test_any_string_in_unescaped_double_quotes_is_read_exactly(value):
    assert parse_call(loose(f"{{'a': \"{value}\"}}")).arguments == {"a": value}


@given(st.text())
def test_any_text_is_a_call_or_unreadable(text):
    for candidate in (text, f"<functioncall>{text}", clean(text), loose(text)):
        try:
            assert isinstance(parse_call(candidate), FunctionCall)
        except UnreadableCall as error:
            assert len(str(error)) < 200


# ---------------------------------------------------------------- writing


def test_a_call_is_valid_json_around_a_python_literal():
    text = render_call(FunctionCall("f", {"a": True, "b": ["x", 2], "c": 'say "don\'t"'}))
    assert text == (
        '<functioncall> {"name": "f", "arguments": '
        "\"{'a': True, 'b': ['x', 2], 'c': 'say \\\"don\\\\'t\\\"'}\"} "
    )


# ---------------------------------------------------------------- reading what is not clean


@pytest.mark.parametrize("write", [clean, loose])
@pytest.mark.parametrize(
    ("literal", "arguments"),
    [
        ("{'b': true, 'c': false}", {"b": True, "c": False}),
        ("{'b': True, 'c': False, 'd': None}", {"b": True, "c": False, "d": None}),
        ("{'track': \"don't let me down\"}", {"track": "don't let me down"}),
        ("{'track': \"it's\", 'volume': 3}", {"track": "it's", "volume": 3}),
        ("{'area': ['rear-left', 'driver']}", {"area": ["rear-left", "driver"]}),
        ("{'t': 21, 'u': 21.5, 'v': -1e2}", {"t": 21, "u": 21.5, "v": -100.0}),
        ("{'a': '', 'b': [], 'c': {}}", {"a": "", "b": [], "c": {}}),
        ("{'a': 'b',}", {"a": "b"}),
        ("{}", {}),
    ],
)
def test_what_real_files_hold_is_read(write, literal, arguments):
    read = parse_call(write(literal))
    assert read == FunctionCall("f", arguments)
    assert [type(v) for v in read.arguments.values()] == [type(v) for v in arguments.values()]


@pytest.mark.parametrize(
    "text",
    [
        '<|im_start|>assistant\n<functioncall> {"name": "f", "arguments": "{}"} <|im_end|>',
        'Sure: <functioncall>{"arguments": "{}", "name": "f"}<|im_end|> <|endoftext|>\n',
        '  {"name": "f", "arguments": {}}',
        '{"name": "f"}',
    ],
)
def test_a_call_is_found_behind_other_text_and_before_markers(text):
    assert parse_call(text) == FunctionCall("f", {})
    assert parse_call(text).raw == text


def test_an_emoji_that_json_escaped_as_two_surrogates_is_one_character():
    assert parse_call(clean(r'{"a": "\ud83d\ude97"}')).arguments == {"a": "🚗"}
    assert parse_call(clean(r'{"a": "\ud83d"}')).arguments == {"a": "�"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no call"),
        ("I can't do that.", "no call"),
        ('<functioncall> {"name": "f", "arguments": "{\'a', "no call"),
        ('<functioncall> {"arguments": "{}"}', 'needs a "name"'),
        ('<functioncall> {"name": 3, "arguments": "{}"}', 'needs a "name"'),
        ("<functioncall> [1]", 'needs a "name"'),
        ('<functioncall> {"name": "f", "arguments": [1]}', "no dict"),
        ('<functioncall> {"name": "f", "arguments": {"a": NaN}}', "expected a value"),
        (clean("[1]"), "no dict"),
        (loose('"x"'), "no dict"),
        (clean("{'a': 'b'"), "end too soon|expected '}'"),
        (clean("{'a' 'b'}"), "expected 'name': value at 'a'"),
        (clean("{1: 'b'}"), "expected 'name': value at 1"),
        (clean("{'a': b}"), "not 'b'"),
        (clean("{'a': 1} {'b': 2}"), "after the end"),
        (clean("{'a': 1 2}"), "expected '}' or ','"),
        (clean("{'a': 1, 'a': 2}"), "given twice"),
        (clean("{'a': 1e999}"), "too large"),
        (clean("{'a': __import__('os').getcwd()}"), "can't read"),
        (clean("{'a': 'x' * 9}"), "can't read"),
    ],
)
def test_what_is_no_call_is_unreadable_and_says_why(text, message):
    with pytest.raises(UnreadableCall, match=message):
        parse_call(text)


@pytest.mark.parametrize("write", [clean, loose])
@pytest.mark.parametrize(
    "literal",
    [
        "{'a': '" + "x" * 1_000_000 + "'}",
        "{'a': " + "[" * 10_000 + "]" * 10_000 + "}",
        "{'a': " + "[" * 5_000 + "]" * 5_000 + "}",
        "{'a':" * 2_000 + "1" + "}" * 2_000,
        "{'a': " + "9" * 10_000 + "}",
        " " * 19_000,
        "<|im_end|> " * 1_700,
        "'" * 9_001,
        '"' * 9_000,
    ],
)  # fmt: skip
def test_huge_and_deep_literals_are_refused_quickly(write, literal):
    start = time.perf_counter()
    with pytest.raises(UnreadableCall):
        parse_call(write(literal))
    # Milliseconds in truth; anything quadratic or exponential takes longer than this.
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("depth", [9, 500, 900, 5_000])
def test_a_deep_json_object_is_refused_too(depth):
    nested = "[" * depth + "]" * depth
    with pytest.raises(UnreadableCall):
        parse_call(f'{{"name": "f", "arguments": {{"a": {nested}}}}}')


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("expected", "predicted", "is_equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        (5, "5", False),
        (None, "None", False),
        ("medium", "MEDIUM", True),
        ("low  beam", " Low\tBeam ", True),
        ("straße", "STRASSE", True),
        ("a b", "ab", False),
        (["driver", "rear-left"], ["rear-left", "DRIVER"], True),
        (["driver"], ["driver", "driver"], False),
        (["driver", "driver"], ["driver"], False),
        (["driver", "driver"], ["driver", "driver"], False),
        (["driver"], ["driver", "rear-left"], False),
        (["driver"], "driver", False),
        ([1], [True], False),
        ([], [], True),
        ("", "", True),
    ],
)
def test_values_are_equal_by_the_rules_of_the_format(expected, predicted, is_equal):
    assert values_equal(expected, predicted) is is_equal
    assert values_equal(predicted, expected) is is_equal


def test_calls_are_equal_by_name_and_arguments_whatever_their_order():
    call = FunctionCall("f", {"a": 1, "b": ["x", "y"]})
    assert calls_equal(call, FunctionCall("f", {"b": ["y", "x"], "a": 1.0}, confidence=0.5))
    assert not calls_equal(call, FunctionCall("g", call.arguments))
    assert not calls_equal(call, FunctionCall("f", {"a": 1}))
    assert not calls_equal(call, FunctionCall("f", {**call.arguments, "c": None}))


def test_an_incomplete_call_knows_what_to_ask_for():
    call = FunctionCall(f"{INCOMPLETE_PREFIX}set_fan_speed", {"speed": "", "area": ["driver"]})
    assert (call.function, call.is_complete, call.missing) == ("set_fan_speed", False, ("speed",))
    whole = FunctionCall("play_music", {"track": ""})
    assert (whole.function, whole.is_complete, whole.missing) == ("play_music", True, ())
