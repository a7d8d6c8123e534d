"""`fuserl show`: what the model sees of a data set or file, and what is scored."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "show",
        run,
        "prompts as the model sees them, with the scored part marked",
        """examples:
  fuserl show fused
  fuserl show fused --prompt 0,17 --html shown.html
  fuserl show scored.jsonl tokenizer=models/target reward_temperature=0.01

PATH is a data set that `fuserl build` wrote, or a file that it would read; then key=value are settings of that command
(tokenizer must be given). Shown are the rendered prompt, each response's scored text, its reward, its weight in FuseSFT
and its part in FusePO's pairs, and the file and line that it comes from.
""",
    )
    command.add_argument("path", metavar="PATH", help="data set, or a file of scored responses")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of `fuserl build`, for a file")
    command.add_argument("-n", "--count", type=int, default=3, metavar="N", help="the first N prompts (default 3)")
    command.add_argument("--prompt", metavar="I,J,...", help="these prompts instead, counted from 0")
    command.add_argument("--tokenizer", metavar="DIR", help="of a data set (default: the one it was made with)")
    command.add_argument("--html", metavar="FILE", help="write a page instead")


def run(options: argparse.Namespace) -> int:
    """`fuserl show`."""
    numbers = _numbers(options)
    with _opened(options.path, options.overrides) as directory:
        from fuserl_megatron.data.dataset import FusedDataset
        from fuserl_megatron.records.show import as_html, as_text, shown_prompts
        from fuserl_megatron.records.tokenize import load_tokenizer

        dataset = FusedDataset(directory, verify=False)
        tokenizer, _ = load_tokenizer(options.tokenizer or dataset.manifest.tokenizer)
        if numbers is None:
            numbers = list(range(min(options.count, dataset.num_groups)))
        prompts = list(shown_prompts(dataset, tokenizer, numbers))
        if options.html:
            Path(options.html).write_text(as_html(prompts, str(options.path)), encoding="utf-8")
            print(f"written: {options.html}")
        else:
            print(*(as_text(prompt, sys.stdout.isatty()) for prompt in prompts), sep="\n\n")
    return 0


def _numbers(options: argparse.Namespace) -> list[int] | None:
    if options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1.")
    if options.prompt is None:
        return None
    try:
        return [int(number) for number in options.prompt.split(",")]
    except ValueError:
        raise UserError(f"--prompt {options.prompt}: must be numbers, such as --prompt 0,17") from None


@contextlib.contextmanager
def _opened(path: str, overrides: list[str]) -> Iterator[str]:
    """The data set itself, or one built of a file for as long as it is looked at."""
    if Path(path, "manifest.json").is_file():
        if overrides:
            raise UserError(f"{overrides[0]}: {path} is built already; settings are for files.")
        yield path
        return
    if not os.path.exists(path):
        raise UserError(f"{path}: does not exist{did_you_mean(path)}")
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.config.validate import validate_build

    with tempfile.TemporaryDirectory(prefix="fuserl-show-") as folder:
        given = [f"inputs=['{path}']", f"output='{folder}/fused'", *overrides]
        if not any(word.startswith("reward_temperature=") for word in overrides):
            given.append("reward_temperature=inf")  # all sources alike, until somebody says what weighs more
        config = load_config("build", given)
        validate_build(config)
        from fuserl_megatron.records.build import build

        build(config)
        yield config.output
