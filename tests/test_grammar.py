"""The grammar against the training tokenisation, the schema, and what must be refused."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fc_lightning.calls import FunctionCall, parse_call, render_call
from fc_lightning.chat import encode_example, make_example
from fc_lightning.decoding import num_decisions
from fc_lightning.functions import ParameterSpec, Registry, load_registry, registry_from_source
from fc_lightning.grammar import Place, compile_grammar, max_response_tokens, number_pattern
from fc_lightning.tokenizer import END_OF_TEXT, get_encoding

REAL_DATA = Path(__file__).parents[2] / "shared" / "model_data"
VEHICLE = load_registry()
FIRST = compile_grammar(VEHICLE)

ODD = registry_from_source(
    {
        "functions": [
            {"name": "stop"},
            {
                "name": "stopwatch",
                "parameters": {
                    "properties": {
                        "label": {"type": "string"},
                        "mode": {"enum": ["it's", 'say "hi"', "größe", "grün", "a\\b", "on/off"]},
                        "laps": {"type": "array", "items": {"type": "integer", "minimum": -3}},
                        "names": {"type": "array", "items": {"type": "string"}},
                        "flags": {"type": "array", "items": {"type": "boolean"}},
                    },
                    "required": ["label", "mode"],
                },
            },
            {
                "name": "tune",
                "parameters": {
                    "properties": {
                        "gain": {"type": "number", "minimum": -2.5, "maximum": 1.25},
                        "step": {"type": "integer", "enum": [10, 100, 1000]},
                        "ratio": {"type": "number"},
                        "is_on": {"type": "boolean"},
                    },
                    "required": ["gain", "is_on"],
                },
            },
        ]
    },
    "odd",
)


def response_ids(call: FunctionCall) -> list[int]:
    encoded = encode_example(make_example("x", call))
    return encoded.ids[encoded.num_prompt_tokens :]


def token_of(text: str) -> int:
    (token,) = get_encoding().encode_ordinary(text)
    return token


def is_allowed(place: Place, token: int) -> bool:
    allowed = place.allowed
    return bool(allowed[token]) if allowed.dtype == torch.bool else token in allowed.tolist()


def allowed_ids(place: Place) -> list[int]:
    is_mask = place.allowed.dtype == torch.bool
    return (place.allowed.nonzero()[:, 0] if is_mask else place.allowed).tolist()


def accepts(first: Place, name: str, **arguments: object) -> bool:
    return num_decisions(first, response_ids(FunctionCall(name, arguments))) is not None


def random_walk(first: Place, rng: random.Random) -> list[int]:
    place, ids = first, []
    while True:
        ids += place.forced
        if not len(place.allowed):
            return ids
        ids.append(rng.choice(allowed_ids(place)))
        place = place.after(ids[-1])


def real_calls() -> Iterator[FunctionCall]:
    for file in sorted(REAL_DATA.glob("*.json")):
        for row in json.loads(file.read_text()):
            yield VEHICLE.canonical(parse_call(row["assistant"]))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real commands are not here")
def test_forced_tokens_are_the_training_tokenisation_of_every_real_call() -> None:
    unique = {render_call(call): call for call in real_calls()}
    decisions = {text: num_decisions(FIRST, response_ids(call)) for text, call in unique.items()}
    assert [text for text, count in decisions.items() if count is None] == []
    counts = [decisions[render_call(call)] for call in real_calls()]
    assert sum(filter(None, counts)) / len(counts) < 6  # of 63 tokens


@pytest.mark.parametrize(
    "text",
    [
        "thriller",
        "don't stop",
        'the "best" of',
        """don't say "never\"""",
        "Café Zürich, 5th Ave. (north)",
        "what's up?",
        "東京タワー",
        "🎵 party!",
        "(I can't get no) satisfaction",
        "'",
        "...",
        "a" * 80,
        " x ",
    ],
)
def test_free_strings_keep_their_training_tokenisation(text: str) -> None:
    assert accepts(FIRST, "play_music", track=text, volume=5)
    assert accepts(FIRST, "set_navigation_destination", destination=text)


def test_an_accepted_text_is_written_in_one_way_only() -> None:
    written = render_call(FunctionCall("play_music", {"track": "abc"}))
    for otherwise in (r"\"abc\"", r"'a\\'c'"):
        body = written.replace("'abc'", otherwise)
        assert parse_call(body).name == "play_music"
        assistant = make_example("x", FunctionCall("x", {})).assistant
        text = "assistant: " + assistant.replace(render_call(FunctionCall("x", {})), body)
        ids = [*get_encoding().encode_ordinary(text), END_OF_TEXT]
        assert num_decisions(FIRST, ids) is None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("set_temperature", {"temperature": 1}),
        ("set_temperature", {"temperature": 80, "unit": "celsius"}),
        ("set_temperature", {"temperature": 21.5, "area": ["driver", "rear-left"]}),
        ("activate_defroster", {}),
        ("activate_defroster", {"duration_minutes": 30}),
        ("check_battery_health", {"include_history": True}),
        ("possibly_incomplete_set_temperature", {"temperature": "", "unit": "celsius"}),
        ("possibly_incomplete_set_navigation_destination", {"destination": ""}),
    ],
)
def test_valid_calls_are_allowed(name: str, arguments: dict[str, object]) -> None:
    assert accepts(FIRST, name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fly", {}),
        ("set_temperature", {}),
        ("set_temperature", {"unit": "celsius", "temperature": 20}),
        ("set_temperature", {"temperature": 0}),
        ("set_temperature", {"temperature": 80.5}),
        ("set_temperature", {"temperature": 81}),
        ("set_temperature", {"temperature": 20.0}),
        ("set_temperature", {"temperature": "20"}),
        ("set_temperature", {"temperature": ""}),
        ("set_temperature", {"temperature": 20, "area": []}),
        ("set_temperature", {"temperature": 20, "area": ["driver", "driver"]}),
        ("set_temperature", {"temperature": 20, "area": ["rear-left", "driver"]}),
        ("set_temperature", {"temperature": 20, "area": "driver"}),
        ("activate_defroster", {"duration_minutes": 2.5}),
        ("activate_defroster", {"duration_minutes": 31}),
        ("check_battery_health", {"include_history": 1}),
        ("lock_doors", {"lock_state": "locked"}),
        ("play_music", {"track": ""}),
        ("play_music", {"track": "a\nb"}),
        ("play_music", {"track": "a" * 81}),
        ("possibly_incomplete_set_temperature", {"temperature": 20}),
        ("possibly_incomplete_set_temperature", {"temperature": "", "unit": ""}),
        ("possibly_incomplete_play_music", {}),
    ],
)
def test_invalid_calls_are_refused(name: str, arguments: dict[str, object]) -> None:
    assert not accepts(FIRST, name, **arguments)


def test_an_incomplete_call_may_leave_out_any_but_not_none_of_its_required_arguments() -> None:
    first, name = compile_grammar(ODD), "possibly_incomplete_tune"
    assert accepts(first, name, gain="", is_on="")
    assert accepts(first, name, gain=-2.5, ratio=3, is_on="")
    assert accepts(first, name, gain="", is_on=False)
    assert not accepts(first, name, gain=1, is_on=False)
    assert not accepts(first, name, gain="")


@pytest.mark.parametrize("registry", [VEHICLE, ODD], ids=["vehicle", "odd"])
def test_any_of_the_required_arguments_may_be_left_open(registry: Registry) -> None:
    first, rng = compile_grammar(registry), random.Random(0)
    for spec in registry.functions:
        required = [p for p in spec.parameters if p.is_required]
        for left_open in itertools.product([False, True], repeat=len(required)):
            if any(left_open):
                arguments = {p.name: rng.choice(some_values(p)) for p in required}
                open_names = itertools.compress([p.name for p in required], left_open)
                arguments |= dict.fromkeys(open_names, "")
                assert accepts(first, f"possibly_incomplete_{spec.name}", **arguments), arguments


def some_values(parameter: ParameterSpec) -> list[object]:
    if parameter.type == "array":
        return [[parameter.enum[0]], list(parameter.enum)]
    if parameter.enum:
        return list(parameter.enum)
    numbers = [parameter.minimum, parameter.maximum] if parameter.minimum is not None else [7]
    return {"string": ["x", "it's", 'a "b"'], "boolean": [True, False]}.get(parameter.type, numbers)


@pytest.mark.parametrize(("registry", "num_walks"), [(VEHICLE, 300), (ODD, 60)])
def test_whatever_is_chosen_the_call_is_valid_canonical_and_short(
    registry: Registry, num_walks: int
) -> None:
    first, rng = compile_grammar(registry, max_text_tokens=48), random.Random(0)
    longest, names = max_response_tokens(registry, max_text_tokens=48), set()
    for _ in range(num_walks):
        ids = random_walk(first, rng)
        text = get_encoding().decode(ids[:-1])
        call = parse_call(text)
        problems = [p for p in registry.violations(call) if "repeated" not in p]
        assert problems == []
        assert render_call(registry.canonical(call)) in text
        assert ids[-1] == END_OF_TEXT and len(ids) <= longest
        names.add(call.name)
    assert len(names) > 0.5 * len(registry.call_names)


def test_ids_that_are_no_text_are_never_allowed() -> None:
    rng = random.Random(1)
    for _ in range(50):
        place = FIRST
        while len(place.allowed):
            ids = allowed_ids(place)
            assert max(ids) < END_OF_TEXT
            place = place.after(rng.choice(ids))


def test_only_the_training_tokenisation_of_a_word_is_offered() -> None:
    adjust, temperature = (get_encoding().encode_ordinary(w)[0] for w in ("adjust", "temperature"))
    place = FIRST.after(adjust).after(temperature)
    offered = get_encoding().decode_batch([[token] for token in allowed_ids(place)])
    assert sorted(offered) == ["dec", "incre"]  # and not "in", "inc", "d", "de"


def test_places_are_shared_but_those_inside_free_text_are_not_remembered() -> None:
    place = FIRST
    for word in ("play", "'", "track", " '"):
        token = get_encoding().encode_ordinary(word)[0]
        assert place.after(token) is place.after(token)
        place = place.after(token)
    song = get_encoding().encode_ordinary("song")[0]
    assert place.after(song) is not place.after(song)


def test_what_is_remembered_after_one_text_holds_after_any_other() -> None:
    """A grammar that has met many texts, and one that has met none, offer the same."""
    apart = [f"'{word} ' ' 'b" for word in ("a", "x" * 30)]  # with other rooms for letters left
    texts = ["a", "x" * 30, *apart, "'' b", 'the "b"', """it's "'d" 'e'""", "ï, 'ü"]
    watches = [
        {"label": a, "mode": "it's", "names": [b, a]}
        for a, b in itertools.pairwise([*texts, *texts[::-1]])
    ]
    calls = [(ODD, FunctionCall("stopwatch", arguments)) for arguments in watches]
    for arguments in ({"label": "", "mode": "it's"}, {"label": "a", "mode": ""}):
        calls.append((ODD, FunctionCall("possibly_incomplete_stopwatch", arguments)))
    calls += [
        (VEHICLE, FunctionCall("set_navigation_destination", {"destination": text}))
        for text in texts
    ]
    have_met = {r.where: compile_grammar(r, max_text_tokens=96) for r in (ODD, VEHICLE)}
    usual, unusual = ([token_of(' \\"'), token_of("'")], [token_of(" \\"), token_of("\"'")])
    for (registry, call), is_usual in itertools.product(calls, [True, False, True, False]):
        ids, at, met = response_ids(call), 0, have_met[registry.where]
        for i in range(len(ids)):
            if ids[i : i + 2] == usual and not is_usual:  # the model may cut as it likes
                ids[i : i + 2] = unusual
        fresh = compile_grammar(registry, max_text_tokens=96)
        while fresh.allowed.numel():
            assert met.forced == fresh.forced, call
            assert torch.equal(met.allowed, fresh.allowed), call
            at += len(fresh.forced)
            met, fresh, at = met.after(ids[at]), fresh.after(ids[at]), at + 1
        assert met.forced == fresh.forced and at + len(fresh.forced) == len(ids), call


def test_free_text_cut_in_unusual_ways_still_ends_in_a_valid_call() -> None:
    place = FIRST
    for word in ("play", "'", "track", " '", "s", "o", "n", "g", "'"):
        (token,) = get_encoding().encode_ordinary(word)
        assert is_allowed(place, token), word
        place = place.after(token)
    assert sorted(get_encoding().decode([token]) for token in allowed_ids(place)) == [",", "}"]


@pytest.mark.parametrize(
    ("minimum", "maximum"),
    [
        (1, 80),
        (10, 150),
        (0, 0),
        (-5, 5),
        (-120, -7),
        (0.25, 2.5),
        (3.1, 3.4),
        (-1.05, 0.5),
        (7, 1234),
    ],
)
def test_a_number_pattern_matches_what_lies_within_its_bounds(
    minimum: float, maximum: float
) -> None:
    for is_integer in (True, False):
        pattern = re.compile(number_pattern(minimum, maximum, is_integer=is_integer))
        for hundredths in range(-13_000, 130_000, 7 if maximum > 100 else 1):
            number = hundredths / 100
            written = repr(int(number) if number.is_integer() else number)
            fits = minimum <= number <= maximum and (number.is_integer() or not is_integer)
            assert bool(pattern.fullmatch(written)) == fits, written


def test_a_number_without_bounds_has_at_most_nine_digits() -> None:
    pattern = re.compile(number_pattern(None, None, is_integer=True))
    assert all(pattern.fullmatch(n) for n in ("0", "-1", "999999999", "-999999999"))
    assert not any(pattern.fullmatch(n) for n in ("-0", "007", "1000000000", "1.5", ""))


def test_bounds_with_no_number_between_are_an_error() -> None:
    schema = {"properties": {"n": {"type": "integer", "minimum": 1.2, "maximum": 1.8}}}
    registry = registry_from_source({"functions": [{"name": "f", "parameters": schema}]}, "here")
    with pytest.raises(ValueError, match=r"n: no integer lies between 1\.2 and 1\.8"):
        compile_grammar(registry)
