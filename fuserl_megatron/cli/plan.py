"""`fuserl plan`: memory and time of a run on GPUs that are not here."""

import argparse
import json

from fuserl_megatron.cli.options import Jobs, add_command, add_config_options
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "plan",
        run,
        "which layout for so many GPUs: memory, time, what to type",
        """examples:
  fuserl plan --gpus 8 recipe=llama31_8b_fusesft model.path=models/target data.path=fused
  fuserl plan --gpus 64 --card H200 --rows 256 recipe=llama31_8b_fusesft model.path=models/target

Takes the settings of `fuserl train`; of the model only its config.json is read. The rows of a step and the number of
steps are counted from data.path; --rows gives the rows without a data set. Layouts are ordered by time, from a cost
model that meets published H100 rows within 7 % (docs/performance.md). Nobody has compared the memory with a GPU.
""",
    )
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    command.add_argument("--card", default="H100", metavar="NAME", help="A100, H100, H200 or B200 (default H100)")
    command.add_argument("--rows", type=int, metavar="R", help="packed rows of a step, where there is no data set yet")
    command.add_argument("--show", type=int, default=8, metavar="N", help="layouts to show (default 8)")
    command.add_argument("--json", metavar="FILE", help="write all that fit to this file")
    add_config_options(command, "train")


def run(options: argparse.Namespace) -> int:
    """`fuserl plan`."""
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.plan.cards import card_of
    from fuserl_megatron.util.report_page import columns

    for name in ("gpus", "rows", "show"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1.")
    card = card_of(options.card)
    overrides = list(options.overrides)
    if options.rows is not None and not any(word.startswith("data.path=") for word in overrides):
        overrides.append("data.path=none")
    config = load_config("train", overrides, options.config_dir, options.config_name)
    from fuserl_megatron.plan.run import planned

    found = planned(config, options.gpus, card, options.rows)
    print(*found.facts, sep="\n")
    if found.plans:
        print(*columns(found.table(options.show)), sep="\n")
    if found.nearest is not None:
        raise UserError(found.nearest)
    print("the first one:", *found.overrides(), sep="\n  ")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found.as_json(), file, indent=1)
    return 0
