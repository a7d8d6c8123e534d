"""Invariants that are checked while a run goes. All are on by default; run.disable_checks=[name] turns one off.

prompt_weights     once: the weights of every prompt sum to 1
mask_coverage      every step: each sequence has its scored positions, never none, and prompts are not scored
group_integrity    every step: pairs and triples lie inside one prompt and source, RLOO's groups are whole
first_step_loss    first step, policy == reference: the loss has its analytic value (log 2 for the DPO family)
reference_hash     stored reference scores belong to this model, data set and precision (reference.py)
tokenizer_match    before any rank starts: data sets, model and reference have one tokenizer (records/belonging.py)
template_match     before any rank starts: the data are rendered by the model's chat template (records/belonging.py)
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fuserl_megatron.config.objective import loss_options, spec_of, uses_reference
from fuserl_megatron.config.schema import Config
from fuserl_megatron.data.batch import IGNORE_INDEX, PackedBatch
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.objectives.spec import Unit
from fuserl_megatron.runtime.collectives import any_rank
from fuserl_megatron.train.reference import reference_path

WEIGHT_TOLERANCE = 1e-9
LOSS_TOLERANCE = {"32": 1e-3, "bf16": 5e-2}
"""Relative. Policy and reference see the same numbers packed into other rows."""


class InvariantError(RuntimeError):
    """Something that must hold does not; the weights are those from before the step."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"check {name}: {problem} (run.disable_checks=[{name}] trains on regardless)")


def check_prepared(config: Config, prepared: PreparedSet) -> None:
    """prompt_weights."""
    if "prompt_weights" in config.run.disable_checks:
        return
    offsets, weights_N = prepared.sequence_offsets, prepared.weights
    if prepared.unit in (Unit.PAIRS, Unit.TRIPLES):
        offsets, weights_N = prepared.pair_offsets, prepared.pair_weights
    elif prepared.unit is Unit.ALL_RESPONSES:  # a source's weight stands at each of its responses
        prompts_N = np.repeat(np.arange(prepared.num_prompts), np.diff(offsets))
        keys_N2 = np.stack([prompts_N, prepared.source_ids], axis=1)
        _, group_N, sizes = np.unique(keys_N2, axis=0, return_inverse=True, return_counts=True)
        weights_N = weights_N / sizes[group_N.reshape(-1)]
    sums_G = np.add.reduceat(weights_N, offsets[:-1])
    worst = int(np.abs(sums_G - 1).argmax())
    if abs(sums_G[worst] - 1) > WEIGHT_TOLERANCE:
        place = prepared.dataset.place(int(prepared.response_ids[prepared.sequence_offsets[worst]]))
        problem = f"{place}: prompt {prepared.group_ids[worst]}: weights sum to {sums_G[worst]}, not 1"
        raise InvariantError("prompt_weights", problem)


def check_batches(
    config: Config,
    unit: Unit | None,
    batches: Sequence[PackedBatch],
    layout: Layout,
    place: Callable[[int], str] = str,
) -> None:
    """mask_coverage and group_integrity of one global batch; raises on all ranks or on none.

    `place` says where a response was read, for messages.
    """
    checks: dict[str, Callable] = {"mask_coverage": _mask_coverage, "group_integrity": _group_integrity}
    problem = None
    for name, check in checks.items():
        if name in config.run.disable_checks:
            continue
        for i, batch in enumerate(batches):
            found = check(batch, unit, place) if batch.num_sequences else None
            if found and problem is None:
                problem = (name, f"rank {layout.rank}, micro-batch {i}, {found}")
    if any_rank(problem is not None, layout.device):
        raise InvariantError(*(problem or ("mask_coverage or group_integrity", "see the other ranks' messages")))


def first_step_check(config: Config, step: int) -> Callable[[float], None]:
    """first_step_loss: what to do with the loss of this step before the weights change."""
    objective = config.objective
    same = uses_reference(objective) and os.path.realpath(reference_path(config)) == os.path.realpath(config.model.path)
    same = same and config.adapter.path is None
    if step or not same or objective.rpo_alpha or "first_step_loss" in config.run.disable_checks:
        return lambda loss: None
    spec = spec_of(objective)
    expected = spec.start(spec.complete(loss_options(objective)))

    def check(loss: float) -> None:
        tolerance = LOSS_TOLERANCE["32" if config.trainer.precision == "32" else "bf16"]
        if expected is not None and abs(loss - expected) > tolerance * expected:
            raise InvariantError(
                "first_step_loss",
                f"policy and reference are the same model, so the loss must be {expected:.6f}, and it is {loss:.6f}",
            )

    return check


def _mask_coverage(batch: PackedBatch, unit: Unit | None, place: Callable[[int], str]) -> str | None:
    scored_BS = batch.labels_BS != IGNORE_INDEX
    counts_N = torch.bincount(batch.sequence_ids_BS[scored_BS].clamp(min=0), minlength=batch.num_sequences)
    if not torch.equal(counts_N, batch.lengths_N) or bool((counts_N == 0).any()):
        n = int((counts_N != batch.lengths_N).int().argmax())
        counted = f"{counts_N[n]} positions are scored, it has {batch.lengths_N[n]} tokens"
        return f"response {_response(batch, n, place)}: {counted}"
    if int(scored_BS.sum()) == int((batch.segment_ids_BS >= 0).sum()):
        return "every position is scored: a prompt longer than one token must not be"
    return None


def _group_integrity(batch: PackedBatch, unit: Unit | None, place: Callable[[int], str]) -> str | None:
    if unit in (Unit.PAIRS, Unit.TRIPLES):
        chosen, rejected = batch.chosen_index_P, batch.rejected_index_P
        ends = [chosen, rejected] + ([] if batch.source_index_P is None else [batch.source_index_P])
        same_P = batch.source_ids_N[chosen] == batch.source_ids_N[rejected]
        for end in ends:
            same_P = same_P & (batch.prompt_ids_N[end] == batch.prompt_ids_N[chosen])
        if not bool((same_P & (chosen != rejected)).all()):
            p = int((~(same_P & (chosen != rejected))).int().argmax())
            first, second = (_response(batch, int(end[p]), place) for end in (chosen, rejected))
            return f"responses {first} and {second} are no pair"
    if unit is Unit.ALL_RESPONSES:
        assert batch.advantages_N is not None and batch.group_ids_N is not None
        sums_N = torch.zeros_like(batch.advantages_N).index_add(0, batch.group_ids_N, batch.advantages_N)
        scale = max(float(batch.advantages_N.abs().max()), 1e-30)
        if bool((sums_N.abs() > 1e-9 * scale * batch.num_sequences).any()):
            n = int((batch.group_ids_N == sums_N.abs().argmax()).int().argmax())
            return f"the group of response {_response(batch, n, place)} is not whole: its advantages do not sum to 0"
    return None


def _response(batch: PackedBatch, n: int, place: Callable[[int], str]) -> str:
    number = int(batch.response_ids_N[n])
    return str(number) + (f" ({place(number)})" if place is not str else "")
