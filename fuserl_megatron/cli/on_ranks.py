"""Commands that run on ranks: check everything once, then be a rank, or start the ranks."""

import argparse
from collections.abc import Callable

from fuserl_megatron.config.schema import Config
from fuserl_megatron.launch.here import becomes_rank, num_ranks_of, start_ranks
from fuserl_megatron.train.preflight import check, with_local_models
from fuserl_megatron.util.own_rank import own_rank


def on_ranks(options: argparse.Namespace, run: Callable[[Config], int], *words: str) -> int:
    """Check everything once, then run as a rank, or start the ranks of the command in `words`."""
    from fuserl_megatron.config.load import load_config

    config = load_config("train", options.overrides, options.config_dir, options.config_name)
    _, differences = check(config, num_ranks := num_ranks_of(options, config))
    config = with_local_models(config)
    if not becomes_rank(config, num_ranks):
        return start_ranks(options, num_ranks, *words)
    say_once(differences)
    return run(config)


def say_once(lines: list[str]) -> None:
    """Print on rank 0."""
    if own_rank() == 0:
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
