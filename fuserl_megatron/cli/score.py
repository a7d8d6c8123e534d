"""`fuserl score`: answers -> answers with rewards."""

import argparse
import sys

from fuserl_megatron.cli.options import Jobs, add_command, add_config_options


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "score",
        run,
        "answers -> answers with rewards, for `fuserl build`",
        """examples:
  fuserl score samples=runs/x/samples output=runs/x/scored rewards=[armorm]
  fuserl score samples=[answers.jsonl] output=scored rewards=[numeric,length] combine.weights.length=0.01
  fuserl score samples=runs/x/samples output=runs/x/scored rewards=[endpoint] rewards.endpoint.url=http://gpu7:8000
  fuserl score samples=[a.jsonl] output=scored rewards=[mine] rewards.mine.kind=rule \\
      rewards.mine.function=my_rules:score
  fuserl build inputs=[runs/x/scored] output=fused tokenizer=models/target reward_temperature=0.01

A reward is a file of conf/reward/ (armorm, skywork_v2_8b, endpoint, exact, numeric, format, json, keywords, length,
number, math_verify, if_verifiable) or of reward/ in your own --config-dir; rewards.NAME.KEY=VALUE sets a key of one.
The same command again goes on where a run stopped, with one more reward scores that one alone, with other combine.* or
policy.* joins anew. Keys and defaults: fuserl_megatron/config/score_sections.py; docs/scoring.md has the whole story.
""",
    )
    command.add_argument("--dry-run", action="store_true", help="read the answers, say what would be scored, stop")
    command.add_argument("--status", action="store_true", help="how far the run in output is, also while it runs; stop")
    add_config_options(command, "score")


def run(options: argparse.Namespace) -> int:
    """`fuserl score`."""
    from fuserl_megatron.config.score_load import load_score

    config, rewards = load_score(options.overrides, options.config_dir, options.config_name, options.status)
    if options.status or options.dry_run:
        from fuserl_megatron.making.score_status import dry_run, status

        print(*(status(config) if options.status else dry_run(config, rewards)), sep="\n")
        return 0
    from fuserl_megatron.making.score import score
    from fuserl_megatron.making.score_report import print_table

    print_table(score(config, rewards, say=_say), sys.stdout)
    print(f"records: {config.output}/records.jsonl; report: {config.output}/report.html")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
