"""Rotary embeddings looked up at given positions, in GPTModel's public `rotary_pos_emb` slot.

Core's own module counts positions from the start of the row; packed rows and shared prefixes need each token's
position inside its own sequence. Its llama3 scaling also takes only one of the four fields; ours comes from
convert.rope with all of them.

Shapes: B rows, S tokens per row, D head dimension.
"""

import torch


class PositionRotary(torch.nn.Module):
    """freqs[s, b, 1, :] = positions[b, s] * (inv_freq, inv_freq). Set `positions_BS` before each forward."""

    inv_freq: torch.Tensor

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        # not a parameter, not saved: it is a function of the config
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.positions_BS: torch.Tensor | None = None

    def get_rotary_seq_len(self, *_args, **_kwargs) -> int:
        """Tokens per row; core asks before it calls forward."""
        assert self.positions_BS is not None
        return self.positions_BS.shape[1]

    def forward(self, _seq_len: int, *_args, **_kwargs) -> torch.Tensor:
        """Angles in radians [S, B, 1, D], fp32."""
        assert self.positions_BS is not None
        freqs = self.positions_BS.t().unsqueeze(-1).float() * self.inv_freq.float()
        return torch.cat((freqs, freqs), dim=-1).unsqueeze(2)
