"""One training run, read top to bottom: data, model, reference, steps, checkpoints, export."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from fuserl_megatron.config.objective import with_defaults
from fuserl_megatron.config.schema import Config, UserError
from fuserl_megatron.convert.hf_config import ModelShape, read_config
from fuserl_megatron.convert.hf_io import check_model_directory
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.mcore import checkpoint, parallel, weights
from fuserl_megatron.mcore.model import build_model, wrap_for_training
from fuserl_megatron.mcore.optimizer import build_optimizer
from fuserl_megatron.mcore.precision import parameter_dtype
from fuserl_megatron.mcore.step import Engine, NonFiniteError, train_step
from fuserl_megatron.train.checks import InvariantError, check_batches, check_prepared, first_step_check
from fuserl_megatron.train.export import export, load_best
from fuserl_megatron.train.feed import Feed, make_feed, step_values, with_references
from fuserl_megatron.train.logging import RunLog, say
from fuserl_megatron.train.meters import peak_tflops, rates, step_flops, time_split
from fuserl_megatron.train.monitor import check_monitor
from fuserl_megatron.train.profiling import StepProfiler
from fuserl_megatron.train.reference import stored_hash
from fuserl_megatron.train.resume import run_identity, steps_to_resume, write_config
from fuserl_megatron.train.saver import Saver
from fuserl_megatron.train.schedule import lr_at, total_steps, warmup_steps
from fuserl_megatron.train.stopping import Stopped, Stopping, resume_command
from fuserl_megatron.train.summary import describe_end, describe_start, versions
from fuserl_megatron.train.validation import History, is_due, validate
from fuserl_megatron.train.watchdog import Watchdog


def train(config: Config) -> int:
    """Run one stage on the ranks that were started. Every rank calls it.

    Returns:
        0 when the run is complete, or was asked to stop and can be resumed (train/stopping.py); 1 when it stopped on a
        loss or gradient that is not finite, or when its last checkpoint could not be written.

    Raises:
        UserError: something the user can put right; nothing was started or half-written.
    """
    config = with_loss_defaults(config)
    for path in (config.model.path, config.objective.reference):
        if path:
            check_model_directory(path)
    shape = read_config(config.model.path)
    dataset = open_dataset(config, config.data.path, shape)
    held_out = open_dataset(config, config.data.validation_path, shape) if config.data.validation_path else None
    check_monitor(config, held_out.sources if held_out else [])
    layout = parallel.initialize(config.model, config.trainer)
    stopping = Stopping(layout.device, config.exp_manager.max_time_per_run)
    try:
        return _run(config, layout, shape, dataset, held_out, stopping)
    except Stopped as stopped:
        stopping.leave(Path(config.run.results_dir), str(stopped) or "before the first step", layout.is_main)
        return 0
    finally:
        parallel.shutdown()


def open_dataset(config: Config, path: str, shape: ModelShape) -> FusedDataset:
    """A fused data set whose tokens the model knows; raises UserError where it does not."""
    dataset = FusedDataset(path)
    if dataset.manifest.max_token_id >= shape.vocab_size:
        raise UserError(
            f"{path} has token id {dataset.manifest.max_token_id}, {config.model.path} a vocabulary of "
            f"{shape.vocab_size}: build the data set with this model's tokenizer (tokenizer={config.model.path})."
        )
    return dataset


def with_loss_defaults(config: Config) -> Config:
    """Fill the objective's null fields with the stage's and the loss's own defaults.

    Raises:
        UserError: an option that the loss does not read, or one that it needs and that is null.
    """
    return dataclasses.replace(config, objective=with_defaults(config.objective))


def _run(
    config: Config,
    layout: parallel.Layout,
    shape,
    dataset: FusedDataset,
    held_out: FusedDataset | None,
    stopping: Stopping,
) -> int:
    directory = Path(config.run.results_dir)
    checkpoints = directory / "checkpoints"
    multiple = layout.pp_size if layout.vpp_size else 1
    feeds = [
        (make_feed(config, data, layout.dp_size, multiple), directory / name)
        for data, name in ((dataset, "reference"), (held_out, "reference_validation"))
        if data is not None
    ]
    for feed, _ in feeds:
        check_prepared(config, feed.prepared)
    prepared, sampler = feeds[0][0].prepared, feeds[0][0].sampler
    total = total_steps(config.trainer, sampler.steps_per_epoch)
    identity = run_identity(config, dataset, prepared.reward_temperature, total)
    done, damaged, saved = steps_to_resume(config, checkpoints, identity, layout)

    started = time.monotonic()
    dtype = parameter_dtype(config.trainer.precision)
    target = build_model(shape, config.model, layout, dtype, config.trainer.precision)
    engine = Engine(
        target=target,
        layout=layout,
        objective=config.objective,
        source_names=dataset.sources,
        logprob_chunk_size=config.model.logprob_chunk_size,
    )
    if layout.is_main:
        write_config(config, directory)
        describe_start(config, layout, shape, prepared, sampler, total, done)

    training, *validation = with_references(config, engine, feeds, stopping.check)
    logps_hash = stored_hash(training.reference)
    progress = identity | {"versions": versions(), "config": dataclasses.asdict(config), "reference_logps": logps_hash}
    if layout.is_main and saved.get("reference_logps") not in (None, logps_hash):
        say("WARNING: the reference was scored anew since this run began: what follows is equal up to rounding only")
    if done == 0:
        weights.load_hf_weights(target, config.model.path, layout)
    wrapped = wrap_for_training(target, config.optim)
    engine = dataclasses.replace(
        engine, wrapped=wrapped, optimizer=build_optimizer(wrapped, config.optim, config.trainer, dtype)
    )
    target.config.finalize_model_grads_func = engine.clock.around(
        "gradient_sync", target.config.finalize_model_grads_func
    )
    if done:
        checkpoint.load(engine, checkpoints, done)
    if layout.is_main:
        say(f"ready after {time.monotonic() - started:.1f} s; {warmup_steps(config.optim, total)} warm-up steps\n")

    log = RunLog(config, directory, total, done, layout.is_main)
    history = History(config, directory, saved.get("validations", []), layout.is_main)
    saver = Saver(config, engine, checkpoints, done, damaged)
    stopping.save_s = saver.seconds
    profiler = StepProfiler(config.exp_manager, directory, layout.rank)
    watchdog = Watchdog(config.trainer.hang_timeout_minutes, directory, layout.rank)

    def between_batches() -> None:
        watchdog.tick()
        stopping.check()

    step, stop, kept = done, False, []
    try:
        stopping.check()
        if validation and is_due(config, done, total) and parallel.from_main_rank(history.lacks(done), layout.device):
            _validate(config, engine, validation[0], history, log, done, total, between_batches)
        _, stop, kept = _decide(history, layout, done)
        while step < total and not stop:
            with profiler.around(step + 1):
                asked = one_step(config, engine, training, log, step, total, stopping)
            step += 1
            watchdog.tick(step)
            is_best = False
            if asked:
                raise Stopped
            if validation and is_due(config, step, total):
                _validate(config, engine, validation[0], history, log, step, total, between_batches)
                is_best, stop, kept = _decide(history, layout, step)
            saver.poll()
            if saver.is_due(step) or step == total or stop or is_best:
                saver.save(step, progress | {"validations": history.records}, kept)
                stopping.save_s = saver.seconds
                watchdog.tick()
        saver.wait()
    except Stopped:
        saver.save(step, progress | {"validations": history.records}, kept)
        if saver.wait():
            where = f"saved at step {saver.saved}" if saver.saved else "nothing saved"
            raise Stopped(f"after step {step} of {total}, {where}" if step else "") from None
        if layout.is_main:
            say(saver.failure())
        return 1
    except (NonFiniteError, InvariantError) as error:
        saver.wait()
        if layout.is_main:
            say(f"stopped before step {step + 1}: {error}")
            say(f"weights are those of step {step}; lower optim.lr or look at the responses named, then run again:")
            say(resume_command())
        return 1
    finally:
        watchdog.close()
        profiler.close()
        log.close(complete=step == total or stop)
    if stop and layout.is_main:
        say(f"stopped after step {step}: no better {history.monitor} for {history.stopping.patience} validations")
    failure = saver.failure()
    if failure and layout.is_main:
        say(failure)
    if config.run.export:
        try:
            export(config, engine, dataset, directory / "hf", load_best(engine, checkpoints, history, step))
        except (UserError, OSError) as error:
            if not failure:
                raise
            if layout.is_main:
                say(f"nor could the model be exported: {error}")
    if layout.is_main:
        describe_end(config, done, step, total, saver.saved, time.monotonic() - started)
    return 1 if failure else 0


def one_step(
    config: Config, engine: Engine, feed: Feed, log: RunLog, step: int, total: int, stopping: Stopping
) -> bool:
    """Lay out one global batch, run it, log it. Returns whether any rank was asked to stop."""
    started = time.monotonic()
    engine.clock.read()  # what came between two steps is nobody's
    with engine.clock.part("data"):
        plan = feed.sampler.step(step)
        batches = feed.batches(plan, engine.layout.dp_rank)
        check_batches(config, feed.prepared.unit, batches, engine.layout)
    values = step_values(config, engine, feed, plan, step, total)
    lr = lr_at(step, total, config.optim)
    result = train_step(
        engine,
        batches,
        normalizer=plan.normalizer(config.objective.nll_reduction),
        values=values,
        lr=lr,
        weight_decay=config.optim.weight_decay,
        max_norm=config.trainer.gradient_clip_val,
        check=first_step_check(config, step),
        stop_wanted=stopping.wanted,
    )
    clip = config.trainer.gradient_clip_val
    record = dict(step=step + 1, epoch=plan.epoch, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
    record |= {
        name: value for name, value in (("wrpo_alpha", values.alpha), ("kto_kl", values.kl)) if value is not None
    }
    record |= result.metrics | dict(
        effective_number_of_sources=float(feed.prepared.effective_sources[plan.prompts].mean()),
        clipped=float(0 < clip < result.grad_norm),
        prompts=plan.num_prompts,
        real_tokens=plan.real_tokens,
        scored_tokens=plan.scored_tokens,
        padding_share=plan.padding_share,
        micro_batches=plan.num_microbatches,
    )
    parts, seconds = engine.clock.read(), time.monotonic() - started
    flops = step_flops(engine.target.shape, plan.real_tokens, plan.attended_keys, plan.scored_tokens)
    peak = peak_tflops(engine.layout.device_name, config.trainer.precision)
    record |= rates(seconds, flops, plan.num_prompts, plan.real_tokens, engine.layout.world_size, peak)
    log.step(record | dict(seconds=seconds) | time_split(seconds, parts))
    return result.stop


def _validate(
    config: Config,
    engine: Engine,
    feed: Feed,
    history: History,
    log: RunLog,
    step: int,
    total: int,
    between_batches: Callable[[], None],
) -> None:
    metrics = validate(config, engine, feed, step, total, between_batches)
    if engine.layout.is_main:
        history.add(step, metrics)
        log.validation(step, metrics)


def _decide(history: History, layout: parallel.Layout, step: int) -> tuple[bool, bool, list[int]]:
    """Whether this step is among the best, whether to stop, which checkpoints are best: rank 0's answer, for all."""
    kept = history.kept_steps()
    return parallel.from_main_rank((step in kept, history.should_stop(), kept), layout.device)
