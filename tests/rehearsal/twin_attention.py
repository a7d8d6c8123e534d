"""Transformer Engine's packed attention: its own signatures, torch's attention segment by segment."""

import inspect

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te

Real = te.DotProductAttention


class PackedAttention(torch.nn.Module):
    """Takes what the real one takes: an argument that it does not know is refused."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        bound = inspect.signature(Real.__init__).bind(self, *args, **kwargs)
        self.options = bound.arguments
        assert bound.arguments["qkv_format"] == "thd" and bound.arguments["attention_dropout"] == 0.0

    def forward(self, *args, **kwargs):
        """Query [B*S, Q, D], key and value [B*S, G, D] -> [B*S, Q*D]."""
        given = inspect.signature(Real.forward).bind(self, *args, **kwargs).arguments
        query, key, value = (given[name] for name in ("query_layer", "key_layer", "value_layer"))
        ends = given["cu_seqlens_q"]
        assert given["qkv_format"] == "thd" and "causal" in given["attn_mask_type"] and ends.dtype == torch.int32
        lengths = ends.diff()
        assert torch.equal(ends, given["cu_seqlens_kv"]) and ends[-1] == len(query)
        assert int(lengths.max()) <= given["max_seqlen_q"] == given["max_seqlen_kv"]
        parts = [
            F.scaled_dot_product_attention(*part, is_causal=True, scale=self.options["softmax_scale"], enable_gqa=True)
            for part in zip(*(t.transpose(0, 1).split(lengths.tolist(), 1) for t in (query, key, value)), strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)


te.DotProductAttention = PackedAttention
