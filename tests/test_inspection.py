"""What is printed of a few tokens."""

import io

from rich.console import Console

from fc_lightning.chat import EncodedExample
from fc_lightning.inspection import TokenView, visible
from fc_lightning.tokenizer import END_OF_PROMPT, END_OF_TEXT, get_encoding


def shown(ids, num_prompt_tokens, **options):
    console = Console(file=io.StringIO(), **{"width": 80} | options)
    console.print(TokenView(EncodedExample(ids, num_prompt_tokens)))
    return console.file.getvalue()


def test_the_response_is_trained_and_the_prompt_with_its_last_token_is_not():
    prompt = get_encoding().encode_ordinary("lock it")
    response = get_encoding().encode_ordinary("yes")
    lines = shown([*prompt, END_OF_PROMPT, *response, END_OF_TEXT], 3).splitlines()
    assert [line.split() for line in lines] == [
        [],
        ["3", "tokens", "read,", "never", "trained"],
        ["lock", "·it", "<|eop_token|>"],
        ["5354", "340", "50258"],
        [],
        ["2", "tokens", "trained"],
        ["yes", "<|endoftext|>"],
        ["8505", "50256"],
    ]


def test_trained_tokens_and_no_others_are_green():
    colored = shown(
        [5354, END_OF_PROMPT, 8505, END_OF_TEXT], 2, force_terminal=True, color_system="standard"
    )
    green = [line for line in colored.splitlines() if "\x1b[32m" in line]
    assert len(green) == 1
    assert "yes" in green[0]


def test_lines_break_between_tokens_and_ids_stay_below_them():
    ids = get_encoding().encode_ordinary("one two three four five six seven eight")
    lines = shown(ids, len(ids), width=30).splitlines()[2:]
    tokens, numbers = [], []
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        assert len(above.rstrip()) <= 30
        tokens += above.split()
        numbers += below.split()
        assert [above.index(token) for token in above.split()] == [
            below.index(number) for number in below.split()
        ]
    assert numbers == [str(i) for i in ids]
    assert "".join(tokens) == "one·two·three·four·five·six·seven·eight"


def test_blanks_and_broken_characters_are_visible():
    encode = get_encoding().encode_ordinary
    assert [visible(i) for i in encode("\n")] == ["↵"]
    assert [visible(i) for i in encode("a\t")] == ["a", "\\t"]
    assert "".join(map(visible, encode("🙂"))) == "\\xf0\\x9f\\x99\\x82"
