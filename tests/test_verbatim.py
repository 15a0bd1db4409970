"""Verbatim text is cut from the command, word by word; all other text stays free."""

from pathlib import Path

import pytest
import torch

from fc_lightning import verbatim
from fc_lightning.caller import _Copying
from fc_lightning.calls import FunctionCall
from fc_lightning.chat import encode_example, harmless, make_example
from fc_lightning.decoding import num_decisions
from fc_lightning.functions import Registry, load_registry, registry_from_source
from fc_lightning.grammar import compile_grammar
from fc_lightning.synthesis import synthesize
from fc_lightning.tokenizer import PADDED_VOCAB_SIZE, get_encoding
from fc_lightning.verbatim import narrowed, not_verbatim

ANYTHING = torch.ones(PADDED_VOCAB_SIZE, dtype=torch.bool)


def registry() -> Registry:
    properties = {"name": {"type": "string", "x-verbatim": True}, "note": {"type": "string"}}
    return registry_from_source(
        {"functions": [{"name": "find", "parameters": {"properties": properties}}]}, "here"
    )


def may_follow(written: str, command: str, *, allowed: torch.Tensor = ANYTHING) -> set[str]:
    """The tokens after a response that goes on with `written` behind its first argument."""
    response = f'<functioncall> {{"name": "find", "arguments": "{{{written}'
    ids = get_encoding().encode_ordinary(response)
    some = narrowed(allowed, ids, command, registry())
    if some is allowed:
        return {"anything"}
    assert some.dtype == torch.long and some.tolist() == sorted(set(some.tolist()))
    return {get_encoding().decode([token]) for token in some.tolist()}


def test_text_begins_with_any_word_and_goes_on_as_the_command_does() -> None:
    first = may_follow("'name': '", "Find Ravenna Mill")
    assert {"R", "Ra", "r", "Mill", "mill", "Find", "find"} <= first
    assert not first & {"avenna", "ill", " Mill", "a", "Ravine"}
    assert {"enna", "en", "e"} <= (second := may_follow("'name': 'Rav", "Find Ravenna Mill"))
    assert not second & {"'", " Mill", "ine", "enn a", "EN"}
    assert {" Mill", " mill", "'", "',"} <= may_follow("'name': 'ravenna", "Ravenna Mill")


def test_text_ends_with_a_word() -> None:
    at_the_end = may_follow("'name': 'ravenna mill", "Find Ravenna Mill")
    assert "'" in at_the_end and not any(text.strip().isalpha() for text in at_the_end)
    assert "'" not in may_follow("'name': 'ravenna ", "Find Ravenna Mill")
    assert "'" not in may_follow("'name': 'ravenna (", "Ravenna (the mill)")
    assert "'" in may_follow("'name': 'ravenna (the mill)", "Ravenna (the mill)")
    # where the grammar wants an end within a word, there is one
    only_end = torch.zeros_like(ANYTHING)
    only_end[get_encoding().encode_ordinary("'}")] = True
    assert may_follow("'name': 'rav", "Find Ravenna", allowed=only_end) == {"'"}
    # and where no text goes on as the command does
    astray = may_follow("'name': 'elsewhere", "Find Ravenna Mill")
    assert "'" in astray and {text[0] for text in astray} == {"'"}


def test_every_place_where_the_text_stands_counts() -> None:
    assert {" end", " mill"} <= may_follow("'name': 'old", "the old mill by the Old End")


def test_quotes_apostrophes_and_accents_are_copied_as_they_are_written() -> None:
    assert "'re" in may_follow(r"'name': \"when you", "play When You're Gone")
    assert r"\"" in may_follow(r"'name': \"when you're", "play When You're Gone")
    assert "'" in may_follow(r"'name': 'o\"brien", 'ask O"Brien')
    assert "é" in may_follow("'name': 'caf", "the CAFÉ there")
    assert {"'s", "'"} <= may_follow(r"'name': \"zoë", "play Zoë’s Song")
    assert "'" in may_follow("'name': 'café", "the café there")


def can_be_answered(command: str, call: FunctionCall, functions: Registry) -> bool:
    """Whether a caller can write the call's own tokens, whatever its model prefers."""
    encoded = encode_example(make_example(command, call))
    ids = encoded.ids[encoded.num_prompt_tokens :]
    place = _Copying(compile_grammar(functions), harmless(command), functions)
    return num_decisions(place, ids) is not None


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("find Łódź", "łódź"),  # two tokens a letter
        ("find Київ, please", "київ"),
        ("find 東京タワー", "東京タワー"),
        ("播放晴天这首歌", "晴天"),  # no spaces between words
        ("find «Ravenna»", "ravenna"),
        ("find „Ravenna“ now", "ravenna"),
        ("find theta—quick", "theta"),
        ("say Ravenna👍", "ravenna"),
        ("find Zoe\u0308", "zoe\u0308"),
        ("GROẞE Allee", "große allee"),
        ("İzmir CAFÉ", "café"),
        ("""find Who's "That\"""", 'who\'s "that"'),
        (r"open AC\DC", r"ac\dc"),
        ("find Ravenna\nMill", "ravenna mill"),
        ("find Ravenna\u00a0 Mill", "ravenna mill"),
        ("find a<|b|>c", "a< |b| >c"),
    ],
)
def test_names_in_any_writing_can_be_copied(command: str, name: str) -> None:
    call = FunctionCall("find", {"name": name})
    assert can_be_answered(command, call, registry())
    assert not_verbatim(call, harmless(command), registry()) == []


def test_a_name_that_was_not_said_may_stay_open() -> None:
    text = {"type": "string", "x-verbatim": True}
    spec = {"properties": {"to": text, "note": text}, "required": ["to", "note"]}
    functions = registry_from_source({"functions": [{"name": "send", "parameters": spec}]}, "here")
    for arguments in (
        {"to": "", "note": "hello"},
        {"to": "Ann", "note": ""},
        {"to": "", "note": ""},
    ):
        call = FunctionCall("possibly_incomplete_send", arguments)
        assert can_be_answered("send hello to Ann", call, functions), arguments
    call = FunctionCall("send", {"to": "", "note": "hello"})
    assert not can_be_answered("send hello to Ann", call, functions)


@pytest.mark.parametrize("domain", ["vehicle", "smart_home"])
def test_what_is_synthesized_can_be_copied(domain: str) -> None:
    domain_file = Path(verbatim.__file__).parent / "assets" / f"{domain}.yaml"
    functions = load_registry(domain_file)
    num_copied = 0
    for example in synthesize(functions, num_examples=400, seed=3).train:
        ids = get_encoding().encode_ordinary(example.response)
        for n, token in enumerate(ids):
            some = narrowed(ANYTHING, ids[:n], example.command, functions)
            if some is not ANYTHING:
                num_copied += 1
                assert token in some.tolist(), (example.command, get_encoding().decode(ids[:n]))
    assert num_copied >= 50


def test_a_call_whose_text_was_not_said_is_told() -> None:
    call = FunctionCall("find", {"name": 'Zoë\'s "Mill"', "note": "anything"})
    assert not_verbatim(call, "find ZOË’S “mill”, quick", registry()) == []
    told = "name: 'Zoë\\'s \"Mill\"' is not in 'find the mill'"
    assert not_verbatim(call, "find the mill", registry()) == [told]
    part_of_a_word = FunctionCall("find", {"name": "mill"})
    assert not_verbatim(part_of_a_word, "find a million", registry()) != []
    assert not_verbatim(part_of_a_word, "find a million, or a mill", registry()) == []


def test_other_text_and_other_places_stay_free() -> None:
    for written in ("'note': '", "'name': 'ravenna', 'note': 'so", "'nobody': '", "'name': "):
        assert may_follow(written, "Find Ravenna Mill") == {"anything"}
