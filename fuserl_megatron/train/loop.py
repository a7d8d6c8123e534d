"""One training run, read top to bottom: data, model, reference, steps, checkpoints, export."""

import dataclasses
import errno
import time
from pathlib import Path

from fuserl_megatron.checkpoint.torch_dist import iteration_directory
from fuserl_megatron.config.derived import total_steps, warmup_steps
from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.config.schema import Config
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.peft import num_parameters
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.manifest import MANIFEST_FILE, RUN_COPY
from fuserl_megatron.mcore import checkpoint, parallel, weights
from fuserl_megatron.mcore.step import Engine, NonFiniteError, train_step
from fuserl_megatron.metrics.flops import peak_tflops, rates, step_flops, time_split
from fuserl_megatron.metrics.run_log import RunLog, say
from fuserl_megatron.runtime import collectives
from fuserl_megatron.runtime.profiling import StepProfiler
from fuserl_megatron.runtime.stopping import Stopped, Stopping, resume_command
from fuserl_megatron.runtime.watchdog import Watchdog
from fuserl_megatron.train.checks import InvariantError, check_batches, check_prepared, first_step_check
from fuserl_megatron.train.export import destination_of, export, load_best
from fuserl_megatron.train.feed import (
    FOLDERS,
    Feed,
    make_engine,
    make_feed,
    open_run,
    step_values,
    with_optimizer,
    with_references,
)
from fuserl_megatron.train.monitor import check_monitor
from fuserl_megatron.train.reference import stored_hash
from fuserl_megatron.train.resume import run_identity, steps_to_resume
from fuserl_megatron.train.saver import Saver
from fuserl_megatron.train.schedule import lr_at
from fuserl_megatron.train.summary import describe_end, describe_start, versions
from fuserl_megatron.train.validation import History, is_due, validate
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import write_file


def train(config: Config) -> int:
    """Run one stage on the ranks that were started. Every rank calls it.

    Returns:
        0 when the run is complete, or was asked to stop and can be resumed (runtime/stopping.py); 1 when it stopped on
        a loss or gradient that is not finite, or when its last checkpoint could not be written.

    Raises:
        UserError: something the user can put right; nothing was started or half-written.
    """
    config, shape, datasets = open_run(config, [config.data.path, config.data.validation_path])
    check_monitor(config, datasets[1].sources if datasets[1:] else [])
    layout = parallel.initialize(config.model, config.trainer)
    stopping = Stopping(layout.device, config.exp_manager.max_time_per_run)
    trainer = config.trainer
    watchdog = Watchdog(
        trainer.hang_timeout_minutes, Path(config.run.results_dir), layout.rank, trainer.distributed_timeout_minutes
    )
    try:
        return _run(config, layout, shape, datasets, stopping, watchdog)
    except Stopped as stopped:
        stopping.leave(Path(config.run.results_dir), str(stopped) or "before the first step", layout.is_main)
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{config.run.results_dir}: {error.strerror}"
        raise UserError(f"{where}: make room there; the same command goes on from the last checkpoint.") from error
    finally:
        watchdog.close()
        parallel.shutdown()


def _run(
    config: Config,
    layout: parallel.Layout,
    shape: ModelShape,
    datasets: list[FusedDataset],
    stopping: Stopping,
    watchdog: Watchdog,
) -> int:
    directory = Path(config.run.results_dir)
    checkpoints = directory / "checkpoints"
    feeds = [make_feed(config, data, layout, folder) for data, folder in zip(datasets, FOLDERS, strict=False)]
    for feed in feeds:
        check_prepared(config, feed.prepared)
    dataset, prepared, sampler = datasets[0], feeds[0].prepared, feeds[0].sampler
    total = total_steps(config.trainer, sampler.steps_per_epoch)
    identity = run_identity(config, dataset, prepared.reward_temperature, total)
    identity |= {"data.on_too_long": prepared.fitted}
    done, damaged, saved = steps_to_resume(config, checkpoints, identity, layout)

    def between_batches() -> None:
        watchdog.tick()
        stopping.check()

    started = time.monotonic()
    watchdog.tick()
    engine = dataclasses.replace(make_engine(config, layout, shape, dataset.sources), place=dataset.place)
    if layout.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / "config.yaml", [to_yaml(config).encode()])
        write_file(directory / RUN_COPY, [(dataset.path / MANIFEST_FILE).read_bytes()])
        describe_start(config, layout, shape, prepared, sampler, total, done)

    training, *validation = with_references(config, engine, feeds, between_batches)
    logps_hash = stored_hash(training.reference)
    progress = identity | {"versions": versions(), "config": dataclasses.asdict(config), "reference_logps": logps_hash}
    if saved.get("reference_logps") not in (None, logps_hash):
        warning = "the reference was scored anew since this run began: what follows is equal up to rounding only"
        say(f"WARNING: {warning}", layout.is_main)
    watchdog.tick()
    if done == 0 or config.adapter.kind == "lora":  # whose checkpoints hold the adapter alone
        weights.load_hf_weights(engine.target, config.model.path, layout)
    engine = with_optimizer(config, engine)
    core = engine.target.config
    core.finalize_model_grads_func = engine.clock.part("gradient_sync")(core.finalize_model_grads_func)
    if done:
        checkpoint.load(engine.target, iteration_directory(checkpoints, done), engine.optimizer)
    seconds, warmup = time.monotonic() - started, warmup_steps(config.optim, total)
    say(f"ready after {seconds:.1f} s; {warmup} warm-up steps\n", layout.is_main)

    log = RunLog(config, directory, total, done, layout.is_main)
    history = History(config, directory, saved.get("validations", []), layout.is_main)
    saver = Saver(config, engine, checkpoints, done, damaged)
    stopping.save_s = saver.seconds
    profiler = StepProfiler(config.exp_manager, directory, layout.rank)
    watchdog.tick(done)

    def validated(step: int) -> tuple[bool, bool, list[int]]:
        metrics = validate(config, engine, validation[0], step, total, between_batches)
        if layout.is_main:
            history.add(step, metrics)
            log.validation(step, metrics)
        return history.decisions(step, layout)

    kept: list[int] = []
    step, stop = done, False
    try:
        stopping.check()
        if (
            validation
            and is_due(config, done, total)
            and collectives.from_main_rank(history.lacks(done), layout.device)
        ):
            validated(done)
        _, stop, kept = history.decisions(done, layout)
        while step < total and not stop:
            with profiler.around(step + 1):
                asked = one_step(config, engine, training, log, step, total, stopping)
            step += 1
            watchdog.tick(step)
            is_best = False
            if asked:
                raise Stopped
            if validation and is_due(config, step, total):
                is_best, stop, kept = validated(step)
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
        say(saver.failure() or "", layout.is_main)
        return 1
    except (NonFiniteError, InvariantError) as error:
        saver.wait()
        advice = (
            f"weights are those of step {step}; look at the responses named. A lower optim.lr, or data without them, "
            "needs a run.results_dir of its own. This run goes on with:"
        )
        say(f"stopped before step {step + 1}: {error}\n{advice}\n{resume_command()}", layout.is_main)
        return 1
    finally:
        watchdog.close()
        profiler.close()
        log.close(complete=step == total or stop)
        history.close()
    if stop:
        waited = f"no better {history.monitor} for {history.stopping.patience} validations"
        say(f"stopped after step {step}: {waited}", layout.is_main)
    if failure := saver.failure():
        say(failure, layout.is_main)
    exported = destination_of(config) if config.run.export else None
    if exported:
        try:
            export(config, engine, dataset, exported, load_best(engine, checkpoints, history, step))
        except (UserError, OSError) as error:
            if not failure:
                raise
            exported = None
            say(f"nor could the model be exported: {error}", layout.is_main)
    if layout.is_main:
        describe_end(config, done, step, total, saver.saved, exported, time.monotonic() - started)
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
        check_batches(config, feed.prepared.unit, batches, engine.layout, engine.place)
    values = step_values(config, engine, feed, plan, step, total)
    lr, clip = lr_at(step, total, config.optim), config.trainer.gradient_clip_val
    result = train_step(
        engine,
        batches,
        normalizer=plan.normalizer(config.objective.nll_reduction),
        values=values,
        lr=lr,
        weight_decay=config.optim.weight_decay,
        max_norm=clip,
        check=first_step_check(config, step),
        stop_wanted=stopping.wanted,
    )
    record = dict(step=step + 1, epoch=plan.epoch, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
    constants = {"wrpo_alpha": values.alpha, "kto_kl": values.kl}
    record |= {name: value for name, value in constants.items() if value is not None}
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
    shape, tokens = engine.target.shape, (plan.real_tokens, plan.attended_keys, plan.scored_tokens)
    flops = step_flops(shape, *tokens, num_parameters(shape, config.adapter))
    peak = peak_tflops(engine.layout.device_name, config.trainer.precision)
    record |= rates(seconds, flops, plan.num_prompts, plan.real_tokens, engine.layout.world_size, peak)
    log.step(record | dict(seconds=seconds) | time_split(seconds, parts))
    return result.stop
