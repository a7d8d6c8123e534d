"""Reference log-probabilities, four ways with the same numbers: on disk, a second model, swapped weights, no adapter.

    cache      scored once before training, one float32 a response on disk; then only look-ups (the default)
    resident   a second model next to the policy, scored every step: no file, twice the weights in memory
    swap       one model; every step the reference's weights come from the CPU, score, and the policy's come back:
               no second model on the device, but two copies over the bus a step
    adapter    one model; every step it scores with its LoRA adapter switched off (the default with one)

All hand out float32 sums.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fuserl_megatron.config.schema import Config
from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.data.reference import ReferenceCache, hash_model_directory, reference_key
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.mcore import lora, parallel, weights
from fuserl_megatron.mcore.model import build_model
from fuserl_megatron.mcore.step import Engine, score
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime import collectives


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of some responses."""

    ids_N: torch.Tensor
    """int64, ascending."""
    logps_N: torch.Tensor
    """float32."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 of the ids given; all of them must be here."""
        return self.logps_N[torch.searchsorted(self.ids_N, ids)]


class LiveReference:
    """Modes resident, swap and adapter. Every rank makes one and calls `scores` at the same time."""

    def __init__(self, config: Config, engine: Engine):
        """Load the reference. engine is the policy's, yet without an optimizer; in mode swap its weights are replaced
        by the reference's: load the policy afterwards."""
        mode = config.objective.reference_mode
        self.swapping = mode == "swap"
        if mode == "resident":
            dtype = engine.target.config.params_dtype
            target = build_model(engine.target.shape, config.model, engine.layout, dtype, config.trainer.precision)
            engine = dataclasses.replace(engine, target=target)
        if mode != "adapter":
            weights.load_hf_weights(engine.target, reference_path(config), engine.layout)
        self.engine = engine
        self._held = _copies(engine) if self.swapping else []

    def scores(self, batches: Sequence[PackedBatch]) -> Scores:
        """Score the global batch whose part `batches` is; all of it comes back, on every rank."""
        if self.swapping:
            policy = _copies(self.engine)
            _put(self.engine, self._held)
        try:
            with lora.off(self.engine.target):
                ids_N, logps_N = score(self.engine, batches)
        finally:
            if self.swapping:
                _put(self.engine, policy)
        order_N = ids_N.argsort()
        return Scores(ids_N[order_N], logps_N[order_N].float())


Reference = ReferenceCache | LiveReference
"""Something whose `scores(batches)`, for the global batch whose part they are, has `lookup(response ids)`."""


def stored_hash(reference: Reference | None) -> str | None:
    """The sha256 of stored log-probabilities, None where there are none."""
    return reference.sha256 if isinstance(reference, ReferenceCache) else None


def reference_path(config: Config) -> str:
    """The Hugging Face directory of the reference model."""
    return config.objective.reference or config.model.path


def stored_references(
    config: Config, engine: Engine, between_batches: Callable[[], None]
) -> Callable[[PreparedSet, GlobalBatchSampler, Path], ReferenceCache]:
    """What opens the cache of a prepared set in a directory; what is not there yet is scored then, laid out by the
    sampler.

    The reference's weights are loaded into the engine's model, once and only if something has to be scored.
    What `between_batches` raises loses nothing: what is scored is kept, and a resumed run scores the rest.

    It raises UserError on every rank, where a cache is of another model, data set, tokenizer, template or precision.
    """

    @functools.cache
    def load() -> None:
        weights.load_hf_weights(engine.target, reference_path(config), engine.layout)

    def opened(prepared: PreparedSet, sampler: GlobalBatchSampler, directory: Path) -> ReferenceCache:
        cache, key, missing = _open(config, engine.layout, prepared, directory)
        if missing[prepared.response_ids].any():
            load()
            _score_missing(config, engine, prepared, sampler, cache, missing, between_batches)
        else:
            say(f"reference: log-probabilities of {reference_path(config)} found in {directory}", engine.layout.is_main)
        return cache or ReferenceCache.open(directory, key, prepared.dataset.num_responses)

    return opened


def _open(
    config: Config, layout: parallel.Layout, prepared: PreparedSet, directory: Path
) -> tuple[ReferenceCache | None, str, np.ndarray]:
    """The cache (rank 0 only, open for writing), its key and which responses of the data set it lacks."""
    cache = None

    def opened() -> tuple[str, np.ndarray]:
        nonlocal cache
        key = _key(config, prepared, directory)
        cache = ReferenceCache.open_or_create(directory, key, prepared.dataset.num_responses)
        return key, cache.missing_mask

    key, missing = collectives.on_main_rank(layout, opened)
    return cache, key, missing


def _key(config: Config, prepared: PreparedSet, directory: Path) -> str:
    """What the numbers depend on; with the check switched off, whatever the directory says."""
    if "reference_hash" in config.run.disable_checks and (stored := ReferenceCache.stored_key(directory)) is not None:
        return stored
    model = hash_model_directory(reference_path(config))
    key = reference_key(model, prepared.dataset.manifest, config.trainer.precision)
    if prepared.dataset.fingerprint is not None:  # a view: responses under other prompts, or cut
        key = f"{key}-{prepared.dataset.fingerprint}"
    return key


def _score_missing(
    config: Config,
    engine: Engine,
    prepared: PreparedSet,
    sampler: GlobalBatchSampler,
    cache: ReferenceCache | None,
    missing: np.ndarray,
    between_batches: Callable[[], None],
) -> None:
    layout, started, num_scored = engine.layout, time.monotonic(), 0

    def write(ids: torch.Tensor, logps: torch.Tensor) -> None:
        assert cache is not None  # of rank 0
        cache.write(ids, logps, prepared.dataset.place)
        cache.flush()

    def finish() -> None:
        assert cache is not None
        cache.finish(prepared.response_ids)

    for plan in sampler.scoring_plans(missing):
        between_batches()
        with lora.off(engine.target):
            scored = score(engine, sampler.micro_batches(plan, layout.dp_rank))
        collectives.on_main_rank(layout, write, *scored)
        num_scored += plan.num_sequences
    # nobody reads before everything is written, either
    collectives.on_main_rank(layout, finish)
    seconds = time.monotonic() - started
    say(f"reference: {num_scored} sequences of {reference_path(config)} scored in {seconds:.1f} s", layout.is_main)


def _parameters(engine: Engine) -> list[torch.nn.Parameter]:
    return [parameter for chunk in engine.target.chunks for parameter in chunk.parameters()]


def _copies(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().cpu().clone() for parameter in _parameters(engine)]


@torch.no_grad()
def _put(engine: Engine, values: Sequence[torch.Tensor]) -> None:
    """In place: the optimizer's buffers are views of the same memory."""
    for parameter, value in zip(_parameters(engine), values, strict=True):
        parameter.copy_(value)
