"""Free text that must stand in the command: names of songs, streets, people.

A small model copies a rare name wrongly ("ravenna" becomes "ravine"). Where a schema says
`x-verbatim: true`, only what goes on with a stretch of the command may be written, from the
beginning of one of its words to the end of one; small letters for capitals, straight quotes for
typographic ones.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fc_lightning.calls import FunctionCall
from fc_lightning.functions import Registry
from fc_lightning.tokenizer import END_OF_TEXT, get_encoding

_AS_WRITTEN = str.maketrans({"‘": "'", "’": "'", "“": r"\"", "”": r"\"", '"': r"\""})
_LONGEST_TOKEN = 24  # in bytes; longer ones of GPT-2 are runs of one mark

# A response up to somewhere in a string: what is called, which argument, and its text so far.
_OPEN = re.compile(
    rb"""\{"name": "(?P<call>[^"]+)".*'(?P<argument>[^']+)': """
    rb"""(?:'(?P<single>[^']*)|\\"(?P<double>[^"]*))$""",
    re.DOTALL,
)


def narrowed(allowed: Tensor, ids: Sequence[int], command: str, registry: Registry) -> Tensor:
    """Of what is allowed after a response's `ids`, a mask (V,), the ids (K,) that copy the command.

    The mask itself where free text may be any, and where none of the command's words may follow,
    as after the longest text that is allowed.
    """
    found = _OPEN.search(get_encoding().decode_bytes(ids))
    spec = registry.spec(found["call"].decode()) if found else None
    if found is None or spec is None:
        return allowed
    parameter = spec.by_name.get(found["argument"].decode())
    if parameter is None or not parameter.is_verbatim:
        return allowed
    is_single = found["double"] is None
    written = found["single"] if is_single else found["double"]
    said = command.translate(_AS_WRITTEN)
    tokens = sorted(set(_continuations(said, written, b"'" if is_single else rb"\"")))
    copying = torch.tensor(tokens, dtype=torch.long)
    copying = copying[allowed[copying]]
    return copying if len(copying) else allowed


def not_verbatim(call: FunctionCall, command: str, registry: Registry) -> list[str]:
    """The arguments of a call that should stand in the command and don't, each with its text."""
    spec = registry.spec(call.name)
    verbatim = [p.name for p in spec.parameters if p.is_verbatim] if spec else []
    texts = {name: call.arguments.get(name) for name in verbatim}
    return [
        f"{name}: {text!r} is not in {command!r}"
        for name, text in texts.items()
        if text and isinstance(text, str) and not _stands_in(command, text)
    ]


def _stands_in(command: str, text: str) -> bool:
    said, written = (t.lower().translate(_AS_WRITTEN).encode() for t in (command, text))
    return any(_is_edge(said, start + len(written)) for start in _starts(said, written))


def _continuations(command: str, written: bytes, quote: bytes) -> Iterator[int]:
    """Tokens that go on with `written`, which begins a word of the command, or end it with a word.

    A token is written as the command has it, or in small letters.
    """
    plain, closing = _vocabulary(b""), _vocabulary(quote)
    as_said, said = command.encode(), command.lower().encode()
    if len(as_said) != len(said):  # a rare letter takes more bytes when it is small
        said = as_said.lower()
    written = written.decode(errors="surrogateescape").lower().encode(errors="surrogateescape")
    for start in _starts(said, written):
        here = start + len(written)
        for end in range(here, min(len(said), here + _LONGEST_TOKEN) + 1):
            texts = {said[here:end], as_said[here:end]}
            may_end = end > start and _is_edge(said, end) and said[end - 1] not in b" ([{"
            for tokens in (plain, closing) if may_end else (plain,):
                yield from itertools.chain(*(tokens.get(text, ()) for text in texts))


def _starts(said: bytes, written: bytes) -> Iterator[int]:
    """Where `written` stands in `said` and begins one of its words."""
    start = said.find(written)
    while start >= 0:
        if _is_edge(said, start) and not said[start : start + 1].isspace():
            yield start
        start = said.find(written, start + 1)


def _is_edge(said: bytes, at: int) -> bool:
    """Whether no word goes on across this place."""
    return not (_is_letter(said[at - 1 : at]) and _is_letter(said[at : at + 1]))


def _is_letter(byte: bytes) -> bool:
    return byte.isalnum() or byte >= b"\x80"


@functools.cache
def _vocabulary(quote: bytes) -> Mapping[bytes, list[int]]:
    """Tokens by their text; with a quote, those that have it, by what stands before it."""
    tokens: dict[bytes, list[int]] = defaultdict(list)
    for token in range(END_OF_TEXT):
        text = get_encoding().decode_single_token_bytes(token)
        before, found, _ = text.partition(quote) if quote else (text, True, b"")
        if found:
            tokens[before].append(token)
    return tokens
