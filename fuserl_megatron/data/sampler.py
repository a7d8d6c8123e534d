"""Which prompts make up which optimizer step, and which data-parallel rank holds what of it.

Everything is a function of (seed, epoch, position): no state, no communication. A step's prompts are packed into
micro-batches without looking at the number of ranks; the micro-batches are then dealt out in turn, and ranks that come
up short get batches of padding (N = P = 0), so that every rank runs the same number. The last step of an epoch takes
the prompts that are left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fuserl_megatron.config.schema import DataConfig
from fuserl_megatron.data.assemble import Part, assemble, attended_keys_of, chunks_of
from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.data.packing import Placement, measure_sharing, pack
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.data.too_long import check_sizes, parts_to_place
from fuserl_megatron.util.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """One global batch, laid out. The same on every rank."""

    step: int
    """Step counted from 0 over all epochs (for scoring: over the scoring pass)."""
    epoch: int
    prompts: np.ndarray
    """Indices into the prepared set."""
    num_prompts: int
    """Prompts of the global batch: the normaliser of all objectives but weighted_token_mean."""
    num_sequences: int
    scored_tokens: int
    """Response tokens with a label."""
    real_tokens: int
    """Positions that are not padding."""
    attended_keys: int
    """Sum over these positions of the keys each of them sees."""
    sum_weighted_tokens: float
    """sum_i w_i * T_i over the global batch: the normaliser of weighted_token_mean (0 for FusePO)."""
    num_microbatches: int
    """Micro-batches per data-parallel rank, equal for all."""
    padding_share: float
    """Share of all positions of all ranks that is padding."""
    micro_batches: tuple[tuple[tuple[Part, Placement], ...], ...]
    """Content of the micro-batches before they are dealt out."""

    def normalizer(self, nll_reduction: str | None) -> float:
        """What the global batch's loss is divided by, once."""
        return self.sum_weighted_tokens if nll_reduction == "weighted_token_mean" else float(self.num_prompts)


class GlobalBatchSampler:
    """Deals a prepared set out in steps and micro-batches.

    Attributes:
        steps_per_epoch: the last step may have fewer prompts.
        share_prefix: whether prompts are computed once for all their responses.
        sharing_reason: one phrase for the start-up log.
    """

    def __init__(self, prepared: PreparedSet, data: DataConfig, seed: int, dp_size: int, microbatch_multiple: int = 1):
        """Decide on prefix sharing and check that everything fits.

        Args:
            prepared: prompts, sequences and pairs of one stage.
            data: seq_length, micro_batch_size, global_batch_size, shuffle and packing are read.
            seed: seeds the order of prompts.
            dp_size: number of data-parallel ranks.
            microbatch_multiple: the micro-batches per rank are a multiple of this (pipeline schedules ask for it).

        Raises:
            UserError: a prompt does not fit, with its size and the setting to raise.
        """
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(data, name) < 1:
                raise UserError(f"data.{name}={getattr(data, name)}: it must be at least 1")
        self.prepared, self.data, self.seed = prepared, data, seed
        self.dp_size, self.microbatch_multiple = dp_size, microbatch_multiple
        self.steps_per_epoch = -(-prepared.num_prompts // data.global_batch_size)
        self._decide_sharing()
        check_sizes(prepared, data, self.share_prefix)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int) -> StepPlan:
        """The plan of one optimizer step; steps count through all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.data.global_batch_size
        return self.plan(self._order(epoch)[start : start + self.data.global_batch_size], step, epoch)

    def scoring_plans(self, missing: np.ndarray | None = None, first_prompts: int | None = None) -> Iterator[StepPlan]:
        """Every prompt once in the order of the data set, in the row shapes of training, for a pass without gradients.

        Args:
            missing: [responses of the data set] bool; prompts without a missing sequence are left out. None: all.
            first_prompts: only so many from the start of the data set. None: all.
        """
        prompts = np.arange(self.prepared.num_prompts)[:first_prompts]
        if missing is not None:
            wanted_N = missing[self.prepared.response_ids]
            wanted_G = np.add.reduceat(wanted_N.astype(np.int64), self.prepared.sequence_offsets[:-1]) > 0
            prompts = prompts[wanted_G[prompts]]
        size = self.data.global_batch_size
        for step, start in enumerate(range(0, prompts.size, size)):
            yield self.plan(prompts[start : start + size], step)

    def micro_batches(self, plan: StepPlan, dp_rank: int) -> list[PackedBatch]:
        """The micro-batches of one data-parallel rank (0 <= dp_rank < dp_size); only these are built."""
        batches = []
        for i in range(plan.num_microbatches):
            m = i * self.dp_size + dp_rank
            items = plan.micro_batches[m] if m < len(plan.micro_batches) else ()
            rows, length = self.data.micro_batch_size, self.data.seq_length
            batches.append(assemble(self.prepared, items, rows, length, self.share_prefix))
        return batches

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The prompts of an epoch in order, a function of (seed, epoch)."""
        if not self.data.shuffle:
            return np.arange(self.prepared.num_prompts)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        return torch.randperm(self.prepared.num_prompts, generator=generator).numpy()

    def plan(self, prompts: np.ndarray, step: int = 0, epoch: int = 0) -> StepPlan:
        """A plan for these prompts (indices into the prepared set)."""
        prepared, data = self.prepared, self.data
        parts = [u for p in prompts.tolist() for u in parts_to_place(prepared, data, self.share_prefix, p)]
        chunks = [chunks_of(prepared, u, self.share_prefix) for u in parts]
        places = pack(chunks, data.seq_length, data.micro_batch_size, not data.packing.enabled)
        filled: list[list[tuple[Part, Placement]]] = [[] for _ in range(max(p.micro_batch for p in places) + 1)]
        for part, place in zip(parts, places, strict=True):
            filled[place.micro_batch].append((part, place))
        per_rank = -(-len(filled) // self.dp_size)
        per_rank = -(-per_rank // self.microbatch_multiple) * self.microbatch_multiple
        sequences = np.array([n for u in parts for n in u.sequences], np.int64)
        real = sum(map(sum, chunks))
        return StepPlan(
            step=step,
            epoch=epoch,
            prompts=prompts,
            num_prompts=prompts.size,
            num_sequences=sequences.size,
            scored_tokens=int(prepared.lengths[sequences].sum()),
            real_tokens=real,
            attended_keys=sum(attended_keys_of(prepared, u, self.share_prefix) for u in parts),
            sum_weighted_tokens=float((prepared.weights[sequences] * prepared.lengths[sequences]).sum()),
            num_microbatches=per_rank,
            padding_share=1.0 - real / (per_rank * self.dp_size * data.micro_batch_size * data.seq_length),
            micro_batches=tuple(tuple(m) for m in filled),
        )

    def _decide_sharing(self) -> None:
        prepared, packing, length = self.prepared, self.data.packing, self.data.seq_length
        if packing.share_prefix == "on" and not packing.enabled:
            raise UserError("data.packing.share_prefix=on needs data.packing.enabled=true (or set share_prefix=off)")
        sharing = measure_sharing(prepared.prompt_lengths, prepared.sequence_offsets, prepared.lengths, length)
        saved = f"{sharing.saving:.1%} of the positions"
        if packing.share_prefix != "auto":
            self.share_prefix = packing.share_prefix == "on"
            self.sharing_reason = f"set: {'saves' if self.share_prefix else 'would save'} {saved}"
            return
        self.share_prefix = packing.enabled and sharing.worth_it
        if not packing.enabled:
            why = "packing is off"
        elif self.share_prefix:
            why = f"saves {saved}"
        elif sharing.longest_group > length:
            why = f"the longest group would need {sharing.longest_group} positions, a row has {length}"
        else:
            why = f"it would save only {saved}"
        self.sharing_reason = f"auto: {why}"
