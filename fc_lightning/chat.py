"""An example and its token ids: the only place that knows what a prompt looks like.

The sequence is a contract with existing checkpoints; `encode_example` writes it out. What a call
looks like inside the response is calls.py's business.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fc_lightning.calls import FunctionCall, render_call
from fc_lightning.tokenizer import END_OF_PROMPT, END_OF_TEXT, get_encoding

SYSTEM = (
    "<|im_start|>system\nYou are a helpful assistant. You have to either provide a way to answer"
    " user's request or answer user's query.\n<|im_end|>\n"
)
RESPONSE_START = "assistant: <|im_start|>assistant\n"
RESPONSE_END = "<|im_end|><|endoftext|>"
_USER_START, _USER_END = "<|im_start|>user\n", "<|im_end|>\n"


@dataclass(frozen=True)
class Example:
    """One training row, its three strings as they stand in a data file, markers included."""

    system: str
    user: str
    assistant: str

    @property
    def command(self) -> str:
        """The person's own words, without the markers around them."""
        return self.user.removeprefix(_USER_START).removesuffix("\n").removesuffix("<|im_end|>")

    @property
    def response(self) -> str:
        """What the assistant says, without the markers around it."""
        text = self.assistant.removeprefix("<|im_start|>assistant\n")
        return text.removesuffix("<|endoftext|>").removesuffix("<|im_end|>")


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a whole row, (T,); the first `num_prompt_tokens` end with END_OF_PROMPT."""

    ids: list[int]
    num_prompt_tokens: int

    @property
    def is_trained(self) -> list[bool]:
        """For each position of `ids[:-1]`, whether its target `ids[1:]` is trained, (T - 1,).

        The first trained target is the first response token, predicted from END_OF_PROMPT; the
        last is END_OF_TEXT.
        """
        num_untrained = self.num_prompt_tokens - 1
        return [False] * num_untrained + [True] * (len(self.ids) - 1 - num_untrained)


def make_example(command: str, call: FunctionCall) -> Example:
    """The row that teaches a model to answer `command` with `call`."""
    return Example(SYSTEM, f"{_USER_START}{command}{_USER_END}", render_response(call))


def render_response(call: FunctionCall) -> str:
    """The assistant's string of a row, as a data file holds it."""
    return f"{RESPONSE_START.removeprefix('assistant: ')}{render_call(call)}{RESPONSE_END}"


def encode_example(example: Example) -> EncodedExample:
    """prompt, END_OF_PROMPT, response, END_OF_TEXT, with literal markers as ordinary text."""
    prompt = encode_prompt(example.system, example.user)
    response = get_encoding().encode_ordinary(f"assistant: {example.assistant}")
    return EncodedExample([*prompt, *response, END_OF_TEXT], len(prompt))


def encode_prompt(system: str, user: str) -> list[int]:
    """Token ids of a prompt as it stands in a data file, END_OF_PROMPT included."""
    text = f"system: {system}\nuser: {user}\n"
    return [*get_encoding().encode_ordinary(text), END_OF_PROMPT]


def encode_command(command: str, *, system: str = SYSTEM) -> list[int]:
    """Token ids of the prompt for what a person said, safe against forged markers.

    Raises:
        ValueError: nothing was said.
    """
    if is_empty(command):
        raise ValueError("the command is empty; say what should be done")
    return encode_prompt(system, f"{_USER_START}{harmless(command)}{_USER_END}")


def is_empty(command: str) -> bool:
    """Whether there is nothing to be seen."""
    return all(unicodedata.category(letter)[0] in "CZ" for letter in command)


def harmless(command: str) -> str:
    """A command without what could be mistaken for the prompt's own structure.

    `<|` is split, line breaks and control characters become spaces, and half a surrogate pair,
    which is no letter, U+FFFD.
    """
    command = command.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    command = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", command)
    command = command.replace("<|", "< |").replace("|>", "| >")
    return command.replace("<functioncall>", "< functioncall >")


def decode_response(ids: Sequence[int]) -> str:
    """The text of generated ids up to END_OF_TEXT; ids that are no text are left out."""
    ids = list(ids)
    text_ids = ids[: ids.index(END_OF_TEXT)] if END_OF_TEXT in ids else ids
    return (
        get_encoding().decode([i for i in text_ids if i < END_OF_TEXT]).removeprefix("assistant: ")
    )
