"""Rotary embeddings looked up at given positions, in GPTModel's public `rotary_pos_emb` slot.

Core's own module counts positions from the start of the row; packed rows and shared prefixes need each token's
position inside its own sequence. Its llama3 scaling also takes only one of the four fields; ours comes from
convert.rope with all of them.

Core hands all layers one tensor. Where they do not all rotate alike it holds the angles of each RoPE, and each layer
takes its own (`take_own`).

Shapes: B rows, S tokens per row, R kinds of RoPE in the model, D rotated dimensions of a head.
"""

import torch


class PositionRotary(torch.nn.Module):
    """freqs[s, b, r, :] = positions[b, s] * (inv_freq[r], inv_freq[r]). Set `positions_BS` before each forward."""

    inv_freq: torch.Tensor

    def __init__(self, *inv_freqs: torch.Tensor):
        super().__init__()
        # not a parameter, not saved: it is a function of the config
        self.register_buffer("inv_freq", torch.stack(inv_freqs).float(), persistent=False)
        self.positions_BS: torch.Tensor | None = None

    def get_rotary_seq_len(self, *_args, **_kwargs) -> int:
        """Tokens per row; core asks before it calls forward."""
        assert self.positions_BS is not None
        return self.positions_BS.shape[1]

    def forward(self, _seq_len: int, *_args, **_kwargs) -> torch.Tensor:
        """Angles in radians [S, B, R, D], fp32; R is 1 where all layers rotate alike."""
        assert self.positions_BS is not None
        freqs = self.positions_BS.t()[:, :, None, None].float() * self.inv_freq.float()
        return torch.cat((freqs, freqs), dim=-1)


def take_own(attention: torch.nn.Module, kind: int | None) -> None:
    """Let a layer's attention see the angles of its own RoPE only; None: it does not rotate at all."""

    def choose(_module, args, kwargs):
        angles = kwargs["rotary_pos_emb"]
        kwargs["rotary_pos_emb"] = None if kind is None else angles[:, :, kind : kind + 1]
        return args, kwargs

    attention.register_forward_pre_hook(choose, with_kwargs=True)
