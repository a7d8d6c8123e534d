"""One training run, read top to bottom: data, model, reference, steps, checkpoints, export."""

import dataclasses
import time
from pathlib import Path

from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.config.schema import Config, UserError
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.hf_io import check_model_directory
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import PreparedSet, prepare
from fuserl_megatron.data.reference import ReferenceCache, hash_model_directory, reference_key
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.mcore import checkpoint, parallel, weights
from fuserl_megatron.mcore.dist_format import newest_iteration
from fuserl_megatron.mcore.model import DTYPES, build_model, wrap_for_training
from fuserl_megatron.mcore.optimizer import build_optimizer
from fuserl_megatron.mcore.step import Engine, NonFiniteError, score, train_step
from fuserl_megatron.objectives.loss_table import LOSSES, PreferenceLoss
from fuserl_megatron.train.logging import RunLog, say
from fuserl_megatron.train.schedule import lr_at, total_steps, warmup_steps
from fuserl_megatron.train.summary import describe_start


def train(config: Config) -> int:
    """Run one stage on the ranks that were started. Every rank calls it.

    Returns:
        0 when the run is complete, 1 when it stopped on a loss or gradient that is not finite.

    Raises:
        UserError: something the user can put right; nothing was started or half-written.
    """
    config = with_loss_defaults(config)
    for path in (config.model.path, config.objective.reference):
        if path:
            check_model_directory(path)
    shape = read_config(config.model.path)
    dataset = FusedDataset(config.data.path)
    if dataset.manifest.max_token_id >= shape.vocab_size:
        raise UserError(
            f"{config.data.path} has token id {dataset.manifest.max_token_id}, {config.model.path} a vocabulary of "
            f"{shape.vocab_size}: build the data set with this model's tokenizer (tokenizer={config.model.path})."
        )
    layout = parallel.initialize(config.model, config.trainer)
    try:
        return _run(config, layout, shape, dataset)
    finally:
        parallel.shutdown()


def with_loss_defaults(config: Config) -> Config:
    """Fill the objective's null fields with the stage's and the loss's own defaults."""
    objective = config.objective
    if objective.stage == "fusesft":
        chosen = dict(
            selection=objective.selection or "per_source", nll_reduction=objective.nll_reduction or "token_mean"
        )
        if chosen["selection"] == "top_m":
            chosen["top_m"] = objective.top_m or 4
    else:
        loss = objective.loss or "dpo"
        options = LOSSES[PreferenceLoss(loss)].options
        chosen = dict(loss=loss, beta=objective.beta if objective.beta is not None else options["beta"])
    return dataclasses.replace(config, objective=dataclasses.replace(objective, **chosen))


def _run(config: Config, layout: parallel.Layout, shape, dataset: FusedDataset) -> int:
    directory = Path(config.run.results_dir)
    prepared = prepare(dataset, config.objective, config.data.reward_temperature)
    sampler = GlobalBatchSampler(
        prepared,
        config.data,
        config.run.seed,
        layout.dp_size,
        microbatch_multiple=layout.pp_size if layout.vpp_size else 1,
    )
    total = total_steps(config.trainer, sampler.steps_per_epoch)
    checkpoints = directory / "checkpoints"
    done = _steps_done(config, checkpoints, layout)

    started = time.monotonic()
    dtype = DTYPES[config.trainer.precision]
    target = build_model(shape, config.model, layout, dtype)
    engine = Engine(
        target=target,
        layout=layout,
        objective=config.objective,
        source_names=dataset.sources,
        logprob_chunk_size=config.model.logprob_chunk_size,
    )
    if layout.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        describe_start(config, layout, shape, prepared, sampler, total, done)

    reference = None
    if config.objective.stage == "fusepo":
        reference = _reference(config, engine, prepared, sampler, directory / "reference")
    if done == 0:
        weights.load_hf_weights(target, config.model.path, layout)
    wrapped = wrap_for_training(target, config.optim)
    engine = dataclasses.replace(
        engine, wrapped=wrapped, optimizer=build_optimizer(wrapped, config.optim, config.trainer, dtype)
    )
    identity = _identity(config, dataset, total)
    if done:
        _check_same_run(identity, checkpoint.load(engine, checkpoints, done), checkpoints)
    if layout.is_main:
        say(f"ready after {time.monotonic() - started:.1f} s; {warmup_steps(config.optim, total)} warm-up steps\n")

    log = RunLog(config, directory, total, done, layout.is_main)
    try:
        for step in range(done, total):
            _one_step(config, engine, sampler, reference, log, step, total)
            every = config.exp_manager.checkpoint_callback_params.every_n_train_steps
            if every is not None and (step + 1 == total or (every and (step + 1) % every == 0)):
                keep = config.exp_manager.checkpoint_callback_params.save_top_k
                checkpoint.save(engine, checkpoints, step + 1, identity, keep)
    except NonFiniteError as error:
        if layout.is_main:
            say(f"stopped before step {step + 1}: {error}")
            say(
                f"weights are those of step {step}; lower optim.lr or look at the responses named, then run again"
            )
        return 1
    finally:
        log.close()
    if config.run.export:
        _export(config, engine, dataset, directory / "hf", total)
    return 0


def _one_step(config: Config, engine: Engine, sampler, reference, log: RunLog, step: int, total: int) -> None:
    """Lay out one global batch, run it, log it."""
    started = time.monotonic()
    plan = sampler.step(step)
    batches = sampler.micro_batches(plan, engine.layout.dp_rank, reference)
    weighted = config.objective.nll_reduction == "weighted_token_mean"
    lr = lr_at(step, total, config.optim)
    result = train_step(
        engine,
        batches,
        normalizer=plan.sum_weighted_tokens if weighted else float(plan.num_prompts),
        lr=lr,
        weight_decay=config.optim.weight_decay,
        max_norm=config.trainer.gradient_clip_val,
    )
    record = dict(step=step + 1, epoch=plan.epoch, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
    record |= result.metrics | dict(
        prompts=plan.num_prompts,
        real_tokens=plan.real_tokens,
        scored_tokens=plan.scored_tokens,
        padding_share=plan.padding_share,
        micro_batches=plan.num_microbatches,
        seconds=time.monotonic() - started,
    )
    log.step(record)


def _steps_done(config: Config, checkpoints: Path, layout: parallel.Layout) -> int:
    """The iteration to resume from, 0 for a fresh start; rank 0 looks."""
    found, problem = 0, None
    if layout.is_main:
        try:
            found = newest_iteration(checkpoints) or 0
        except UserError as error:
            problem = str(error)
    found, problem = parallel.from_main_rank((found, problem), layout.device)
    if problem:
        raise UserError(problem)
    if found and not config.exp_manager.resume_if_exists:
        raise UserError(
            f"{checkpoints} holds a checkpoint of step {found} and exp_manager.resume_if_exists=false: "
            "set it to true to continue, or choose another run.results_dir."
        )
    return found


def _identity(config: Config, dataset: FusedDataset, total: int) -> dict:
    """What must not change between a run and its continuation. The layout may."""
    return {
        "stage": config.objective.stage,
        "data_hash": dataset.hash,
        "seed": config.run.seed,
        "global_batch_size": config.data.global_batch_size,
        "total_steps": total,
    }


def _check_same_run(now: dict, saved: dict, checkpoints: Path) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoints}: was written with {key}={saved.get(key)}, this run has {key}={value}: "
                "use the same value to continue, or another run.results_dir to start anew."
            )


def _reference(config: Config, engine: Engine, prepared: PreparedSet, sampler, directory: Path) -> ReferenceCache:
    """Stored reference log-probabilities of every sequence; scored now if they are not all there."""
    layout, dataset = engine.layout, prepared.dataset
    path = config.objective.reference or config.model.path
    cache, key, problem, missing = None, None, None, None
    if layout.is_main:
        try:
            key = reference_key(hash_model_directory(path), dataset.manifest, config.trainer.precision)
            cache = ReferenceCache.open_or_create(directory, key, dataset.num_responses)
            missing = cache.missing_mask
        except (UserError, OSError) as error:
            problem = str(error)
    key, problem, missing = parallel.from_main_rank((key, problem, missing), layout.device)
    if problem:
        raise UserError(problem)
    if missing[prepared.response_ids].any():
        weights.load_hf_weights(engine.target, path, layout)
        started, num_scored = time.monotonic(), 0
        for plan in sampler.scoring_plans(missing):
            ids, logps = score(engine, sampler.micro_batches(plan, layout.dp_rank))
            num_scored += plan.num_sequences
            if layout.is_main:
                cache.write(ids, logps)
                cache.flush()
        if layout.is_main:
            cache.finish(prepared.response_ids)
            say(f"reference: {num_scored} sequences of {path} scored in {time.monotonic() - started:.1f} s")
        parallel.any_rank(False, layout.device)  # nobody reads before everything is written
    elif layout.is_main:
        say(f"reference: log-probabilities of {path} found in {directory}")
    return cache or ReferenceCache.open(directory, key, dataset.num_responses)


def _export(config: Config, engine: Engine, dataset: FusedDataset, destination: Path, total: int) -> None:
    lineage = {
        "run": config.run.name,
        "stage": config.objective.stage,
        "target": config.model.path,
        "sources": list(dataset.sources),
        "data_set": dataset.hash,
        "optimizer_steps": total,
        "config": dataclasses.asdict(config),
    }
    started = time.monotonic()
    tokenizer = config.model.tokenizer or config.model.path
    weights.export_hf(engine.target, engine.layout, str(destination), source_dir=tokenizer, lineage=lineage)
    if engine.layout.is_main:
        say(f"\nHugging Face model written to {destination} in {time.monotonic() - started:.1f} s")
