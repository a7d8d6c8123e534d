"""What each subcommand of `fuserl` does with its parsed options: a thin call into a room, returning the exit code.

Rooms are imported inside the functions, after everything that can be checked without them.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fuserl_megatron.config.schema import Config
from fuserl_megatron.launch.here import becomes_rank, is_first_rank, num_ranks_of, start_ranks
from fuserl_megatron.train.preflight import check as check
from fuserl_megatron.train.preflight import check_reference, check_weight_files, laid_out, with_local_models
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.locks import only_writer


def build(options: argparse.Namespace) -> int:
    """`fuserl build`."""
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.config.validate import validate_build

    # without a temperature build reads the records and says what the rule gives on them
    later = ("reward_temperature",)
    config = load_config("build", options.overrides, options.config_dir, options.config_name, later)
    validate_build(config)
    from fuserl_megatron.records.build import build as run
    from fuserl_megatron.records.summary import print_summary
    from fuserl_megatron.records.temperature import TemperatureMissing

    try:
        print_summary(run(config))
    except TemperatureMissing as missing:
        for line in missing.table:
            print(line)
        raise
    return 0


def sample(options: argparse.Namespace) -> int:
    """`fuserl sample`."""
    from fuserl_megatron.config.sample_load import load_sample

    config, sources = load_sample(options.overrides, options.config_dir, options.config_name)
    if options.status:
        from fuserl_megatron.making.sample_plan import status

        return status(config.output)
    if not sources:
        raise UserError("sources=[]: needs at least one; type sources=[NAME] of conf/source/, or sources=[my.yaml]")
    if options.dry_run:
        from fuserl_megatron.making.sample_plan import dry_run

        return dry_run(config, sources)
    from fuserl_megatron.making.sample import sample as run

    return run(config, sources)


def train(options: argparse.Namespace) -> int:
    """`fuserl train`: check everything once, then be a rank, or start the ranks."""
    from fuserl_megatron.runtime import stopping

    with stopping.held():
        return _train(options)


def _train(options: argparse.Namespace) -> int:
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.runtime import stopping
    from fuserl_megatron.runtime.watchdog import own_log

    config = load_config("train", options.overrides, options.config_dir, options.config_name)
    if options.dry_run:
        return _dry_run(options, config)
    directory = Path(config.run.results_dir)
    with contextlib.ExitStack() as lock:  # given up before ranks start: rank 0 takes it then, wherever it was started
        if is_first_rank():
            lock.enter_context(_only_run_in(config))
            stopping.remove_marker(directory)
        num_ranks = num_ranks_of(options, config)
        check(config, num_ranks)
        if options.reference_only:
            check_reference(config)
        config = with_local_models(config)
        listens = config.exp_manager.create_preemption_callback
        if becomes_rank(config, num_ranks):
            _say_once(config)
            stopping.listen() if listens else stopping.release()
            with own_log(directory):
                if options.reference_only:
                    from fuserl_megatron.train.evaluate import score_reference as run
                else:
                    from fuserl_megatron.train.loop import train as run

                return run(config)
    os.environ.setdefault("FUSERL_COMMAND", stopping.own_command())
    words = ["train", *(["--reference-only"] if options.reference_only else [])]
    return start_ranks(options, num_ranks, *words, save_on_ctrl_c=listens)


def _dry_run(options: argparse.Namespace, config: Config) -> int:
    from fuserl_megatron.config.load import to_yaml
    from fuserl_megatron.config.objective import with_loss_defaults

    num_ranks = num_ranks_of(options, config)
    facts = check(config, num_ranks)
    if options.reference_only:
        check_reference(config)
    check_weight_files(config)
    filled = with_loss_defaults(config)  # as the run writes it down
    print(to_yaml(filled), *facts, *laid_out(filled, num_ranks), sep="\n")
    return 0


def _only_run_in(config: Config) -> contextlib.AbstractContextManager:
    """The lock of run.results_dir: two runs there would take each other's checkpoints for left-overs."""
    directory = config.run.results_dir
    return only_writer(Path(directory, ".lock"), directory, "choose another run.results_dir")


def evaluate(options: argparse.Namespace) -> int:
    """`fuserl evaluate`: as `train`, the figures of model.path on data.path."""
    before = None if options.before is None else local_model(options.before)

    def run(config: Config) -> int:
        from fuserl_megatron.records.belonging import compare
        from fuserl_megatron.train.evaluate import evaluate

        if before is not None:
            compare(config.data.path, "--before", before, (*config.run.disable_checks, "template_match"))
        with _only_run_in(config) if is_first_rank() else contextlib.nullcontext():
            return evaluate(config, before)

    return _on_ranks(options, run, "evaluate", *([] if before is None else [f"--before={before}"]))


def launch(options: argparse.Namespace) -> int:
    """`fuserl launch`."""
    from fuserl_megatron.launch.chain import launch as run
    from fuserl_megatron.launch.chain import unfinished
    from fuserl_megatron.launch.pipeline import load_pipeline

    pipeline = load_pipeline(options.overrides, options.config_dir, options.config_name)
    if any(stage.config for stage in pipeline.stages):
        from fuserl_megatron.records.belonging import check_chain
        from fuserl_megatron.records.chain_files import check_there

        check_there(pipeline.stages, unfinished(pipeline))
        check_chain(pipeline.stages, pipeline.config.target)
    return run(pipeline, options.overrides, options.dry_run)


def nemo_config(options: argparse.Namespace) -> int:
    """`fuserl nemo-config`."""
    from fuserl_megatron.nemo.settings import convert, report

    print(report(*convert(options.file)), end="")
    return 0


def parity(options: argparse.Namespace) -> int:
    """`fuserl parity`: as `train`, on the ranks of the run that is asked about."""
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1; --steps 1 would work.")
    if options.threshold is not None and not options.threshold > 0:
        raise UserError(f"--threshold {options.threshold}: must be positive; --threshold 1e-5 would work.")

    def run(config: Config) -> int:
        from fuserl_megatron.proofs.parity import parity

        return parity(config, steps=options.steps, threshold=options.threshold)

    threshold = [] if options.threshold is None else [f"--threshold={options.threshold!r}"]
    return _on_ranks(options, run, "parity", f"--steps={options.steps}", *threshold)


def _on_ranks(options: argparse.Namespace, run: Callable[[Config], int], *words: str) -> int:
    """Check everything once, then run as a rank, or start the ranks of the command in `words`."""
    from fuserl_megatron.config.load import load_config

    config = load_config("train", options.overrides, options.config_dir, options.config_name)
    check(config, num_ranks := num_ranks_of(options, config))
    config = with_local_models(config)
    if not becomes_rank(config, num_ranks):
        return start_ranks(options, num_ranks, *words)
    _say_once(config)
    return run(config)


def _say_once(config: Config) -> None:
    """On rank 0, in which way data and model differ that is no mistake."""
    from fuserl_megatron.records.belonging import check_run

    if is_first_rank():
        for line in check_run(config):
            print(line, flush=True)


def hf_to_megatron(options: argparse.Namespace) -> int:
    """`fuserl convert hf-to-megatron`."""
    written = to_megatron(options)
    print(f"written: {written}", (written / "megatron_lm_flags.txt").read_text().rstrip(), sep="\n")
    return 0


def megatron_to_hf(options: argparse.Namespace) -> int:
    """`fuserl convert megatron-to-hf`."""
    options.max_shard_bytes = _bytes(options.max_shard_size)
    print(f"written: {to_hf(options)}")
    return 0


def to_megatron(options: argparse.Namespace) -> Path:
    """Convert a Hugging Face directory, here and in tools/; returns the directory written."""
    from fuserl_megatron.convert import offline

    return offline.hf_to_megatron(
        options.source,
        options.destination,
        dtype=options.dtype,
        make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
        force=options.force,
        allow_pickle=options.allow_pickle,
    )


def to_hf(options: argparse.Namespace) -> Path:
    """Convert a Megatron checkpoint, here and in tools/; returns the directory written."""
    from fuserl_megatron.convert import offline

    return offline.megatron_to_hf(
        options.source,
        options.destination,
        hf=options.hf,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        force=options.force,
    )


def verify(options: argparse.Namespace) -> int:
    """`fuserl verify`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison is one of fp32 on the CPU; core takes any GPU it sees
    from fuserl_megatron.proofs.verify import verify as run

    return run(
        options.a,
        options.b,
        text=options.text,
        threshold=options.threshold,
        json_path=options.json,
        max_new_tokens=options.max_new_tokens,
        hf=options.hf,
    )


def doctor(options: argparse.Namespace) -> int:
    """`fuserl doctor`."""
    from fuserl_megatron.cli.doctor import examine, print_report

    return 0 if print_report(examine(), options.json) else 1


def demo(options: argparse.Namespace) -> int:
    """`fuserl demo`: the examples are no part of the wheel, so this needs a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    for root in (checkout, Path.cwd()):  # examples/ of the current directory may be another program's
        script = root / "examples" / "skills" / "run_demo.py"
        if script.is_file():
            return subprocess.call([sys.executable, str(script), "--dir", options.dir])
    raise UserError(
        "demo: examples/skills is not here (the wheel carries no examples); clone the repository and type `make demo`."
    )


def _bytes(text: str) -> int:
    """Decimal units as in 5GB, 500MB; a plain number is bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    try:
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--max-shard-size {text}: is no size; 5GB would work.")
    return size
