"""The core attention of every layer: one mask for packing and prefix sharing, in the layer spec's `core_attention`
slot.

Shapes: B rows, S tokens per row, L of them on this context-parallel rank (all, without), Q query heads of this rank, G
key/value groups of this rank, D head dimension.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from fuserl_megatron.mcore.context import gathered_columns


def visibility_mask(
    segment_ids_BS: torch.Tensor, parent_ids_BS: torch.Tensor, cp_size: int = 1, cp_rank: int = 0
) -> torch.Tensor:
    """Who may look at whom: own segment and own segment's parent, never later in the row. Padding sees padding only.

    Returns:
        bool [B, 1, L, S], True where the query (third dimension) sees the key (fourth); with context parallelism the
        queries are this rank's and the keys in gathered order (context.py).
    """
    keys_S = gathered_columns(segment_ids_BS.shape[1], cp_size).to(segment_ids_BS.device)
    queries_L = keys_S.chunk(cp_size)[cp_rank]
    seen_BS = segment_ids_BS[:, keys_S][:, None, :]
    same = segment_ids_BS[:, queries_L, None] == seen_BS
    parent = parent_ids_BS[:, queries_L, None] == seen_BS
    return ((same | parent) & (keys_S <= queries_L[:, None])).unsqueeze(1)


class SegmentAttention(MegatronModule):
    """softmax(q k^T * scale + mask) v with the mask given; no dropout, no state.

    The rotary attention scaling of yarn multiplies queries and keys alike: model.py folds its square into `scale`.
    """

    def __init__(self, config, softmax_scale=None, **_layer_number_mask_type_and_groups):
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, **_kwargs):
        """Query [L, B, Q, D], key and value [L, B, G, D], mask [B, 1, L, S] -> [L, B, Q*D]."""
        if self.config.context_parallel_size > 1:
            # one collective for both; backward sums the ranks' gradients of each key and gives every rank its own
            both = gather_from_sequence_parallel_region(
                torch.cat((key, value), dim=-1).contiguous(), True, ps.get_context_parallel_group()
            )
            key, value = both.chunk(2, dim=-1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        shared = q.shape[1] != k.shape[1]
        if shared and q.is_cuda:
            # with a mask CUDA has only the math kernel for grouped heads (fp32 scores in memory): repeat the keys
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
            shared = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scale, enable_gqa=shared)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
