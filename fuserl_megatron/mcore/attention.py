"""The core attention of every layer: one mask for packing and prefix sharing, in the layer spec's `core_attention`
slot.

Shapes: B rows, S tokens per row, Q query heads of this rank, G key/value groups of this rank, D head dimension.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule


def visibility_mask(segment_ids_BS: torch.Tensor, parent_ids_BS: torch.Tensor) -> torch.Tensor:
    """Who may look at whom: own segment and own segment's parent, never later in the row. Padding sees padding only.

    Returns:
        bool [B, 1, S, S], True where the query (third dimension) sees the key (fourth).
    """
    same = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    parent = parent_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    return (same | parent).tril().unsqueeze(1)


class SegmentAttention(MegatronModule):
    """softmax(q k^T * scale + mask) v with the mask given; no dropout, no state.

    The rotary attention scaling of yarn multiplies queries and keys alike: model.py folds its square into `scale`.
    """

    def __init__(self, config, softmax_scale=None, **_layer_number_mask_type_and_groups):
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, **_kwargs):
        """Query [S, B, Q, D], key and value [S, B, G, D], mask [B, 1, S, S] -> [S, B, Q*D]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        shared = q.shape[1] != k.shape[1]
        if shared and q.is_cuda:
            # with a mask CUDA has only the math kernel for grouped heads (fp32 scores in memory): repeat the keys
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
            shared = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scale, enable_gqa=shared)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
