"""GPT-2's byte-pair encoding, offline, with the two special tokens of the function-call format.

The merge table ships with the package (tiktoken's own `r50k_base.tiktoken`, which is GPT-2's) and
is checked against its published sha256. What a prompt looks like is chat.py's business.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

import tiktoken

END_OF_TEXT = 50256
PAD = 50257
END_OF_PROMPT = 50258
NUM_TOKENS = 50259  # ids a checkpoint must have rows for
PADDED_VOCAB_SIZE = 50304  # nanoGPT's rounding up to a multiple of 64

_TABLE = Path(__file__).parent / "assets" / "gpt2.tiktoken"
_TABLE_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# tiktoken's faster equivalent of the pattern in OpenAI's GPT-2 release.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def get_encoding() -> tiktoken.Encoding:
    """The encoding, built once a process from the shipped table.

    Raises:
        RuntimeError: the shipped table is damaged.
    """
    table = _TABLE.read_bytes()
    if hashlib.sha256(table).hexdigest() != _TABLE_SHA256:
        raise RuntimeError(f"{_TABLE} is damaged (its sha256 is wrong); reinstall fc_lightning")
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in table.splitlines())
    }
    special = {"<|endoftext|>": END_OF_TEXT, "<|pad_token|>": PAD, "<|eop_token|>": END_OF_PROMPT}
    return tiktoken.Encoding(
        "gpt2-function-call", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
