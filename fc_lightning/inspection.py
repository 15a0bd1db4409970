"""One example as the model sees it: its tokens, their ids, and which of them are trained.

For a terminal or a notebook, through rich. How an example becomes tokens is chat.py's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fc_lightning.chat import EncodedExample
from fc_lightning.tokenizer import get_encoding


@dataclass(frozen=True)
class TokenView:
    """Every token over its id, the trained ones in green. `rich.print(TokenView(...))` shows it.

    A space is shown as ·, a line break as ↵, bytes that are no whole character as \\xf0.
    """

    encoded: EncodedExample

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The first token is nobody's target.
        is_trained = [False, *self.encoded.is_trained]
        pairs = zip(self.encoded.ids, is_trained, strict=True)
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
            ids = [token for token, _ in group]
            what = "trained" if trained else "read, never trained"
            yield Text(f"\n{len(ids)} tokens {what}", "bold")
            yield from _lines(ids, options.max_width, "green" if trained else "")


def _lines(ids: Sequence[int], width: int, style: str) -> Iterator[Text]:
    """The tokens and below them their ids, in as many pairs of lines as the width needs."""
    above, below = Text(style=style), Text(style="dim")
    for token in ids:
        piece, number = visible(token), str(token)
        size = max(cell_len(piece), len(number)) + 2
        if above.cell_len and above.cell_len + size > width:
            yield from (above, below)
            above, below = Text(style=style), Text(style="dim")
        above.append(piece + " " * (size - cell_len(piece)))
        below.append(number.ljust(size))
    yield from (above, below)


def visible(token: int) -> str:
    """A token's text with blanks and broken characters made visible."""
    text = get_encoding().decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else _escape(c) for c in text.replace(" ", "·"))


def _escape(character: str) -> str:
    return "↵" if character == "\n" else character.encode("unicode_escape").decode()
