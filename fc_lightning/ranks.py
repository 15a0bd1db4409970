"""What the processes of one run, its ranks, share out and tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(item: T) -> list[T]:
    """The items of all ranks, in order of rank; every rank must take part."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items: list[T] = [item] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of items that all ranks hold: each item in exactly one rank's part."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    return items[dist.get_rank() :: dist.get_world_size()]
