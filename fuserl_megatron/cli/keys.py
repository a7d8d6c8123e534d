"""`fuserl keys`: every setting with its type, default and meaning."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError

if TYPE_CHECKING:
    from fuserl_megatron.config.describe import Setting

HEAD = """# Settings

Every key that a command takes, as `key=value` on its command line or in a yaml file. This page is written by
`fuserl keys --markdown` from the dataclasses in `fuserl_megatron/config/`; a test compares. An empty default means that
you must give a value. `fuserl keys PATTERN` shows the same in a terminal.
"""


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "keys",
        run,
        "the settings: types, defaults, meanings",
        """examples:
  fuserl keys
  fuserl keys learning_rate
  fuserl keys checkpoint --of train
  fuserl keys --markdown > docs/settings.md

PATTERN is looked for in keys and meanings; the names of other trainers (TRL, ms-swift, NeMo-RL) are answered with ours.
""",
    )
    command.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a key or of its meaning")
    command.add_argument("--of", metavar="COMMAND", help="only of train, build, sample, logprobs, score or launch")
    command.add_argument("--markdown", action="store_true", help="print the page docs/settings.md")


def run(options: argparse.Namespace) -> int:
    """`fuserl keys`."""
    from fuserl_megatron.config.describe import commands, settings
    from fuserl_megatron.config.peer_names import peer_advice
    from fuserl_megatron.util.text import nearest

    if options.of is not None and options.of not in commands():
        raise UserError(f"--of {options.of}: not one of {', '.join(commands())}.{nearest(options.of, commands())}")
    wanted = options.pattern.lower()
    found = [s for s in settings(options.of) if wanted in s.key.lower() or wanted in s.meaning.lower()]
    if options.markdown:
        print(markdown(found), end="")
        return 0
    for setting in found:
        print(_shown(setting))
    everything = [s.key for s in settings(options.of)]
    if options.pattern and not any(wanted in s.key.lower() for s in found):
        advice = peer_advice(options.pattern, everything) or nearest(options.pattern, everything)
        if not found and not advice:
            raise UserError(f"{options.pattern}: no key and no meaning has it; `fuserl keys` lists all.")
        if advice:
            print(f"{options.pattern}:{advice}")
    return 0


def _shown(setting: Setting) -> str:
    default = f" (default {setting.default})" if setting.default else " (required)"
    return f"{setting.command}  {setting.key}: {setting.type}{default}\n      {setting.meaning}"


def markdown(found: list[Setting]) -> str:
    """The page of settings, a table a command and section."""
    lines = [HEAD]
    for command, group in itertools.groupby(found, key=lambda s: s.command):
        lines.append(f"## fuserl {command}\n")
        for section, rows in itertools.groupby(group, key=lambda s: s.key.rpartition(".")[0]):
            if section:
                lines.append(f"### {section}\n")
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            for s in rows:
                cells = (f"`{s.key}`", s.type, s.default, s.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)
