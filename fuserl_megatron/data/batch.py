"""PackedBatch: one micro-batch, the only batch type there is.

Shapes: B rows, S tokens per row, N sequences (responses) in the micro-batch, P pairs.

Packing and prefix sharing are the same structure: a row is a run of *segments*, each token may look at earlier tokens
of its own segment and of its segment's parent. Without sharing, a segment is prompt + response and is its own parent.
With sharing, the prompt without its last token is one segment, and every response is a segment that begins with a copy
of that last token and has the prompt as parent; its positions continue the prompt's, so every position still predicts
exactly one label.
"""

from dataclasses import dataclass, fields, replace

import torch

IGNORE_INDEX = -100
"""Label of a position that is not scored."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A micro-batch of B rows holding N sequences, and P pairs of them. Ids index the data set unless said."""

    tokens_BS: torch.Tensor
    """int64; padding is 0."""
    labels_BS: torch.Tensor
    """int64, already shifted: the token that position s must predict, IGNORE_INDEX where nothing is scored."""
    positions_BS: torch.Tensor
    """int64; position of the token inside its own prompt + response."""
    segment_ids_BS: torch.Tensor
    """int64; unique inside a row, -1 for padding."""
    parent_ids_BS: torch.Tensor
    """int64; segment id of the prefix this token may also see; its own where there is none, -1 for padding."""
    sequence_ids_BS: torch.Tensor
    """int64; index 0..N-1 of the sequence whose label this position scores, -1 where nothing is scored."""
    lengths_N: torch.Tensor
    """int64; scored tokens of each sequence (response and end-of-turn token)."""
    weights_N: torch.Tensor
    """float64; weight of each sequence where the loss is one of sequences (FuseSFT, RLOO, KTO), 0 where of pairs."""
    source_ids_N: torch.Tensor
    """int64; index into the manifest's list of sources."""
    prompt_ids_N: torch.Tensor
    """int64; group of the data set."""
    response_ids_N: torch.Tensor
    """int64; response of the data set; the key of the stored reference log-probabilities."""
    chosen_index_P: torch.Tensor
    """int64; index 0..N-1 into this batch."""
    rejected_index_P: torch.Tensor
    """int64; index 0..N-1 into this batch."""
    pair_weights_P: torch.Tensor
    """float64; the source weight w_k of each pair."""
    pair_source_ids_P: torch.Tensor
    """int64; index into the manifest's list of sources."""
    source_index_P: torch.Tensor | None = None
    """WRPO: int64; index 0..N-1 into this batch of the best response over all other sources."""
    reward_gaps_P: torch.Tensor | None = None
    """MaPPO: float64; r+ - r- in [0, 1]."""
    source_chosen_mean_logps_PK: torch.Tensor | None = None
    """InfiFPO: float64; per-token mean log-probability of the chosen response under each source, 0 where none."""
    source_rejected_mean_logps_PK: torch.Tensor | None = None
    """InfiFPO: float64; the same of the rejected response."""
    source_present_PK: torch.Tensor | None = None
    """InfiFPO: bool; which sources have a value for both."""
    group_ids_N: torch.Tensor | None = None
    """RLOO: int64 below N; equal for the responses of one source to one prompt, all of which are in this batch."""
    advantages_N: torch.Tensor | None = None
    """RLOO: float64; leave-one-out advantages, in the rewards' units."""
    best_N: torch.Tensor | None = None
    """RLOO: bool; the best response of each group."""
    desirable_N: torch.Tensor | None = None
    """KTO: bool; whether the response is a desirable one."""
    reference_logps_N: torch.Tensor | None = None
    """float32; summed reference log-probability of each sequence, None where no reference is needed."""

    scored_2T: torch.Tensor | None = None
    """int64; row and column of each scored position, in row order. `to` makes it: on a GPU whoever asks where a mask is
    true waits for all that the GPU still has to do."""

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.lengths_N.numel()

    def scored(self, values: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] -> [T, ...]: those of the scored positions, in row order. After `to`."""
        assert self.scored_2T is not None, "`to` comes first"
        rows_T, columns_T = self.scored_2T
        return values[rows_T, columns_T]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device, with the places of what is scored."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.scored_2T is None:
            moved["scored_2T"] = (self.labels_BS != IGNORE_INDEX).nonzero().t()
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})
