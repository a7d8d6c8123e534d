"""Small exchanges between all ranks: flags and picklable values. Every rank must call them at the same place."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fuserl_megatron.util.errors import UserError


class Ranks(Protocol):
    """What a layout of ranks says of this one (mcore's Layout)."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0."""


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: decisions to stop are taken by all ranks or none. Also a barrier."""
    return on_any_rank([flag], device)[0]


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """`any_rank` of several flags in one reduction."""
    if dist.get_world_size() == 1:
        return list(flags)
    values = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_main_rank(value, device: torch.device):
    """Rank 0's picklable value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's picklable value, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def on_main_rank(ranks: Ranks, action: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 alone does, and its result on all ranks. What keeps it from that is raised on all of them: the others
    would wait for it in the next collective until the timeout."""
    result = problem = None
    if ranks.is_main:
        try:
            result = action(*args)
        except (ValueError, OSError) as error:
            problem = str(error)
    result, problem = from_main_rank((result, problem), ranks.device)
    if problem:
        raise UserError(problem)
    return result
