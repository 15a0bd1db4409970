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
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fc_lightning.calls import FunctionCall
from fc_lightning.functions import Registry
from fc_lightning.tokenizer import END_OF_TEXT, get_encoding

_STRAIGHT = str.maketrans("‘’“”„", '\'\'"""')
# As repr and then JSON write a text, in single and in double quotes.
_IN_SINGLE = str.maketrans({"'": r"\\'", '"': r"\"", "\\": r"\\\\"})
_IN_DOUBLE = str.maketrans({"\\": r"\\\\"})
_LONGEST_TOKEN = 24  # in bytes; longer ones of GPT-2 are runs of one mark
# Scripts that write no spaces between words, or join what is no part of a name.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\ud7af\uf900-\ufaff]"
)

# A response up to somewhere in a string: what is called, which argument, and its text so far.
_OPEN = re.compile(
    rb"""\{"name": "(?P<call>[^"]+)".*'(?P<argument>[^']+)': """
    rb"""(?:'(?P<single>(?:[^'\\]|\\\\\\\\|\\\\'|\\")*\\{0,3})|\\"(?P<double>[^"]*))$""",
    re.DOTALL,
)


def narrowed(allowed: Tensor, ids: Sequence[int], command: str, registry: Registry) -> Tensor:
    """Of what is allowed after a response's `ids`, the ids (K,) that copy the command.

    `allowed` is a mask (V,) or ids (K,). It is returned as it is where free text may be any, and
    where neither the command's words nor the text's end may follow.
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
    said = _as_said(command).translate(_IN_SINGLE if is_single else _IN_DOUBLE)
    quote = b"'" if is_single else rb"\""
    going_on, ends = set(_continuations(said, written, quote)), _vocabulary(quote).get(b"", [])
    if not written:  # what was not said is '', where the grammar lets it be
        going_on.update(ends)
    for copying in (going_on, ends):
        if len(some := _both(allowed, copying)):
            return some
    return allowed


def _both(allowed: Tensor, ids: Collection[int]) -> Tensor:
    """The ids that are allowed too, ascending."""
    some = torch.tensor(sorted(ids), dtype=torch.long)
    return some[allowed[some] if allowed.dtype == torch.bool else torch.isin(some, allowed)]


def _as_said(command: str) -> str:
    """The command as it may be copied: with straight quotes, and one space between words."""
    return " ".join(command.translate(_STRAIGHT).split())


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
    said, written = _as_said(command).lower(), text.lower().translate(_STRAIGHT).encode()
    return any(start + len(written) in _edges(said) for start in _starts(said, written))


def _continuations(command: str, written: bytes, quote: bytes) -> Iterator[int]:
    """Tokens that go on with `written`, which begins a word of the command, or end it with a word.

    A token is written as the command has it, or in small letters.
    """
    plain, closing = _vocabulary(b""), _vocabulary(quote)
    as_said, said = command.encode(), command.lower().encode()
    if len(as_said) != len(said):  # a rare letter takes more bytes when it is small
        as_said = said
    written = written.decode(errors="surrogateescape").lower().encode(errors="surrogateescape")
    edges = _edges(command.lower())
    for start in _starts(command.lower(), written):
        here = start + len(written)
        for end in range(here, min(len(said), here + _LONGEST_TOKEN) + 1):
            texts = {said[here:end], as_said[here:end]}
            may_end = end > start and end in edges and said[end - 1] not in b" ([{"
            for tokens in (plain, closing) if may_end else (plain,):
                yield from itertools.chain(*(tokens.get(text, ()) for text in texts))


def _starts(command: str, written: bytes) -> Iterator[int]:
    """Where, in bytes, `written` stands in the command and begins one of its words."""
    said, edges = command.encode(), _edges(command)
    start = said.find(written)
    while start >= 0:
        if start in edges and not said[start : start + 1].isspace():
            yield start
        start = said.find(written, start + 1)


@functools.lru_cache(maxsize=1024)
def _edges(text: str) -> frozenset[int]:
    """The places, in bytes, that no word goes on across."""
    places = itertools.accumulate((len(letter.encode()) for letter in text), initial=0)
    pairs = itertools.pairwise(["", *text, ""])
    return frozenset(
        place
        for place, (a, b) in zip(places, pairs, strict=True)
        if not (_is_letter(a) and _is_letter(b)) or _UNSPACED.search(a + b)
    )


def _is_letter(letter: str) -> bool:
    """Or a digit, or a mark that belongs to the letter before it."""
    return letter.isalnum() or (letter != "" and unicodedata.category(letter)[0] == "M")


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
