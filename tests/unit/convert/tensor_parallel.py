"""The slow obvious twin of reading slices: a tensor-parallel rank's part cut out of the full Megatron tensor."""

import torch

from fuserl_megatron.convert.names import find_rule


def shard(full, name, tp, rank):
    """The part of a full parameter that one of tp ranks holds; fc1's gate and up are cut separately."""
    rule = find_rule(name)[0].rule
    if rule == "plain":
        return full
    if rule == "gate_up":
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    return full.chunk(tp, dim=1 if rule == "row" else 0)[rank]
