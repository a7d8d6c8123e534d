"""`fuserl evaluate`: a model on held-out prompts."""

import argparse
import contextlib

from fuserl_megatron.cli.on_ranks import on_ranks
from fuserl_megatron.cli.options import OVERRIDES, Jobs, add_command, add_config_options
from fuserl_megatron.config.schema import Config
from fuserl_megatron.train.preflight import lock_of
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.own_rank import own_rank


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "evaluate",
        run,
        "loss and preference metrics of a model on held-out prompts",
        f"""examples:
  fuserl evaluate model.path=runs/fusesft/hf data.path=heldout
  fuserl evaluate --before models/target model.path=runs/fusesft/hf data.path=heldout
  fuserl evaluate --nproc 8 recipe=llama31_8b_fusepo_ln_dpo model.path=runs/fusepo/hf data.path=heldout \\
      objective.reference=runs/fusesft/hf run.results_dir=runs/evaluation

Takes the settings of `fuserl train`. Prints the weighted NLL of each source's best response and, with a FusePO
objective, its loss and metrics; writes them to run.results_dir/evaluation.json. With --before, both models' figures.
{OVERRIDES}""",
    )
    command.add_argument("--before", metavar="DIR", help="the model that training started from, to compare with")
    add_config_options(command, "train", ranks=True)


def run(options: argparse.Namespace) -> int:
    """`fuserl evaluate`: as `train`, the figures of model.path on data.path."""
    before = None if options.before is None else local_model(options.before)

    def figures(config: Config) -> int:
        from fuserl_megatron.records.belonging import compare
        from fuserl_megatron.train.evaluate import evaluate

        if before is not None:
            compare(config.data.path, "--before", before, (*config.run.disable_checks, "template_match"))
        with lock_of(config) if own_rank() == 0 else contextlib.nullcontext():
            return evaluate(config, before)

    return on_ranks(options, figures, "evaluate", *([] if before is None else [f"--before={before}"]))
