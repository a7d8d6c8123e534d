"""`fuserl sample`: prompts -> responses of several source models."""

import argparse

from fuserl_megatron.cli.options import Jobs, add_command, add_config_options
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "sample",
        run,
        "prompts -> responses of several source models, each exactly once",
        """examples:
  fuserl sample prompts=[prompts.jsonl] output=samples sources=[my_model.yaml] n=4
  fuserl sample prompts=[prompts.jsonl] output=samples sources=[llama31_70b,qwen25_72b] n=5 --dry-run
  fuserl sample prompts=[prompts.jsonl] output=samples sources=[openai_compatible] \\
      sources.openai_compatible.url=[http://node7:8000/v1] sources.openai_compatible.model=llama
  fuserl sample output=samples --status

A source is a file of conf/source/ or a yaml file of your own: where the model answers (url), or how its server is
started. sources.NAME.KEY=value changes a setting of one source. The same command goes on where it stopped, whatever
stopped it; a larger n or more prompts sample what is missing. docs/sampling.md begins at the beginning.

Settings are hydra overrides, key=value: any key of fuserl_megatron/config/sample_sections.py. A list is written
key=[a,b]; text with spaces, commas or equal signs goes in quotes: 'sources.a.system="Be brief, please."'.
""",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check prompts and servers, print counts, time and price, stop"
    )
    command.add_argument("--status", action="store_true", help="how far the run in output is, from its files, and stop")
    add_config_options(command, "sample")


def run(options: argparse.Namespace) -> int:
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
    from fuserl_megatron.making.sample import sample

    return sample(config, sources)
