"""`fuserl train`: FuseSFT or FusePO."""

import argparse
import contextlib
import os
from pathlib import Path

from fuserl_megatron.cli.on_ranks import say_once
from fuserl_megatron.cli.options import OVERRIDES, Jobs, add_command, add_config_options
from fuserl_megatron.config.schema import Config
from fuserl_megatron.launch.here import becomes_rank, num_ranks_of, start_ranks
from fuserl_megatron.train.preflight import (
    check,
    check_reference,
    check_weight_files,
    laid_out,
    lock_of,
    with_local_models,
)
from fuserl_megatron.util.own_rank import own_rank


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "train",
        run,
        "FuseSFT or FusePO, everything else from the configuration",
        f"""examples:
  fuserl train --nproc 2 trainer=cpu model=tiny model.path=models/target data.path=fused optim.lr=1e-4
  fuserl train --nproc 8 recipe=llama31_8b_fusesft model.path=models/target data.path=fused
  fuserl train --nproc 8 recipe=llama31_8b_fusepo_ln_dpo model.path=runs/llama31_8b_fusesft/hf data.path=fused_po
  fuserl train --dry-run recipe=llama31_8b_fusesft model.path=models/target data.path=fused --nproc 8
  torchrun --nnodes 2 --nproc-per-node 8 ... -m fuserl_megatron.cli train recipe=...
  srun --ntasks 16 fuserl train recipe=...

The same command on the same run.results_dir resumes from its newest checkpoint.
{OVERRIDES}""",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check, print the resolved settings and what follows, stop"
    )
    command.add_argument(
        "--reference-only", action="store_true", help="score what the loss reads of the reference model, stop"
    )
    add_config_options(command, "train", ranks=True)


def run(options: argparse.Namespace) -> int:
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
        if own_rank() == 0:
            lock.enter_context(lock_of(config))
            stopping.remove_marker(directory)
        num_ranks = num_ranks_of(options, config)
        _, differences = check(config, num_ranks)
        if options.reference_only:
            check_reference(config)
        config = with_local_models(config)
        listens = config.exp_manager.create_preemption_callback
        if becomes_rank(config, num_ranks):
            say_once(differences)
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
    facts, differences = check(config, num_ranks)
    if options.reference_only:
        check_reference(config)
    check_weight_files(config)
    filled = with_loss_defaults(config)  # as the run writes it down
    print(to_yaml(filled), *facts, *differences, *laid_out(filled, num_ranks), sep="\n")
    return 0
