"""`fuserl logprobs`: answers -> how likely each source finds them."""

import argparse

from fuserl_megatron.cli.options import Jobs, add_command, add_config_options
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "logprobs",
        run,
        "answers -> how likely each source finds them (for InfiFPO)",
        """examples:
  fuserl logprobs samples=[samples] output=logprobs sources=[llama31_70b,qwen25_72b]
  fuserl logprobs samples=[samples] output=logprobs sources=[mine.yaml] sources.mine.url=[http://node7:8000/v1]
  fuserl score samples=samples logprobs=logprobs output=scored rewards=[armorm]
  fuserl logprobs output=logprobs --status

Every source is asked about every answer, its own and those of the others, with the prompt as `fuserl sample` puts it;
the sources' files are the same. It takes vLLM servers: others do not say how likely a given text is. The same command
goes on where it stopped, and more answers are asked about alone. docs/sampling.md, "Log-probabilities".

Settings are hydra overrides, key=value: any key of class LogprobsConfig in fuserl_megatron/config/sample_sections.py.
""",
    )
    command.add_argument("--dry-run", action="store_true", help="read the answers, say how many are missing, stop")
    command.add_argument("--status", action="store_true", help="how far the run in output is, from its files, and stop")
    add_config_options(command, "logprobs")


def run(options: argparse.Namespace) -> int:
    """`fuserl logprobs`."""
    from fuserl_megatron.config.sample_load import load_logprobs

    config, sources = load_logprobs(options.overrides, options.config_dir, options.config_name)
    if options.status:
        from fuserl_megatron.making.sample_plan import status

        return status(config.output)
    if not sources:
        raise UserError("sources=[]: needs at least one; type sources=[NAME] of conf/source/, or sources=[my.yaml]")
    from fuserl_megatron.making.logprobs import dry_run, logprobs

    if options.dry_run:
        print(*dry_run(config, sources), sep="\n")
        return 0
    return logprobs(config, sources)
