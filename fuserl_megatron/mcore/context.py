"""Context parallelism: the tokens of every row are split over CP ranks.

A row of S positions is cut into 2 CP chunks; rank r holds chunks r and 2 CP - 1 - r. Later positions have more to look
at, so that the two together are the same work on every rank. Queries stay where they are; keys and values are gathered
over the ranks in each layer's core attention, in the order of the ranks: a softmax does not care for the order of its
keys, so the mask's columns are put into that order and the keys stay as they came. Labels are made and shifted on the
whole row, before it is cut.

A sequence's scored tokens may lie on several ranks. Each rank sums its own, `sum_over_context` adds the sums up, and
every rank computes the same loss of the same totals. The gradients of the ranks add up to that of the loss when the sum
passes them on unchanged.

Shapes: B rows, S tokens per row, L = S / CP tokens of this rank, N sequences.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from fuserl_megatron.data.batch import PackedBatch


def gathered_columns(num_tokens: int, cp_size: int) -> torch.Tensor:
    """Columns [S] of the whole row in the order in which gathered keys come: those of rank 0, of rank 1, ..."""
    if cp_size == 1:
        return torch.arange(num_tokens)
    chunks = torch.arange(num_tokens).chunk(2 * cp_size)
    return torch.cat([torch.cat((chunks[r], chunks[-1 - r])) for r in range(cp_size)])


def context_part(batch: PackedBatch, cp_size: int, cp_rank: int) -> PackedBatch:
    """The batch with this rank's columns [B, L] only; what is said of sequences and pairs stays whole."""
    columns_L = gathered_columns(batch.tokens_BS.shape[1], cp_size).chunk(cp_size)[cp_rank]
    names = ("tokens_BS", "labels_BS", "positions_BS", "segment_ids_BS", "parent_ids_BS", "sequence_ids_BS")
    return replace(batch, **{name: getattr(batch, name)[:, columns_L] for name in names})


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part_N, group):
        total_N = part_N.clone()
        dist.all_reduce(total_N, group=group)
        return total_N

    @staticmethod
    def backward(ctx, grad_N):
        return grad_N, None


def sum_over_context(part_N: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of the ranks' parts, on every rank; its gradient goes to each part unchanged."""
    return _SumOverContext.apply(part_N, group)


def check_sum_rule(group: dist.ProcessGroup, device: torch.device) -> None:
    """Asserts the gradient rule on a toy: every rank has the loss (sum of parts)^2, whose gradient is 2 sum."""
    part = torch.tensor([dist.get_rank(group) + 1.0], dtype=torch.float64, device=device, requires_grad=True)
    total = sum_over_context(part, group)
    total.square().sum().backward()
    size = dist.get_world_size(group)
    expected = size * (size + 1)  # 2 (1 + ... + size)
    grad = None if part.grad is None else part.grad.item()
    assert grad == expected, f"the sum over context ranks has gradient {grad}, not {expected}"
