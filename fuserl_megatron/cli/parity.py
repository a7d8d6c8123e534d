"""`fuserl parity`: a layout against one process."""

import argparse

from fuserl_megatron.cli.on_ranks import on_ranks
from fuserl_megatron.cli.options import OVERRIDES, Jobs, add_command, add_config_options
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "parity",
        run,
        "is this layout right? Its loss and gradients against one float64 process",
        f"""examples:
  fuserl parity --nproc 4 trainer=cpu trainer.precision=32 model.path=models/small data.path=fused \\
      model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2
  fuserl parity recipe=llama31_8b_fusesft model.path=models/small data.path=fused trainer.precision=32 --threshold 1e-4
  torchrun --nproc-per-node 8 -m fuserl_megatron.cli parity recipe=...

Takes the settings of `fuserl train`, computes its first global batch twice, and prints the worst relative error of the
loss, the gradient norm and each group of parameters. Trains and writes nothing. Exit code 1 past the threshold.
{OVERRIDES}""",
    )
    command.add_argument(
        "--threshold", type=float, metavar="X", help="largest relative error allowed (default: 1e-5; with bf16: 0.2)"
    )
    command.add_argument("--steps", type=int, default=1, metavar="N", help="global batches to compare (default 1)")
    add_config_options(command, "train", ranks=True)


def run(options: argparse.Namespace) -> int:
    """`fuserl parity`: as `train`, on the ranks of the run that is asked about."""
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1; --steps 1 would work.")
    if options.threshold is not None and not options.threshold > 0:
        raise UserError(f"--threshold {options.threshold}: must be positive; --threshold 1e-5 would work.")

    def compare(config: Config) -> int:
        from fuserl_megatron.proofs.parity import parity

        return parity(config, steps=options.steps, threshold=options.threshold)

    threshold = [] if options.threshold is None else [f"--threshold={options.threshold!r}"]
    return on_ranks(options, compare, "parity", f"--steps={options.steps}", *threshold)
