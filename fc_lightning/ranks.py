"""What the processes of one run, its ranks, share out and tell each other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gather(item: T) -> list[T]:
    """The items of all ranks, in order of rank, by way of the hosts; every rank must take part."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items: list[T] = [item] * dist.get_world_size()
    dist.all_gather_object(items, item, group=_hosts(dist.group.WORLD))
    return items


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place; every rank must take part.

    Unlike Lightning's `strategy.reduce`, it has no barrier first, which makes hosts wait for GPUs.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def highest_of_ranks(number: int) -> int:
    """The highest of all ranks' numbers; every rank must take part. No device is waited for."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    highest = torch.tensor(number)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD))
    return int(highest)


@functools.cache
def _hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks of `world`, for tensors in the hosts' memory."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of items that all ranks hold: each item in exactly one rank's part."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    return items[dist.get_rank() :: dist.get_world_size()]
