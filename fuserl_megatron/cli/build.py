"""`fuserl build`: scored responses -> fused data set."""

import argparse

from fuserl_megatron.cli.options import OVERRIDES, Jobs, add_command, add_config_options


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "build",
        run,
        "scored responses -> fused data set",
        f"""examples:
  fuserl build inputs=[scored.jsonl] output=fused tokenizer=models/target reward_temperature=0.01
  fuserl build inputs=[part-*.parquet] output=fused tokenizer=models/target reward_temperature=0.01 on_bad_record=skip
  fuserl build --config-dir my_conf --config-name my_build force=true
{OVERRIDES}""",
    )
    add_config_options(command, "build")


def run(options: argparse.Namespace) -> int:
    """`fuserl build`."""
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.config.validate import validate_build

    # without a temperature build reads the records and says what the rule gives on them
    later = ("reward_temperature",)
    config = load_config("build", options.overrides, options.config_dir, options.config_name, later)
    validate_build(config)
    from fuserl_megatron.records.build import build
    from fuserl_megatron.records.summary import print_summary
    from fuserl_megatron.records.temperature import TemperatureMissing

    try:
        print_summary(build(config))
    except TemperatureMissing as missing:
        for line in missing.table:
            print(line)
        raise
    return 0
